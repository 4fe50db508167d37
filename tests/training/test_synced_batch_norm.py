"""The layer is torch's batch norm where there is one process; two are compared with one in test_processes.py."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smp_ensemble.training.synced_batch_norm import BatchNormSync, SyncedBatchNorm


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=(tmp_path / "meet").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_values_gradients_and_statistics_are_torchs(group, momentum):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Tanh()).double()
    ours = copy.deepcopy(theirs)
    BatchNormSync().apply(ours)
    assert isinstance(ours[1], SyncedBatchNorm)
    for size in (5, 2):
        images = torch.randn(size, 3, 6, 7, dtype=torch.float64)
        for network in (theirs, ours):
            network(images).pow(3).sum().backward()
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-12, atol=1e-12)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)
    ours.load_state_dict(theirs.state_dict())  # sums in another order: the last bit may differ
    images = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_layers_come_back_as_they_were():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    network[1].eval()
    before = list(network.modules())
    sync = BatchNormSync()
    sync.apply(network)
    assert network[0].weight is before[1].weight
    assert network[0].running_mean is before[1].running_mean
    assert [layer.training for layer in network.modules()] == [True, True, False, False]
    network[0].eval()
    sync.revert(network)
    assert all(one is other for one, other in zip(network.modules(), before, strict=True))
    assert [layer.training for layer in network.modules()] == [True, False, False, False]
