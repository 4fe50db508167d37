"""Candidates with what they predict on validation data: what a selector that looks at predictions may ask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.ensembling.tally import MOST_ADDITIONS, best_cuts, count_sums, decide, score_counts
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from smp_ensemble.ensembling.tally import Block
    from smp_ensemble.typing import Snapshot, Task

METRICS = ("val_iou", "val_dice", "val_nll")
"""What a pool can score."""


def check_metric(metric: str) -> None:
    """Refuses a metric that no pool can score.

    Raises:
        ConfigError: Lists those that can be.
    """
    if metric not in METRICS:
        raise ConfigError(
            f"members are not selected by {metric}: {nearest(metric, METRICS)}; or use selector=top-k, which takes any"
        )


@dataclass(frozen=True)
class Chained:
    """Blocks of several parts, one part after the other; may be gone through again and again.

    Attributes:
        parts: Of each, its blocks.
    """

    parts: Sequence[Iterable[Block]]

    def __iter__(self) -> Iterator[Block]:
        return chain.from_iterable(self.parts)


@dataclass(frozen=True)
class CandidatePool:
    """Candidates, best first, and scores of their means on validation data.

    Scores are pooled over all valid pixels of the data: IoU and Dice of the foreground at its best threshold of 255
    in binary mode, else means over classes, at 0.5 or of the likeliest class. Probabilities are one byte each, so a
    mean's score may differ from the exact one where a pixel is within 1/256 of the threshold.

    Attributes:
        candidates: Tracked snapshots.
        task: What they predict.
        metric: One of `METRICS`.
        blocks: The pixels; may be gone through again and again, and read from disk each time.
        parts: The same pixels in parts, no group of images in two of them; empty: they were not divided.

    Raises:
        ConfigError: Another metric.
    """

    candidates: Sequence[Snapshot]
    task: Task
    metric: str
    blocks: Iterable[Block]
    parts: Sequence[Iterable[Block]] = ()

    def __post_init__(self) -> None:
        check_metric(self.metric)

    @property
    def sign(self) -> int:
        """-1 where less is better, else 1."""
        return -1 if self.metric == "val_nll" else 1

    def score(self, counts: Sequence[int]) -> float:
        """The metric of one mean, to which candidate i contributes `counts[i]` times.

        Raises:
            ConfigError: No candidate, or more than 257 contributions.
        """
        first = next((index for index, count in enumerate(counts) if count), None)
        if first is None:
            raise ConfigError("expected at least one candidate in a mean, got none")
        rest = [count - (index == first) for index, count in enumerate(counts)]
        return float(self.scores_with(rest, [first])[0])

    def scores_with(self, counts: Sequence[int], add: Sequence[int]) -> npt.NDArray[np.float64]:
        """The metric of each mean that one more candidate would make.

        Args:
            counts: How often each candidate contributes so far.
            add: Candidates, by their place.

        Raises:
            ConfigError: More than 257 contributions.
        """
        return self._scores(counts, add, self.metric.removeprefix("val_"))

    def losses_with(self, counts: Sequence[int], add: Sequence[int]) -> npt.NDArray[np.float64]:
        """The same for the log-loss, which tells equals apart."""
        return self._scores(counts, add, "nll")

    def _scores(self, counts: Sequence[int], add: Sequence[int], metric: str) -> npt.NDArray[np.float64]:
        return score_counts(self._counted(self.blocks, counts, add, metric), self.task.mode, metric)

    def _counted(
        self, blocks: Iterable[Block], counts: Sequence[int], add: Sequence[int], metric: str
    ) -> npt.NDArray[np.int64]:
        if sum(counts) >= MOST_ADDITIONS:
            raise ConfigError(f"expected a mean of at most {MOST_ADDITIONS} contributions, got {sum(counts) + 1}")
        return count_sums(blocks, counts, add, self.task.mode, self.task.num_outputs, metric)

    def counted(self, counts: Sequence[int], add: Sequence[int], blocks: Iterable[Block]) -> npt.NDArray[np.int64]:
        """The pixels behind `scores_with`, of some blocks alone: what parts give may be added up.

        Args:
            counts: How often each candidate contributes so far.
            add: Candidates, by their place; the first axis of what is returned.
            blocks: Some of the data.

        Raises:
            ConfigError: More than 257 contributions.
        """
        return self._counted(blocks, counts, add, self.metric.removeprefix("val_"))

    def scored(self, counted: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The metric of what `counted` returned."""
        return score_counts(counted, self.task.mode, self.metric.removeprefix("val_"))

    def without(self, part: int) -> CandidatePool:
        """The same candidates on all parts but one."""
        rest = [blocks for index, blocks in enumerate(self.parts) if index != part]
        return CandidatePool(self.candidates, self.task, self.metric, Chained(rest))

    @cached_property
    def singles(self) -> npt.NDArray[np.float64]:
        """Each candidate's own score, `(N,)`."""
        return self.scores_with([0] * len(self.candidates), range(len(self.candidates)))

    @cached_property
    def disagreement(self) -> npt.NDArray[np.float64]:
        """Share of valid pixels where two candidates decide differently, `(N, N)`; see `metrics.diversity`.

        Each decides at its own best threshold in binary mode; in multilabel mode pairs of pixel and class count.
        """
        count = len(self.candidates)
        cuts = None
        if self.task.mode == "binary":
            cuts = best_cuts(self.blocks, count)
        elif self.task.mode == "multilabel":
            cuts = np.full(count, 128)
        differ, pixels = np.zeros((count, count)), 0
        for block in self.blocks:
            decisions = decide(block.codes, cuts)
            pixels += decisions.shape[1]
            for i in range(count):
                for j in range(i):
                    differ[i, j] += np.count_nonzero(decisions[i] != decisions[j])
        return np.asarray((differ + differ.T) / max(pixels, 1), np.float64)
