"""How to train, apart from the method, and what of it goes together with which."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest
from smp_ensemble.training.refreshing import SOURCES
from smp_ensemble.typing import Resampling

if TYPE_CHECKING:
    from smp_ensemble.typing import Trainer


@dataclass(frozen=True)
class FitOptions:
    """How to train, apart from the method: the same for all methods, so that they compare.

    Attributes:
        loss: `auto`, or like `0.5*lovasz+0.5*focal(gamma=2)`.
        optimizer: Any name that timm knows.
        lr: Maximum learning rate; schedules give factors of it.
        weight_decay: On weights of two or more dimensions.
        encoder_lr_scale: Encoder's rate as a factor of `lr`.
        freeze_encoder: Whether to keep the encoder as it is.
        batch_size: Images in a batch, of all processes together.
        crop_size: Side of the square training crops, in pixels.
        augment: Named level of augmentation.
        workers: Data loading processes; 0 loads in the training process.
        precision: Lightning's words, or `auto`.
        accelerator: Lightning's words, or `auto`.
        seed: Of weights that are initialised here, of batches and augmentation.
        class_weights: Of cross-entropy: `none`, `balanced`, `sqrt`, or numbers separated by commas.
        warmup_epochs: Epochs over which the rate climbs to the schedule's; may be a fraction.
        clip_norm: Gradients are scaled down to this norm; 0: they are left as they are.
        accumulate: Batches whose gradients make one step.
        patience: Epochs without a better `val_iou` after which training stops early; 0: never.
        devices: Processes on each machine that train together, each with a device of its own; `auto`: one for each
            GPU. Batches stay as they are: each process takes its part.
        num_nodes: Machines; with more than one, torchrun or SLURM starts the processes.
        batch_norm: What the batch norm of a snapshot is measured on before it is scored and kept: `images`, the whole
            training images; `crops`, augmented ones as in training; `best`, whichever of these, or the training's
            running statistics, gives the least log-loss on validation data; `auto`, that for averages of weights, which
            have no running statistics, while all else keeps them.
    """

    loss: str = "auto"
    # Of three recipes, within 0.7 points of validation IoU of each method's best, but for `snapshot` in 156 steps: the
    # rows tune-* of aerial-binary and aerial-binary-small.
    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 1e-4
    encoder_lr_scale: float = 1.0
    freeze_encoder: bool = False
    batch_size: int = 8
    crop_size: int = 128
    augment: str = "default"
    workers: int = 0
    precision: str = "auto"
    accelerator: str = "auto"
    seed: int = 0
    class_weights: str = "none"
    warmup_epochs: float = 0.0
    clip_norm: float = 0.0
    accumulate: int = 1
    patience: int = 0
    devices: int | str = 1
    num_nodes: int = 1
    # Averages, on images, on crops, and chosen on validation data:
    # Evidence: aerial-small-long, 24 epochs, swa last: -0.28 points
    # Evidence: aerial-small-long, 24 epochs, swa crops: +0.68 points
    # Evidence: aerial-small-long, 24 epochs, swa best of crops: +0.86 points
    # All else: worth its passes in a short training, and nothing in one four times as long.
    # Evidence: aerial-binary-small, 6 epochs, single best: -62.8 thousandths
    # Evidence: aerial-small-long, 24 epochs, single best: -0.2 thousandths
    batch_norm: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("warmup_epochs", 0), ("clip_norm", 0), ("accumulate", 1), ("patience", 0)):
            value = getattr(self, name)
            if not (value >= least and math.isfinite(value)):
                raise ConfigError(f"expected {name.replace('_', '-')} of {least} or more, got {value}")
        if self.batch_norm not in SOURCES:
            raise ConfigError(f"unknown batch-norm '{self.batch_norm}': {nearest(self.batch_norm, SOURCES)}")

    def check_with(self, method: Trainer) -> None:
        """Refuses what would watch or weigh other weights than those that are kept."""
        averaged = method.averager() is not None
        if self.patience and averaged:
            raise ConfigError(
                f"patience={self.patience} watches the scores of the network, but '{method.name}' keeps an average of "
                "its weights, which is scored at the end alone: use patience=0"
            )
        if self.batch_norm == "auto" or averaged:
            return
        if self.patience:
            raise ConfigError(
                f"batch-norm={self.batch_norm} is measured for snapshots whose epoch is known, and patience ends a "
                "training anywhere: use patience=0, or batch-norm=auto"
            )
        if isinstance(method, Resampling):
            raise ConfigError(
                f"'{method.name}' draws images by the losses of its snapshots as training leaves them: "
                "use batch-norm=auto"
            )
