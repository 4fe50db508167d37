"""A member: a network with its own normalisation, kept as `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smp_ensemble.architectures import check_network, from_config, network_config
from smp_ensemble.exceptions import NetworkError
from smp_ensemble.untrusted import MEBI, read_json, shorten

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from smp_ensemble.data.normalization import Normalization

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_BYTES = 1 * MEBI
_HEADER_ERRORS = (ValueError, KeyError, TypeError, RuntimeError, OverflowError)  # of types and shapes nobody has


class Member(nn.Module):
    """Raw images `(N, C, H, W)` -> logits `(N, K, H, W)`: normalisation, then the network.

    Args:
        network: Gives logits for normalised images.
        normalization: What the network's input goes through first.
        source: The tracked snapshot it is, `models:/m-...`; empty: not tracked.
        training_images: Digests of the images it was trained on, for the leak guard; None: unknown.

    Attributes:
        threshold: What it would use alone: tuned on validation data when it joined an ensemble.
        temperature: The same. An ensemble is compared with members at their best, not with those it left behind.

    Raises:
        NetworkError: The network has an activation or an auxiliary head.
    """

    def __init__(
        self,
        network: nn.Module,
        normalization: Normalization,
        *,
        source: str = "",
        training_images: Collection[str] | None = None,
    ) -> None:
        check_network(network)
        super().__init__()
        self.network = network
        self.normalization = normalization
        self.source = source
        self.training_images = None if training_images is None else frozenset(training_images)
        self.threshold = 0.5
        self.temperature = 1.0

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, K, H, W)` of raw images `(N, C, H, W)`; H and W must fit the network's output stride."""
        logits = self.network(self.normalization(images))
        assert isinstance(logits, Tensor)
        return logits


def save_network(network: nn.Module, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` to `folder`, as `smp.from_pretrained(folder)` opens them, offline.

    Raises:
        NetworkError: Nobody could build the network again from a configuration.
    """
    config = network_config(network)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n"
    )
    # Contiguous copies: tensors that share storage are written twice rather than refused.
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_network(folder: Path) -> nn.Module:
    """Reads what `save_network` wrote; the network comes back in evaluation mode, on the CPU.

    Raises:
        NetworkError: The configuration is not JSON, names no class of smp, or does not fit the weights.
    """
    network = from_config(read_config(folder), weights_size(folder))
    load_weights(network, read_weights(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    return network.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """What a network's `config.json` holds.

    Raises:
        NetworkError: It is missing, too large, too deep, or no JSON object.
    """
    try:
        config = read_json(folder / CONFIG_FILE, CONFIG_BYTES, links=True)  # as a hub's cache has it
    except (OSError, ValueError) as error:
        raise NetworkError(f"cannot read {folder / CONFIG_FILE}: {shorten(error)}") from error
    if not isinstance(config, dict):
        raise NetworkError(f"expected an object in {folder / CONFIG_FILE}, got {type(config).__name__}")
    return config


def weights_size(folder: Path) -> int:
    """Bytes of a network's file of weights.

    Raises:
        NetworkError: There is none.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise NetworkError(f"cannot read {path}: expected a file of weights, found none")
    return path.stat().st_size


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        NetworkError: It is missing, or its header does not fit its content.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, *_HEADER_ERRORS) as error:
        raise NetworkError(f"cannot read {path}: {shorten(error)}") from error


def load_weights(network: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Loads a state dict; the error names the first tensor that differs, with both shapes.

    Raises:
        NetworkError: A tensor is missing, unknown or of another shape.
    """
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise NetworkError(f"{where} lacks the tensor '{name}' {tuple(tensor.shape)}: other architecture?")
        if tensors[name].shape != tensor.shape:
            raise NetworkError(
                f"{where}: tensor '{name}' has shape {tuple(tensors[name].shape)}, the network expects "
                f"{tuple(tensor.shape)}: other architecture, encoder or number of classes?"
            )
    unknown = next((name for name in tensors if name not in expected), None)
    if unknown is not None:
        raise NetworkError(f"{where} holds the tensor '{unknown}', which the network does not have")
    network.load_state_dict(tensors)
