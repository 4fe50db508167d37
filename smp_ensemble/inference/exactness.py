"""How far an engine is from its members as they were trained: in eager float32, without anything that makes it fast."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from smp_ensemble.ensembling.views import average_views, parse_views
from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from smp_ensemble.inference.engine import Engine


@dataclass(frozen=True)
class Exactness:
    """What `compare` measured.

    Attributes:
        max_difference: The largest difference of a probability.
        changed: Decisions that differ: pixels, in multilabel mode those of each class.
        total: All decisions.
    """

    max_difference: float
    changed: int
    total: int

    @property
    def agreement(self) -> float:
        """The share of decisions that are the same."""
        return 1 - self.changed / self.total


def compare(engine: Engine, images: Tensor) -> Exactness:
    """Measures an engine against its own ensemble, run plainly: eager, float32, batch norms in place, view by view.

    Args:
        engine: Of one pass: draws of dropout are not comparable.
        images: Raw, `(N, C, H, W)`, of any size. Take real ones: on noise no network is sure of anything.

    Raises:
        ConfigError: More than one pass, or images that the engine refuses.

    Example:
        >>> from smp_ensemble.ensembling.ensemble import Ensemble
        >>> from smp_ensemble.inference.engine import Engine
        >>> engine = Engine(Ensemble([torch.nn.Conv2d(3, 1, 1)], mode="binary"), "cpu", "32")
        >>> compare(engine, torch.ones(1, 3, 8, 8)).agreement
        1.0
    """
    if engine.passes > 1:
        raise ConfigError(f"expected an engine of one pass to compare, got passes={engine.passes}")
    largest, changed, total = 0.0, 0, 0
    ensemble = engine.ensemble
    for part in engine.parts(images):
        found = engine(part)
        with torch.inference_mode():
            expected = ensemble.combine(_plainly(engine, part.to(engine.device).float()))
            difference = ensemble.decide(found) != ensemble.decide(expected)
        largest = max(largest, float((found - expected).abs().max()))
        changed += int(difference.sum())
        total += difference.numel()
    return Exactness(largest, changed, total)


def _plainly(engine: Engine, images: Tensor) -> Iterator[Tensor]:
    """Each member's probabilities in turn; on the engine's device there is one plain member at a time."""
    views = parse_views(engine.views)
    for member in engine.ensemble.members:
        plain = copy.deepcopy(member).to(engine.device)

        def predict(seen: Tensor, plain: nn.Module = plain) -> Tensor:
            height, width = seen.shape[2:]
            padding = (0, -width % engine.stride, 0, -height % engine.stride)
            padded = F.pad(seen, padding, mode="replicate") if any(padding) else seen
            return engine.ensemble.probabilities_of(plain, padded.contiguous())[..., :height, :width]

        yield average_views(views, images, predict)
