"""Optimizers by name: who is in which group, at which rate, and Lookahead by the paper."""

from __future__ import annotations

import copy

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.optimizers import freeze_encoder, make_optimizer


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 8, 8, 8))


def by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    return {group["name"]: group for group in optimizer.param_groups}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb", "AdamW", "lookahead_sgd"])
def test_groups_by_name(unet: nn.Module, name: str) -> None:
    groups = by_name(make_optimizer(unet, name, lr=0.1, weight_decay=1e-4, encoder_lr_scale=0.5))
    assert list(groups) == ["encoder", "encoder_no_decay", "rest", "rest_no_decay"]
    names = {id(parameter): parameter_name for parameter_name, parameter in unet.named_parameters()}
    seen = []
    for group_name, group in groups.items():
        in_encoder, plain = group_name.startswith("encoder"), group_name.endswith("no_decay")
        assert group["lr"] == pytest.approx(0.05 if in_encoder else 0.1)
        assert group["weight_decay"] == (0.0 if plain else 1e-4)
        for parameter in group["params"]:
            assert names[id(parameter)].startswith("encoder.") == in_encoder
            assert (parameter.ndim <= 1) == plain
        seen += [id(parameter) for parameter in group["params"]]
    assert sorted(seen) == sorted(names)


def test_the_optimizer_is_the_named_one(unet: nn.Module) -> None:
    sgd = make_optimizer(unet, "sgd", lr=0.1, weight_decay=0.0, momentum=0.8)
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.8}
    assert isinstance(make_optimizer(unet, "adamw", lr=0.1, weight_decay=0.0), torch.optim.AdamW)
    assert type(make_optimizer(unet, "lamb", lr=0.1, weight_decay=0.0)).__name__ == "Lamb"


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lookahead_adamw"])
def test_it_steps(name: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = make_optimizer(network, name, lr=0.1, weight_decay=1e-4)
    before = copy.deepcopy(network.state_dict())
    network(torch.randn(2, 1, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before["0.weight"], network[0].weight)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    network = smp.Unet("resnet18", encoder_weights=None)
    freeze_encoder(network)
    assert list(by_name(make_optimizer(network, "sgd", lr=0.1, weight_decay=0.0))) == ["rest", "rest_no_decay"]
    network.train()
    assert not any(module.training for module in network.encoder.modules() if isinstance(module, nn.BatchNorm2d))
    for parameter in network.parameters():
        parameter.requires_grad = False
    with pytest.raises(ConfigError, match="every one of them is frozen"):
        make_optimizer(network, "sgd", lr=0.1, weight_decay=0.0)


def test_a_frozen_encoder_drops_nothing() -> None:
    """smp's `eval()` skips it: whatever is in train mode when it is frozen would stay so in validation."""
    torch.manual_seed(0)
    network = smp.Unet("mit_b0", encoder_weights=None)
    freeze_encoder(network.train())
    network.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images), network(images))
    network.train()
    assert not any(module.training for module in network.encoder.modules())


def test_shared_parameters_appear_once() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    groups = make_optimizer(network, "sgd", lr=0.1, weight_decay=0.0).param_groups
    assert sum(len(group["params"]) for group in groups) == 3


def test_freezing_needs_an_smp_model() -> None:
    with pytest.raises(ConfigError, match=r"smp model with freeze_encoder\(\) to freeze, came Linear"):
        freeze_encoder(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamv", {}, "unknown optimizer 'adamv': did you mean 'adam"),
        ("lookahead_sdg", {}, "unknown optimizer 'lookahead_sdg': did you mean 'sgd'"),
        ("ahead_sgd", {}, "unknown optimizer 'ahead_sgd'"),
        ("lookahead_", {}, "unknown optimizer 'lookahead_'"),
        ("fusedadam", {}, "optimizer 'fusedadam' cannot be made here: .*: use 'sgd' or 'adamw'"),
        ("sgd", {"lr": 0.0}, "positive lr, came 0.0"),
        ("sgd", {"lr": float("nan")}, "positive lr, came nan"),
        (
            "sgd",
            {"encoder_lr_scale": 0.0},
            "positive encoder_lr_scale, came 0.0: to keep the encoder as it is, freeze it",
        ),
        ("sgd", {"weight_decay": -1.0}, "weight_decay of 0 or more, came -1.0"),
        ("sgd", {"momentum": 1.0}, "momentum in 0..1 .* came 1.0"),
    ],
)
def test_refuses(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(nn.Linear(1, 1), name, **{"lr": 0.1, "weight_decay": 0.0, **options})


def steps(network: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        network.weight.sum().backward()
        optimizer.step()


def make_lookahead(base: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network, make_optimizer(network, f"lookahead_{base}", lr=1.0, weight_decay=0.0, momentum=0.0)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_lookahead_starts_from_the_initial_weights(base: str) -> None:
    """Gradient 1, rate 1: six fast steps reach -6, halfway back to 0 is -3; then -9, halfway to -3 is -6."""
    network, optimizer = make_lookahead(base)
    for count, expected in ((5, -5.0), (1, -3.0), (5, -8.0), (1, -6.0)):
        steps(network, optimizer, count)
        assert network.weight.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("done", [1, 4, 7])
def test_lookahead_resumes_exactly(done: int) -> None:
    whole, optimizer = make_lookahead("adamw")
    steps(whole, optimizer, 13)
    first, optimizer = make_lookahead("adamw")
    steps(first, optimizer, done)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = make_lookahead("adamw")
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(second, optimizer, 13 - done)
    assert torch.equal(second.weight, whole.weight)
