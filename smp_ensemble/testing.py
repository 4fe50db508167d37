"""For authors of trainers and stores: checks that a trainer keeps its promises, and a store in memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from smp_ensemble.typing import Averager, Resampling, Snapshot, SnapshotRecord, Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class KeptSnapshot:
    """What `MemoryStore` keeps of a snapshot: the record, and a copy of its weights."""

    record: SnapshotRecord
    weights: dict[str, Tensor]


class MemoryStore:
    """A `SnapshotStore` that keeps everything in memory, for tests without MLflow."""

    def __init__(self) -> None:
        self.kept: list[KeptSnapshot] = []
        self.history: list[tuple[int, dict[str, float]]] = []
        self.closed_with: list[str | None] = []

    def save_snapshot(self, record: SnapshotRecord) -> None:
        """Keeps a copy of the weights: training goes on changing the network."""
        weights = {name: tensor.detach().clone() for name, tensor in record.network.state_dict().items()}
        self.kept.append(KeptSnapshot(record, weights))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps points of the curves."""
        self.history.append((step, dict(metrics)))

    def snapshots(self) -> list[Snapshot]:
        """References, with made-up addresses."""
        return [
            Snapshot(f"memory:/{index}", "", kept.record.step, metrics=dict(kept.record.metrics))
            for index, kept in enumerate(self.kept)
        ]

    def close(self, error: str | None = None) -> None:
        """Remembers how training ended."""
        self.closed_with.append(error)


def check_trainer(trainer: Trainer) -> None:
    """Checks that a trainer is what `smp_ensemble` expects of one; call it from your own tests.

    Args:
        trainer: With its default options, or any others.

    Raises:
        AssertionError: Names the broken promise.

    Example:
        >>> from smp_ensemble.training.trainers import SSE
        >>> check_trainer(SSE(cycles=3))
    """
    kind = type(trainer)
    _require(dataclasses.is_dataclass(trainer), f"{kind.__name__} must be a dataclass: asdict() is what is tracked")
    parameters: Any = getattr(kind, "__dataclass_params__", None)
    _require(bool(parameters and parameters.frozen), f"{kind.__name__} must be frozen: @dataclass(frozen=True)")
    for attribute in ("name", "reference"):
        text = getattr(trainer, attribute, None)
        _require(isinstance(text, str) and bool(text), f"{kind.__name__}.{attribute} must be a text, got {text!r}")
    _require(isinstance(trainer, Trainer), f"{kind.__name__} must have schedule() and averager()")
    for epochs, steps_per_epoch in ((12, 3), (13, 1), (30, 7)):
        _check_schedule(trainer, epochs, steps_per_epoch)
        _check_averager(trainer, epochs, steps_per_epoch)
    if isinstance(trainer, Resampling):
        _check_resampling(trainer)


def _check_schedule(trainer: Trainer, epochs: int, steps_per_epoch: int) -> None:
    where = f"{trainer.name}.schedule({epochs}, {steps_per_epoch})"
    schedule, again = (trainer.schedule(epochs, steps_per_epoch) for _ in range(2))
    total = epochs * steps_per_epoch
    _require(schedule.total_steps == total, f"{where}.total_steps must be {total}, got {schedule.total_steps}")
    taken = [step for step in range(1, total + 1) if schedule.is_snapshot(step)]
    _require(tuple(taken) == tuple(schedule.snapshot_steps), f"{where}: is_snapshot and snapshot_steps must agree")
    _require(bool(taken), f"{where} must take at least one snapshot")
    late = [step for step in taken if step % steps_per_epoch]
    _require(not late, f"{where}: snapshots must fall on epoch ends, got steps {late}")
    for step in (*range(total), *reversed(range(total))):
        factor = schedule.factor(step)
        _require(math.isfinite(factor) and factor >= 0, f"{where}.factor({step}) must be finite, not below 0: {factor}")
        _require(factor == again.factor(step), f"{where}.factor({step}) must be a pure function of the step")


def _check_averager(trainer: Trainer, epochs: int, steps_per_epoch: int) -> None:
    average, again = trainer.averager(), trainer.averager()
    if average is None:
        return
    where = f"{trainer.name}.averager()"
    _require(isinstance(average, Averager), f"{where} must have {', '.join(sorted(_names(Averager)))}")
    _require(average is not again, f"{where} must be a new one at each call: an average belongs to one training")
    network = nn.Linear(2, 1)
    due = [step for step in range(1, epochs * steps_per_epoch + 1) if average.is_due(step, epochs, steps_per_epoch)]
    first = trainer.schedule(epochs, steps_per_epoch).snapshot_steps[0]
    _require(bool(due) and due[0] <= first, f"{where} must take in a network before the first snapshot, after {first}")
    for step in due:
        with torch.no_grad():
            network.weight.fill_(step)
        average.update(network, step)
        _require(bool((network.weight == step).all()), f"{where}.update must leave the network as it is")
    weights = {name: tensor.clone() for name, tensor in average.weights().items()}
    _require(set(weights) == set(network.state_dict()), f"{where}.weights() must be a state dict of the network")
    with torch.no_grad():
        network.weight.fill_(-1)
    assert again is not None
    again.load_state_dict(average.state_dict())
    for what, found in (("weights()", average.weights()), ("load_state_dict(state_dict())", again.weights())):
        same = all(torch.equal(found[name], tensor) for name, tensor in weights.items())
        _require(same, f"{where}.{what} must give the average, whatever the network does")


def _check_resampling(trainer: Resampling) -> None:
    losses = np.array([0.0, 0.5, 2.0])
    for given in (losses, np.zeros(3)):
        weights = np.asarray(trainer.image_weights(given))
        fits = weights.shape == (3,) and np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0
        _require(bool(fits), f"image_weights({given.tolist()}) must give 3 finite numbers of 0 or more, got {weights}")


def _names(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
