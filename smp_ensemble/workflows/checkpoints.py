"""Checkpoints of other people's trainings: found, read without executing anything, and fitted into a network."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smp_ensemble.architectures import create_network, from_config
from smp_ensemble.ensembling.member import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_weights,
    read_config,
    read_weights,
    weights_size,
)
from smp_ensemble.exceptions import ConfigError, NetworkError

if TYPE_CHECKING:
    from smp_ensemble.typing import Task

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights inside a checkpoint."""


def find_checkpoints(spec: str) -> list[Path]:
    """Files and smp folders that `spec` names: paths or globs, separated by commas.

    Raises:
        ConfigError: A part that names nothing, or a file of another kind.
    """
    found: list[Path] = []
    for part in (one.strip() for one in spec.split(",")):
        paths = sorted(Path(one) for one in glob.glob(part, recursive=True))  # noqa: PTH207 (absolute patterns)
        if not paths:
            raise ConfigError(f"no checkpoint found at '{part}': expected {', '.join(SUFFIXES)} or a folder of smp's")
        for path in paths:
            folder = path.is_dir() and (path / CONFIG_FILE).is_file()
            if not folder and path.suffix.lower() not in SUFFIXES:
                raise ConfigError(f"'{path}' is no checkpoint: expected {', '.join(SUFFIXES)} or a folder of smp's")
            found.append(path)
    return found


def load_checkpoint(
    path: Path, task: Task, *, arch: str, encoder_name: str, model_options: Mapping[str, Any] | None = None
) -> nn.Module:
    """The network of one checkpoint, in evaluation mode.

    Args:
        path: A file of weights, or a folder of smp's `save_pretrained`, which says its architecture itself.
        task: What the network has to fit.
        arch: The architecture of a file of weights.
        encoder_name: Its encoder.
        model_options: Its further arguments.

    Raises:
        NetworkError: It cannot be read without unpickling code, or does not fit the architecture or the data.
    """
    if path.is_dir():
        config = read_config(path)
        network = from_config(config, weights_size(path))
        outputs, bands = config.get("classes"), config.get("in_channels")
        if (outputs, bands) != (task.num_outputs, task.in_channels):
            raise NetworkError(
                f"{path} has {outputs} outputs and {bands} bands, the data needs {task.num_outputs} and "
                f"{task.in_channels}"
            )
        load_weights(network, read_tensors(path / WEIGHTS_FILE), str(path))
        return network.eval()
    network = create_network(
        arch,
        encoder_name=encoder_name,
        in_channels=task.in_channels,
        num_outputs=task.num_outputs,
        model_options=model_options,
    )
    load_weights(network, _without_prefix(read_tensors(path), network), str(path))
    return network.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, whatever wraps it; never executes anything that a pickle may hold.

    Raises:
        NetworkError: Not a checkpoint, or one that holds more than tensors and plain values.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return read_weights(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except NetworkError:
        raise
    except OSError as error:
        raise NetworkError(f"cannot read {path}: {error}") from error
    except Exception as error:  # torch raises whatever its unpickler raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NetworkError(
            f"cannot read {path} without executing code that it holds: {reason} "
            "Save its weights alone: torch.save(model.state_dict(), path), or as safetensors"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise NetworkError(f"expected a state dict in {path}, got {type(content).__name__}")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Drops what a wrapper put before each name (`model.`, `network.`, `module.`), and other modules' tensors."""
    expected = next(iter(network.state_dict()))
    prefix = next((name.removesuffix(expected) for name in tensors if name.endswith(expected)), "")
    if not prefix:
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
