"""Networks by name and JSON options, and back from a `config.json`: smp's own, and those of the entry-point group."""

from __future__ import annotations

import inspect
import json
import math
from typing import TYPE_CHECKING, Any

import segmentation_models_pytorch as smp
from torch import nn

from smp_ensemble import registry
from smp_ensemble.budget import Budget, check_options
from smp_ensemble.dropout import add_head_dropout, head_dropout
from smp_ensemble.exceptions import ConfigError, InputError, NetworkError
from smp_ensemble.untrusted import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

GROUP = "smp_ensemble.architectures"
DEFAULT_STRIDE = 32
"""Images are padded to a multiple of this where a network does not say its own output stride."""

_PLUGIN_KEY = "_architecture"
_DROPOUT_OPTION = "dropout"
_DROPOUT_KEY = "_dropout"
"""In a `config.json`; `smp.from_pretrained` passes over keys with an underscore."""


def architecture_names() -> list[str]:
    """Names of all architectures: smp's (`unet`, `fpn`, ...) and those that are installed as plugins."""
    return sorted({*smp.MODEL_ARCHITECTURES_MAPPING, *registry.names(GROUP)})


def _check_encoder(encoder_name: str) -> None:
    known = smp.encoders.get_encoder_names()
    if encoder_name not in known and not encoder_name.startswith("tu-"):
        raise ConfigError(
            f"unknown encoder '{encoder_name}': {registry.nearest(encoder_name, known)}; "
            "any timm model works as 'tu-NAME'"
        )


def _check_options(smp_class: type[nn.Module], options: Mapping[str, Any], encoder_name: str) -> None:
    """Refuses options that smp would swallow in its `**kwargs` without a word."""
    if encoder_name.startswith("tu-"):
        return  # there they reach timm, which checks them
    named = {
        name
        for name, parameter in inspect.signature(smp_class).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    } | {_DROPOUT_OPTION}
    for option in options:
        if option not in named:
            raise ConfigError(f"{smp_class.__name__} has no model-option '{option}': {registry.nearest(option, named)}")


