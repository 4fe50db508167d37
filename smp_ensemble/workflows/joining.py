"""What a training's other processes do: train along, and leave when it is done; the first one does the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.precision import choose_device
from smp_ensemble.training.fit import fit
from smp_ensemble.training.processes import Place, leave_group, place_of
from smp_ensemble.workflows.starting import new_network, normalization_for

if TYPE_CHECKING:
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.training.fit_options import FitOptions
    from smp_ensemble.typing import Trainer
    from smp_ensemble.workflows.options import TrainOptions
    from smp_ensemble.workflows.starting import Start


def place_for(options: TrainOptions, *, trainings: int = 1) -> Place:
    """Which process this is; all but the first say only what goes wrong.

    Args:
        options: How many processes train together.
        trainings: How many are to run one after the other.

    Raises:
        ConfigError: There are not so many devices, or the others could not follow.
    """
    place = place_of(options.devices, options.num_nodes, choose_device(options.accelerator))
    if place.count > 1 and trainings > 1:
        raise ConfigError(
            f"{trainings} trainings one after the other run in one process, got {place.count}: start each alone with "
            "fold=0, fold=1, ... or seed=0, seed=1, ..., or use devices=1"
        )
    if not place.is_first:
        logging.getLogger("smp_ensemble").setLevel(logging.WARNING)
    return place


def train_along(
    options: TrainOptions, splits: DataSplits, method: Trainer, start: Start | None, fitting: FitOptions
) -> NoReturn:
    """Trains as one of the other processes: nothing is tracked, printed or kept; then leaves the program.

    Raises:
        SystemExit: With 0, when the training is done.
    """
    known = start.normalization if start is not None else None
    fit(
        new_network(options, splits.task, start),
        splits.train,
        splits.val,
        trainer=method,
        epochs=options.epochs,
        normalization=known or normalization_for(options.normalization, splits.train),
        options=fitting,
        checkpoint_folder=Path(),  # all take part when a checkpoint is made; the first one knows where, and writes it
    )
    leave_group()
    raise SystemExit(0)


def refuse_finished(place: Place, run_id: str) -> None:
    """A finished training has nothing for other processes to do, and they wait already if somebody else started them.

    Raises:
        ConfigError: That is so.
    """
    if place.external:
        raise ConfigError(f"this training is finished already: run {run_id}; build on it in one process")
