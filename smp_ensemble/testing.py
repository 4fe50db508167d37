"""For authors of trainers, combiners, selectors and stores: checks that promises are kept, and a store in memory."""

from __future__ import annotations

import dataclasses
import math
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from smp_ensemble.typing import (
    MODES,
    Averager,
    CombinerContext,
    FittedCombiner,
    PixelSample,
    Resampling,
    Snapshot,
    SnapshotRecord,
    Task,
    Trainer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from smp_ensemble.typing import Combiner, Mode


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


def check_combiner(combiner: Callable[[CombinerContext], Combiner], mode: Mode) -> None:
    """Checks that a combiner is what `smp_ensemble` expects of one; call it from your own tests, for each mode.

    One that fits what it needs (`FittedCombiner`) is fitted first, on made-up pixels; it may know members apart, so
    it is not asked to treat them alike.

    Args:
        combiner: The class, as an entry point names it.
        mode: That it is to work in.

    Raises:
        AssertionError: Names the broken promise.

    Example:
        >>> from smp_ensemble.ensembling.combiners import Geometric
        >>> check_combiner(Geometric, "multiclass")
    """
    name = getattr(combiner, "__name__", repr(combiner))
    reject = getattr(combiner, "reject", 0.0)
    _require(0 <= reject < 1, f"{name}.reject must be 0 or below 1, got {reject}")
    members = _made_up_members(mode)
    context = CombinerContext(mode, state=_made_up_state(combiner, mode, members) if _fits(combiner) else {})
    weights = [1.0, 0.25, 0.5, 1.0]

    def combined(order: list[int], scale: float = 1.0) -> Tensor:
        return _combined(combiner, context, [(members[at], scale * weights[at]) for at in order])

    order = list(range(len(members)))
    found = combined(order)
    _check_combined(found, members[0], mode, name)
    _require(_close(found, combined(order)), f"{name} must be made anew for each batch: two gave different results")
    _require(_close(found, combined(order, 0.5)), f"{name}: the scale of weights must not matter")
    if _fits(combiner):
        return
    _require(_close(found, combined(order[::-1])), f"{name}: the order of members must not matter")
    _check_copies(combiner, context, members[0])


def check_selector(selector: Any) -> None:
    """Checks that a selector is what `smp_ensemble` expects of one; call it from your own tests.

    One that needs predictions (`needs_predictions = True`) is asked with made-up ones, in every mode.

    Args:
        selector: The function, or an object of the class, that an entry point names.

    Raises:
        AssertionError: Names the broken promise.

    Example:
        >>> from smp_ensemble.ensembling.selection import select_top_k
        >>> check_selector(select_top_k)
    """
    from smp_ensemble.ensembling.pool import METRICS, CandidatePool
    from smp_ensemble.ensembling.selection import Selection, needs_predictions
    from smp_ensemble.ensembling.tally import Block

    name = getattr(selector, "__name__", type(selector).__name__)
    for count in (1, 5):
        snapshots = [Snapshot(f"models:/m-{index}", f"run{index}", 5 - index) for index in range(count)]
        if not needs_predictions(selector):
            found, again = (selector(list(snapshots), 3) for _ in range(2))
            _require(
                isinstance(found, list) and found == again, f"{name} must give the same list for the same candidates"
            )
            _check_members(found, snapshots, name)
            continue
        for mode in MODES:
            task = Task(mode, ("a", "b", "c")[: 2 if mode == "binary" else 3])
            rng = np.random.default_rng(0)
            shape = (count, task.num_outputs if mode == "multiclass" else 1, 30)
            planes = range(task.num_outputs if mode == "multilabel" else 1)
            truths = [10] * 3 if mode == "multiclass" else [18, 12]
            blocks = [Block(rng.integers(0, 256, shape, dtype=np.uint8), truths, plane) for plane in planes]
            for metric in METRICS:
                found, again = (selector(CandidatePool(snapshots, task, metric, blocks), 3) for _ in range(2))
                _require(isinstance(found, Selection), f"{name} must give a Selection, got {type(found).__name__}")
                _require(found == again, f"{name} must give the same for the same candidates")
                _check_members(found.members, snapshots, name)
                _require(len(found.members) <= 3, f"{name} must give at most 3 members when asked, got {found.members}")
                fits = len(found.weights) == len(found.members) and all(weight > 0 for weight in found.weights)
                _require(fits, f"{name} must give each member a weight above 0, got {found.weights}")
                _require(abs(sum(found.weights) - 1) < 1e-6, f"{name}: weights must sum to 1, got {found.weights}")
                _require(0 <= found.kept <= len(found.path), f"{name}: kept must count steps of the path: {found.kept}")


def _check_members(found: list[Snapshot], candidates: list[Snapshot], name: str) -> None:
    _require(bool(found), f"{name} must give at least one member")
    _require(all(one in candidates for one in found), f"{name} must give candidates only, got {found}")
    _require(len({one.uri for one in found}) == len(found), f"{name} must give each member once, got {found}")


def _fits(combiner: object) -> bool:
    return isinstance(combiner, FittedCombiner)


def _made_up_members(mode: Mode) -> Tensor:
    """Probabilities `(M, N, K, H, W)`, certainty and impossibility among them."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4, 2, 1 if mode == "binary" else 3, 6, 5, generator=generator)
    logits[:, :, :, 0] *= 100
    return logits.softmax(dim=2) if mode == "multiclass" else logits.sigmoid()


def _made_up_state(combiner: Any, mode: Mode, members: Tensor) -> dict[str, Tensor]:
    name = getattr(combiner, "__name__", repr(combiner))
    pixels = members.movedim(2, -1).flatten(1, -2).transpose(0, 1).contiguous()
    generator = torch.Generator().manual_seed(1)
    if mode == "multiclass":
        truth = torch.randint(0, pixels.shape[2], pixels.shape[:1], generator=generator)
    else:
        shape = pixels.shape[:1] if mode == "binary" else (len(pixels), pixels.shape[2])
        truth = torch.randint(0, 2, shape, generator=generator)
    first, second = (combiner.fit(PixelSample(pixels.clone(), truth.clone(), mode)) for _ in range(2))
    named = isinstance(first, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in first.items()
    )
    _require(named and bool(first), f"{name}.fit must give tensors by name, got {first!r}")
    same = set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)
    _require(same, f"{name}.fit must give the same for the same pixels")
    state: dict[str, Tensor] = first
    return state


def _combined(
    combiner: Callable[[CombinerContext], Combiner], context: CombinerContext, members: list[tuple[Tensor, float]]
) -> Tensor:
    name = getattr(combiner, "__name__", repr(combiner))
    fresh = combiner(context)
    seen = []
    for probabilities, weight in members:
        given = probabilities.clone()
        fresh.update(given, weight)
        _require(torch.equal(given, probabilities), f"{name}.update must leave what it is given as it is")
        seen.append(weakref.ref(given))
        del given
    alive = sum(one() is not None for one in seen)
    _require(alive <= 1, f"{name} must not keep members' probabilities, so that memory does not grow: kept {alive}")
    found = fresh.compute()
    before = found.clone()
    same = torch.allclose(fresh.compute(), before, rtol=0, atol=0, equal_nan=True)
    _require(same, f"{name}.compute must give the same when it is asked again")
    return before


def _check_combined(found: Tensor, one: Tensor, mode: Mode, name: str) -> None:
    shape = tuple(one.shape)
    _require(tuple(found.shape) == shape, f"{name}.compute must give shape {shape}, got {tuple(found.shape)}")
    _require(found.is_floating_point(), f"{name}.compute must give floating point, got {found.dtype}")
    low, high = float(found.min()), float(found.max())
    _require(low >= -1e-6 and high <= 1 + 1e-6, f"{name}.compute must give values in 0..1, got {low:g} to {high:g}")
    if mode == "multiclass":
        off = float((found.sum(dim=1) - 1).abs().max())
        _require(off < 1e-4, f"{name}.compute must give classes that sum to 1 in multiclass mode, off by {off:g}")


def _check_copies(combiner: Callable[[CombinerContext], Combiner], context: CombinerContext, one: Tensor) -> None:
    name = getattr(combiner, "__name__", repr(combiner))
    found = _combined(combiner, context, [(one, 1.0), (one, 0.5), (one, 1.0)])
    if getattr(combiner, "votes", False):
        pairs = [(values.argmax(dim=1) if context.mode == "multiclass" else values >= 0.5) for values in (found, one)]
        _require(torch.equal(*pairs), f"{name}: copies of one model must decide as that model does")
        return
    _require(_close(found, one), f"{name}: copies of one model must give what that model gives")


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first.float(), second.float(), rtol=0, atol=1e-5)


def _names(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
