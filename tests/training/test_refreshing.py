"""Batch norm from whole images: NumPy's mean and variance over every pixel; nothing for networks without."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from smp_ensemble.data.loading import training_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.training.refreshing import SOURCES, make_refresh, refresh_on_crops, refresh_on_images


def refresh(network, data, **more):
    options = {"normalization": imagenet(), "batch_size": 3, "precision": "32", **more}
    refresh_on_images(network, data=data, **options)


def test_statistics_are_numpys_over_whole_images(make_tiny_network, tiny_splits):
    network = make_tiny_network()
    data = tiny_splits.train
    refresh(network, data)
    images = np.stack([data.read(index)[0] for index in range(len(data))]).transpose(0, 3, 1, 2)
    inputs = torch.nn.functional.conv2d(
        imagenet()(torch.from_numpy(images.copy())), network.encoder.conv1.weight.detach(), stride=2, padding=3
    )
    values = inputs.double().numpy()
    assert network.encoder.bn1.running_mean.numpy() == pytest.approx(values.mean(axis=(0, 2, 3)), abs=1e-5)
    assert network.encoder.bn1.running_var.numpy() == pytest.approx(values.var(axis=(0, 2, 3)), rel=1e-5)


def test_statistics_of_crops_are_numpys_over_the_crops_that_training_sees_first(make_tiny_network, tiny_splits):
    """Two epochs of them, each image once in each."""
    network, data = make_tiny_network(), tiny_splits.train
    transform = TrainTransform(32, fill=imagenet().raw_mean())
    options = {"normalization": imagenet(), "batch_size": 4, "precision": "32", "seed": 3}
    refresh_on_crops(network, data=data, transform=transform, **options)
    crops = []
    for epoch in range(2):
        loader = training_loader(data, transform, batch_size=4, seed=3, workers=0, epoch_of=lambda epoch=epoch: epoch)
        crops += [batch["image"] for batch in loader]
    assert len(crops) == 2 * (len(data) // 4)
    weight = network.encoder.conv1.weight.detach()
    values = torch.nn.functional.conv2d(imagenet()(torch.cat(crops)), weight, stride=2, padding=3).double().numpy()
    assert network.encoder.bn1.running_mean.numpy() == pytest.approx(values.mean(axis=(0, 2, 3)), abs=1e-5)
    assert network.encoder.bn1.running_var.numpy() == pytest.approx(values.var(axis=(0, 2, 3)), rel=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_names_one_of_the_two(make_tiny_network, tiny_splits, source):
    transform = TrainTransform(32, fill=imagenet().raw_mean())
    shared = {"normalization": imagenet(), "data": tiny_splits.train, "batch_size": 4, "precision": "32"}
    found, expected = make_tiny_network(), make_tiny_network()
    make_refresh(source, transform=transform, seed=3, **shared)(found)
    if source == "crops":
        refresh_on_crops(expected, transform=transform, seed=3, **shared)
    else:
        refresh_on_images(expected, **shared)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def test_in_the_first_layer_the_batch_size_changes_rounding_alone(make_tiny_network, tiny_splits):
    networks = [make_tiny_network() for _ in range(2)]
    for network, batch_size in zip(networks, (2, 7), strict=True):
        refresh(network, tiny_splits.train, batch_size=batch_size)
    one, other = (network.encoder.bn1 for network in networks)
    torch.testing.assert_close(one.running_var, other.running_var, rtol=1e-5, atol=1e-7)


def test_the_number_format_of_prediction_is_used(make_tiny_network, tiny_splits):
    networks = [make_tiny_network() for _ in range(2)]
    for network, precision in zip(networks, ("32", "bf16-mixed"), strict=True):
        refresh(network, tiny_splits.val, precision=precision)
    one, other = (network.encoder.bn1.running_mean for network in networks)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_a_network_without_batch_norm_reads_nothing():
    network = nn.Conv2d(3, 1, 1)
    before = copy.deepcopy(network.state_dict())
    refresh(network, None)
    refresh_on_crops(network, normalization=imagenet(), data=None, transform=None, batch_size=1, seed=0, precision="32")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
