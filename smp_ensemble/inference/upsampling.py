"""Doubling by nearest neighbours merged into the convolution after it, in decoders of known classes: fewer products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from segmentation_models_pytorch.base.modules import Attention, Conv2dReLU
from segmentation_models_pytorch.decoders.manet.decoder import DecoderBlock as MAnetBlock
from segmentation_models_pytorch.decoders.manet.decoder import MFABBlock
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock
from segmentation_models_pytorch.decoders.unetplusplus.decoder import DecoderBlock as UnetPlusPlusBlock
from torch import Tensor, nn

from smp_ensemble.inference.folding import agree, is_watched, twin_of

if TYPE_CHECKING:
    from collections.abc import Mapping

SUMS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))
"""Which entries of three a transposed convolution of four sums up, along one axis."""


class DoublingConvolution(nn.Module):
    """A 3x3 convolution of two maps, the small one doubled by nearest neighbours: 4/9 of the products for that one.

    Pixels of the doubled map are equal in pairs, so an output sees a 2x2 window of the small map, through sums of the
    kernel's entries. Which sums depends on the output's row and column being even or odd: all together are a transposed
    convolution with a 4x4 kernel, stride 2 and padding 1. Zeros around the doubled map are zeros around the small one.
    The map beside it is convolved by itself and added, so the two are never joined in memory.

    The 4x4 kernel holds 16/9 of the weights of its part. They are summed up in float64, and so rounded once.

    Args:
        convolution: Of `(N, C, H, W)`, padded by one pixel of zeros; it is not altered.
        channels: How many of the `C`, the first ones, are those of the small map.
    """

    def __init__(self, convolution: nn.Conv2d, channels: int) -> None:
        super().__init__()
        weight = convolution.weight.detach()
        sums = torch.tensor(SUMS, dtype=torch.float64, device=weight.device)
        kernel = torch.einsum("ai,ocij,bj->coab", sums, weight[:, :channels].double(), sums)
        outputs, beside = convolution.out_channels, convolution.in_channels - channels
        self.doubling = nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1, bias=False, device="meta")
        self.doubling.weight = nn.Parameter(kernel.to(weight.dtype), False)
        if convolution.bias is not None:
            self.doubling.bias = nn.Parameter(convolution.bias.detach(), False)
        self.beside: nn.Conv2d | None = None
        if beside:
            self.beside = nn.Conv2d(beside, outputs, 3, padding=1, bias=False, device="meta")
            self.beside.weight = nn.Parameter(weight[:, channels:].contiguous(), False)

    def forward(self, small: Tensor, size: tuple[int, int], beside: Tensor | None = None) -> Tensor:
        """The convolution's output `(N, K, *size)`.

        Args:
            small: `(N, channels, H, W)`, to be enlarged to `size`; what is not `(2H, 2W)` gets the plain convolution.
            size: Height and width.
            beside: `(N, C - channels, *size)`.
        """
        doubled = size == (2 * small.shape[2], 2 * small.shape[3])
        made: Tensor = self.doubling(small) if doubled else self._plainly(small, size)
        if self.beside is None:
            return made
        added: Tensor = self.beside(beside).add_(made)
        return added

    def _plainly(self, small: Tensor, size: tuple[int, int]) -> Tensor:
        """With the 3x3 kernel, which its sums determine; rare, and so not kept."""
        kernel = self.doubling.weight
        inverse = torch.linalg.pinv(torch.tensor(SUMS, dtype=torch.float64, device=kernel.device))
        weight = torch.einsum("ia,coab,jb->ocij", inverse, kernel.double(), inverse).to(kernel.dtype)
        return F.conv2d(F.interpolate(small, size=size, mode="nearest"), weight, self.doubling.bias, padding=1)


class _Block(nn.Module):
    """A decoder block from its first convolution on."""

    def __init__(self, block: Any, channels: int) -> None:
        super().__init__()
        convolution, *after = block.conv1
        self.first = DoublingConvolution(convolution, channels)
        self.rest = nn.Sequential(*after, block.conv2, getattr(block, "attention2", nn.Identity()))

    def _run(self, small: Tensor, size: tuple[int, int], skip: Tensor | None) -> Tensor:
        found: Tensor = self.rest(self.first(small, size, skip))
        return found


class SizedBlock(_Block):
    """A block that is told how large its output is, as Unet's are."""

    def forward(
        self, feature_map: Tensor, target_height: int, target_width: int, skip_connection: Tensor | None = None
    ) -> Tensor:
        """Shape `(N, K, target_height, target_width)`; parameters are smp's."""
        return self._run(feature_map, (target_height, target_width), skip_connection)


