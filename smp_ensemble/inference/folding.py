"""Batch norms folded into the convolutions before them, where the flow of data proves that they belong together."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONVOLUTIONS = frozenset({"aten::convolution", "aten::conv2d", "aten::conv_transpose2d"})
NORMS = frozenset({"aten::batch_norm", "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"})
TOLERANCE = 1e-3
"""How far a twin may lie from its network on random numbers, relative to the largest value, to be taken."""


class _Trace(TorchDispatchMode):
    """Which tensor went where in one run. Everything is kept alive, so that no two tensors share an id."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: Counter[int] = Counter()
        self.convolutions: dict[int, tuple[Any, ...]] = {}  # by the id of what came out
        self.norms: list[tuple[Any, ...]] = []
        self._alive: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self._alive.append((args, kwargs, found))
        self.count((args, kwargs))
        name = func.name().partition(".")[0]  # without the overload
        if name in CONVOLUTIONS and isinstance(found, Tensor):
            self.convolutions[id(found)] = args
        elif name in NORMS:
            self.norms.append(args)
        return found

    def count(self, values: Any) -> None:
        """Each tensor among `values` is used once more."""
        self.uses.update(id(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def fold_batch_norms(module: nn.Module, example: Tensor) -> nn.Module:
    """The same function with fewer steps: a module of its own, which shares all other tensors with `module`.

    A batch norm in evaluation mode is a factor and a summand for each channel, and those of a convolution before it can
    take them in. One run on `example` shows which tensors the convolution gave and the batch norm took. A pair is
    folded if that is one tensor that nothing else reads, if both run once with weights of their own, and if nothing
    watches them. All else stays as it is; so does everything if the result does not agree on random numbers, or if the
    module cannot be run on the example.

    Args:
        module: In evaluation mode; it is not altered.
        example: What it runs on, on its device.

    Returns:
        The folded twin; `module` itself where there is nothing to fold.
    """
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()):
        return module
    noise = torch.empty_like(example).uniform_(0, 255, generator=torch.Generator(example.device).manual_seed(0))
    try:
        twin = twin_of(module)
        with torch.inference_mode(False), torch.no_grad():
            if not _fold(twin, example):
                return module
            same = agree(module, twin, noise)
    except Exception:  # noqa: BLE001 (a network of anyone's: what cannot be traced or copied stays as it is)
        return module
    return twin if same else module


def agree(module: nn.Module, twin: nn.Module, images: Tensor) -> bool:
    """Whether two networks give the same for `images`, within `TOLERANCE`."""
    expected, found = module(images), twin(images)
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def twin_of(module: nn.Module, convert: Callable[[nn.Module, Tensor], Tensor] | None = None) -> nn.Module:
    """Modules of its own on the very same tensors, in evaluation mode.

    Args:
        module: Stays as it is.
        convert: Gives the tensor that takes the place of each of a layer's own, once for tensors that are shared.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    twin = copy.deepcopy(module, memo).eval()
    if convert is None:
        return twin
    made: dict[int, Tensor] = {}
    for layer in twin.modules():
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        for name, tensor in own:
            if id(tensor) not in made:
                new = convert(layer, tensor.detach())
                made[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
            setattr(layer, name, made[id(tensor)])
    return twin


def _fold(twin: nn.Module, example: Tensor) -> int:
    """Folds what the run on `example` proves, in place; how many pairs."""
    trace = _Trace()
    with trace:
        given = twin(example)
    trace.count(given)
    convolutions = {id(layer.weight): layer for layer in twin.modules() if _may_fold(layer)}
    norms = {id(layer.running_mean): layer for layer in twin.modules() if _may_vanish(layer)}
    parents = {id(child): (parent, name) for parent in twin.modules() for name, child in parent.named_children()}
    homes = Counter(id(layer) for _, layer in twin.named_modules(remove_duplicate=False))
    folded = 0
    for taken, _, _, running_mean, _, training, *_ in trace.norms:
        made = trace.convolutions.get(id(taken))
        norm = norms.get(id(running_mean))
        if made is None or norm is None or training or trace.uses[id(taken)] != 1:
            continue
        convolution = convolutions.get(id(made[1]))
        if convolution is None or convolution.bias is not (made[2] if len(made) > 2 else None):
            continue
        once = all(trace.uses[id(tensor)] == 1 for tensor in (convolution.weight, running_mean))
        if once and homes[id(norm)] == 1:
            _absorb(convolution, norm)
            parent, name = parents[id(norm)]
            setattr(parent, name, _what_remains(norm))
            folded += 1
    return folded


def is_watched(layer: nn.Module) -> bool:
    """Whether hooks see what goes into the layer or comes out."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)  # noqa: SLF001 (torch has no public way to ask)


def _may_fold(layer: nn.Module) -> bool:
    """A convolution whose weight is a parameter of its own, and nothing that is computed anew in each run."""
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return False
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return False
    return not is_watched(layer) and not (isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1)


def _may_vanish(layer: nn.Module) -> bool:
    known = type(layer) in {nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d}
    return known and layer.running_mean is not None and not layer.training and not is_watched(layer)


def _what_remains(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()


def _absorb(convolution: Any, norm: Any) -> None:
    """Gives the convolution new weights; computed in float64, so that folding rounds once."""
    weight, bias = convolution.weight, convolution.bias
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factor = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -mean if bias is None else bias.double() - mean
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    outputs = (1, -1, 1, 1) if isinstance(convolution, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    convolution.weight = nn.Parameter((weight.double() * factor.view(outputs)).to(weight.dtype), False)
    convolution.bias = nn.Parameter(shift.to(weight.dtype), False)
