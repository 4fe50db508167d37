"""Running averages of weights beside the training model's: uniform (SWA) and exponential (EMA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


class RunningAverage:
    """What both averages share: floating tensors are averaged, all others are copied from the latest network.

    Batch-norm statistics among them are averaged too, and mean nothing until they are refreshed (`refresh_batch_norm`).

    Attributes:
        count: Networks taken in so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._weights: dict[str, Tensor] = {}

    def _share_of_new(self) -> float:
        """The weight of the next network in the average, in 0..1; that of the first is 1."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Takes the weights of `network` after `step` completed steps into the average."""
        share = self._share_of_new()
        for name, tensor in network.state_dict().items():
            average = self._weights.get(name)
            if average is None:
                self._weights[name] = tensor.detach().clone()
                continue
            if average.device != tensor.device:  # after a resume
                average = self._weights[name] = average.to(tensor.device)
            if average.is_floating_point():
                average.lerp_(tensor, share)
            else:
                average.copy_(tensor)
        self.count += 1

    def weights(self) -> Mapping[str, Tensor]:
        """The average, as a state dict of the network.

        Raises:
            ConfigError: No network was taken in yet.
        """
        if not self.count:
            raise ConfigError("expected an average of at least one network, got none: averaging has not started yet")
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"count": self.count, "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.count = int(state["count"])
        self._weights = {name: tensor.clone() for name, tensor in state["weights"].items()}


class UniformAverage(RunningAverage):
    """The mean of the weights at epoch ends: `average <- average + (weights - average) / (n + 1)`.

    Args:
        start: Share of the epochs after which averaging starts.
        cycle_epochs: Epochs from one model in the average to the next; the last epoch is always one of them.

    References:
        Izmailov et al., UAI 2018, arXiv:1803.05407, algorithm 1.
    """

    def __init__(self, start: float = 0.75, cycle_epochs: int = 1) -> None:
        super().__init__()
        self._start, self._cycle_epochs = start, cycle_epochs

    def is_due(self, step: int, epochs: int, steps_per_epoch: int) -> bool:
        """After each cycle's last epoch; the start counts as one, as it does in the paper."""
        epoch, inside = divmod(step, steps_per_epoch)
        since = epoch - swa_start_epoch(self._start, epochs, self._cycle_epochs)
        return not inside and epoch > 0 and since >= 0 and since % self._cycle_epochs == 0

    def _share_of_new(self) -> float:
        return 1 / (self.count + 1)


class ExponentialAverage(RunningAverage):
    """`average <- d * average + (1 - d) * weights` after each step, with `d = min(decay, 1 - (1 + t / gamma)^-power)`.

    t counts updates from 0, so that the first one makes the average equal to the weights.

    Args:
        decay: The largest d.
        gamma: Steps of the warm-up; larger ones lengthen it.
        power: How fast d approaches 1.

    References:
        Tarvainen and Valpola, "Mean teachers", NeurIPS 2017, arXiv:1703.01780; the warm-up is timm's `ModelEmaV3`.
    """

    def __init__(self, decay: float = 0.999, gamma: float = 1.0, power: float = 0.75) -> None:
        super().__init__()
        self._decay, self._gamma, self._power = decay, gamma, power

    def is_due(self, step: int, epochs: int, steps_per_epoch: int) -> bool:
        """After every step."""
        return step > 0

    def decay_at(self, update: int) -> float:
        """The factor d of an update, counted from 0."""
        warm: float = 1 - (1 + update / self._gamma) ** -self._power
        return min(self._decay, warm)

    def _share_of_new(self) -> float:
        return 1 - self.decay_at(self.count)


def swa_start_epoch(start: float, epochs: int, cycle_epochs: int) -> int:
    """Completed epochs after which averaging starts: about `start * epochs`, whole cycles before the last epoch.

    Example:
        >>> swa_start_epoch(0.75, epochs=20, cycle_epochs=1), swa_start_epoch(0.75, epochs=20, cycle_epochs=2)
        (15, 16)
    """
    wanted = min(round(start * epochs), epochs - cycle_epochs)
    return wanted + (epochs - wanted) % cycle_epochs
