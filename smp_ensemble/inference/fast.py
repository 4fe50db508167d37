"""A member in its fastest form for a device: modules of its own; the member stays as it is."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smp_ensemble.architectures import output_stride
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.folding import fold_batch_norms, twin_of
from smp_ensemble.inference.upsampling import merge_upsampling

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLE_SIDE = 64
"""Least height and width of the image that a network is tried on."""

logger = logging.getLogger(__name__)


def fast_form(
    member: nn.Module, device: torch.device, dtype: torch.dtype | None, *, compiled: bool = False
) -> nn.Module:
    """The member as the engine runs it: batch norms folded, channels last, weights in the type that multiplies.

    On a CPU a decoder's doubling of maps is merged into its convolutions, too.

    Weights of convolutions and linear layers are cast once instead of in every call, which changes no result: autocast
    would round them alike. All other tensors, normalisation and norms that stay, keep float32. The member keeps its own
    weights where they are, so a device holds each weight once, in its short type.

    Args:
        member: A network, or a `Member`, in evaluation mode.
        device: Where it will run.
        dtype: What `torch.autocast` will compute in; None: float32.
        compiled: Whether `torch.compile` makes kernels of it; see `Compiled`.
    """
    bands = _bands(member)
    folded = member
    if bands is not None:
        network = member.network if isinstance(member, Member) else member
        side = math.lcm(EXAMPLE_SIDE, output_stride([network]))
        where = next(iter(member.parameters())).device
        example = torch.zeros(1, bands, side, side, device=where)
        folded = fold_batch_norms(member, example)
        if device.type == "cpu":  # where it was measured to pay
            folded = merge_upsampling(folded, example)

    def convert(layer: nn.Module, tensor: Tensor) -> Tensor:
        multiplies = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and tensor.is_floating_point()
        moved = tensor.to(device, dtype if multiplies and dtype is not None else tensor.dtype)
        return moved.contiguous(memory_format=torch.channels_last) if moved.ndim == 4 else moved

    fast = twin_of(folded, convert)
    return Compiled(fast) if compiled else fast


def _bands(member: nn.Module) -> int | None:
    """Bands of the images that a member takes; None: it does not say."""
    if isinstance(member, Member):
        return member.normalization.in_channels
    first = next((layer for layer in member.modules() if isinstance(layer, nn.Conv2d)), None)
    return None if first is None else first.in_channels


class Compiled(nn.Module):
    """A network with kernels by `torch.compile`, made at its first image and kept; other sizes make one more.

    Constants are folded into the kernels (inductor's freezing). Where that fails, such as without a C++ compiler, a
    warning says so once, and the network runs as it is.

    Args:
        network: In evaluation mode.
    """

    def __init__(self, network: nn.Module, compiler: Callable[..., Any] = torch.compile) -> None:
        super().__init__()
        self.network = network
        self._run = compiler(network, options={"freezing": True})
        self._failed = False

    def forward(self, images: Tensor) -> Tensor:
        """What the network gives for raw images `(N, C, H, W)`."""
        if not self._failed:
            try:
                found: Tensor = self._run(images)
            except Exception as error:  # noqa: BLE001 (whatever the compiler raises, the network itself still runs)
                self._failed = True
                reason = str(error).strip().splitlines() or [type(error).__name__]
                logger.warning(
                    "torch.compile failed, the network runs without: %s; is a C++ compiler installed (apt-get install "
                    "g++)?",
                    reason[0],
                )  # fmt: skip
            else:
                return found
        plain: Tensor = self.network(images)
        return plain
