"""Whether an exported file gives what the engine gives, on random images in batches of several sizes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import NetworkError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.inference.engine import Engine

    Run: TypeAlias = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4
"""Largest difference in probability between the file and the engine; most are below 1e-6."""

_SIDES = ((4, 4), (2, 6), (5, 3), (8, 2))
"""Heights and widths in strides, in turn."""


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        difference: The largest in probability.
        images: So many were compared.
        undecided: Share of their pixels left out where members vote: those at which a member's vote hangs on less than
            `TOLERANCE`, so that rounding decides it.
    """

    difference: float
    images: int
    undecided: float


def compare(engine: Engine, run: Run, batches: Iterable[Tensor]) -> Comparison:
    """Compares `run` with the engine on batches of raw images `(N, C, H, W)`.

    Raises:
        NetworkError: A difference above `TOLERANCE`, another shape or a value that is not a number; says how large it
            is, and on which shape of images.
    """
    worst, left_out, pixels, images = 0.0, 0, 0, 0
    for batch in batches:
        expected, found = engine(batch), run(batch)
        decided = torch.ones_like(expected, dtype=torch.bool)
        if engine.ensemble.votes:
            decided = _decided(engine.ensemble, engine.member_probabilities(batch)).expand_as(expected)
        worst = max(worst, _difference(expected, found, decided))
        left_out, pixels, images = left_out + int((~decided).sum()), pixels + decided.numel(), images + len(batch)
        if worst > TOLERANCE:
            raise NetworkError(
                f"the exported file differs from the engine by {worst:.3g} in probability on images of shape "
                f"{tuple(batch.shape)}, at most {TOLERANCE:g} is allowed: nothing was written; try the other format"
            )
    return Comparison(worst, images, left_out / pixels)


def _difference(expected: Tensor, found: Tensor, decided: Tensor) -> float:
    if expected.shape != found.shape:
        return math.inf
    difference = (expected - found).abs().nan_to_num(math.inf)
    return float(torch.where(decided, difference, 0).max())


def _decided(ensemble: Ensemble, members: Iterator[Tensor]) -> Tensor:
    """Where each member's vote stays if its probabilities move by `TOLERANCE`; multiclass: `(N, 1, H, W)`."""
    decided: Tensor | None = None
    for probabilities in members:
        if ensemble.mode == "multiclass":
            first, second = probabilities.topk(2, dim=1).values.unbind(1)
            sure = (first - second).unsqueeze(1) > 2 * TOLERANCE
        else:
            sure = (probabilities - ensemble.threshold).abs() > TOLERANCE
        decided = sure if decided is None else decided & sure
    assert decided is not None  # there is a member
    return decided


def random_batches(ensemble: Ensemble, in_channels: int, stride: int, at_least: int) -> Iterator[Tensor]:
    """Batches of 1, 2, 3, ... images until there are enough: smooth areas under noise, in the members' raw values."""
    generator = torch.Generator().manual_seed(0)
    highest = max(float(member.normalization.maximum) for member in ensemble.members if isinstance(member, Member))
    count, sides = 0, itertools.cycle(_SIDES)
    for size in itertools.count(1):
        coarse = torch.rand(size, in_channels, *next(sides), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, scale_factor=stride, mode="bilinear")
        noise = torch.rand(smooth.shape, generator=generator)
        yield ((0.8 * smooth + 0.2 * noise) * highest).round()
        count += size
        if count >= at_least:
            return
