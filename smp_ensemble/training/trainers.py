"""Training methods by name: frozen dataclasses that make a schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from smp_ensemble import registry
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.schedules import CosineRestarts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smp_ensemble.typing import Averager, Schedule, Trainer

GROUP = "smp_ensemble.trainers"


@dataclass(frozen=True)
class Single:
    """One cosine over the whole training and one snapshot at its end: the baseline for everything else.

    Attributes:
        min_factor: The rate's end, as a factor of its start.
    """

    name: ClassVar[str] = "single"
    reference: ClassVar[str] = "Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983 (without restarts)"

    min_factor: float = 0.0

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """One cosine cycle."""
        return CosineRestarts(epochs, steps_per_epoch, 1, self.min_factor)

    def averager(self) -> Averager | None:
        """None: the weights stand for themselves."""
        return None


@dataclass(frozen=True)
class SSE:
    """Snapshot ensembles: cosine cycles with restarts, one snapshot at the end of each.

    Momentum is not reset at a restart. Cycles that are too short do not pay: give each at least a few epochs.

    Attributes:
        cycles: M, the number of cycles and snapshots.
        min_factor: The rate's end in each cycle, as a factor of its start.
    """

    name: ClassVar[str] = "snapshot"
    reference: ClassVar[str] = "Huang et al., ICLR 2017, arXiv:1704.00109"

    cycles: int = 5
    min_factor: float = 0.0

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """Cosine annealing with `cycles` warm restarts on whole epochs."""
        return CosineRestarts(epochs, steps_per_epoch, self.cycles, self.min_factor)

    def averager(self) -> Averager | None:
        """None: the weights stand for themselves."""
        return None


def make_trainer(name: str, options: Mapping[str, Any] | None = None) -> Trainer:
    """A trainer by name, with its options.

    Args:
        name: In the entry-point group `smp_ensemble.trainers`.
        options: Values for the fields of its dataclass.

    Raises:
        ConfigError: Unknown name or option, or a value of the wrong type.
    """
    factory = registry.load(GROUP, name)
    chosen = dict(options or {})
    known = {field.name: field for field in dataclasses.fields(factory)}
    for option, value in chosen.items():
        if option not in known:
            raise ConfigError(f"trainer '{name}' has no option '{option}': {registry.nearest(option, known)}")
        expected = type(known[option].default)
        fits = isinstance(value, int | float) if expected is float else isinstance(value, expected)
        if not fits or (isinstance(value, bool) and expected is not bool):
            raise ConfigError(
                f"option '{option}' of trainer '{name}' must be of type {expected.__name__}, got {value!r}"
            )
    trainer: Trainer = factory(**chosen)
    return trainer


def describe(trainer: Trainer) -> dict[str, Any]:
    """Name and options of a trainer, as MLflow keeps them as params."""
    options: Mapping[str, Any] = dataclasses.asdict(trainer) if dataclasses.is_dataclass(trainer) else {}
    return {"trainer": trainer.name, **options}
