"""Boosting: after each snapshot, training images are drawn by the loss that the snapshots together leave on them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import Callback

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.precision import autocast_dtype
from smp_ensemble.training.processes import of_first
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import lightning.pytorch as pl
    from torch import Tensor, nn

    from smp_ensemble.data.loading import Batch
    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.training.callback import SnapshotCallback
    from smp_ensemble.typing import Mode, Resampling

LEAST_PROBABILITY = 1e-6
"""What the logarithm sees at least: a confident error costs 13.8 nats and not infinity."""


def image_losses(probabilities: Tensor, target: Tensor, mode: Mode) -> Tensor:
    """The mean cross-entropy of each image over its valid pixels, shape `(N,)`; 0 for an image without any.

    Args:
        probabilities: Shape `(N, K, H, W)`.
        target: Class ids `(N, H, W)`, in multilabel mode `(N, K, H, W)`; 255 is ignored.
        mode: Says whether channels compete.
    """
    valid = target != IGNORE_INDEX
    label = torch.where(valid, target, 0)
    if mode == "multiclass":
        chosen = probabilities.gather(1, label.unsqueeze(1))[:, 0]
    else:
        foreground = probabilities if mode == "multilabel" else probabilities[:, 0]
        chosen = torch.where(label == 1, foreground, 1 - foreground)
    losses = torch.where(valid, -chosen.clamp_min(LEAST_PROBABILITY).log(), 0.0)
    return losses.flatten(1).sum(dim=1) / valid.flatten(1).sum(dim=1).clamp_min(1)


class Boosting(Callback):
    """Keeps the weights of the snapshots so far, and measures after each what their mean still gets wrong.

    The running ensemble is the mean of the snapshots' probabilities on one crop of each training image, a fresh one
    after each snapshot. Memory holds the snapshots' weights, on the CPU and in checkpoints, so that a resume goes on
    exactly; M snapshots cost M(M - 1)/2 passes over the training crops without gradients.

    Args:
        method: Turns losses into weights.
        snapshots: Says when a snapshot was taken, and which network it was.
        normalization: What images go through before the network.
        mode: `binary`, `multiclass` or `multilabel`.
        crops: Gives batches of each training image once, in order, from a seed.
        precision: Lightning's words.

    Attributes:
        weights: Of each training image, shape `(n,)`; None until the first snapshot.
        losses: What they come from.
    """

    def __init__(
        self,
        method: Resampling,
        snapshots: SnapshotCallback,
        *,
        normalization: Normalization,
        mode: Mode,
        crops: Callable[[int], Iterable[Batch]],
        precision: str,
    ) -> None:
        self._method = method
        self._snapshots = snapshots
        self._normalization = normalization
        self._mode: Mode = mode
        self._crops = crops
        self._dtype = autocast_dtype(precision)
        self._members: list[dict[str, Tensor]] = []
        self.weights: npt.NDArray[np.float64] | None = None
        self.losses: npt.NDArray[np.float64] | None = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the losses anew if a snapshot was taken and training goes on."""
        step = trainer.global_step
        if not self._snapshots.took(step) or trainer.current_epoch + 1 == trainer.max_epochs:
            return
        network = self._snapshots.network_of(pl_module)
        self._members.append({name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()})
        losses = torch.from_numpy(self.measure(network, seed=len(self._members)))
        self.losses = of_first(losses, next(network.parameters()).device).numpy()  # all draw the same images
        weights = np.asarray(self._method.image_weights(self.losses), dtype=np.float64)
        if weights.shape != self.losses.shape or not np.isfinite(weights).all() or not (weights >= 0).all():
            raise ConfigError(
                f"{type(self._method).__name__}.image_weights must give {len(self.losses)} finite numbers of 0 or "
                f"more, got an array of shape {weights.shape}"
            )
        self.weights = weights if weights.sum() > 0 else np.ones_like(weights)

    @torch.no_grad()
    def measure(self, network: nn.Module, seed: int) -> npt.NDArray[np.float64]:
        """The loss of the mean of all snapshots on a crop of each training image, shape `(n,)`; `network` is copied."""
        device = next(network.parameters()).device
        scratch = copy.deepcopy(network).eval()
        losses = []
        for batch in self._crops(seed):
            images = self._normalization(batch["image"].to(device))
            total: Tensor | None = None
            for member in self._members:  # inside, so that memory holds the probabilities of one batch
                scratch.load_state_dict(member)
                with torch.autocast(device.type, self._dtype, enabled=self._dtype is not None):
                    logits = scratch(images).float()
                found = logits.softmax(dim=1) if self._mode == "multiclass" else logits.sigmoid()
                total = found if total is None else total.add_(found)
            assert total is not None
            losses.append(image_losses((total / len(self._members)).cpu(), batch["mask"], self._mode))
        return torch.cat(losses).double().numpy()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the snapshots' weights, and the images'."""
        weights = None if self.weights is None else torch.from_numpy(self.weights)
        return {"members": list(self._members), "weights": weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._members = list(state_dict["members"])
        weights = state_dict["weights"]
        self.weights = None if weights is None else weights.numpy()
