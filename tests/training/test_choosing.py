"""Statistics with the least log-loss are kept: against SciPy's minimum over temperatures, and a judge's word."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from smp_ensemble.data.forms import load_data
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.training.choosing import keep_best_statistics, validation_loss

SHARED = {"normalization": imagenet(), "batch_size": 4, "precision": "32"}


def by_hand(network, data) -> float:
    """Mean log-loss at the best temperature of all, in float64, image by image."""
    network.eval()
    logits, truth = [], []
    for index in range(len(data)):
        image, mask = data.read(index)
        with torch.no_grad():
            found = network(imagenet()(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]))[0].double().numpy()
        mask = mask.transpose(2, 0, 1) if mask.ndim == 3 else mask[None]
        if data.task.mode == "multiclass":
            valid = mask[0] != 255
            logits.append(found[:, valid])
            truth.append(mask[0][valid])
        else:
            valid = mask != 255
            logits.append(found[valid][None])
            truth.append(mask[valid])
    scores, known = np.concatenate(logits, axis=1), np.concatenate(truth)

    def loss(sharpness: float) -> float:
        z = sharpness * scores
        if data.task.mode == "multiclass":
            return float(np.mean(np.logaddexp.reduce(z, axis=0) - z[known.astype(int), np.arange(z.shape[1])]))
        return float(np.mean(np.logaddexp(0, np.where(known == 1, -z[0], z[0]))))

    return float(minimize_scalar(loss, bounds=(0.25, 4), method="bounded").fun)


@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_the_loss_is_that_at_the_best_temperature(make_tiny_network, mode):
    data = load_data(f"synthetic:count=12,size=64,seed=3,mode={mode}").train
    network = make_tiny_network(num_outputs=data.task.num_outputs)
    found = validation_loss(network, data=data, **SHARED)
    assert network.training
    expected = by_hand(network, data)
    assert expected <= found + 1e-6
    assert found == pytest.approx(expected, rel=0.01), "a third of an octave between temperatures"


def test_a_factor_of_all_logits_does_not_count(tiny_splits):
    """Colours tell buildings apart, so the best temperature lies inside the range, for twice the logits too."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    images, masks = zip(*(tiny_splits.val.read(index) for index in range(len(tiny_splits.val))), strict=True)
    inputs = imagenet()(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()))
    truth = torch.from_numpy(np.stack(masks)).float()[:, None]
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(inputs), truth, weight=(truth != 255).float()).backward()
        optimizer.step()
    sharper = copy.deepcopy(network)
    with torch.no_grad():
        sharper.weight *= 2
        sharper.bias *= 2
    one, other = (validation_loss(each, data=tiny_splits.val, **SHARED) for each in (network, sharper))
    assert one == pytest.approx(other, rel=1e-3)


def test_the_way_with_the_least_loss_is_kept_and_each_begins_from_the_same_statistics(make_tiny_network):
    network = make_tiny_network()
    before = copy.deepcopy(network.state_dict())

    def add(value):
        def measure(model):
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(value)

        return measure

    first = float(network.encoder.bn1.running_mean[0])
    losses = iter([0.5, 0.2, 0.2])
    seen = []

    def judge(model):
        seen.append(float(model.encoder.bn1.running_mean[0]))
        return next(losses)

    kept = keep_best_statistics(network, sources={"a": None, "b": add(1), "c": add(2)}, judge=judge)
    assert kept == "b", "the first of equals"
    assert seen == pytest.approx([first, first + 1, first + 2])
    for name, tensor in network.state_dict().items():
        moved = 1 if name.endswith("running_mean") else 0
        torch.testing.assert_close(tensor, before[name] + moved if tensor.is_floating_point() else before[name])


def test_a_network_without_batch_norm_is_not_judged():
    assert keep_best_statistics(nn.Conv2d(3, 1, 1), sources={"a": None}, judge=lambda _: math.nan) is None


@pytest.mark.parametrize("order", [("running", "images"), ("images", "running")])
def test_a_loss_that_is_no_number_never_wins(make_tiny_network, order):
    network = make_tiny_network()

    def spoil(one):
        one.encoder.bn1.running_mean.fill_(math.nan)

    def judge(one):
        return float(one.encoder.bn1.running_mean.sum())

    ways = {"running": None, "images": spoil}
    assert keep_best_statistics(network, sources={name: ways[name] for name in order}, judge=judge) == "running"
    assert torch.isfinite(network.encoder.bn1.running_mean).all()
