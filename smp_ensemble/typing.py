"""Every protocol and value type that crosses a package border, with one paragraph on what it promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from smp_ensemble.data.normalization import Normalization

Mode = Literal["binary", "multiclass", "multilabel"]
Kind = Literal["mask", "probabilities", "uncertainty", "rle", "overlay"]

MODES: tuple[Mode, ...] = get_args(Mode)
KINDS: tuple[Kind, ...] = get_args(Kind)

IGNORE_INDEX = 255
"""Pixels with this class id take no part in losses, metrics or statistics. Masks are uint8, so it is always free."""


@dataclass(frozen=True)
class Task:
    """What is predicted: mode, class names in the order of their ids, and the number of image bands.

    Attributes:
        mode: `binary` (one foreground class against background), `multiclass` or `multilabel`.
        class_names: In binary mode two names, background first; else one name for each class id.
        in_channels: Bands of the images.
    """

    mode: Mode
    class_names: tuple[str, ...]
    in_channels: int = 3

    @property
    def num_outputs(self) -> int:
        """K, the number of output channels: 1 in binary mode, else the number of classes."""
        return 1 if self.mode == "binary" else len(self.class_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the K output channels: in binary mode the foreground's."""
        return self.class_names[-1:] if self.mode == "binary" else self.class_names


class Schedule(Protocol):
    """Learning rate and snapshot points as a pure function of completed optimizer steps.

    Resuming needs nothing but the step count.
    """

    def factor(self, step: int) -> float:
        """Rate of the next step after `step` completed ones, as a factor of each parameter group's own rate."""
        ...

    def is_snapshot(self, step: int) -> bool:
        """Whether a snapshot is due after `step` completed steps; true only at epoch ends."""
        ...

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """All steps for which `is_snapshot` is true, ascending."""
        ...

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        ...


@runtime_checkable
class Averager(Protocol):
    """A running average of weights beside the training model's (SWA, EMA); it never changes that model."""

    def is_due(self, step: int, epochs: int, steps_per_epoch: int) -> bool:
        """Whether the weights after `step` completed steps belong to the average."""
        ...

    def update(self, network: nn.Module, step: int) -> None:
        """Takes the weights of `network` after `step` completed steps into the average."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The average, as a state dict of the network."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """A training method by name: a frozen dataclass that makes a schedule and, for SWA and EMA, an averager."""

    name: ClassVar[str]
    reference: ClassVar[str]

    def schedule(self, epochs: int, steps_per_epoch: int) -> Schedule:
        """The schedule of a training of `epochs` epochs with `steps_per_epoch` optimizer steps each."""
        ...

    def averager(self) -> Averager | None:
        """A running average of the weights, or None."""
        ...


@runtime_checkable
class Resampling(Protocol):
    """A trainer that says after each snapshot how often each training image is to be drawn (boosting)."""

    def image_weights(self, losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Relative frequencies `(n,)` from the loss `(n,)` that the snapshots so far, together, have on each image."""
        ...


@dataclass(frozen=True)
class CombinerContext:
    """What a combiner may know of the ensemble that it works for.

    Attributes:
        mode: Says whether channels compete.
        threshold: From which probability on a member votes for the foreground, in binary and multilabel mode.
        state: What was fitted for it, as its `fit` gave it; empty for those that need nothing.
    """

    mode: Mode
    threshold: float = 0.5
    state: Mapping[str, Tensor] = field(default_factory=dict)


class Combiner(Protocol):
    """How member probabilities become one; streaming, so memory does not grow with the number of members.

    A combiner is a class that is made anew for each batch, from a `CombinerContext`. It may inherit from this protocol
    for the defaults of its traits, or state them itself.

    Attributes:
        votes: `compute` gives shares of votes, which are cut at 0.5 and not at a tuned threshold, and which a
            temperature would not mean anything for.
        reject: Which pixels are rejected unless the ensemble says otherwise: those whose decision does not get more
            than this.
        fits_weights: Member weights are fitted on validation data unless they are given.
        additive: What `compute` gives follows from a sum over members, each times its weight, and for each class grows
            with what members say of it; `compute` may be asked after each member, and changes nothing. Adaptive
            ensembles need it.
    """

    votes: ClassVar[bool] = False
    reject: ClassVar[float] = 0.0
    fits_weights: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def update(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Takes one member's probabilities, shape `(N, K, H, W)`."""
        ...

    def compute(self) -> Tensor:
        """The combined probabilities, shape `(N, K, H, W)`."""
        ...


@dataclass(frozen=True)
class PixelSample:
    """Probabilities of all members at pixels that no member was trained on, to fit a combiner with.

    Attributes:
        probabilities: Shape `(P, M, K)`, float32.
        truth: Class ids `(P,)`, int64; in multilabel mode `(P, K)`, with 255 where a class is ignored.
        mode: Says whether channels compete.
    """

    probabilities: Tensor
    truth: Tensor
    mode: Mode


@runtime_checkable
class FittedCombiner(Protocol):
    """A combiner whose class fits what it needs (a stacker); the result is kept beside the members."""

    @staticmethod
    def fit(sample: PixelSample) -> dict[str, Tensor]:
        """Tensors by name, as `CombinerContext.state` hands them to the combiner again."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """A reference to a tracked snapshot, not its weights: cheap to search, sort and select.

    Attributes:
        uri: `models:/m-...`, where MLflow keeps it.
        run_id: The snapshot's own run, a child of the training's.
        step: Completed optimizer steps.
        params: What it was trained with.
        metrics: The scores measured for exactly these weights.
        tags: Its run's tags.
    """

    uri: str
    run_id: str
    step: int
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        """`m-...`, the logged model's id."""
        return self.uri.removeprefix("models:/")


@dataclass(frozen=True)
class DatasetReference:
    """A data set as scores are linked to it: two scores compare only when the digests are equal."""

    name: str
    digest: str
    source: str = ""
    count: int = 0


@dataclass(frozen=True)
class SnapshotRecord:
    """One snapshot as training hands it to a store: live weights, and what was measured for exactly those weights.

    The store must copy what it needs before it returns: training goes on changing the network.

    Attributes:
        network: Gives logits `(N, K, H, W)` for normalised images.
        normalization: What the network expects its input to have gone through.
        task: Mode, class names, bands.
        step: Completed optimizer steps.
        epoch: Completed epochs.
        index: 1 for the training's first snapshot.
        metrics: Scores by name (`val_iou`, `val_iou/building`, ...).
        params: What it was trained with.
        dataset: What the scores were measured on.
        training_images: Digests of the images that it was trained on; None: unknown.
        previews: Masks predicted for the same few validation images at each snapshot, uint8 `(H, W)` or `(K, H, W)`.
    """

    network: nn.Module
    normalization: Normalization
    task: Task
    step: int
    epoch: int
    index: int
    metrics: Mapping[str, float]
    params: Mapping[str, Any] = field(default_factory=dict)
    dataset: DatasetReference | None = None
    training_images: Sequence[str] | None = None
    previews: Sequence[npt.NDArray[np.uint8]] = ()


class SnapshotStore(Protocol):
    """Where training leaves its snapshots and curves; every method returns without waiting for a network."""

    def save_snapshot(self, record: SnapshotRecord) -> None:
        """Keeps a snapshot."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps points of the training's curves."""
        ...

    def snapshots(self) -> list[Snapshot]:
        """References to all snapshots kept so far, after waiting until they are delivered."""
        ...

    def close(self, error: str | None = None) -> None:
        """Ends the training, as failed where there is an error; whoever opened the store closes it."""
        ...
