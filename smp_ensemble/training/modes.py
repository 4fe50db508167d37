"""A network as it predicts, for a while: evaluation mode, no gradients, a number format; then as it was before."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from smp_ensemble.precision import autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextlib.contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Each module's mode is afterwards what it was, whatever happens in between: a frozen encoder stays frozen."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def predicting(network: nn.Module, precision: str) -> Iterator[torch.device]:
    """While the block runs, what the network computes is what prediction would.

    Args:
        network: On any device.
        precision: Lightning's words.

    Yields:
        The device of the network.
    """
    device, dtype = next(network.parameters()).device, autocast_dtype(precision)
    with modes_kept(network), torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        network.eval()
        yield device