class DoublingBlock(_Block):
    """A block that always doubles, as those of UnetPlusPlus and the last of MAnet do."""

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Shape `(N, K, 2H, 2W)` for `x` of `(N, C, H, W)`; parameters are smp's."""
        return self._run(x, (2 * x.shape[2], 2 * x.shape[3]), skip)


class AttentiveBlock(DoublingBlock):
    """MAnet's block of multi-scale fusion. A channel's mean and factor are the same before doubling as after it."""

    def __init__(self, block: Any, channels: int) -> None:
        super().__init__(block, channels)
        self.hl_conv, self.SE_hl, self.SE_ll = block.hl_conv, block.SE_hl, block.SE_ll

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Shape `(N, K, 2H, 2W)` for `x` of `(N, C, H, W)`; parameters are smp's."""
        small = self.hl_conv(x)
        return super().forward(small * (self.SE_hl(small) + self.SE_ll(skip)), skip)


FORMS: Mapping[type[nn.Module], type[_Block]] = {
    UnetDecoderBlock: SizedBlock,
    UnetPlusPlusBlock: DoublingBlock,
    MAnetBlock: DoublingBlock,
    MFABBlock: AttentiveBlock,
}
"""What takes the place of a block, by the block's class itself."""


def merge_upsampling(module: nn.Module, example: Tensor) -> nn.Module:
    """The same function with fewer products: a module of its own, which shares all other tensors with `module`.

    One run on `example` shows how many channels a block enlarges. Blocks are replaced whose class and configuration are
    known to the last detail; all else stays as it is. So does everything if the result does not agree on random
    numbers, or if the module cannot be run on the example.

    Args:
        module: In evaluation mode; it is not altered.
        example: What it runs on, on its device.

    Returns:
        The twin with other blocks; `module` itself where there is nothing to merge.
    """
    if not any(_is_known(layer) for layer in module.modules()):
        return module
    noise = torch.empty_like(example).uniform_(0, 255, generator=torch.Generator(example.device).manual_seed(0))
    try:
        twin = twin_of(module)
        with torch.inference_mode(False), torch.no_grad():
            if not _merge(twin, example):
                return module
            same = agree(module, twin, noise)
    except Exception:  # noqa: BLE001 (a network of anyone's: what cannot be run or copied stays as it is)
        return module
    return twin if same else module


def _merge(twin: nn.Module, example: Tensor) -> int:
    """Replaces blocks in place; how many."""
    seen: dict[nn.Module, set[tuple[int, bool]]] = {}  # channels that a block enlarges, and whether a map was beside

    def watch(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        small, *more = *given, *named.values()
        beside = any(isinstance(value, Tensor) for value in more)
        seen.setdefault(block, set()).add((small.shape[1], beside))

    hooks = [
        layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in twin.modules() if _is_known(layer)
    ]  # fmt: skip
    twin(example)
    for hook in hooks:
        hook.remove()
    replaced = 0
    for parent in list(twin.modules()):
        for name, block in list(parent.named_children()):
            runs = seen.get(block, set())
            if len(runs) == 1 and (channels := _channels(block, *next(iter(runs)))) is not None:
                setattr(parent, name, FORMS[type(block)](block, channels))
                replaced += 1
    return replaced


def _channels(block: Any, given: int, beside: bool) -> int | None:
    """How many channels a known block doubles; None: its run was not one that the new block repeats."""
    inputs: int = block.conv1[0].in_channels
    if isinstance(block, MFABBlock):
        return inputs // 2 if beside else None
    attention = getattr(block, "attention1", None)
    if beside and attention is not None and not isinstance(attention.attention, nn.Identity):
        return None  # it weighs the joined maps
    return given if beside or given == inputs else None


def _is_known(block: Any) -> bool:
    """A block of a known class, that doubles by nearest neighbours before a plain convolution, and nothing watches."""
    if type(block) not in FORMS or getattr(block, "interpolation_mode", "") != "nearest":
        return False
    if type(block.conv1) is not Conv2dReLU or not _is_plain(block.conv1[0]):
        return False
    touched = [block, block.conv1, block.conv1[0]]
    if (attention := getattr(block, "attention1", None)) is not None:
        if type(attention) is not Attention:
            return False
        touched += [attention, attention.attention]
    if isinstance(block, MFABBlock) and getattr(block.SE_hl[0], "output_size", None) != 1:
        return False
    return not any(is_watched(layer) or "forward" in vars(layer) for layer in touched)


def _is_plain(convolution: nn.Module) -> bool:
    """3x3, padded by a pixel of zeros, with a weight that is a parameter of its own."""
    if type(convolution) is not nn.Conv2d or "weight" not in dict(convolution.named_parameters(recurse=False)):
        return False
    form = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    plain = convolution.groups == 1 and convolution.padding_mode == "zeros"
    return plain and form == ((3, 3), (1, 1), (1, 1), (1, 1))
