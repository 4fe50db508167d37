"""Networks by name and JSON options, and back from a `config.json`."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from smp_ensemble import architectures, registry
from smp_ensemble.architectures import (
    architecture_names,
    architecture_of,
    check_network,
    create_network,
    from_config,
    network_config,
    output_stride,
)
from smp_ensemble.exceptions import ConfigError, NetworkError

TINY = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}


class TinyPlugin(nn.Module):
    def __init__(self, in_channels: int, classes: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("width must be\nabove 0")
        self.layers = nn.Sequential(nn.Conv2d(in_channels, width, 1), nn.Conv2d(width, classes, 1))

    def forward(self, images):
        return self.layers(images)


def build_plugin(*, encoder_name, encoder_weights, in_channels, classes, width=2):
    return TinyPlugin(in_channels, classes, width)


def build_nothing(**options):
    return None


@pytest.fixture
def plugins(monkeypatch):
    """Two architectures as a third party would install them."""
    found = [EntryPoint(name, f"plugin:{name}", architectures.GROUP) for name in ("tiny-plugin", "nothing")]
    factories = {"tiny-plugin": build_plugin, "nothing": build_nothing}
    third_party = SimpleNamespace(name="third-party", entry_points=found)
    monkeypatch.setattr(registry, "distributions", lambda: [third_party])
    monkeypatch.setattr(EntryPoint, "load", lambda point: factories[point.name])


def test_names_are_smps_and_plugins(plugins):
    assert {"unet", "fpn", "deeplabv3plus", "segformer", "tiny-plugin"} <= set(architecture_names())
    assert architecture_names() == sorted(architecture_names())


@pytest.mark.parametrize("arch", ["unet", "Unet", "LINKNET"])
def test_networks_have_the_bands_and_outputs_that_were_asked_for(arch):
    options = TINY if arch != "LINKNET" else {"encoder_depth": 3}
    network = create_network(arch, in_channels=5, num_outputs=4, model_options=options)
    assert network.eval()(torch.zeros(2, 5, 32, 48)).shape == (2, 4, 32, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "unett"}, r"unknown arch 'unett': did you mean 'unet'\? Known: deeplabv3, "),
        (
            {"arch": "unet", "encoder_name": "resnet81"},
            r"unknown encoder 'resnet81': did you mean 'resnet\d+'.*tu-NAME",
        ),
        (
            {"arch": "unet", "model_options": {"decoder_chanels": [8]}},
            "Unet has no model-option 'decoder_chanels': did you mean 'decoder_channels'",
        ),
        ({"arch": "unet", "model_options": {"encoder_depth": 9}}, r"^cannot build Unet with encoder 'resnet18'.*9"),
        ({"arch": "unet", "encoder_weights": "imagenett"}, "cannot build Unet .*encoder_weights 'imagenett'"),
        ({"arch": "unet", "encoder_name": "tu-no_such_model"}, "cannot build Unet with encoder 'tu-no_such_model'"),
    ],
)
def test_mistakes_are_explained_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        create_network(**arguments)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_fetched_name_the_remedy(monkeypatch):
    class Offline(nn.Module):
        def __init__(self, encoder_name, encoder_weights, in_channels, classes):
            raise OSError("cannot connect to the hub.\nand forty more lines")

    monkeypatch.setitem(smp.MODEL_ARCHITECTURES_MAPPING, "unet", Offline)
    with pytest.raises(ConfigError) as error:
        create_network("unet", encoder_weights="imagenet")
    assert str(error.value) == (
        "cannot fetch encoder_weights 'imagenet' for encoder 'resnet18': cannot connect to the hub. "
        "Connect to the network once, or use encoder-weights=none"
    )


@pytest.mark.parametrize(("option", "value"), [("activation", "sigmoid"), ("aux_params", {"classes": 2})])
def test_what_would_not_give_logits_is_refused_by_name(option, value):
    message = f"this network has '{option}': .*build it with {option}=None"
    with pytest.raises(NetworkError, match=message):
        create_network("unet", model_options={**TINY, option: value})
    network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8), **{option: value})
    with pytest.raises(NetworkError, match=message):
        check_network(network)
    with pytest.raises(NetworkError, match=message):
        from_config({**network.config, "_model_class": "Unet"})


@pytest.mark.parametrize("arch", sorted(smp.MODEL_ARCHITECTURES_MAPPING))
def test_an_activation_is_found_in_every_architecture(arch):
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"
    smp_class = smp.MODEL_ARCHITECTURES_MAPPING[arch]
    with pytest.raises(NetworkError, match="has 'activation'"):
        check_network(smp_class(encoder, encoder_weights=None, activation="softmax2d"))


def test_no_activation_may_be_said_aloud():
    create_network("unet", model_options={**TINY, "activation": None, "aux_params": None})


def test_a_config_rebuilds_the_network_and_fetches_nothing():
    network = create_network("unet", in_channels=4, num_outputs=3, model_options=TINY).eval()
    config = json.loads(json.dumps(network_config(network)))
    assert config["_model_class"] == "Unet"
    assert config["encoder_weights"] is None
    again = from_config(config).eval()
    again.load_state_dict(network.state_dict())
    images = torch.rand(1, 4, 16, 16)
    torch.testing.assert_close(again(images), network(images), rtol=0, atol=0)


def test_a_config_never_brings_first_weights_back(monkeypatch):
    asked = []

    class Recorder(nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            asked.append(arguments)

    Recorder.__name__ = "Unet"
    monkeypatch.setitem(smp.MODEL_ARCHITECTURES_MAPPING, "unet", Recorder)
    from_config({"_model_class": "Unet", "encoder_weights": "imagenet", "classes": 2})
    assert asked == [{"encoder_weights": None, "classes": 2}]


def test_networks_that_nobody_could_rebuild_are_refused():
    class MyUnet(smp.Unet):
        pass

    mine = MyUnet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8))
    for network in (nn.Conv2d(3, 1, 1), mine):
        with pytest.raises(NetworkError, match=r"expected one of smp's own .*smp_ensemble\.architectures"):
            network_config(network)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_model_class": "Unett"}, "names the class 'Unett', which smp does not have: did you mean 'Unet'"),
        ({"_model_class": "unet"}, "names the class 'unet', which smp does not have"),
        ({"_model_class": "os.system"}, "names the class 'os.system'"),
        ({}, "names the class ''"),
        ({"_model_class": "Unet", "encoder_name": "resnet0"}, "config.json does not fit Unet: .*resnet0"),
        ({"_model_class": "Unet", "encoder_depth": "three"}, "config.json does not fit Unet"),
    ],
)
def test_a_foreign_config_is_refused(config, message):
    with pytest.raises(NetworkError, match=message) as error:
        from_config(config)
    assert "\n" not in str(error.value)


def test_a_plugin_is_built_recorded_and_rebuilt(plugins):
    network = create_network("tiny-plugin", in_channels=2, num_outputs=3, model_options={"width": 5})
    config = json.loads(json.dumps(network_config(network)))
    again = from_config(config)
    again.load_state_dict(network.state_dict())
    images = torch.rand(1, 2, 4, 4)
    assert torch.equal(again(images), network(images))
    assert network_config(again) == config


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        (
            "tiny-plugin",
            {"widht": 5},
            "^'tiny-plugin' has no model-option 'widht': did you mean 'width'. Known: width$",
        ),
        ("tiny-plugin", {"width": "wide"}, "cannot build 'tiny-plugin' from .*wide"),
        ("tiny-plugin", {"width": 0}, "cannot build 'tiny-plugin' from .*width must be above 0"),
        ("nothing", {}, "architecture 'nothing' must build a torch.nn.Module, got NoneType"),
    ],
)
def test_plugin_mistakes_are_explained(plugins, arch, options, message):
    with pytest.raises(ConfigError, match=message):
        create_network(arch, model_options=options)


def test_a_plugin_whose_weights_cannot_be_fetched_names_the_remedy(plugins, monkeypatch):
    def offline(*, encoder_name, encoder_weights, in_channels, classes):
        raise OSError("no route to host.\nand more")

    monkeypatch.setattr(EntryPoint, "load", lambda point: offline)
    with pytest.raises(ConfigError) as error:
        create_network("tiny-plugin", encoder_weights="imagenet")
    assert str(error.value) == (
        "cannot fetch encoder_weights 'imagenet' for encoder 'resnet18': no route to host. "
        "Connect to the network once, or use encoder-weights=none"
    )


def test_a_plugin_that_takes_anything_is_asked_for_anything(plugins, monkeypatch):
    def open_minded(**options):
        return nn.Conv2d(options["in_channels"], options["depth"], 1)

    monkeypatch.setattr(EntryPoint, "load", lambda point: open_minded)
    assert create_network("tiny-plugin", model_options={"depth": 7}).out_channels == 7


def test_networks_know_the_name_that_they_are_built_by(plugins):
    for arch in ("unet", "deeplabv3plus", "tiny-plugin"):
        assert architecture_of(create_network(arch)) == arch
    assert architecture_of(nn.Conv2d(3, 1, 1)) == ""


def test_the_stride_is_the_least_common_multiple():
    def with_stride(stride):
        network = nn.Module()
        network.encoder = nn.Module()
        network.encoder.output_stride = stride
        return network

    assert output_stride([create_network("unet", model_options=TINY)]) == 8
    assert output_stride([with_stride(8), with_stride(12)]) == 24
    assert output_stride([nn.Conv2d(3, 1, 1)]) == output_stride([]) == 32


def test_model_options_reach_the_network_and_its_config():
    """Atrous rates, output stride and dropout: the options that smp gives DeepLabV3+."""
    options = {
        "encoder_output_stride": 8,
        "decoder_atrous_rates": [2, 4, 6],
        "decoder_channels": 16,
        "decoder_aspp_dropout": 0.3,
    }
    network = create_network("deeplabv3plus", encoder_name="resnet18", model_options=options)
    assert output_stride([network]) == 8
    convolutions = [one for one in network.decoder.modules() if isinstance(one, nn.Conv2d)]
    assert {2, 4, 6} <= {one.dilation[0] for one in convolutions}
    assert [one.p for one in network.modules() if isinstance(one, nn.Dropout)] == [0.3]
    assert {name: network_config(network)[name] for name in options} == options
