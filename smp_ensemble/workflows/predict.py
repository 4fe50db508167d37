"""`predict`: images to files, by any model of ours; a broken image is listed and the rest goes on."""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from smp_ensemble.data.images import image_size, read_image
from smp_ensemble.ensembling.views import OWN, check_views
from smp_ensemble.exceptions import DataError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.files import find_images
from smp_ensemble.inference.payload import check_kind, predict_raw, render
from smp_ensemble.inference.pipeline import IN_FLIGHT_BYTES, Limits, Pipeline, Steps
from smp_ensemble.inference.tables import write_csv
from smp_ensemble.inference.windows import size_of
from smp_ensemble.inference.writing import FileWriter
from smp_ensemble.metrics.uncertainty import max_entropy
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.workflows.large import check_tiles, is_large, predict_large
from smp_ensemble.workflows.results import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smp_ensemble.inference.files import InputImage
    from smp_ensemble.inference.pipeline import Array
    from smp_ensemble.inference.tables import Row
    from smp_ensemble.workflows.options import PredictOptions

ERRORS_FILE = "errors.csv"
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Prediction:
    """What was written.

    Attributes:
        output: The folder, or the CSV of run lengths.
        count: Images predicted.
        errors: Name and reason of each image that could not be.
        kept: Images whose results an earlier call had written.
        members_used: By an image on average, where images may skip members; else None.
    """

    output: Path
    count: int
    errors: list[tuple[str, str]]
    kept: int = 0
    members_used: float | None = None

    def report(self) -> Report:
        """How many, and where."""
        before = f", {self.kept} kept from before" if self.kept else ""
        lines = [f"{self.count} images predicted{before}: {self.output}"]
        if self.errors:
            name, reason = self.errors[0]
            lines.append(f"{len(self.errors)} could not be, listed in {ERRORS_FILE}; the first: {name}: {reason}")
        if self.members_used is not None:
            lines.append(f"an image used {self.members_used:.2f} members on average")
        values = {
            "output": str(self.output),
            "count": self.count,
            "kept": self.kept,
            "errors": dict(self.errors),
            "members_used": self.members_used,
        }
        return Report(values, (), lines)


def predict(options: PredictOptions) -> Prediction:
    """Predicts every image that `options.input` names.

    Raises:
        DataError: No images, or none of them can be read.
        ConfigError: No such model, kind or views, or several passes of a model without dropout.
        IntegrityError: A file of the model is missing or changed.
        StorageError: The disk is full. What is written so far stays, as it does after an interruption.
    """
    kind = check_kind(options.kind)
    if options.views != OWN:
        check_views(options.views)  # before anything is loaded
    check_tiles(options)
    images = find_images(options.input, Path(options.output))
    ensemble = load_model(options.model)
    device = choose_device(options.accelerator)
    engine = Engine(ensemble, device, options.precision, options.passes, options.views, options.adaptive)
    writer = FileWriter(
        Path(options.output), kind, images, max_entropy(ensemble.mode, len(ensemble.class_names)),
        len(ensemble.class_names) if ensemble.mode == "multilabel" else 0, resume=options.skip_existing,
    )  # fmt: skip
    todo = writer.todo() if options.skip_existing else images
    limits = Limits(options.batch_size, options.io_threads, pixels_in_memory(engine))
    errors = _predict_all(todo, steps_of(engine, writer, kind, options), limits, writer)
    if len(errors) == len(images):
        raise DataError(f"none of the {len(images)} images could be predicted; the first: {errors[0][1]}")
    return Prediction(writer.close(), len(todo) - len(errors), errors, len(images) - len(todo), engine.mean_members)


def steps_of(engine: Engine, writer: FileWriter, kind: str, options: PredictOptions) -> Steps:
    """What is done to an image of ordinary size, and to one that is cut into tiles."""

    def read(image: InputImage) -> Array:
        pixels = read_image(image.path)
        bands = engine.in_channels
        if bands is not None and pixels.shape[-1] != bands:
            raise DataError(f"{image.path} has {pixels.shape[-1]} bands, the model takes {bands}")
        return pixels

    def run(images: Sequence[Array]) -> Sequence[Any]:
        return predict_raw(engine, images, kind)

    def finish(image: InputImage, pixels: Array, raw: Any) -> Row | None:
        return writer.save(image, render(engine.ensemble, pixels, raw, kind))

    def large(image: InputImage, size: tuple[int, int]) -> Callable[[], Row | None] | None:
        return partial(cut, image) if is_large(size, options) else None

    def cut(image: InputImage) -> None:
        predict_large(engine, image.path, writer.target(image), options)

    return Steps(_measure, read, run, finish, large)


def _measure(image: InputImage) -> tuple[int, int]:
    """Height and width; of images that are too large for Pillow too, because those can be cut into tiles."""
    try:
        return image_size(image.path)
    except DataError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning):
            return size_of(image.path)
        raise


def pixels_in_memory(engine: Engine) -> int:
    """Pixels whose bands and probabilities, as float32, fill `IN_FLIGHT_BYTES`."""
    outputs = len(engine.ensemble.class_names) or 1
    return IN_FLIGHT_BYTES // (FLOAT_BYTES * ((engine.in_channels or 3) + outputs))


def _predict_all(
    images: Sequence[InputImage], steps: Steps, limits: Limits, writer: FileWriter
) -> list[tuple[str, str]]:
    """Predicts and writes; name and reason of each image that could not be, also listed in a file, however it ends."""
    errors: list[tuple[str, str]] = []
    listed = writer.folder / ERRORS_FILE
    listed.unlink(missing_ok=True)  # of an earlier attempt
    bar = tqdm(total=len(images), desc="predict", unit="image", leave=False, disable=None)
    try:
        with bar, closing(Pipeline(images, steps, limits).outcomes()) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    errors.append((outcome.image.name, outcome.error))
                    bar.set_postfix(errors=len(errors), refresh=False)
                elif outcome.row is not None:
                    writer.record(outcome.row)
                bar.update()
    except BaseException:
        with suppress(OSError):  # the disk may be full
            _list_errors(listed, errors)
        writer.stop()
        raise
    _list_errors(listed, errors)
    return errors


def _list_errors(path: Path, errors: Sequence[tuple[str, str]]) -> None:
    if errors:
        write_csv(path, ("name", "error"), errors)
