"""Losses by name: smp's own, with ignored pixels left out exactly, in every mode and in float32.

Whatever the loss, its value is the one it would have if ignored pixels did not exist: it does not depend on the logits
there, its gradient there is zero, and means are over valid pixels. A batch without valid pixels gives 0.
smp does so for Dice, Jaccard and Tversky only; `loss_terms.py` sees to the rest.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from segmentation_models_pytorch import losses as smp
from torch import Tensor, nn

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.registry import nearest
from smp_ensemble.training.loss_spec import Term, Value, parse_loss
from smp_ensemble.training.loss_terms import (
    MCC,
    CrossEntropy,
    Focal,
    Lovasz,
    Tversky,
    cross_entropy_parameters,
    region,
)
from smp_ensemble.typing import IGNORE_INDEX, MODES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from smp_ensemble.typing import Mode


@dataclass(frozen=True)
class _Loss:
    """How a loss is made, whose signature says what its parameters are, where it applies, and what to use elsewhere."""

    make: Callable[..., nn.Module]
    signature: Callable[..., Any]
    modes: tuple[Mode, ...] = MODES
    instead: str = ""

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that users may give."""
        hidden = {"mode", "from_logits", "ignore_index", "dim"}
        return sorted(set(inspect.signature(self.signature).parameters) - hidden)


_LOSSES: Mapping[str, _Loss] = {
    "dice": _Loss(region(smp.DiceLoss), smp.DiceLoss),
    "jaccard": _Loss(region(smp.JaccardLoss), smp.JaccardLoss),
    "tversky": _Loss(Tversky, smp.TverskyLoss),
    "focal": _Loss(Focal, smp.FocalLoss),
    "lovasz": _Loss(Lovasz, smp.LovaszLoss),
    "mcc": _Loss(MCC, smp.MCCLoss, ("binary",), "use 'dice' or 'tversky'"),
    "bce": _Loss(CrossEntropy, smp.SoftBCEWithLogitsLoss, ("binary", "multilabel"), "use 'ce'"),
    "ce": _Loss(CrossEntropy, cross_entropy_parameters, ("multiclass",), "use 'bce'"),
}

_WEIGHT_PARAMETER = {"bce": "pos_weight", "ce": "class_weights"}
"""Which parameter of which loss takes class weights from the data; `focal` does in the modes with several classes."""


def _make_term(term: Term, mode: Mode, num_outputs: int) -> nn.Module:
    if term.name not in _LOSSES:
        raise ConfigError(f"unknown loss '{term.name}': {nearest(term.name, ['auto', *_LOSSES])}")
    loss = _LOSSES[term.name]
    if mode not in loss.modes:
        modes = " and ".join(loss.modes)
        raise ConfigError(f"loss '{term.name}' works in {modes} mode, came {mode}: {loss.instead}")
    parameters = dict(term.parameters)
    for name, value in parameters.items():
        if name not in loss.parameters:
            raise ConfigError(f"loss '{term.name}' has no parameter '{name}': {nearest(name, loss.parameters)}")
        if name == "reduction" and value not in {"mean", "sum"}:
            raise ConfigError(f"loss '{term.name}': expected reduction 'mean' or 'sum', came '{value}'")
        if name in {"classes", "class_weights"} and not isinstance(value, list):
            raise ConfigError(f"loss '{term.name}': expected a list, came {name}={value}: write {name}=[{value}]")
        if name == "class_weights" and isinstance(value, list) and len(value) != num_outputs:
            raise ConfigError(f"loss '{term.name}': expected {num_outputs} class_weights, came {len(value)}")
    if loss.make is CrossEntropy:
        parameters["num_outputs"] = num_outputs
    given = dict(term.parameters) or "its defaults"
    try:
        module = loss.make(mode, **parameters)
        shape = (2, num_outputs, 2, 2) if mode == "multilabel" else (2, 2, 2)
        value = module(torch.zeros(2, num_outputs, 2, 2), torch.ones(shape, dtype=torch.int64))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"loss '{term.name}' does not take {given} in {mode} mode: {reason}") from error
    if value.ndim or not bool(torch.isfinite(value)):
        raise ConfigError(f"loss '{term.name}': expected a finite scalar, came {value.tolist()} with {given}")
    return module


