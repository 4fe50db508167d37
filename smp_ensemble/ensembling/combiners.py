"""How the probabilities of members become one, streaming: memory does not grow with the number of members."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble import registry
from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from smp_ensemble.typing import Combiner

GROUP = "smp_ensemble.combiners"


class Mean:
    """Arithmetic mean of probabilities, weighted where weights are given; their scale does not matter.

    Averaging probabilities, not logits, is what Snapshot Ensembles and FGE do.

    References:
        Huang et al., "Snapshot Ensembles: Train 1, get M for free", ICLR 2017, arXiv:1704.00109, section 3.

    Example:
        >>> import torch
        >>> mean = Mean()
        >>> mean.update(torch.full((1, 1, 1, 1), 0.25))
        >>> mean.update(torch.full((1, 1, 1, 1), 1.0), weight=2.0)
        >>> mean.compute().item()
        0.75
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0

    def update(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Adds one member's probabilities, shape `(N, K, H, W)`."""
        if self._sum is None:
            self._sum = probabilities.float() * weight
        else:
            self._sum.add_(probabilities.float(), alpha=weight)
        self._weight += weight

    def compute(self) -> Tensor:
        """The mean so far, shape `(N, K, H, W)`, float32.

        Raises:
            ConfigError: No member was added, or all weights are zero.
        """
        if self._sum is None or self._weight <= 0:
            raise ConfigError("expected at least one member with a weight above 0, got none")
        return self._sum / self._weight


def combiner_factory(name: str) -> Callable[[], Combiner]:
    """What makes a fresh combiner, by name.

    Raises:
        ConfigError: Unknown name.
    """
    factory: Callable[[], Combiner] = registry.load(GROUP, name)
    return factory
