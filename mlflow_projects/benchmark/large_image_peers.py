"""One large image, in a process for each way, so that each has a peak of its own: ours, MONAI, pytorch-toolbelt."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peers
import torch
from PIL import Image

import smp_ensemble

if TYPE_CHECKING:
    from collections.abc import Callable

TILE, OVERLAP = 512, 0.5


def run(folder: Path, side: int, device: str) -> list[dict[str, Any]]:
    """Each way on the same image; one that is not there is a row that says so."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (side // 64, side // 64, 3), dtype=np.uint8)
    source = folder / "large.png"
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(source)
    rows = []
    for who in WAYS:
        command = [sys.executable, __file__, "--who", who, "--model", str(folder), "--image", str(source)]
        done = subprocess.run([*command, "--device", device], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"left out: {who}: {reason}")
            rows.append({"what": who, "side": side, "shown": "not measured | not measured", "reason": reason})
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        shown = f"{found['seconds']:.1f} | {found['peak_mb']:.0f}"
        rows.append({"what": who, "side": side, "shown": shown, **found})
    return rows


def ours(ensemble: smp_ensemble.Ensemble, source: Path, device: torch.device) -> None:
    """Windowed reading and writing."""
    from smp_ensemble.inference.raster import predict_raster

    engine = smp_ensemble.Engine(ensemble, device)
    predict_raster(engine, source, source.with_suffix(".ours.png"), kind="mask", tile=TILE, overlap=OVERLAP)


@torch.inference_mode()
def monai(ensemble: smp_ensemble.Ensemble, source: Path, device: torch.device) -> None:
    """`SlidingWindowInferer` with Gaussian weights for each member, then `MeanEnsemble`."""
    from monai.inferers import SlidingWindowInferer
    from monai.transforms import MeanEnsemble

    inferer = SlidingWindowInferer(TILE, 1, OVERLAP, mode="gaussian")
    raw = _read(source)[None].to(device)
    found = [inferer(raw, model)[0].cpu() for model in peers.wrapped(ensemble, device)]
    _write(ensemble, MeanEnsemble()(found), source.with_suffix(".monai.png"))


@torch.inference_mode()
def toolbelt(ensemble: smp_ensemble.Ensemble, source: Path, device: torch.device) -> None:
    """`ImageSlicer` and `TileMerger` with pyramid weights."""
    from pytorch_toolbelt.inference.tiles import ImageSlicer, TileMerger

    image = np.asarray(Image.open(source))
    slicer = ImageSlicer(image.shape, TILE, int(TILE * (1 - OVERLAP)), weight="pyramid")
    outputs = 1 if ensemble.mode == "binary" else len(ensemble.class_names)
    merger = TileMerger(slicer.target_shape, outputs, slicer.weight, device=str(device))
    models = peers.wrapped(ensemble, device)
    for tile, where in zip(slicer.split(image), slicer.crops, strict=True):
        raw = torch.from_numpy(tile.transpose(2, 0, 1).copy())[None].to(device).float()
        merger.integrate_batch(torch.stack([model(raw) for model in models]).mean(dim=0), [where])
    merged = merger.merge().cpu().numpy().transpose(1, 2, 0)
    probabilities = torch.from_numpy(slicer.crop_to_orignal_size(merged).transpose(2, 0, 1).copy())
    _write(ensemble, probabilities, source.with_suffix(".toolbelt.png"))


WAYS: dict[str, Callable[[smp_ensemble.Ensemble, Path, torch.device], None]] = {
    "ours": ours,
    "monai": monai,
    "toolbelt": toolbelt,
}


def _read(source: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(source)).transpose(2, 0, 1).copy()).float()


def _write(ensemble: smp_ensemble.Ensemble, probabilities: torch.Tensor, path: Path) -> None:
    Image.fromarray(ensemble.decide(torch.as_tensor(probabilities)[None])[0].numpy()).save(path)


def main() -> None:
    """One way, on one image; views are none, so that all do the same work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--who", choices=list(WAYS), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    loaded = smp_ensemble.load_model(str(options.model))
    ensemble = smp_ensemble.Ensemble(
        list(loaded.members)[:3], mode=loaded.mode, class_names=loaded.class_names, views="none"
    )
    start = time.perf_counter()
    WAYS[options.who](ensemble, options.image, torch.device(options.device))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main()
