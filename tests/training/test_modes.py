"""A network that predicts for a while is afterwards, module by module, as it was."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.modes import modes_kept, predicting


def tree() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), nn.Dropout(0.5), nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("fails", [False, True])
@given(modes=st.lists(st.booleans(), min_size=6, max_size=6))
def test_each_module_gets_its_own_mode_back(fails, modes):
    network = tree()
    modules = list(network.modules())
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    with contextlib.suppress(ZeroDivisionError), predicting(network, "32"):
        assert not any(module.training for module in modules)
        assert 1 / (not fails)
    assert [module.training for module in modules] == modes
    with modes_kept(network):
        network.train()
    assert [module.training for module in modules] == modes


def test_no_gradient_is_kept_and_the_number_format_holds_within():
    network, images = tree(), torch.rand(2, 1, 4, 4)
    with predicting(network, "bf16-mixed") as device:
        found = network(images.to(device))
        assert (found.dtype, found.requires_grad) == (torch.bfloat16, False)
    found = network(images)
    assert (found.dtype, found.requires_grad) == (torch.float32, True)


def test_a_word_that_no_device_knows_changes_nothing():
    network = tree()
    with pytest.raises(ConfigError, match="unknown precision 'half'"), predicting(network, "half"):
        pass
    assert all(module.training for module in network.modules())
