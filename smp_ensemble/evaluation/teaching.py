"""What a teacher predicts for each training image, whole and once, kept on disk in two bytes a probability."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from smp_ensemble.evaluation.codes import decode, encode
from smp_ensemble.evaluation.predictions import FREE_SHARE, Predictions
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import to_tensor

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.typing import Mode


@dataclass(frozen=True)
class TeacherPredictions:
    """A teacher's probabilities of each image of a data set, on disk: readable in any process.

    Attributes:
        folder: Where they are.
        mode: Of the teacher.
    """

    folder: Path
    mode: Mode

    def __call__(self, index: int) -> npt.NDArray[np.float32]:
        """Probabilities of the image at `index`, shape `(H, W, K)`."""
        codes: npt.NDArray[np.uint16] = np.load(self.path(index), allow_pickle=False)
        return np.ascontiguousarray(decode(codes, self.mode).transpose(1, 2, 0))

    def path(self, index: int) -> Path:
        """The file of an image: codes, uint16 `(K, H, W)`."""
        return self.folder / f"{index:06d}.npy"


def teach(engine: Engine, data: SegmentationDataset, folder: Path, *, batch_size: int = 8) -> TeacherPredictions:
    """Predicts each image of a data set once, in the engine's views, calibrated as it is served.

    Args:
        engine: Runs the teacher.
        data: Its masks are not looked at.
        folder: An empty folder with room for two bytes for each pixel and output.
        batch_size: Images at once.

    Raises:
        ConfigError: There is too little room.
    """
    needed = 2 * sum(scan.pixels for scan in data.scans) * data.task.num_outputs
    free = shutil.disk_usage(folder).free
    if needed > FREE_SHARE * free:
        raise ConfigError(
            f"the teacher's predictions take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {folder}: make "
            "room there, or let TMPDIR name a larger disk"
        )
    found = TeacherPredictions(folder, data.task.mode)
    for batch in Predictions(engine, data, batch_size=batch_size, label="teacher"):
        probabilities = engine(torch.stack([to_tensor(image) for image in batch.images])).cpu().numpy()
        for index, one in zip(batch.indices, probabilities, strict=True):
            np.save(found.path(index), encode(one))
    return found
