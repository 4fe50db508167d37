"""The LightningModule: any network that gives logits, any loss, any optimizer; raw images in the batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from smp_ensemble.architectures import check_network
from smp_ensemble.data.loading import NOTHING
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.training.processes import gathered

if TYPE_CHECKING:
    from collections.abc import Callable

    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.typing import Task

Batch = dict[str, Tensor]


class SegmentationModule(pl.LightningModule):
    """Trains a network on batches `{"image": (N, C, H, W) raw, "mask": (N, H, W) or (N, K, H, W)}`.

    Validation logs `val_loss` (mean over images), and over all valid pixels of the set `val_iou`, `val_iou/<class>`,
    `val_dice` and `val_ece`.

    Args:
        network: Gives logits `(N, K, H, W)` for normalised images.
        normalization: Applied to the raw images on the device.
        task: Mode and class names.
        loss: Called with logits and masks.
        make_optimizer: Makes the optimizer from the network; no scheduler, the snapshot callback sets the rate.
        channels_last: Whether to keep the network and its input in channels-last memory, the faster layout.
        processes: How many train together, each on its part of each batch, all of one size: the loss is that of the
            whole batch.
    """

    def __init__(
        self,
        network: nn.Module,
        normalization: Normalization,
        task: Task,
        *,
        loss: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        channels_last: bool = True,
        processes: int = 1,
    ) -> None:
        check_network(network)
        super().__init__()
        self.task = task
        self.network = network.to(memory_format=torch.channels_last) if channels_last else network
        self.normalization = normalization
        self.loss = loss
        self._make_optimizer = make_optimizer
        self._channels_last = channels_last
        self._processes = processes
        self.mean_loss = MeanMetric()
        self.scores = SegmentationScores(task)
        self.calibration = CalibrationScores(task)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, K, H, W)` of raw images `(N, C, H, W)`."""
        normalized = self.normalization(images)
        if self._channels_last:
            normalized = normalized.to(memory_format=torch.channels_last)
        logits: Tensor = self.network(normalized)
        expected = (images.shape[0], self.task.num_outputs, *images.shape[2:])
        if tuple(logits.shape) != expected:
            raise ConfigError(f"the network must give logits of shape {expected}, got {tuple(logits.shape)}")
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch; of several processes it is the whole batch's, in each of them."""
        logits, mask = self(batch["image"]), batch["mask"]
        if self._processes > 1:
            logits, mask = gathered(logits), gathered(mask.byte())  # 255 marks what is ignored: ids fit
        loss: Tensor = self.loss(logits, mask)
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(mask), sync_dist=True
        )  # fmt: skip
        # Gradients are averaged over the processes, each of which holds those of its own part: their sum is wanted.
        return loss * self._processes if self._processes > 1 else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds one batch to the scores."""
        logits = self(batch["image"]).float()
        images = int((batch["index"] != NOTHING).sum()) if "index" in batch else len(logits)
        self.mean_loss.update(self.loss(logits, batch["mask"]), images)
        probabilities = logits.softmax(dim=1) if self.task.mode == "multiclass" else logits.sigmoid()
        self.scores.update(probabilities, batch["mask"])
        self.calibration.update(probabilities, batch["mask"])

    def on_validation_epoch_end(self) -> None:
        """Logs the scores over the whole set and starts afresh."""
        self.log("val_loss", self.mean_loss.compute(), sync_dist=True)
        scores = self.scores.compute()
        wanted = {name: value for name, value in scores.items() if name.split("/")[0] in {"iou", "dice"}}
        wanted["ece"] = self.calibration.compute()["ece"]
        for name, value in wanted.items():
            self.log(f"val_{name}", value.float(), prog_bar=name == "iou", sync_dist=True)
        self.mean_loss.reset()
        self.scores.reset()
        self.calibration.reset()

    def configure_optimizers(self) -> Any:
        """The optimizer alone."""
        return self._make_optimizer(self.network)
