"""The network inside a LightningModule: found, and lent other weights for a while."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from smp_ensemble.architectures import network_config
from smp_ensemble.exceptions import NetworkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn


def find_network(module: nn.Module) -> nn.Module:
    """The one network inside a LightningModule that could be built again from a configuration.

    Raises:
        NetworkError: There is none, or more than one.
    """
    found: list[tuple[str, nn.Module]] = []
    covered: set[str] = set()
    for name, part in module.named_modules():
        if any(name.startswith(f"{parent}.") for parent in covered if parent):
            continue
        try:
            network_config(part)
        except NetworkError:
            continue
        covered.add(name)
        found.append((name, part))
    if len(found) != 1:
        names = ", ".join(f"'{name}'" for name, _ in found) or "none"
        raise NetworkError(
            f"expected one segmentation network in {type(module).__name__}, found {names}: "
            "say which as SnapshotCallback(..., network=lambda module: module.NAME)"
        )
    return found[0][1]


@contextlib.contextmanager
def holding(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets `network` hold other weights and buffers for a while; then its own are back, bit for bit, come what may."""
    own = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    try:
        copy_into(network, weights)
        yield
    finally:
        copy_into(network, own)


@torch.no_grad()
def copy_into(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies values into the tensors of `network`, which stay the same objects: optimizers hold on to them."""
    for name, tensor in network.state_dict().items():
        tensor.copy_(weights[name])
