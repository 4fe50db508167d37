"""Batch norm over the whole batch of several processes, where torch has none: its `SyncBatchNorm` needs CUDA.

Mean and variance of a batch are those that one process would find in all parts together, and so are the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """The sum over all processes; each one's gradient is the sum of the gradients in all of them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:  # noqa: ARG004 (torch's signature)
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm(_BatchNorm):
    """A batch-norm layer whose batch is that of all processes; in evaluation mode it is like any other."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's own name)
        """Any number of dimensions from 2 on, as the layer in whose place this stands has checked before."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        """Normalises `(N, C, ...)` by the mean and variance over all processes' values of each channel."""
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        values = input if input.dtype == torch.float64 else input.float()
        others = [0, *range(2, values.ndim)]
        shape = [1, -1] + [1] * (values.ndim - 2)
        own = values.new_full((1,), values.numel() // values.shape[1])
        sums = _Sum.apply(torch.cat([values.sum(others), own]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(others)) / count
        self._remember(mean.detach(), variance.detach(), count)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        result: Tensor = normalised.to(input.dtype)
        return result

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """The running statistics, as torch's layer keeps them: with the variance of a sample."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_((variance * count / (count - 1).clamp_min(1)).to(self.running_var), share)


class BatchNormSync(LayerSync):
    """Puts `SyncedBatchNorm` in the place of each batch-norm layer while training lasts, and then the layers back.

    Parameters and buffers stay the same objects under the same names.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[nn.Module, str, _BatchNorm]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Replaces the layers inside `model`."""
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm) and not isinstance(child, SyncedBatchNorm):
                    self._replaced.append((parent, name, child))
                    setattr(parent, name, _synced(child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Puts the layers back, with what they have learned."""
        for parent, name, layer in self._replaced:
            layer.train(getattr(parent, name).training)
            setattr(parent, name, layer)
        self._replaced.clear()
        return model


def _synced(layer: _BatchNorm) -> SyncedBatchNorm:
    """A layer with the same parameters and buffers."""
    made = SyncedBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    made.weight, made.bias = layer.weight, layer.bias
    made.running_mean, made.running_var = layer.running_mean, layer.running_var
    made.num_batches_tracked = layer.num_batches_tracked
    return made.train(layer.training)
