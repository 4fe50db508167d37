"""Building the network of a stranger's file: no address in its options, no more memory than goes with its weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smp_ensemble.exceptions import NetworkError

if TYPE_CHECKING:
    from collections.abc import Mapping

SPARE_BYTES = 2 << 30
"""What building may take beside twice the size of the weights: encoders are built whole, and cut to their depth."""

MOST_TENSORS = 20_000
"""Created while one network is built; the largest encoders take about two thousand."""

MOST_NUMBER = 1 << 14
"""In a configuration: channels, sizes, layers."""

BYTES = 4
"""Of a number in a network that is built."""

MOST_TEXT = 200
MOST_ITEMS = 1000

ADDRESSES = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "checkpoint_path",
        "cache_dir",
        "features_only",
        "device",
        "dtype",
    }
)
"""Options of `timm.create_model` that name weights to fetch, or where things are: a finished network needs none."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options of one of smp's networks that would fetch or open anything, or are out of all bounds.

    Raises:
        NetworkError: Names the option.
    """
    pending: list[tuple[str, Any]] = list(options.items())
    if len(pending) > MOST_ITEMS:
        raise NetworkError(f"config.json holds {len(pending)} options, expected at most {MOST_ITEMS}")
    while pending:
        name, value = pending.pop()
        if name in ADDRESSES:
            raise NetworkError(f"config.json names '{name}': a finished network fetches no weights; refused")
        if isinstance(value, dict | list) and len(value) > MOST_ITEMS:
            raise NetworkError(f"config.json has {len(value)} values at '{name}', expected at most {MOST_ITEMS}")
        if isinstance(value, dict):
            pending.extend((str(inner), one) for inner, one in value.items())
        elif isinstance(value, list):
            pending.extend((name, inner) for inner in value)
        elif isinstance(value, str) and (len(value) > MOST_TEXT or set(value) & set(":/\\")):
            raise NetworkError(f"config.json names a place at '{name}', expected a plain word: refused")
        elif isinstance(value, int | float) and not abs(value) <= MOST_NUMBER:
            raise NetworkError(f"config.json has {value} at '{name}', expected a number up to {MOST_NUMBER}")


class Budget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops a network that grows beyond its weights while it is built, before the memory is asked for.

    Args:
        weights_bytes: Size of the file that the weights are in.

    Raises:
        NetworkError: From within, at the tensor that would be too much.
    """

    def __init__(self, weights_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights_bytes = weights_bytes
        self._left = 2 * weights_bytes + SPARE_BYTES
        self._tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation, unless its inputs, or the tensor that it makes from nothing, are too large."""
        kwargs = kwargs or {}
        flat = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else (arg,))]
        tensors = [one for one in flat if isinstance(one, torch.Tensor)]
        if str(kwargs.get("device")) == "meta" or any(one.is_meta for one in tensors):
            self._count(0 if tensors else 1)
        elif tensors:
            times = _elements(args[1:]) if func.overloadpacket is torch.ops.aten.repeat else 1
            self._check(BYTES * times * sum(one.numel() for one in tensors))
        else:
            self._count(1)
            size = BYTES * _elements(args)
            self._check(size)
            self._left -= size
        return func(*args, **kwargs)

    def _count(self, tensors: int) -> None:
        self._tensors += tensors
        if self._tensors > MOST_TENSORS:
            raise NetworkError(f"config.json describes a network of more than {MOST_TENSORS} tensors: refused")

    def _check(self, size: int) -> None:
        if size > self._left:
            raise NetworkError(
                f"config.json describes a network far larger than its weights, which are {self._weights_bytes} bytes: "
                "refused before memory is asked for"
            )


def _elements(args: tuple[Any, ...]) -> int:
    """How many elements a tensor has that is made from these arguments: a shape, or the ends of a range."""
    shape = next((arg for arg in args if isinstance(arg, list | tuple)), None)
    if shape is not None:
        return math.prod(abs(int(side)) for side in shape)
    return max((abs(int(arg)) for arg in args if isinstance(arg, int | float) and math.isfinite(arg)), default=1)
