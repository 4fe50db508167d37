"""Monte Carlo dropout: several passes with dropout on and everything else in evaluation mode, averaged.

References:
    Gal & Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016, arXiv:1506.02142.
"""

from __future__ import annotations

import copy
import json
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from smp_ensemble.architectures import architecture_of
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

OWN_OPTIONS = {
    "fpn": {"decoder_dropout": 0.2},
    "pspnet": {"psp_dropout": 0.2},
    "deeplabv3": {"decoder_aspp_dropout": 0.5},
    "deeplabv3plus": {"decoder_aspp_dropout": 0.5},
}
"""Model-options by which architectures have dropout of their own, with smp's defaults; all others take `dropout`."""

_drawing = threading.Lock()


def dropout_layers(network: nn.Module) -> list[nn.Module]:
    """The dropout layers that would drop something in training mode. Stochastic depth and batch norm are none."""
    return [layer for layer in network.modules() if isinstance(layer, DROPOUT_LAYERS) and layer.p > 0]


def check_passes(members: Iterable[nn.Module], passes: int, name: str = "passes") -> int:
    """Refuses a number of passes that means nothing for these members, and returns it otherwise.

    Args:
        members: Networks, or `Member`s.
        passes: T; 1 is the deterministic pass, which needs no dropout.
        name: What the user calls it.

    Raises:
        ConfigError: Not a whole number above 0, or more than one pass of a member without dropout.
    """
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ConfigError(f"expected {name} as a whole number above 0, got {passes!r}: 1 is one pass without dropout")
    for index, member in enumerate(members if passes > 1 else ()):
        if not dropout_layers(member):
            network = member.network if isinstance(member, Member) else member
            raise ConfigError(
                f"{name}={passes} needs dropout, but member {index} ({type(network).__name__}) holds none, so that all "
                f"passes would be equal: {_remedy(network)}, or use {name}=1"
            )
    return passes


def _remedy(network: nn.Module) -> str:
    name = architecture_of(network)
    if not name:
        return "give it dropout layers and train it with them"
    options = OWN_OPTIONS.get(name, {"dropout": 0.2})
    return f"train it with --arch {name} --model-options '{json.dumps(options)}'"


def stochastic_copy(member: nn.Module) -> nn.Module:
    """The same weights, the very same tensors, in modules of its own: dropout on, all else in evaluation mode.

    The member itself is never switched, so a deterministic prediction in another thread stays one.
    """
    tensors = [*member.parameters(), *member.buffers()]
    twin = copy.deepcopy(member, {id(tensor): tensor for tensor in tensors}).eval()
    for layer in dropout_layers(twin):
        layer.train()
    return twin


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws on `device` start from `seed`; afterwards the random state is the one from before, whatever happened.

    One at a time: torch has one random state for all threads.
    """
    mps = device.type == "mps"  # fork_rng does not know it
    with _drawing, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = torch.mps.get_rng_state() if mps else None
        try:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device there is
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif mps:
                torch.mps.manual_seed(seed)
            yield
        finally:
            if state is not None:
                torch.mps.set_rng_state(state)
