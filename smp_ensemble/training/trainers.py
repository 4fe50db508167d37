"""Training methods by name: frozen dataclasses that make a schedule and, some of them, an averager."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from smp_ensemble import registry
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.averagers import ExponentialAverage, UniformAverage, swa_start_epoch
from smp_ensemble.training.schedules import CosineCheckpoints, CosineRestarts, PlateauThenConstant, TriangularCycles

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

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

    # Against one plain training, 1560 steps: the mean of five snapshots, and the average of their weights.
    # Evidence: aerial-binary, 60 epochs, snapshot5 all: +0.59 points
    # Evidence: aerial-binary, 60 epochs, snapshot5 soup: +1.40 points
    cycles: int = 5
    min_factor: float = 0.0

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """Cosine annealing with `cycles` warm restarts on whole epochs."""
        return CosineRestarts(epochs, steps_per_epoch, self.cycles, self.min_factor)

    def averager(self) -> Averager | None:
        """None: the weights stand for themselves."""
        return None


@dataclass(frozen=True)
class FGE:
    """Fast geometric ensembling: short triangular cycles near the end, one snapshot at the minimum of each.

    The first phase trains on a plateau and a linear fall to `high`; then the rate swings between `high` and `low` every
    `cycle_epochs`. The first phase is lengthened by up to a cycle, so that the training ends at a minimum. Starting
    from trained weights (`init`) there is no first phase and, with a tracked snapshot, no momentum from it either.

    Attributes:
        start: Share of the epochs before the cycles; 0 starts with them.
        cycle_epochs: c, epochs of a cycle: an even number.
        high: a1, the cycles' largest rate, as a factor of `lr`.
        low: a2, their smallest, as a factor of `lr`.
    """

    name: ClassVar[str] = "fge"
    reference: ClassVar[str] = "Garipov et al., NeurIPS 2018, arXiv:1802.10026"

    # Nine snapshots in 1560 steps: their mean, and the average of their weights; one snapshot in 156 steps.
    # Evidence: aerial-binary, 60 epochs, fge all: +0.77 points
    # Evidence: aerial-binary, 60 epochs, fge soup: +2.97 points
    # Evidence: aerial-binary-small, 6 epochs, fge last: +0.13 points
    start: float = 0.7
    cycle_epochs: int = 2
    high: float = 0.5
    low: float = 0.01

    def __post_init__(self) -> None:
        _check_start(self.start)

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """Plateau, linear fall, and triangular cycles."""
        start = round(self.start * epochs)
        half = self.cycle_epochs // 2
        if start and epochs - start >= half and self.cycle_epochs > 1:
            start += (epochs - start - half) % self.cycle_epochs
        return TriangularCycles(epochs, steps_per_epoch, self.cycle_epochs, self.high, self.low, start)

    def averager(self) -> Averager | None:
        """None: the weights stand for themselves."""
        return None


@dataclass(frozen=True)
class SWA:
    """Stochastic weight averaging: one snapshot, the mean of the weights at the ends of late epochs.

    Its batch-norm statistics are measured anew on training data, and it is scored as itself.

    Attributes:
        start: Share of the epochs after which averaging starts.
        swa_lr: The rate from then on, as a factor of `lr`.
        cycle_epochs: Epochs from one model in the average to the next.
        cyclic: Whether each cycle falls from `swa_lr` to `low`, instead of a constant rate.
        low: The smallest rate of such a cycle, as a factor of `lr`.
    """

    name: ClassVar[str] = "swa"
    reference: ClassVar[str] = "Izmailov et al., UAI 2018, arXiv:1803.05407"

    # With these, 1560 steps gain and 156 steps lose: an average pays where training has become slow.
    # Evidence: aerial-binary, 60 epochs, swa last: +3.65 points
    # Evidence: aerial-binary-small, 6 epochs, swa last: -1.38 points
    start: float = 0.75
    swa_lr: float = 0.2
    cycle_epochs: int = 1
    cyclic: bool = False
    low: float = 0.01

    def __post_init__(self) -> None:
        _check_start(self.start)
        if self.cycle_epochs < 1:
            raise ConfigError(f"expected cycle_epochs of 1 or more, got {self.cycle_epochs}")

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """Plateau, linear fall, then a constant or cyclic rate; one snapshot at the end."""
        start = swa_start_epoch(self.start, epochs, self.cycle_epochs)
        return PlateauThenConstant(
            epochs, steps_per_epoch, self.swa_lr, start, self.cycle_epochs, self.cyclic, self.low
        )

    def averager(self) -> Averager | None:
        """The uniform mean of epoch ends."""
        return UniformAverage(self.start, self.cycle_epochs)


@dataclass(frozen=True)
class EMA:
    """One cosine, and an exponential moving average of the weights that is updated after each step.

    The snapshot holds the average, with its own batch-norm statistics and its own scores.

    Attributes:
        decay: The average's largest share of itself in an update.
        gamma: Steps of the warm-up of that share.
        power: How fast it approaches 1.
        min_factor: The rate's end, as a factor of its start.
    """

    name: ClassVar[str] = "ema"
    reference: ClassVar[str] = "Tarvainen and Valpola, NeurIPS 2017, arXiv:1703.01780"

    decay: float = 0.999
    gamma: float = 1.0
    power: float = 0.75
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.decay < 1 and self.gamma > 0 and self.power > 0):
            raise ConfigError(
                f"expected a decay in 0..1 (below 1), gamma and power above 0, got {self.decay}, {self.gamma} and "
                f"{self.power}"
            )

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """One cosine cycle."""
        return CosineRestarts(epochs, steps_per_epoch, 1, self.min_factor)

    def averager(self) -> Averager | None:
        """The exponential moving average."""
        return ExponentialAverage(self.decay, self.gamma, self.power)


@dataclass(frozen=True)
class Checkpoints:
    """One cosine with a snapshot every few epochs: what an ensemble of ordinary checkpoints is worth.

    Attributes:
        every_epochs: Epochs from one snapshot to the next, counted back from the last epoch.
        min_factor: The rate's end, as a factor of its start.
    """

    name: ClassVar[str] = "checkpoints"
    reference: ClassVar[str] = "Chen, Lundberg and Lee, 2017, arXiv:1710.03282"

    every_epochs: int = 4
    min_factor: float = 0.0

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """One cosine cycle, with snapshots on the way."""
        return CosineCheckpoints(epochs, steps_per_epoch, self.every_epochs, self.min_factor)

    def averager(self) -> Averager | None:
        """None: the weights stand for themselves."""
        return None


@dataclass(frozen=True)
class Boost:
    """Boosted snapshots: each cycle draws training images by the loss that the snapshots so far still have on them.

    The first cycle draws evenly. Labels that are wrong have a high loss for ever: with noisy masks lower `strength`.

    Attributes:
        cycles: Number of cycles and snapshots.
        strength: An image is drawn in proportion to its loss to this power; 0 draws evenly.
        min_factor: The rate's end in each cycle, as a factor of its start.
    """

    name: ClassVar[str] = "boost"
    reference: ClassVar[str] = "Freund and Schapire, JCSS 1997 (boosting by resampling); Moghimi et al., BMVC 2016"

    cycles: int = 5
    strength: float = 1.0
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 10:
            raise ConfigError(f"expected a strength from 0 (draw evenly) to 10, got {self.strength}")

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """Cosine annealing with `cycles` warm restarts on whole epochs."""
        return CosineRestarts(epochs, steps_per_epoch, self.cycles, self.min_factor)

    def averager(self) -> Averager | None:
        """None: the weights stand for themselves."""
        return None

    def image_weights(self, losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """How often each image is drawn, relative to the others, from its loss; shape `(n,)` to `(n,)`, mean 1."""
        weights: npt.NDArray[np.float64] = losses**self.strength
        return weights / weights.mean() if weights.mean() > 0 else weights * 0 + 1


def _check_start(start: float) -> None:
    if not 0 <= start < 1:
        raise ConfigError(f"expected start as a share of the epochs, from 0 to below 1, got {start}")


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
