"""Large images: time and peak memory of `predict_raster` and of MONAI's sliding window, each in a process of its own.

Three members (a Unet on resnet18 with seeded, untrained weights) predict a binary mask of a seeded picture. MONAI's
`SlidingWindowInferer` runs each member in turn, with the same tiles, overlap and Gaussian weights; their mean is taken.
Cases are interleaved; seconds are from the file to the written mask, after each process has predicted one tile.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Nothing heavy here: a process counts the memory of the one that started it as its own peak.

MEMBERS = 3


def main(arguments: list[str] | None = None) -> None:
    """Runs all cases; results in `--output` from an earlier call stay, and further repetitions are added."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    output = Path(options.output)
    results: dict[str, list[dict[str, Any]]] = {}
    if output.exists():
        results = json.loads(output.read_text(encoding="utf-8"))["cases"]
    with tempfile.TemporaryDirectory() as name:
        for _ in range(options.repeats):
            for case in options.cases.split(","):
                results.setdefault(case, []).append(run(case, Path(name), options))
                print(case, results[case][-1], flush=True)
                write(output, results, options)
    print("\n".join(table(results)))
    if options.track:
        import mlflow  # noqa: TID251 (a project of its own: it opens its run as any user does)

        with mlflow.start_run(run_name="large_images"):
            mlflow.log_params({"tile": options.tile, "overlap": options.overlap, "threads": options.threads})
            mlflow.log_dict({"cases": results}, "large_images.json")
            mlflow.log_text("\n".join(table(results)), "large_images.txt")


def run(case: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One case, such as `ours:auto:4096` or `monai:32:2048`, in a fresh process."""
    command = [sys.executable, __file__, "--worker", case, "--folder", str(folder), "--tile", str(options.tile)]
    command += ["--overlap", str(options.overlap), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (this very file)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def work(options: argparse.Namespace) -> None:
    """The process of one case: prints seconds and memory."""
    import numpy as np
    import torch
    from PIL import Image

    from smp_ensemble import Engine, Ensemble
    from smp_ensemble.architectures import create_network
    from smp_ensemble.data.normalization import imagenet
    from smp_ensemble.ensembling.member import Member
    from smp_ensemble.inference.raster import predict_raster

    who, precision, size = options.worker.split(":")
    torch.set_num_threads(options.threads)
    source, output = options.folder / f"{size}.png", options.folder / f"{who}-{precision}-{size}.png"
    make_picture(source, int(size))
    members = []
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        members.append(Member(create_network("unet", encoder_name="resnet18", num_outputs=1), imagenet()).eval())
    tile = torch.zeros(1, 3, options.tile, options.tile)
    if who == "ours":
        engine = Engine(Ensemble(members, mode="binary"), "cpu", precision)
        engine(tile)

        def predict() -> None:
            predict_raster(engine, source, output, tile=options.tile, overlap=options.overlap, resume=False)

    elif who == "toolbelt":

        def predict() -> None:
            Image.fromarray(toolbelt(np.asarray(Image.open(source)), members, options)).save(output)

    elif who == "monai":
        from monai.inferers import SlidingWindowInferer

        inferer = SlidingWindowInferer(
            (options.tile, options.tile), sw_batch_size=4, overlap=options.overlap, mode="gaussian"
        )

        def predict() -> None:
            with torch.inference_mode():
                image = torch.from_numpy(np.asarray(Image.open(source)).transpose(2, 0, 1).copy())[None].float()
                mean = torch.stack([inferer(image, lambda x, m=member: m(x).sigmoid()) for member in members]).mean(0)
                Image.fromarray((mean[0, 0] >= 0.5).to(torch.uint8).numpy()).save(output)

    else:
        raise SystemExit(f"unknown case '{options.worker}': expected ours, monai or toolbelt, as WHO:PRECISION:SIDE")
    if who != "ours":
        with torch.inference_mode():
            members[0](tile)
    before = peak_bytes()
    started = time.perf_counter()
    predict()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak_bytes(), "before": before}))


def toolbelt(image: Any, members: list[Any], options: argparse.Namespace) -> Any:
    """The mask of an image `(H, W, 3)` by pytorch-toolbelt's tiles with pyramid weights, one tile at a time."""
    import numpy as np
    import torch
    from pytorch_toolbelt.inference.tiles import ImageSlicer, TileMerger

    slicer = ImageSlicer(image.shape, options.tile, int(options.tile * (1 - options.overlap)), weight="pyramid")
    merger = TileMerger(slicer.target_shape, 1, slicer.weight, device="cpu")
    with torch.inference_mode():
        for piece, where in zip(slicer.split(image), slicer.crops, strict=True):
            raw = torch.from_numpy(piece.transpose(2, 0, 1).copy())[None].float()
            merger.integrate_batch(sum(member(raw).sigmoid() for member in members) / MEMBERS, [where])
        merged = slicer.crop_to_orignal_size(merger.merge().numpy().transpose(1, 2, 0))
    return (merged[..., 0] >= 0.5).astype(np.uint8)


def make_picture(path: Path, size: int) -> None:
    """Seeded colours that vary over many pixels; written in strips, so that it leaves no mark on the peak."""
    if path.exists():
        return
    import numpy as np

    from smp_ensemble.inference.png_stream import write_png

    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (3, size // 16, size // 16), dtype=np.uint8)
    strips = (np.kron(coarse[:, top : top + 4], np.ones((1, 16, 16), np.uint8)) for top in range(0, size // 16, 4))
    partial = path.with_suffix(".partial")
    write_png(partial, strips, (3, size, size))
    partial.replace(path)


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(path: Path, results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Keeps what was measured so far."""
    about = {
        "machine": platform.machine(),
        "tile": options.tile,
        "overlap": options.overlap,
        "threads": options.threads,
    }
    path.write_text(json.dumps({"about": about, "cases": results}, indent=2), encoding="utf-8", newline="\n")


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians, and ratios to MONAI's at the same size."""
    seconds = {case: statistics.median(one["seconds"] for one in runs) for case, runs in results.items()}
    peaks = {case: statistics.median(one["peak"] for one in runs) for case, runs in results.items()}
    lines = ["case               runs   seconds   MiB peak   time / MONAI's   peak / MONAI's"]
    for case, runs in results.items():
        other = f"monai:32:{case.rsplit(':', 1)[1]}"
        to_monai = [f"{values[case] / values[other]:.2f}" if other in values else "-" for values in (seconds, peaks)]
        numbers = f"{len(runs):>4} {seconds[case]:>9.1f} {peaks[case] / 2**20:>10.0f}"
        lines.append(f"{case:<18} {numbers} {to_monai[0]:>16} {to_monai[1]:>16}")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the entry point `large_images`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [f"{who}:{size}" for size in (2048, 4096) for who in ("ours:auto", "monai:32", "ours:32", "toolbelt:32")]
    parser.add_argument(
        "--cases", default=",".join(cases), help="ours, monai or toolbelt, number format and side, as WHO:P:SIZE"
    )
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--track", type=lambda text: text == "true", default=True, help="keep the table as an MLflow run"
    )
    parser.add_argument("--output", default="large_images.json")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
