"""`predict`: images to files, by any model of ours; a broken image is listed and the rest goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from smp_ensemble.data.images import read_image
from smp_ensemble.ensembling.views import OWN, check_views
from smp_ensemble.exceptions import DataError, InputError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.files import FileWriter, InputImage, find_images, write_csv
from smp_ensemble.inference.payload import check_kind, predict_as
from smp_ensemble.metrics.uncertainty import max_entropy
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.workflows.results import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from smp_ensemble.workflows.options import PredictOptions

ERRORS_FILE = "errors.csv"


@dataclass(frozen=True)
class Prediction:
    """What was written.

    Attributes:
        output: The folder, or the CSV of run lengths.
        count: Images predicted.
        errors: Name and reason of each image that could not be.
        members_used: By an image on average, where images may skip members; else None.
    """

    output: Path
    count: int
    errors: list[tuple[str, str]]
    members_used: float | None = None

    def report(self) -> Report:
        """How many, and where."""
        lines = [f"{self.count} images predicted: {self.output}"]
        if self.errors:
            name, reason = self.errors[0]
            lines.append(f"{len(self.errors)} could not be, listed in {ERRORS_FILE}; the first: {name}: {reason}")
        if self.members_used is not None:
            lines.append(f"an image used {self.members_used:.2f} members on average")
        values = {
            "output": str(self.output),
            "count": self.count,
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
    """
    kind = check_kind(options.kind)
    if options.views != OWN:
        check_views(options.views)  # before anything is loaded
    images = find_images(options.input)
    ensemble = load_model(options.model)
    device = choose_device(options.accelerator)
    engine = Engine(ensemble, device, options.precision, options.passes, options.views, options.adaptive)
    writer = FileWriter(Path(options.output), kind, images, max_entropy(ensemble.mode, len(ensemble.class_names)))
    errors: list[tuple[str, str]] = []
    batches = [images[at : at + options.batch_size] for at in range(0, len(images), options.batch_size)]
    for batch in tqdm(batches, desc="predict", unit="batch", leave=False, disable=None):
        readable, arrays = _read(batch, engine, errors)
        for image, result in zip(readable, predict_as(engine, arrays, kind), strict=True):
            writer.write(image, result)
    listed = writer.folder / ERRORS_FILE
    listed.unlink(missing_ok=True)  # of an earlier attempt
    if errors:
        write_csv(listed, ("name", "error"), errors)
    if len(errors) == len(images):
        raise DataError(f"none of the {len(images)} images could be predicted; the first: {errors[0][1]}")
    return Prediction(writer.close(), len(images) - len(errors), errors, engine.mean_members)


def _read(
    batch: Sequence[InputImage], engine: Engine, errors: list[tuple[str, str]]
) -> tuple[list[InputImage], list[npt.NDArray[np.generic]]]:
    """The images of a batch that can be read and have the model's bands; the others go to `errors`."""
    readable, arrays = [], []
    bands = engine.in_channels
    for image in batch:
        try:
            array = read_image(image.path)
            if bands is not None and array.shape[-1] != bands:
                raise DataError(f"{image.path} has {array.shape[-1]} bands, the model takes {bands}")
        except InputError as error:
            errors.append((image.name, str(error)))
            continue
        readable.append(image)
        arrays.append(array)
    return readable, arrays