class WeightedLoss(nn.Module):
    """A weighted sum of losses over valid pixels; made by `make_loss`.

    Args:
        terms: The losses with their weights and parameters.
        mode: What is predicted.
        num_outputs: K, the number of output channels.

    Raises:
        ConfigError: A loss or a parameter is unknown, or does not work in this mode.
    """

    def __init__(self, terms: tuple[Term, ...], mode: Mode, num_outputs: int) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.num_outputs = num_outputs
        self.weights = tuple(term.weight for term in terms)
        self.losses = nn.ModuleList(_make_term(term, mode, num_outputs) for term in terms)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss as a float32 scalar, computed in float32 under autocast, too.

        Args:
            logits: Shape `(N, K, H, W)`.
            target: Class ids `(N, H, W)`, zeros and ones `(N, K, H, W)` in multilabel mode; 255 where ignored.

        Raises:
            DataError: Shapes do not fit.
        """
        came = tuple(logits.shape)
        if logits.ndim != 4 or came[1] != self.num_outputs:
            raise DataError(f"expected logits of shape (N, {self.num_outputs}, H, W), came {came}: check the classes")
        expected = came if self.mode == "multilabel" else (came[0], *came[2:])
        if tuple(target.shape) != expected:
            raise DataError(f"expected a {self.mode} target of shape {expected}, came {tuple(target.shape)}")
        with torch.autocast(logits.device.type, enabled=False):
            target = target.long()
            valid = target != IGNORE_INDEX
            logits = torch.where(valid if self.mode == "multilabel" else valid.unsqueeze(1), logits.float(), 0.0)
            return torch.stack(
                [w * loss(logits, target) for w, loss in zip(self.weights, self.losses, strict=True)]
            ).sum()


def make_loss(spec: str, mode: Mode, num_outputs: int, *, class_weights: Sequence[float] | None = None) -> WeightedLoss:
    """Makes a loss from its specification, called as `loss(logits, target)`.

    Args:
        spec: `auto` (`dice+ce` in multiclass mode, else `dice+bce`) or a weighted sum such as `dice+bce` or
            `0.5*lovasz+0.5*focal(gamma=2,alpha=0.25)` of dice, jaccard, tversky, focal, lovasz, mcc, bce and ce with
            the parameters of smp's losses of these names; `bce(smooth_factor=0.1)` smooths labels.
        mode: What is predicted.
        num_outputs: K, the number of output channels.
        class_weights: One for each output channel, for the terms `ce`, `bce` and, with several classes, `focal` that
            bring none of their own.

    Raises:
        ConfigError: The specification cannot be read, no term takes the class weights, a loss or a parameter is
            unknown, or it does not fit the mode.

    Example:
        >>> loss = make_loss("0.5*bce+2*bce(smooth_factor=0.1)", "binary", 1)
        >>> round(loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[1, 255]]])).item(), 4)  # 2.5 * log(2)
        1.7329
    """
    if spec.strip().lower() == "auto":
        spec = "dice+ce" if mode == "multiclass" else "dice+bce"
    terms = parse_loss(spec)
    if class_weights is not None:
        terms = _with_class_weights(terms, mode, list(class_weights))
    return WeightedLoss(terms, mode, num_outputs)


def _with_class_weights(terms: tuple[Term, ...], mode: Mode, weights: list[Value]) -> tuple[Term, ...]:
    names = dict(_WEIGHT_PARAMETER) if mode == "binary" else {**_WEIGHT_PARAMETER, "focal": "class_weights"}
    if not any(term.name in names for term in terms):
        raise ConfigError(
            f"class weights need a loss that takes them, {' or '.join(sorted(names))}, got "
            f"{'+'.join(term.name for term in terms)}: add one, or use class-weights=none"
        )
    return tuple(
        replace(term, parameters={names[term.name]: weights, **term.parameters}) if term.name in names else term
        for term in terms
    )
