"""Batch-norm statistics for weights that no training step has seen: exact over all pixels of a data set."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.modes import modes_kept

if TYPE_CHECKING:
    from torch import nn

IMAGE_KEYS = ("image", "images", "input", "inputs", "x", "pixel_values")
"""Where a batch that is a mapping holds its images; the first of these counts."""


def refresh_batch_norm(model: nn.Module, loader: Iterable[Any]) -> None:
    """Measures the mean and variance of what reaches each batch-norm layer, over all pixels of all batches.

    Averaged weights need it: their layers pass on other values than those of any model that went into the average.

    Only layers that `model.train()` puts in train mode are refreshed, so the encoder of an smp model after
    `freeze_encoder()` keeps its statistics. While it runs, these layers normalise by each batch's own statistics, as in
    training, and everything else (dropout, drop path) is in evaluation mode: the result is deterministic, and no random
    number is drawn. Only `running_mean` and `running_var` change, to the pooled mean and the population variance
    (NumPy's `ddof=0`); modes, `momentum` and `num_batches_tracked` stay, and after an exception everything does.

    A layer that gets one value per channel (a batch of one after global pooling) normalises it by what was pooled so
    far. A layer that gets fewer than two values in all keeps its statistics. Padded pixels count like all others.

    With an initialised process group every process must call this with its own batches; all get the statistics that one
    process would find in all the batches.

    Args:
        model: Changed in place; takes the images and runs on its own device. Without such layers nothing happens.
        loader: Batches: a tensor `(N, C, H, W)`, a tuple or list that begins with one, or a mapping with one under
            `image` (else `images`, `input`, `inputs`, `x`, `pixel_values`). Whole numbers become float32.

    Raises:
        ConfigError: The loader is empty, or a batch has none of these forms.

    References:
        Izmailov et al., UAI 2018, arXiv:1803.05407, algorithm 1: "Compute BatchNorm statistics for the averaged
        weights".

    Example:
        >>> layer = torch.nn.BatchNorm1d(1)
        >>> refresh_batch_norm(layer, [torch.zeros(8, 1), torch.full((1, 1), 9.0)])
        >>> layer.running_mean, layer.running_var
        (tensor([1.]), tensor([8.]))
    """
    if isinstance(model, DataParallel | DistributedDataParallel):
        model = model.module  # a wrapper would send buffers around at each batch
    layers = _refreshed_layers(model)
    if not layers:
        return
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    statistics = [_Statistics(layer) for layer in layers]
    with torch.no_grad(), _put_back(model):
        for module in model.modules():
            module.training = False  # not eval(): smp's leaves the dropout of a frozen encoder in train mode
        with _watched(layers, statistics):
            batches = 0
            for batch in loader:
                model(_images_of(batch).to(device, non_blocking=True))
                batches += 1
        batches = _shared(statistics, batches, device)
        if not batches:
            raise ConfigError("expected at least one batch to refresh batch norm, got an empty loader")
    with torch.no_grad():
        for layer, found in zip(layers, statistics, strict=True):
            if found.count > 1:
                _write(layer, found.mean, found.variance)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether `refresh_batch_norm` would touch any layer of `model`.

    Example:
        >>> has_batch_norm(torch.nn.BatchNorm2d(3)), has_batch_norm(torch.nn.GroupNorm(1, 3))
        (True, False)
    """
    return bool(_refreshed_layers(model))


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running means and variances of all batch-norm layers, by their names in `model`."""
    return {name: buffer.clone() for name, buffer in _running_buffers(model)}


@torch.no_grad()
def restore_statistics(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Writes back what `running_statistics` returned for the same model."""
    for name, buffer in _running_buffers(model):
        buffer.copy_(statistics[name])


def _running_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            for name in ("running_mean", "running_var"):
                buffer = getattr(layer, name)
                if buffer is not None:
                    yield f"{path}.{name}", buffer


class _Statistics:
    """Mean and variance of one layer's input, shape `(C,)`, merged batch by batch in float64 where there is one."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        dtype = torch.float32 if layer.running_mean.device.type == "mps" else torch.float64
        self.count = 0.0
        self.mean = torch.zeros_like(layer.running_mean, dtype=dtype)
        self.squares = torch.zeros_like(self.mean)
        """Sum of squared deviations from the mean."""

    @property
    def variance(self) -> Tensor:
        return self.squares / max(self.count, 1.0)

    def add(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Chan, Golub and LeVeque's update: no sums of large squares that cancel."""
        total = self.count + count
        distance = mean.to(self.mean) - self.mean
        self.mean += distance * (count / total)
        self.squares += variance.to(self.mean) * count + distance.square() * (self.count * count / total)
        self.count = total


def _refreshed_layers(model: nn.Module) -> list[_BatchNorm]:
    """Layers with running statistics that `model.train()` puts in train mode; leaves all modes as they are."""
    with modes_kept(model):
        for module in model.modules():
            module.training = False
        model.train()
        return [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            and module.training
            and module.running_mean is not None
            and module.running_var is not None
        ]


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Modes and running statistics are afterwards as they were, to the bit, whatever happens in between."""
    statistics = running_statistics(model)
    try:
        with modes_kept(model):
            yield
    finally:
        restore_statistics(model, statistics)


@contextlib.contextmanager
def _watched(layers: list[_BatchNorm], statistics: list[_Statistics]) -> Iterator[None]:
    """Each call of a layer is measured, and normalises by the batch's own statistics.

    They are put where the layer, in evaluation mode, reads them: the same numbers as in train mode, without momentum,
    counters, the error about a single value, or other processes (`SyncBatchNorm`).
    """

    def hook_for(found: _Statistics) -> Any:
        def measure(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0] if inputs[0].dtype == torch.float64 else inputs[0].float()
            count = values.numel() // max(values.shape[1], 1)
            if not count:
                return
            mean, variance = _moments(values)
            found.add(count, mean, variance)
            if count == 1:
                mean, variance = found.mean, found.variance
            _write(layer, mean, variance)

        return measure

    handles = []
    try:
        for layer, found in zip(layers, statistics, strict=True):
            handles.append(layer.register_forward_pre_hook(hook_for(found)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each channel, `(C,)`, in two passes, so that no large squares cancel."""
    others = [0, *range(2, values.ndim)]
    if values.device.type != "cpu":
        variance, mean = torch.var_mean(values, others, correction=0)
        return mean, variance
    mean = values.mean(others, keepdim=True)  # two vectorised sums: `var_mean` has one slow loop here, twice to tenfold
    return mean.flatten(), (values - mean).square_().mean(others)


def _write(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)


def _shared(statistics: list[_Statistics], batches: int, device: torch.device) -> int:
    """Merges the statistics of all processes; returns the number of batches that all of them saw.

    Two sums: counts and means first, then squared deviations from the mean that all share, so that nothing cancels.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return batches
    counts = torch.tensor([batches, *(found.count for found in statistics)], dtype=torch.float64, device=device)
    sums = torch.cat([found.mean.to(counts) * found.count for found in statistics])
    dist.all_reduce(counts)
    dist.all_reduce(sums)
    totals = counts[1:].tolist()
    sizes = [len(found.mean) for found in statistics]
    means = [one / max(total, 1.0) for one, total in zip(torch.split(sums, sizes), totals, strict=True)]
    squares = torch.cat(
        [
            found.squares.to(counts) + (found.mean.to(counts) - mean).square() * found.count
            for found, mean in zip(statistics, means, strict=True)
        ]
    )
    dist.all_reduce(squares)
    for found, total, mean, part in zip(statistics, totals, means, torch.split(squares, sizes), strict=True):
        found.count, found.mean, found.squares = total, mean, part
    return int(counts[0])


def _images_of(batch: Any) -> Tensor:
    """The images of a batch in any of the usual forms, floating.

    Raises:
        ConfigError: No images in it.
    """
    found = batch
    if isinstance(batch, Mapping):
        key = next((key for key in IMAGE_KEYS if key in batch), None)
        if key is None:
            raise ConfigError(
                f"expected a batch with its images under one of {', '.join(IMAGE_KEYS)}, got the keys "
                f"{', '.join(map(str, batch)) or 'none'}: rename one of them"
            )
        found = batch[key]
    elif isinstance(batch, tuple | list) and batch:
        found = batch[0]
    if not isinstance(found, Tensor):
        raise ConfigError(
            "expected batches of images: a tensor, a tuple or list that begins with one, or a mapping that holds one, "
            f"got {type(found).__name__}" + ("" if found is batch else f" in a {type(batch).__name__}")
        )
    return found if found.is_floating_point() else found.float()
