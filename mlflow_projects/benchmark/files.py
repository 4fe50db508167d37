"""`predict` on a folder of images of three sizes against a plain loop: the ratio of their times, and the same files.

The loop reads a batch of consecutive images, predicts those of one size together, and writes, one after the other.
Both run the same engine on the same images in turns, in one process, and every file they leave is compared.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow  # noqa: TID251 (a project of its own: it opens its run as any user does)
import numpy as np
import torch
from PIL import Image

from smp_ensemble import Engine, Ensemble, load_data, load_model
from smp_ensemble.architectures import create_network
from smp_ensemble.data.images import read_image
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.postprocessing import Crf, PostProcessing
from smp_ensemble.inference.files import find_images
from smp_ensemble.inference.payload import predict_as
from smp_ensemble.inference.pipeline import Limits, Pipeline
from smp_ensemble.inference.writing import FileWriter
from smp_ensemble.precision import choose_device
from smp_ensemble.workflows.options import PredictOptions
from smp_ensemble.workflows.predict import pixels_in_memory, steps_of
from smp_ensemble.workflows.results import format_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from smp_ensemble.inference.files import InputImage

SHARES = ((1.0, 1.0), (0.75, 1.0), (0.5, 0.5))
"""Height and width of the images, as shares of those of the data."""


def main(arguments: list[str] | None = None) -> None:
    """Predicts everything with both, and prints a row for each kind."""
    options = parse(arguments)
    engine = Engine(model_of(options), choose_device(options.accelerator), options.precision)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", options)
        for kind in options.kinds.split(","):
            rows.append(compare(engine, images, kind, Path(folder) / kind, options))
            print("\n".join(format_table(rows[-1:])), flush=True)
    table = "\n".join(format_table(rows))
    print(table)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {engine.device}, {engine.precision}")
    with mlflow.start_run(run_name="files"):
        mlflow.log_params(vars(options))
        mlflow.log_text(table, "files.txt")
        mlflow.log_dict({"rows": rows}, "files.json")


def model_of(options: argparse.Namespace) -> Ensemble:
    """The given model; or one of random weights, which takes as long."""
    if options.model:
        ensemble = load_model(options.model)
    else:
        torch.manual_seed(options.seed)
        network = create_network("unet", encoder_name=options.encoder_name, num_outputs=1)
        ensemble = Ensemble([Member(network, imagenet())], mode="binary", class_names=("background", "object"))
    if options.crf:
        ensemble.postprocess = PostProcessing(crf=Crf(), min_area=64)
    return ensemble


def write_images(folder: Path, options: argparse.Namespace) -> list[InputImage]:
    """Crops of the data's training images, each of one of three sizes by chance: JPEG and PNG in turn."""
    folder.mkdir()
    source = load_data(options.data).train
    generator = np.random.default_rng(options.seed)
    for index in range(options.count):
        image = source.read(index % len(source))[0]
        share = SHARES[generator.integers(len(SHARES))]
        height, width = (int(side * one) for side, one in zip(image.shape, share, strict=False))
        path = folder / f"{index:06d}.{('jpg', 'png')[index % 2]}"
        Image.fromarray(image[:height, :width].squeeze()).save(path)
    return find_images(str(folder))


def compare(
    engine: Engine, images: list[InputImage], kind: str, folder: Path, options: argparse.Namespace
) -> dict[str, object]:
    """Seconds of both, and the medians of the ratios of their repeats."""
    ways: dict[str, Callable[..., None]] = {"loop": plain_loop, "predict": pipeline}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for repeat in range(options.repeats):
        for name in sorted(ways, reverse=bool(repeat % 2)):
            start = time.perf_counter(), time.process_time()
            ways[name](engine, images, kind, folder / name, options)
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    pairs = list(zip(taken["loop"], taken["predict"], strict=True))
    return {
        "kind": kind,
        "images": len(images),
        "loop s": statistics.median(before for before, _ in taken["loop"]),
        "predict s": statistics.median(after for after, _ in taken["predict"]),
        "images/s": len(images) / min(after for after, _ in taken["predict"]),
        "ratio": statistics.median(after / before for (before, _), (after, _) in pairs),
        "ratio of processor time": statistics.median(after / before for (_, before), (_, after) in pairs),
        "files that differ": differing(folder / "loop", folder / "predict"),
    }


def plain_loop(engine: Engine, images: list[InputImage], kind: str, output: Path, options: argparse.Namespace) -> None:
    """One thing after the other."""
    writer = FileWriter(output, kind, images)
    for at in range(0, len(images), options.batch_size):
        batch = images[at : at + options.batch_size]
        arrays = [slowly(read_image, options)(image.path) for image in batch]
        for image, result in zip(batch, predict_as(engine, arrays, kind), strict=True):
            slowly(writer.write, options)(image, result)
    writer.close()


def pipeline(engine: Engine, images: list[InputImage], kind: str, output: Path, options: argparse.Namespace) -> None:
    """What `smp-ensemble predict` does once the model is loaded."""
    writer = FileWriter(output, kind, images)
    limits = Limits(options.batch_size, options.io_threads, pixels_in_memory(engine))
    steps = steps_of(engine, writer, kind, PredictOptions(kind=kind))
    steps = replace(steps, read=slowly(steps.read, options), finish=slowly(steps.finish, options))
    with closing(Pipeline(images, steps, limits).outcomes()) as outcomes:
        for outcome in outcomes:
            if outcome.row is not None:
                writer.record(outcome.row)
    writer.close()


def slowly(work: Callable[..., Any], options: argparse.Namespace) -> Callable[..., Any]:
    """The same, on storage that takes so much longer for each file."""

    def slow(*arguments: Any) -> Any:
        time.sleep(options.latency / 1000)
        return work(*arguments)

    return slow if options.latency else work


def differing(first: Path, second: Path) -> int:
    """Files that are not in both folders with the same bytes."""
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    ]
    return sum(contents[0].get(name) != contents[1].get(name) for name in contents[0].keys() | contents[1].keys())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the entry point `files`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic:count=60,size=256", help="as for smp-ensemble")
    parser.add_argument("--model", default="", help="any model of ours; empty: one member of random weights")
    parser.add_argument("--encoder-name", default="resnet18", help="of that member")
    parser.add_argument("--crf", action="store_true", help="with a CRF and small components removed")
    parser.add_argument("--count", type=int, default=1200, help="images")
    parser.add_argument("--kinds", default="mask,rle", help="kinds of results, separated by commas")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--io-threads", type=int, default=4)
    parser.add_argument("--latency", type=float, default=0.0, help="ms that each file takes longer, as on a network")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="32")
    parser.add_argument("--accelerator", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
