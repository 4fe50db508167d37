"""The measure of exactness: it finds what is there, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.exactness import Exactness, compare


def make_images(count: int = 2, height: int = 21, width: int = 13) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture
def ensemble(make_tiny_network) -> Ensemble:
    members = [Member(make_tiny_network(seed, 3), imagenet()) for seed in (0, 1)]
    for layer in nn.ModuleList(members).modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return Ensemble(members, mode="multiclass", weights=[2, 1], views="flips")


def test_the_fast_form_in_float32_is_the_plain_one_to_rounding(ensemble):
    found = compare(Engine(ensemble, "cpu", "32"), make_images())
    assert found.max_difference <= 1e-5
    assert found.agreement >= 0.99999
    assert found.total == 2 * 21 * 13


def test_half_precision_is_near_and_is_seen(ensemble):
    found = compare(Engine(ensemble, "cpu", "bf16-mixed"), make_images())
    assert 1e-5 < found.max_difference < 0.05


def test_it_finds_what_is_wrong(ensemble):
    engine = Engine(ensemble, "cpu", "32")
    with torch.no_grad():
        for member in ensemble.members:  # after the engine copied the weights
            member.network.segmentation_head[0].weight.neg_()
    images = make_images()
    found = compare(engine, images)
    expected = Engine(ensemble, "cpu", "32")(images)
    fast = engine(images)
    assert found.max_difference == pytest.approx(float((fast - expected).abs().max()), abs=1e-5)
    assert found.max_difference > 0.01
    differing = int(np.sum(fast.argmax(dim=1).numpy() != expected.argmax(dim=1).numpy()))
    assert found.changed == pytest.approx(differing, abs=2)
    assert found.changed > 0


def test_agreement_is_the_share_of_decisions():
    assert Exactness(0.5, 3, 12).agreement == 0.75


def test_passes_are_refused(make_tiny_network):
    member = Member(make_tiny_network(0, 3, dropout=0.5), imagenet())
    engine = Engine(Ensemble([member], mode="multiclass"), "cpu", "32", passes=2)
    with pytest.raises(ConfigError, match="expected an engine of one pass to compare, got passes=2"):
        compare(engine, make_images())
