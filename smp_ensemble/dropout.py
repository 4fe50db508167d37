"""Dropout before the segmentation head, for networks that are built without any; no name of a weight changes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from smp_ensemble.exceptions import ConfigError

_NAME = "head_dropout"


class HeadDropout(nn.Dropout2d):
    """Drops whole channels of what the segmentation head is given; a submodule of the network, without weights.

    The head's hook is a bound method, so a deep copy of the network drops by its own copy of this module.
    """

    def before_head(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The head's forward pre-hook: its first input with channels dropped, in training mode."""
        return (self(inputs[0]), *inputs[1:])


def add_head_dropout(network: nn.Module, probability: Any) -> None:
    """Inserts channel dropout before the segmentation head, in place.

    Args:
        network: Has a `segmentation_head`, as all of smp's networks do.
        probability: Of a channel to be dropped, above 0 and below 1.

    Raises:
        ConfigError: The probability is not such a number, there is no head, or it has its dropout already.

    References:
        Tompson et al., "Efficient Object Localization Using Convolutional Networks", CVPR 2015, arXiv:1411.4280.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> network = smp.Unet("resnet18", encoder_weights=None)
        >>> add_head_dropout(network, 0.2)
        >>> head_dropout(network)
        0.2
    """
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 < probability < 1:
        raise ConfigError(f"expected a number above 0 and below 1 for dropout, got {probability!r}: 0.2 is common")
    head = getattr(network, "segmentation_head", None)
    if not isinstance(head, nn.Module):
        raise ConfigError(f"expected a segmentation_head to put dropout before, but {type(network).__name__} has none")
    if head_dropout(network) is not None:
        raise ConfigError(f"{type(network).__name__} has dropout before its head already: set it once")
    dropout = HeadDropout(float(probability))
    network.add_module(_NAME, dropout)
    head.register_forward_pre_hook(dropout.before_head)


def head_dropout(network: nn.Module) -> float | None:
    """The probability that `add_head_dropout` was given; None: it was never called for this network."""
    found = getattr(network, _NAME, None)
    return found.p if isinstance(found, HeadDropout) else None