def create_network(
    arch: str,
    *,
    encoder_name: str = "resnet18",
    encoder_weights: str | None = None,
    in_channels: int = 3,
    num_outputs: int = 1,
    model_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a network that gives logits `(N, num_outputs, H, W)`.

    Args:
        arch: `unet`, `fpn`, `deeplabv3plus`, ..., or a plugin's name.
        encoder_name: An smp encoder, or `tu-NAME` for any timm model.
        encoder_weights: Name of pretrained weights (`imagenet`), or None for random initialisation.
        in_channels: Bands of the images.
        num_outputs: K, output channels.
        model_options: Further constructor arguments (`decoder_channels`, `encoder_output_stride`, ...); `dropout`
            puts channel dropout before the head of any of smp's.

    Raises:
        ConfigError: Unknown name, an option that the architecture does not take, or weights that cannot be fetched.
        NetworkError: The options add an activation or an auxiliary head.
    """
    options = dict(model_options or {})
    for option in ("activation", "aux_params"):
        if options.get(option) is not None:
            raise NetworkError(_refusal(option))
    smp_class = smp.MODEL_ARCHITECTURES_MAPPING.get(arch.lower())
    arguments = {
        "encoder_name": encoder_name,
        "encoder_weights": encoder_weights,
        "in_channels": in_channels,
        "classes": num_outputs,
        **options,
    }
    if smp_class is None:
        if arch not in registry.names(GROUP):
            raise ConfigError(f"unknown arch '{arch}': {registry.nearest(arch, architecture_names())}")
        return _from_plugin(arch, arguments)
    _check_encoder(encoder_name)
    _check_options(smp_class, options, encoder_name)
    dropout = arguments.pop(_DROPOUT_OPTION, None)
    try:
        network = smp_class(**arguments)
    except OSError as error:
        raise _not_fetched(arguments, error) from error
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"cannot build {smp_class.__name__} with encoder '{encoder_name}', encoder_weights "
            f"{encoder_weights!r} and model-options {json.dumps(options, default=str)}: {reason}"
        ) from error
    check_network(network)
    assert isinstance(network, nn.Module)
    if dropout is not None:
        add_head_dropout(network, dropout)
    return network


def _not_fetched(arguments: Mapping[str, Any], error: OSError) -> ConfigError:
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return ConfigError(
        f"cannot fetch encoder_weights '{arguments['encoder_weights']}' for encoder '{arguments['encoder_name']}': "
        f"{reason} Connect to the network once, or use encoder-weights=none"
    )


def _check_plugin_options(arch: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuses, by name, an option that the factory does not take."""
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    own = set(parameters) - {"encoder_name", "encoder_weights", "in_channels", "classes"}
    for option in options:
        if option not in parameters:
            raise ConfigError(f"'{arch}' has no model-option '{option}': {registry.nearest(option, own)}")


def _from_plugin(arch: str, options: Mapping[str, Any]) -> nn.Module:
    factory = registry.load(GROUP, arch)
    _check_plugin_options(arch, factory, options)
    try:
        network = factory(**options)
    except OSError as error:
        raise _not_fetched(options, error) from error
    except InputError:
        raise  # it explains itself
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        given = json.dumps(dict(options), default=str)
        raise ConfigError(f"cannot build '{arch}' from {given}: {' '.join(str(error).split())}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"architecture '{arch}' must build a torch.nn.Module, got {type(network).__name__}")
    setattr(network, _PLUGIN_KEY, {_PLUGIN_KEY: arch, **options, "encoder_weights": None})
    check_network(network)
    return network


def _refusal(option: str) -> str:
    why = {
        "activation": "it would turn logits into probabilities before the ensemble does",
        "aux_params": "it would make the network return a tuple of mask and label",
    }[option]
    return f"a member must give logits alone, but this network has '{option}': {why}; build it with {option}=None"


def check_network(network: nn.Module) -> None:
    """Refuses, by name, a network whose output is not one tensor of logits.

    Raises:
        NetworkError: It has an `activation` or was built with `aux_params`.
    """
    if getattr(network, "classification_head", None) is not None:
        raise NetworkError(_refusal("aux_params"))
    head = getattr(network, "segmentation_head", None)
    last = head[-1] if isinstance(head, nn.Sequential) and len(head) else getattr(head, "activation", None)
    if not isinstance(getattr(last, "activation", nn.Identity()), nn.Identity):
        raise NetworkError(_refusal("activation"))


def _arguments(network: Any) -> Mapping[str, Any]:
    """Constructor arguments of an smp network, as smp itself records them."""
    arguments: Mapping[str, Any] = network.config
    return arguments


def architecture_of(network: nn.Module) -> str:
    """The name that `create_network` builds such a network by; empty: it is neither smp's nor registered.

    Example:
        >>> architecture_of(create_network("unet")), architecture_of(nn.Identity())
        ('unet', '')
    """
    plugin = getattr(network, _PLUGIN_KEY, None)
    if plugin is not None:
        return str(plugin[_PLUGIN_KEY])
    name = type(network).__name__.lower()
    return name if type(network) is smp.MODEL_ARCHITECTURES_MAPPING.get(name) else ""


def network_config(network: nn.Module) -> dict[str, Any]:
    """What `from_config` needs to build the network again, and `smp.from_pretrained` to open it offline.

    Raises:
        NetworkError: The network is neither smp's nor a registered architecture's, so nobody could rebuild it.
    """
    name = type(network).__name__
    if not architecture_of(network):
        raise NetworkError(
            f"expected one of smp's own networks or a registered architecture, got {type(network).__qualname__}: "
            f"register a factory for it under the entry-point group '{GROUP}' and build it with create_network"
        )
    # Null weights: opening a finished network must not fetch its encoder's first ones.
    config: dict[str, Any] = dict(
        getattr(network, _PLUGIN_KEY, None) or {**_arguments(network), "_model_class": name, "encoder_weights": None}
    )
    if (dropout := head_dropout(network)) is not None:
        config[_DROPOUT_KEY] = dropout
    try:
        json.dumps(config)
    except TypeError as error:
        raise NetworkError(f"{name} was built with arguments that JSON cannot hold: {error}") from error
    return config


def from_config(config: Mapping[str, Any], weights_bytes: int = 0) -> nn.Module:
    """Builds the network that a `config.json` describes, with fresh weights; only known classes are ever called.

    Nothing is fetched, whatever the configuration says, and no more memory is taken than goes with the weights.

    Args:
        config: From a file that anybody may have written.
        weights_bytes: Size of the file of its weights.

    Raises:
        NetworkError: The class is not one of smp's, the arguments do not fit it, or the network is far larger than its
            weights.
        ConfigError: The architecture is a plugin's that is not installed, or that refuses the arguments.
    """
    arguments = dict(config)
    dropout = arguments.pop(_DROPOUT_KEY, None)
    plugin = arguments.pop(_PLUGIN_KEY, None)
    with Budget(weights_bytes):
        if plugin is None:
            network = _smp_from(arguments)
        else:
            network = _from_plugin(str(plugin), {**arguments, "encoder_weights": None})
    if dropout is not None:
        try:
            add_head_dropout(network, dropout)
        except ConfigError as error:
            raise NetworkError(f"config.json does not fit, at '{_DROPOUT_KEY}': {error}") from error
    return network


def _smp_from(arguments: dict[str, Any]) -> nn.Module:
    name = str(arguments.pop("_model_class", ""))
    smp_class = smp.MODEL_ARCHITECTURES_MAPPING.get(name.lower())
    if smp_class is None or smp_class.__name__ != name:
        raise NetworkError(
            f"config.json names the class '{shorten(name, 80)}', which smp does not have: "
            f"{registry.nearest(name, (known.__name__ for known in smp.MODEL_ARCHITECTURES_MAPPING.values()))}"
        )
    arguments["encoder_weights"] = None
    check_options(arguments)
    try:
        network = smp_class(**arguments)
    except InputError:
        raise
    except Exception as error:  # whatever smp and timm raise at options that they never thought of
        raise NetworkError(f"config.json does not fit {name}: {shorten(error)}") from error
    check_network(network)
    assert isinstance(network, nn.Module)
    return network


def output_stride(networks: Iterable[nn.Module]) -> int:
    """The least number that image height and width must be multiples of for all of `networks`."""
    strides = [
        int(getattr(getattr(network, "encoder", None), "output_stride", DEFAULT_STRIDE) or DEFAULT_STRIDE)
        for network in networks
    ]
    return math.lcm(*strides) if strides else DEFAULT_STRIDE
