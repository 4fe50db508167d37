"""Optimizers by name through timm, with rates and weight decay by parameter group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from timm import optim

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

timm_optim: Any = optim  # its names are re-exports, which a strict type checker does not see

_SLOW = "lookahead_slow_buff"


def _groups(network: nn.Module, lr: float, weight_decay: float, encoder_lr_scale: float) -> list[dict[str, Any]]:
    encoder = getattr(network, "encoder", None)
    in_encoder = (
        {id(parameter) for parameter in encoder.parameters()} if isinstance(encoder, torch.nn.Module) else set()
    )
    members: dict[str, list[nn.Parameter]] = {"encoder": [], "encoder_no_decay": [], "rest": [], "rest_no_decay": []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            part = "encoder" if id(parameter) in in_encoder else "rest"
            plain = parameter.ndim <= 1 or name.endswith("bias")
            members[f"{part}_no_decay" if plain else part].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr * (encoder_lr_scale if name.startswith("encoder") else 1.0),
            "weight_decay": 0.0 if name.endswith("no_decay") else weight_decay,
        }
        for name, parameters in members.items()
        if parameters
    ]


def _start_slow_weights_at_initial(optimizer: Optimizer) -> None:
    """Lets Lookahead's slow weights be the initial ones: timm makes them at the first sync, which then does nothing.

    They are remembered before the first step and put in place after it, when the optimizer has made its own state; a
    resumed optimizer brings them along.
    """
    initial: dict[Tensor, Tensor] = {}

    def remember(base: Optimizer, *_: Any) -> None:
        before.remove()
        for group in base.param_groups:
            initial.update((p, p.detach().clone()) for p in group["params"] if _SLOW not in base.state.get(p, {}))

    def place(base: Optimizer, *_: Any) -> None:
        after.remove()
        for parameter, weights in initial.items():
            if parameter.grad is not None:  # unused parameters have no state, and a resume refuses half a one
                base.state[parameter][_SLOW] = weights
        initial.clear()

    before = optimizer.register_step_pre_hook(remember)
    after = optimizer.register_step_post_hook(place)


def make_optimizer(
    network: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    encoder_lr_scale: float = 1.0,
    momentum: float = 0.9,
) -> Optimizer:
    """Makes an optimizer over the parameters of `network` that are not frozen.

    Groups are `encoder`, `encoder_no_decay`, `rest` and `rest_no_decay`, empty ones left out: biases and 1-d
    parameters (norms) have no weight decay, the encoder learns at `lr * encoder_lr_scale`.

    Args:
        network: An smp model, or any module; without an `encoder` all its parameters are the rest.
        name: One of `timm.optim.list_optimizers()`, such as `sgd` (with Nesterov momentum), `momentum` (without),
            `adamw`, `lamb`; `lookahead_<name>` wraps it in Lookahead (alpha 0.5, 6 steps), slow weights starting at the
            initial ones.
        lr: Learning rate of everything but the encoder.
        weight_decay: As the optimizer defines it.
        encoder_lr_scale: The encoder's learning rate in units of `lr`.
        momentum: For the optimizers that have one.

    Raises:
        ConfigError: The name is unknown or its package missing, a value is out of range, or every parameter is frozen.

    References:
        Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019, arXiv:1907.08610.

    Example:
        >>> optimizer = make_optimizer(torch.nn.Linear(2, 1), "sgd", lr=0.1, weight_decay=1e-4)
        >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
        [('rest', 0.0001), ('rest_no_decay', 0.0)]
    """
    for option, value in (("lr", lr), ("encoder_lr_scale", encoder_lr_scale)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"expected a positive {option}, came {value}: to keep the encoder as it is, freeze it")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ConfigError(f"expected a weight_decay of 0 or more, came {weight_decay}")
    if not 0 <= momentum < 1:
        raise ConfigError(f"expected a momentum in 0..1 (below 1), came {momentum}: 0.9 is the default")
    known: list[str] = timm_optim.list_optimizers()
    base_name = name.lower().removeprefix("lookahead_")
    if base_name not in known:
        raise ConfigError(f"unknown optimizer '{name}': {nearest(base_name, known)}")
    groups = _groups(network, lr, weight_decay, encoder_lr_scale)
    if not groups:
        raise ConfigError("expected parameters to train, but every one of them is frozen: unfreeze some")
    try:
        base: Optimizer = timm_optim.create_optimizer_v2(
            groups, base_name, lr=lr, weight_decay=weight_decay, momentum=momentum
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer '{name}' cannot be made here: {error}: use 'sgd' or 'adamw'") from error
    if base_name == name.lower():
        return base
    _start_slow_weights_at_initial(base)
    wrapped: Optimizer = timm_optim.Lookahead(base)
    return wrapped


def freeze_encoder(network: nn.Module) -> None:
    """Freezes the encoder's parameters and batch-norm statistics, in smp's own way, so that they survive `train()`.

    Its drop path and dropout are off too, for good: smp's `eval()` skips a frozen encoder, and would leave them on.

    Args:
        network: An smp model; changed in place.

    Raises:
        ConfigError: The network has no `freeze_encoder` method.
    """
    freeze = getattr(network, "freeze_encoder", None)
    if not callable(freeze):
        raise ConfigError(
            f"expected an smp model with freeze_encoder() to freeze, came {type(network).__name__}: "
            "train without freezing, or set requires_grad=False on the parameters yourself"
        )
    freeze()
    encoder = getattr(network, "encoder", None)
    if isinstance(encoder, torch.nn.Module):
        encoder.eval()
