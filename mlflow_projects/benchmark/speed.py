"""What the engine costs against the loops that people write: the same trained members, views and images, in turns.

Prints a markdown table, and leaves every number in a JSON file and a figure beside it; all three are in an MLflow run.
Seconds are medians; ratios are medians of the ratios within each repetition, so that a busy machine spoils neither
side. Peers that are not installed (extra `bench`) are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow  # noqa: TID251 (a project of its own: it opens its run as any user does)
import numpy as np
import peers
import torch
from matplotlib.figure import Figure

import smp_ensemble
from smp_ensemble.architectures import create_network
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.exactness import compare
from smp_ensemble.precision import choose_device
from smp_ensemble.testing import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = "eager loop with ttach, fp32"
LIBRARIES = ("torch", "segmentation-models-pytorch", "timm", "ttach", "pytorch-toolbelt", "monai")


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
"""Processor time does not count what others do on the machine; with one thread it is what a free machine would take."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the suite."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.accelerator)
    output = Path(options.output)
    with tempfile.TemporaryDirectory() as name:
        members = smp_ensemble.load_model(options.models) if options.models else train(options)
        ensemble = smp_ensemble.Ensemble(
            list(members.members), mode=members.mode, views=options.views, class_names=members.class_names
        )
        images = read_images(options)
        results: dict[str, Any] = {"settings": vars(options), "machine": describe(device)}
        results["table"] = speed(ensemble, images, device, options)
        results["exactness"] = exactness(ensemble, images, device)
        results["pyfunc"] = serving(ensemble, images, Path(name), options)
    report = markdown(results)
    print(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8", newline="\n")
    draw(results).savefig(output.with_suffix(".png"), dpi=120)
    with mlflow.start_run(run_name="speed"):
        mlflow.log_params({key: value for key, value in vars(options).items() if key != "output"})
        mlflow.log_artifact(str(output))
        mlflow.log_artifact(str(output.with_suffix(".png")))
        mlflow.log_text(report, "speed.md")


def train(options: argparse.Namespace) -> smp_ensemble.Ensemble:
    """Snapshots of one short training: networks that know something, whose masks are worth comparing."""
    splits = smp_ensemble.load_data(options.train_data)
    torch.manual_seed(0)
    settings = json.loads(options.model_options)
    network = create_network(
        options.arch, encoder_name=options.encoder, num_outputs=splits.task.num_outputs, model_options=settings
    )
    store = MemoryStore()
    start = time.perf_counter()
    smp_ensemble.fit(
        network,
        splits.train,
        splits.val,
        trainer=smp_ensemble.trainers.SSE(cycles=options.members),
        epochs=options.members * options.cycle_epochs,
        store=store,
        options=smp_ensemble.FitOptions(crop_size=options.crop_size, precision="auto", accelerator=options.accelerator),
    )
    members = []
    for kept in store.kept:
        one = create_network(
            options.arch, encoder_name=options.encoder, num_outputs=splits.task.num_outputs, model_options=settings
        )
        one.load_state_dict(kept.weights)
        members.append(Member(one.eval(), kept.record.normalization))
    scores = [kept.record.metrics["val_iou"] for kept in store.kept]
    print(f"trained in {time.perf_counter() - start:.0f} s, val IoU {', '.join(f'{score:.3f}' for score in scores)}")
    return smp_ensemble.Ensemble(members, mode=splits.task.mode, class_names=splits.task.class_names)


def read_images(options: argparse.Namespace) -> np.ndarray:
    """Images that are not in the training data, uint8 `(N, H, W, C)`: smaller ones lie side by side in one."""
    name = options.image_data or f"synthetic:count={2 * options.images + 4},size={options.size},seed=77"
    splits = smp_ensemble.load_data(name)
    data = (splits.test or splits.val) if options.image_data else splits.train
    height, width = data.read(0)[0].shape[:2]
    down, across = -(-options.size // height), -(-options.size // width)
    tiles = [data.read(index % len(data))[0] for index in range(options.images * down * across)]
    rows = [np.concatenate(tiles[at : at + across], axis=1) for at in range(0, len(tiles), across)]
    whole = [np.concatenate(rows[at : at + down], axis=0) for at in range(0, len(rows), down)]
    return np.stack([image[: options.size, : options.size] for image in whole])


def contestants(
    ensemble: smp_ensemble.Ensemble, device: torch.device, options: argparse.Namespace
) -> dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    """What is timed: number format, and raw images `(N, C, H, W)` on the CPU to probabilities on the CPU."""
    found: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {}
    for label, make in peers.CONTESTANTS.items():
        try:
            found[label] = make(ensemble, device)
        except ModuleNotFoundError as error:
            print(f"left out: {label}: {error.name} is not installed")
    for precision in ("32", "auto"):
        engine = smp_ensemble.Engine(ensemble, device, precision)
        found[f"Engine, precision={precision}"] = (engine.precision, lambda images, run=engine: run(images).cpu())
        if options.compile:
            kernels = smp_ensemble.Engine(ensemble, device, precision, compile=True)
            found[f"Engine, precision={precision}, compile"] = (
                kernels.precision,
                lambda images, run=kernels: run(images).cpu(),
            )
    return found


def interleave(
    runs: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each run in each repetition, after one warm-up, and what the warm-up gave."""
    results = {label: run() for label, run in runs.items()}
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = clock()
            run()
            seconds[label].append(clock() - start)
    return seconds, results


def ratios(mine: list[float], base: list[float]) -> dict[str, float]:
    """Of each repetition: their median and range."""
    found = [one / other for one, other in zip(mine, base, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}


def speed(
    ensemble: smp_ensemble.Ensemble, images: np.ndarray, device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each contestant, against the first that is there."""
    batch = torch.from_numpy(images[: options.timed]).permute(0, 3, 1, 2).contiguous()
    competing = contestants(ensemble, device, options)
    runs = {label: (lambda run=run: run(batch)) for label, (_, run) in competing.items()}
    seconds, results = interleave(runs, options.repeats, CLOCKS[options.clock])
    base = BASE if BASE in seconds else next(iter(seconds))
    rows = []
    for label, taken in seconds.items():
        agree = (ensemble.decide(results[label]) == ensemble.decide(results[base])).double().mean()
        row = {
            "what": label,
            "precision": competing[label][0],
            "seconds_per_image": statistics.median(taken) / len(batch),
            "seconds": taken,
            "base": base,
            "ratio": ratios(taken, seconds[base]),
            "agreement": float(agree),
            "max_difference": float((results[label] - results[base]).abs().max()),
        }
        rows.append(row)
        print(f"{label}: {row['ratio']['median']:.3f} x {base}", flush=True)
    return rows


def exactness(ensemble: smp_ensemble.Ensemble, images: np.ndarray, device: torch.device) -> list[dict[str, Any]]:
    """The engine against its own members, run plainly in float32, on all images."""
    batch, rows = torch.from_numpy(images).permute(0, 3, 1, 2), []
    for precision in ("32", "auto"):
        engine = smp_ensemble.Engine(ensemble, device, precision)
        found = compare(engine, batch)
        rows.append(
            {
                "precision": engine.precision,
                "max_difference": found.max_difference,
                "changed": found.changed,
                "pixels": found.total,
                "agreement": found.agreement,
            }
        )
    return rows


def serving(
    ensemble: smp_ensemble.Ensemble, images: np.ndarray, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """`mlflow.pyfunc` from a batch of arrays to masks, against the bare engine on the same batch."""
    single = smp_ensemble.Ensemble(
        list(ensemble.members)[: options.served], mode=ensemble.mode, class_names=ensemble.class_names
    )
    smp_ensemble.save_model(single, folder / "served")
    served = mlflow.pyfunc.load_model(str(folder / "served"))
    engine = smp_ensemble.Engine(single)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    runs = {"pyfunc": lambda: served.predict(images), "engine": lambda: engine(batch).cpu()}
    seconds, _ = interleave(runs, max(3, options.repeats))
    ratio = ratios(seconds["pyfunc"], seconds["engine"])
    return {"images": len(images), "members": len(single.members), "views": "none", "seconds": seconds, "ratio": ratio}


def describe(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def markdown(results: dict[str, Any]) -> str:
    """The tables, with the machine that they are from."""
    machine = results["machine"]
    held = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['device']}, {machine['cpu']}, {machine['threads']} threads; {held}; "
        f"{results['settings']['clock']} time",
        "",
        "| what | number format | s/image | ratio (range) | same mask pixels | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {row['precision']} | {row['seconds_per_image']:.3f} | {_ratio(row['ratio'])} | "
        f"{100 * row['agreement']:.4f} % | {row['max_difference']:.1e} |"
        for row in results["table"]
    ]
    lines += ["", "| the engine against its members, plainly in fp32 | same mask pixels | largest difference |"]
    lines += ["|---|---|---|"]
    lines += [
        f"| {row['precision']} | {100 * row['agreement']:.5f} % of {row['pixels']} | {row['max_difference']:.1e} |"
        for row in results["exactness"]
    ]
    served = results["pyfunc"]
    lines += ["", f"pyfunc against the bare engine, {served['images']} images: {_ratio(served['ratio'])}"]
    return "\n".join(lines) + "\n"


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['least']:.3f}..{ratio['greatest']:.3f})"


def draw(results: dict[str, Any]) -> Figure:
    """The ratios as bars, the range of repetitions as lines."""
    rows = results["table"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    middle = [row["ratio"]["median"] for row in rows]
    below = [row["ratio"]["median"] - row["ratio"]["least"] for row in rows]
    above = [row["ratio"]["greatest"] - row["ratio"]["median"] for row in rows]
    colours = ["#2a6f97" if row["what"].startswith("Engine") else "#a0a0a0" for row in rows]
    axes.barh([f"{row['what']} ({row['precision']})" for row in rows], middle, xerr=[below, above], color=colours)
    axes.set_xlabel(f"time relative to: {rows[0]['base']}")
    axes.set_title(f"{results['settings']['members']} members, views {results['settings']['views']}, "
                   f"{results['settings']['size']} px, {results['machine']['device']}")  # fmt: skip
    return figure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the suite; `--short` takes smaller numbers where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="2 members, 2 images of 256 pixels, 2 repetitions")
    parser.add_argument("--models", default="", help="URI or folder of a logged ensemble in place of a training")
    parser.add_argument("--arch", default="unet")
    parser.add_argument("--encoder", default="resnet34")
    parser.add_argument("--model-options", default="{}", help="JSON")
    parser.add_argument("--train-data", default=None)
    parser.add_argument("--image-data", default="", help="whose test images are predicted; empty: synthetic ones")
    parser.add_argument("--crop-size", type=int, default=128)
    parser.add_argument("--cycle-epochs", type=int, default=None, help="epochs for each member")
    parser.add_argument("--members", type=int, default=None)
    parser.add_argument("--views", default="d4")
    parser.add_argument("--size", type=int, default=None, help="height and width of the images")
    parser.add_argument("--images", type=int, default=None, help="that exactness and pyfunc are measured on")
    parser.add_argument("--timed", type=int, default=1, help="images in a timed batch")
    parser.add_argument("--served", type=int, default=2, help="members of the served model")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: processor time, on shared machines"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", default="speed.json")
    options = parser.parse_args(arguments)
    full = {"members": 5, "size": 512, "images": 8, "repeats": 5, "cycle_epochs": 2}
    full["train_data"] = "synthetic:count=120,size=128,seed=1"
    short = {**full, "members": 2, "size": 256, "images": 2, "repeats": 2}
    for name, value in (short if options.short else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
