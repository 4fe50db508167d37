"""Folding of batch norms: the same function with fewer steps, and hands off where nothing is proven."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.inference.folding import fold_batch_norms, twin_of


def with_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """As if trained: every batch norm has statistics, weights and offsets of its own."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.3, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            if layer.affine:
                layer.weight.data.uniform_(0.5, 1.5, generator=generator)
                layer.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return module.eval()


def norms_of(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def folded(module: nn.Module, bands: int = 3, side: int = 64) -> nn.Module:
    return fold_batch_norms(module, torch.zeros(1, bands, side, side))


@torch.inference_mode()
def check_same(module: nn.Module, twin: nn.Module, bands: int = 3, side: int = 32) -> None:
    images = torch.rand(2, bands, side, side, generator=torch.Generator().manual_seed(1))
    expected = module(images)
    torch.testing.assert_close(twin(images), expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))


@settings(max_examples=20)
@given(
    st.booleans(), st.booleans(), st.sampled_from([1, 2]), st.sampled_from([0, 1]), st.sampled_from([1, 2]),
    st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]),
)  # fmt: skip
def test_a_pair_is_one_convolution(bias, affine, groups, padding, stride, kind):
    groups = 1 if kind is nn.ConvTranspose2d else groups
    pair = nn.Sequential(
        kind(4, 6, 3, stride=stride, padding=padding, groups=groups, bias=bias), nn.BatchNorm2d(6, affine=affine)
    )
    twin = folded(with_statistics(pair), bands=4, side=8)
    assert norms_of(twin) == 0
    check_same(pair, twin, bands=4, side=9)


ALL_FOLDED = {"unet", "linknet", "fpn", "deeplabv3plus", "manet", "unetplusplus", "upernet", "segformer", "deeplabv3"}


@pytest.mark.parametrize("arch", [*sorted(ALL_FOLDED), "pspnet", "pan"])
def test_every_architecture_stays_the_same_function(arch):
    torch.manual_seed(0)
    network = with_statistics(create_network(arch, encoder_name="resnet18", num_outputs=2))
    twin = folded(network, side=128)
    assert norms_of(twin) < norms_of(network) / 2
    if arch in ALL_FOLDED:
        assert norms_of(twin) == 0
    check_same(network, twin, side=128)


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "tu-mobilenetv3_small_100", "densenet121", "tu-resnet10t"])
def test_encoders_with_other_norms_and_orders_stay_the_same_function(encoder):
    torch.manual_seed(0)
    network = with_statistics(create_network("unet", encoder_name=encoder, num_outputs=1))
    twin = folded(network)
    assert norms_of(twin) < norms_of(network)
    check_same(network, twin, side=64)


def test_the_activation_of_a_fused_norm_stays():
    pair = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU))
    twin = folded(with_statistics(pair))
    assert norms_of(twin) == 0
    check_same(pair, twin)


class Block(nn.Module):
    """A convolution and a batch norm that modules in their order would take for a pair."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.how = how

    def forward(self, images):
        made = self.convolution(images)
        match self.how:
            case "read twice":
                return self.norm(made) + made
            case "read through a view":
                return self.norm(made) + made.flatten(2).view_as(made)
            case "activation between":
                return self.norm(made.relu())
            case "norm first":
                return self.convolution(self.norm(images))
            case "run twice":
                return self.norm(made) + self.convolution(images * 2)
            case "norm twice":
                return self.norm(made) + self.norm(images)
            case "changed in place":
                return self.norm(made.add_(1))
            case "weights read":
                return self.norm(made) + self.convolution.weight.sum()
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    "how",
    [
        "read twice", "read through a view", "activation between", "norm first", "run twice", "norm twice",
        "changed in place", "weights read",
    ],
)  # fmt: skip
def test_what_is_no_pair_is_left_alone(how):
    block = with_statistics(Block(how))
    twin = folded(block)
    assert norms_of(twin) == 1
    check_same(block, twin)


def test_given_out_means_read():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images):
            made = self.convolution(images)
            self.norm(made)
            return made

    assert norms_of(folded(with_statistics(Both()))) == 1


@pytest.mark.parametrize("what", ["hook", "training", "parametrized", "shared"])
def test_what_is_more_than_a_layer_is_left_alone(what):
    pair = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    if what == "hook":
        pair[0].register_forward_hook(lambda module, given, made: made * 2)
    elif what == "parametrized":
        nn.utils.parametrizations.weight_norm(pair[0])
    elif what == "shared":
        pair = nn.Sequential(*pair, nn.ReLU(), *pair)
    elif what == "training":
        pair[1].track_running_stats, pair[1].running_mean, pair[1].running_var = False, None, None
    assert norms_of(folded(pair)) == norms_of(pair)


def test_the_module_itself_stays_and_unfolded_tensors_are_shared():
    module = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    twin = folded(module)
    assert twin[2].weight is module[2].weight
    assert twin[0].weight is not module[0].weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_what_cannot_be_run_or_holds_no_norm_is_given_back():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            raise ValueError("no such size")

    broken, plain = Broken().eval(), nn.Conv2d(3, 1, 1)
    assert folded(broken) is broken
    assert folded(plain) is plain


def test_dropout_stays():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    twin = folded(with_statistics(module))
    assert norms_of(twin) == 0
    assert isinstance(twin[2], nn.Dropout)


def test_a_twin_converts_each_tensor_once():
    layer = nn.Conv2d(3, 3, 1)
    module = nn.Sequential(layer, layer)
    calls = []
    twin = twin_of(module, lambda owner, tensor: calls.append(owner) or tensor.bfloat16())
    assert len(calls) == 2
    assert twin[0].weight is twin[1].weight
    assert module[0].weight.dtype == torch.float32
