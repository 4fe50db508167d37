"""Monte Carlo dropout: dropout and nothing else is on, the draws repeat, and the member is never touched."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.mc_dropout import check_passes, dropout_layers, seeded, stochastic_copy
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError

CPU = torch.device("cpu")


def test_dropout_of_every_kind_counts_and_nothing_else():
    from timm.layers import DropPath

    kinds = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
    on = [kind(0.5) for kind in kinds]
    others = [*(kind(0.0) for kind in kinds), nn.BatchNorm2d(3), DropPath(0.5), nn.Identity()]
    assert dropout_layers(nn.Sequential(*on, nn.Sequential(*others))) == on


def test_the_copy_shares_every_tensor_and_switches_dropout_alone(make_tiny_network):
    member = Member(make_tiny_network(dropout=0.5), imagenet()).eval()
    twin = stochastic_copy(member)
    for ours, theirs in (
        (member.named_parameters(), twin.named_parameters()),
        (member.named_buffers(), twin.named_buffers()),
    ):
        for (name, one), (other_name, other) in zip(ours, theirs, strict=True):
            assert name == other_name
            assert one is other
    assert [module for module in twin.modules() if module.training] == dropout_layers(twin)
    assert not any(module.training for module in member.modules())
    assert not set(member.modules()) & set(twin.modules())


def test_weights_that_change_later_change_in_the_copy():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5))
    twin = stochastic_copy(network)
    nn.init.constant_(network[0].weight, 3.0)
    assert twin[0].weight.item() == 3.0


@torch.no_grad()
def test_batch_norm_stays_in_evaluation_mode_bit_for_bit():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    network[1].running_mean.uniform_(-1, 1)
    network[1].running_var.uniform_(0.5, 2)
    network.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = torch.rand(2, 3, 5, 5)
    expected = network(images)
    found = stochastic_copy(network)(images)
    kept = found != 0
    assert 0 < kept.float().mean() < 1
    assert torch.equal(found[kept], 2 * expected[kept])  # kept values are scaled by 1 / (1 - p), and that is all
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_network_in_training_mode_gives_the_same_copy():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Dropout(0.0)).train()
    twin = stochastic_copy(network)
    assert [module.training for module in twin] == [False, True, False]
    assert all(module.training for module in network.modules())


def test_draws_repeat_and_leave_the_callers_state():
    torch.manual_seed(5)
    torch.rand(3)
    state = torch.get_rng_state()
    draws = []
    for seed in (0, 0, 1):
        with seeded(seed, CPU):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_callers_state_comes_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the middle"), seeded(0, CPU):
        torch.rand(3)
        raise RuntimeError("in the middle")
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(0, CPU):  # and the lock is free again
        pass


def test_threads_draw_one_after_the_other():
    found = []

    def draw():
        with seeded(3, CPU):
            found.append(torch.stack([nn.functional.dropout(torch.ones(1000)) for _ in range(20)]))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_draws_on_cuda_repeat_and_leave_the_callers_state():
    device = torch.device("cuda")
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(0, device):
            draws.append(torch.rand(4, device=device))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


@pytest.mark.parametrize("passes", [0, -1, 1.5, "2", True, None])
def test_what_is_no_number_of_passes_is_refused(passes):
    with pytest.raises(ConfigError, match="expected passes as a whole number above 0, got"):
        check_passes([nn.Dropout(0.5)], passes)


def test_one_pass_needs_no_dropout():
    assert check_passes([nn.Conv2d(3, 1, 1)], 1) == 1
    assert check_passes([nn.Dropout(0.5)], 7) == 7


@pytest.mark.parametrize(
    ("arch", "built_with", "remedy"),
    [
        ("unet", {}, {"dropout": 0.2}),
        ("segformer", {}, {"dropout": 0.2}),
        ("fcn", {"dropout": 0}, {"dropout": 0.2}),
        ("fpn", {"decoder_dropout": 0}, {"decoder_dropout": 0.2}),
        ("pspnet", {"psp_dropout": 0}, {"psp_dropout": 0.2}),
        ("deeplabv3", {"decoder_aspp_dropout": 0}, {"decoder_aspp_dropout": 0.5}),
        ("deeplabv3plus", {"decoder_aspp_dropout": 0}, {"decoder_aspp_dropout": 0.5}),
    ],
)
def test_a_member_without_dropout_is_told_what_adds_some(arch, built_with, remedy):
    network = create_network(arch, model_options=built_with)
    with pytest.raises(ConfigError) as error:
        check_passes([nn.Dropout(0.5), Member(network, imagenet())], 8, "passes")
    assert str(error.value) == (
        f"passes=8 needs dropout, but member 1 ({type(network).__name__}) holds none, so that all passes would be "
        f"equal: train it with --arch {arch} --model-options '{json.dumps(remedy)}', or use passes=1"
    )
    check_passes([create_network(arch, model_options=remedy)], 8)


def test_a_network_of_ones_own_is_told_so_too():
    with pytest.raises(ConfigError, match=r"member 0 \(Conv2d\) holds none.*: give it dropout layers and train it"):
        check_passes([nn.Conv2d(3, 1, 1)], 2)
