"""Dropout before the head: nothing changes but what training mode does, and it comes back with the network."""

from __future__ import annotations

import copy
import json

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from smp_ensemble.architectures import create_network, from_config, network_config
from smp_ensemble.dropout import HeadDropout, add_head_dropout, head_dropout
from smp_ensemble.ensembling.member import load_network, save_network
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.training.optimizers import freeze_encoder

SMALL = {
    "unet": {"encoder_depth": 3, "decoder_channels": [8, 8, 8]},
    "unetplusplus": {"encoder_depth": 3, "decoder_channels": [8, 8, 8]},
    "manet": {"encoder_depth": 3, "decoder_channels": [8, 8, 8], "decoder_pab_channels": 8},
    "linknet": {"encoder_depth": 3},
    "fpn": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32, "decoder_dropout": 0.0},
    "pspnet": {"psp_out_channels": 16, "psp_dropout": 0.0},
    "deeplabv3": {"decoder_channels": 16, "decoder_aspp_dropout": 0.0},
    "deeplabv3plus": {"decoder_channels": 16, "decoder_aspp_dropout": 0.0},
    "pan": {"decoder_channels": 16},
    "upernet": {"decoder_channels": 16},
    "segformer": {"decoder_segmentation_channels": 16},
    "dpt": {
        "dynamic_img_size": True,
        "decoder_intermediate_channels": [8, 8, 8, 8],
        "decoder_fusion_channels": 8,
    },
}
"""Options that make each architecture small, and without dropout of its own but for DPT's."""


def build(arch: str, **options) -> nn.Module:
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"
    torch.manual_seed(0)
    return create_network(arch, encoder_name=encoder, num_outputs=2, model_options={**SMALL[arch], **options})


def images(side: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_no_architecture_is_forgotten():
    assert set(SMALL) == set(smp.MODEL_ARCHITECTURES_MAPPING)


@pytest.mark.parametrize("arch", sorted(SMALL))
@torch.no_grad()
def test_every_architecture_drops_before_its_head_and_only_in_training(arch, tmp_path):
    plain, network = build(arch).eval(), build(arch, dropout=0.5).eval()
    assert list(network.state_dict()) == list(plain.state_dict())
    network.load_state_dict(plain.state_dict())
    batch = images(128 if arch == "pan" else 64)  # PAN halves the last feature map three times
    expected = plain(batch)
    assert torch.equal(network(batch), expected)

    given = []
    plain.segmentation_head.register_forward_pre_hook(lambda head, inputs: given.append(inputs[0]))
    plain(batch)
    network.head_dropout.train()
    torch.manual_seed(7)
    dropped = network(batch)
    torch.manual_seed(7)
    by_hand = plain.segmentation_head(nn.functional.dropout2d(given[0], 0.5, training=True))
    assert torch.equal(dropped, by_hand)
    assert not torch.equal(dropped, expected)

    save_network(network, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_dropout"] == 0.5
    assert "dropout" not in config
    loaded = load_network(tmp_path)
    assert head_dropout(loaded) == 0.5
    assert torch.equal(loaded(batch), expected)
    torch.manual_seed(7)
    loaded.head_dropout.train()
    assert torch.equal(loaded(batch), dropped)
    assert network_config(loaded) == config


@pytest.mark.parametrize(
    ("arch", "encoder"), [("unet", "resnet18"), ("unet", "tu-resnet18"), ("dpt", "tu-vit_tiny_patch16_224")]
)
@torch.no_grad()
def test_smp_opens_such_a_member_without_the_dropout(arch, encoder, tmp_path):
    network = create_network(arch, encoder_name=encoder, model_options={**SMALL[arch], "dropout": 0.2}).eval()
    save_network(network, tmp_path)
    opened = smp.from_pretrained(tmp_path)
    assert head_dropout(opened) is None
    assert torch.equal(opened(images()), network(images()))


def test_train_and_eval_reach_it(make_tiny_network):
    network = make_tiny_network(dropout=0.2)
    assert network.train().head_dropout.training
    assert not network.eval().head_dropout.training


def test_a_copy_drops_by_its_own_module(make_tiny_network):
    network = make_tiny_network(dropout=0.5).eval()
    twin = copy.deepcopy(network)
    assert twin.head_dropout is not network.head_dropout
    (hook,) = twin.segmentation_head._forward_pre_hooks.values()
    assert hook.__self__ is twin.head_dropout
    twin.head_dropout.train()
    assert torch.equal(network(images()), network(images()))
    assert not torch.equal(twin(images()), twin(images()))


def test_a_frozen_encoder_stays_frozen_and_the_dropout_goes_on(make_tiny_network):
    network = make_tiny_network(dropout=0.5)
    freeze_encoder(network)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    assert not torch.equal(network(images()), network(images()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.encoder.parameters())


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("fpn", {"decoder_dropout": 0.3}),
        ("pspnet", {"psp_dropout": 0.3}),
        ("deeplabv3", {"decoder_aspp_dropout": 0.3}),
        ("deeplabv3plus", {"decoder_aspp_dropout": 0.3}),
    ],
)
def test_smps_own_options_keep_working_beside_it(arch, options):
    network = build(arch, **options, dropout=0.2)
    found = [one.p for one in network.modules() if isinstance(one, nn.Dropout | nn.Dropout2d) and one.p]
    assert sorted(found) == [0.2, 0.3]
    again = from_config(network_config(network))
    assert [one.p for one in again.modules() if isinstance(one, nn.Dropout | nn.Dropout2d) and one.p] == found


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), float("inf"), True, "0.2", [0.2]])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(ConfigError, match="expected a number above 0 and below 1 for dropout, got"):
        build("unet", dropout=value)
    config = {**network_config(build("unet")), "_dropout": value}
    with pytest.raises(NetworkError, match="config.json does not fit, at '_dropout'"):
        from_config(config)


def test_none_is_no_dropout():
    assert head_dropout(build("unet", dropout=None)) is None


def test_a_misspelt_option_is_told_about_it():
    with pytest.raises(ConfigError, match="Unet has no model-option 'dropuot': did you mean 'dropout'"):
        build("unet", dropuot=0.2)


def test_it_needs_a_head_and_comes_once(make_tiny_network):
    with pytest.raises(ConfigError, match="expected a segmentation_head .* but Conv2d has none"):
        add_head_dropout(nn.Conv2d(3, 1, 1), 0.2)
    network = make_tiny_network(dropout=0.2)
    with pytest.raises(ConfigError, match="Unet has dropout before its head already"):
        add_head_dropout(network, 0.2)
    assert sum(isinstance(one, HeadDropout) for one in network.modules()) == 1
