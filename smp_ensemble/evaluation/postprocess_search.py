"""Post-processing chosen on validation data: each setting stays only if it raises the IoU."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from smp_ensemble.ensembling.postprocessing import Crf, PostProcessing
from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.inference.crf import refine
from smp_ensemble.inference.postprocess import clean
from smp_ensemble.metrics.confusion import confusion_counts
from smp_ensemble.registry import nearest
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from smp_ensemble.typing import Mode

    Mask = npt.NDArray[np.uint8]
    Sample = tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[Any]]

LEAST_GAIN = 1e-4
"""A setting stays only if it raises the IoU by more than this."""

CANDIDATES: Mapping[str, Sequence[Any]] = {
    "crf": (
        Crf(position_weight=0.5, bilateral_weight=1.0),
        Crf(),
        Crf(position_weight=3.0, bilateral_weight=5.0),
    ),
    "opening": (1, 2, 3),
    "closing": (1, 2, 3),
    "min_area": (8, 16, 32, 64, 128, 256, 512),
    "max_hole": (8, 16, 32, 64, 128, 256, 512),
}
"""What is tried, setting by setting in the order in which they are applied."""

logger = logging.getLogger(__name__)


class Tuned(NamedTuple):
    """The settings that were chosen, and the IoU without and with them."""

    settings: PostProcessing
    score_before: float
    score_after: float


def tune(
    samples: Callable[[], Iterable[Sample]],
    *,
    mode: Mode,
    num_classes: int,
    decide: Callable[[npt.NDArray[np.float32]], Mask],
    candidates: Mapping[str, Sequence[Any]] | None = None,
    device: str | torch.device = "cpu",
) -> Tuned:
    """Chooses post-processing by the pooled IoU of validation data, one setting after the other.

    For each setting all its candidates are scored with what was chosen so far; the best one stays if it raises the IoU
    by more than `LEAST_GAIN`, the first of equal ones. Nothing is random. Samples are read once: what was decided, with
    each CRF, is kept compressed, so that neither network nor CRF runs again.

    The IoU is the foreground's in binary mode, else the mean over classes that are predicted or true somewhere. Pixels
    of unknown truth (255) do not count, and neither do rejected ones.

    Args:
        samples: Gives a fresh iterator over `(image, probabilities, truth)`: `(H, W, C)`, float32 `(K, H, W)`, and
            class ids `(H, W)` with 255 where unknown, `(K, H, W)` in multilabel mode.
        mode: What is predicted.
        num_classes: Classes in multiclass mode, labels in multilabel mode; nothing to binary mode.
        decide: Makes probabilities `(K, H, W)` a uint8 mask, 255 where it rejects.
        candidates: Values for each setting, in the order of the search; None: `CANDIDATES`. Opening and closing are
            left out in multiclass mode.
        device: Where the CRF computes.

    Returns:
        The settings, `PostProcessing()` where nothing helps; the score without and with them, NaN where no class is
        predicted or true anywhere.

    Raises:
        ConfigError: A candidate for a setting that there is not.
        DataError: There are no samples, or truth and masks do not fit.
    """
    chosen = dict(CANDIDATES if candidates is None else candidates)
    known = [field.name for field in dataclasses.fields(PostProcessing)]
    for name in chosen:
        if name not in known:
            raise ConfigError(f"unknown setting '{name}' among the candidates: {nearest(name, known)}")
    outputs = 1 if mode == "binary" else num_classes
    crfs: list[Crf | None] = [None, *chosen.pop("crf", ())]
    scores, kept = _decisions(samples(), crfs, mode, outputs, decide, device)
    best = _best(scores)
    settings, score, masks = PostProcessing(crf=crfs[best]), scores[best], kept[best]
    for name, values in chosen.items():
        if mode == "multiclass" and name in {"opening", "closing"}:
            continue
        trials = [settings, *(dataclasses.replace(settings, **{name: value}) for value in values)]
        tried = _trials(masks, trials, mode, outputs, name)
        best = _best(tried)
        settings, score = trials[best], tried[best]
    logger.info("post-processing %s: IoU %.4f, without %.4f", settings.to_dict() or "none", score, scores[0])
    return Tuned(settings, scores[0], score)


@dataclass(frozen=True)
class _Kept:
    """A mask and its truth, compressed: masks are large areas of one value."""

    shape: tuple[int, ...]
    mask: bytes
    truth: bytes

    def open(self) -> tuple[Mask, Mask]:
        mask, truth = (np.frombuffer(zlib.decompress(part), dtype=np.uint8) for part in (self.mask, self.truth))
        return mask.reshape(self.shape), truth.reshape(self.shape)


class _Pooled:
    """Counts over images, and the IoU that they give."""

    def __init__(self, mode: Mode, outputs: int) -> None:
        self._mode: Mode = mode
        self._outputs = outputs
        self._hits = self._any = torch.zeros(outputs, dtype=torch.int64)

    def update(self, mask: Mask, truth: Mask) -> None:
        known = np.where(mask == IGNORE_INDEX, np.uint8(IGNORE_INDEX), truth)
        decision, target = (torch.from_numpy(array[None].astype(np.int64)) for array in (mask, known))
        tp, fp, fn, _ = confusion_counts(decision, target, self._mode, self._outputs)
        self._hits, self._any = self._hits + tp, self._any + tp + fp + fn

    def iou(self) -> float:
        return float((self._hits / self._any).nanmean())


def _decisions(
    samples: Iterable[Sample],
    crfs: Sequence[Crf | None],
    mode: Mode,
    outputs: int,
    decide: Callable[[npt.NDArray[np.float32]], Mask],
    device: str | torch.device,
) -> tuple[list[float], list[list[_Kept]]]:
    """The score of each CRF, and all masks and truths with it."""
    pooled = [_Pooled(mode, outputs) for _ in crfs]
    kept: list[list[_Kept]] = [[] for _ in crfs]
    for image, probabilities, truth in _progress(samples, "crf", "image"):
        target = np.asarray(truth, dtype=np.uint8)
        stored = zlib.compress(target.tobytes(), level=1)
        for crf, counts, masks in zip(crfs, pooled, kept, strict=True):
            mask = decide(probabilities if crf is None else refine(image, probabilities, mode, crf, device=device))
            if mask.shape != target.shape:
                raise DataError(f"expected truth of the mask's shape {mask.shape}, came {target.shape}")
            counts.update(mask, target)
            masks.append(_Kept(mask.shape, zlib.compress(mask.tobytes(), level=1), stored))
    if not kept[0]:
        raise DataError("expected at least one image to tune post-processing on, came none")
    return [counts.iou() for counts in pooled], kept


def _trials(
    masks: Sequence[_Kept], trials: Sequence[PostProcessing], mode: Mode, outputs: int, label: str
) -> list[float]:
    """The score of each trial, in one pass over the masks."""
    pooled = [_Pooled(mode, outputs) for _ in trials]
    for entry in _progress(masks, label, "image"):
        mask, truth = entry.open()
        for settings, counts in zip(trials, pooled, strict=True):
            counts.update(clean(mask, mode, settings), truth)
    return [counts.iou() for counts in pooled]


def _best(scores: Sequence[float]) -> int:
    """The first of the best, or 0 unless that is better by more than `LEAST_GAIN`; never one that is NaN."""
    best = max(range(len(scores)), key=lambda index: (scores[index] == scores[index], scores[index]))
    return best if scores[best] > scores[0] + LEAST_GAIN else 0


def _progress(entries: Iterable[Any], label: str, unit: str) -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    bar: Iterator[Any] = iter(tqdm(entries, desc=f"post-processing: {label}", unit=unit, leave=False, disable=None))
    return bar
