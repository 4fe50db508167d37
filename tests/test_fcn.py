"""torchvision's FCN as an architecture: the same numbers, and all that the other architectures can do."""

from __future__ import annotations

import json
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.segmentation import fcn_resnet50

from smp_ensemble import fcn
from smp_ensemble.architectures import architecture_names, check_network, create_network, network_config, output_stride
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member, load_network, save_network
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.training.optimizers import freeze_encoder, make_optimizer


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_network("fcn", num_outputs=2)


def images(bands: int = 3, height: int = 40, width: int = 56) -> torch.Tensor:
    return torch.rand(2, bands, height, width, generator=torch.Generator().manual_seed(1))


def shake(network: nn.Module) -> None:
    """Batch-norm statistics and all weights as after a training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator))


@torch.no_grad()
def test_logits_are_torchvisions():
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=4).eval()
    shake(theirs)
    ours = create_network("fcn", encoder_name="resnet50", num_outputs=4).eval()
    names = {"backbone": "encoder", "classifier": "segmentation_head"}
    parts = {name: name.partition(".") for name in theirs.state_dict()}
    ours.load_state_dict({f"{names[parts[n][0]]}.{parts[n][2]}": t for n, t in theirs.state_dict().items()})
    assert torch.equal(ours(images()), theirs(images())["out"])


@pytest.mark.parametrize(
    ("encoder", "bands", "stride"), [("resnet18", 3, 32), ("resnet34", 1, 32), ("resnet50", 5, 8), ("resnet101", 2, 8)]
)
@torch.no_grad()
def test_encoders_have_their_stride_and_take_any_bands(encoder, bands, stride):
    network = create_network("fcn", encoder_name=encoder, in_channels=bands, num_outputs=3).eval()
    assert output_stride([network]) == stride
    assert network.encoder(images(bands, 64, 64)).shape[2:] == (64 // stride, 64 // stride)
    assert network(images(bands, 33, 47)).shape == (2, 3, 33, 47)


def test_it_is_found_by_name_and_gives_logits(network):
    assert "fcn" in architecture_names()
    check_network(network)


@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path):
    network = create_network("fcn", in_channels=4, num_outputs=2, model_options={"dropout": 0.3}).eval()
    shake(network)
    save_network(network, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "_architecture": "fcn", "encoder_name": "resnet18", "encoder_weights": None, "in_channels": 4, "classes": 2,
        "dropout": 0.3,
    }  # fmt: skip
    loaded = load_network(tmp_path)
    assert torch.equal(loaded(images(4)), network(images(4)))
    assert network_config(loaded) == network_config(network)


@pytest.mark.parametrize(("options", "expected"), [({}, 0.1), ({"dropout": 0.4}, 0.4), ({"dropout": 0}, 0.0)])
def test_dropout_is_an_option(options, expected):
    network = create_network("fcn", model_options=options)
    assert [one.p for one in network.modules() if isinstance(one, nn.Dropout)] == [expected]


def test_several_passes_work(network):
    ensemble = Ensemble([Member(network, imagenet())], mode="multiclass")
    raw = images() * 255
    found = Engine(ensemble, "cpu", "32", passes=3)(raw)
    assert torch.equal(found, Engine(ensemble, "cpu", "32", passes=3)(raw))
    assert not torch.equal(found, Engine(ensemble, "cpu", "32")(raw))


def test_a_frozen_encoder_survives_train(network):
    freeze_encoder(network)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    network(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.encoder.state_dict().items())
    assert network.segmentation_head.training
    names = {group["name"] for group in make_optimizer(network, "sgd", lr=0.1, weight_decay=0).param_groups}
    assert names == {"rest", "rest_no_decay"}


def test_the_encoder_has_its_own_rate(network):
    groups = make_optimizer(network, "sgd", lr=0.1, weight_decay=0, encoder_lr_scale=0.5).param_groups
    assert {group["name"]: group["lr"] for group in groups} == {
        "encoder": 0.05, "encoder_no_decay": 0.05, "rest": 0.1, "rest_no_decay": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"encoder_name": "resnet19"},
            "^unknown encoder 'resnet19' for fcn: did you mean 'resnet18'. Known: resnet101, resnet18, resnet34, ",
        ),
        ({"encoder_name": "tu-resnet18"}, "unknown encoder 'tu-resnet18' for fcn: did you mean 'resnet18'"),
        (
            {"encoder_weights": "imagenett"},
            "^unknown encoder_weights 'imagenett' for resnet18: did you mean 'imagenet'",
        ),
        ({"model_options": {"dropuot": 0.1}}, "'fcn' has no model-option 'dropuot': did you mean 'dropout'"),
        ({"model_options": {"dropout": 1.0}}, "^expected a dropout in 0..1 .below 1. for fcn, got 1.0"),
        ({"model_options": {"dropout": True}}, "expected a dropout in 0..1 .below 1. for fcn, got True"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_network("fcn", **arguments)


@pytest.fixture
def pretrained(monkeypatch):
    """What torchvision would fetch, and how it was asked."""
    asked = {}
    tensors = resnet18().state_dict()

    def get_state_dict(self, **options):
        asked.update(options, weights=self.name)
        return tensors

    monkeypatch.setattr(type(fcn.get_model_weights("resnet18").DEFAULT), "get_state_dict", get_state_dict)
    return tensors, asked


def test_pretrained_weights_are_torchvisions_and_read_without_pickle(pretrained):
    tensors, asked = pretrained
    network = create_network("fcn", encoder_weights="imagenet")
    assert asked == {"weights": "IMAGENET1K_V1", "progress": False, "check_hash": True, "weights_only": True}
    found = network.encoder.state_dict()
    assert found.keys() == {name for name in tensors if not name.startswith("fc.")}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    assert network_config(network)["encoder_weights"] is None


def test_other_bands_get_smps_share_of_pretrained_weights(pretrained):
    old = pretrained[0]["conv1.weight"]
    expected = {
        1: old.sum(dim=1, keepdim=True),
        2: old[:, :2] * 1.5,
        5: torch.cat([old, old[:, :2]], dim=1) * 3 / 5,
    }
    for bands, weight in expected.items():
        network = create_network("fcn", encoder_weights="imagenet", in_channels=bands)
        torch.testing.assert_close(network.encoder.conv1.weight.detach(), weight)


def test_without_a_network_the_remedy_is_named(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        create_network("fcn", encoder_weights="imagenet")
    assert str(error.value) == (
        "cannot fetch encoder_weights 'imagenet' for encoder 'resnet18': <urlopen error no route to host> "
        "Connect to the network once, or use encoder-weights=none"
    )
