"""Plans: which trainings to run, of any method: one for each fold, bootstrap sample or seed, or just one."""

from __future__ import annotations

from dataclasses import dataclass

from smp_ensemble.data.splits import check_part
from smp_ensemble.exceptions import ConfigError


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a plan; it needs nothing of the others, so each may run on a machine of its own.

    Attributes:
        label: `fold-3`, `bootstrap-3` or `seed-3`; what tells it from the others.
        seed: Of weights, batches and augmentation.
        fold: Which fold is left out, or which bootstrap sample trains; None: all training images train.
    """

    label: str
    seed: int
    fold: int | None = None


def make_plan(
    *,
    folds: int | None = None,
    bootstrap: int | None = None,
    seeds: int | None = None,
    fold: int | None = None,
    seed: int = 0,
) -> tuple[PlannedTraining, ...]:
    """The trainings of a plan, in order.

    Folds and bootstrap samples share the seed: they differ in their images alone.

    Args:
        folds: Train without each of so many folds of the training images.
        bootstrap: Train on each of so many bootstrap samples of the training images.
        seeds: Train on all training images with the seeds `seed`, `seed + 1`, ...
        fold: Only this fold or bootstrap sample, counted from 0.
        seed: The first training's seed.

    Raises:
        ConfigError: More than one of `folds`, `bootstrap` and `seeds`; or a `fold` that is not one of them.

    Example:
        >>> [(one.label, one.seed) for one in make_plan(seeds=2, seed=7)]
        [('seed-7', 7), ('seed-8', 8)]
        >>> make_plan(folds=5, fold=3)
        (PlannedTraining(label='fold-3', seed=0, fold=3),)
    """
    asked = {"folds": folds, "bootstrap": bootstrap, "seeds": seeds}
    given = [f"{name}={value}" for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)}: expected one of them; choose one, and run the command for each other"
        )
    check_part(folds, bootstrap, fold)
    if seeds is not None:
        if seeds < 1:
            raise ConfigError(f"seeds: expected at least 1, found {seeds}")
        return tuple(PlannedTraining(f"seed-{one}", one) for one in range(seed, seed + seeds))
    parts = folds or bootstrap
    if parts is None:
        return (PlannedTraining(f"seed-{seed}", seed),)
    word = "fold" if folds else "bootstrap"
    chosen = range(parts) if fold is None else (fold,)
    return tuple(PlannedTraining(f"{word}-{one}", seed, one) for one in chosen)
