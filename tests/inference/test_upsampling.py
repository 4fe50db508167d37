"""Doubling merged into convolutions: the same function, fewer products, and hands off where a block is not known."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.fast import fast_form
from smp_ensemble.inference.folding import fold_batch_norms
from smp_ensemble.inference.upsampling import DoublingConvolution, _Block, merge_upsampling
from tests.inference.test_folding import with_statistics

SIDE = 32
SMALL = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}


def make_network(arch: str = "unet", encoder: str = "resnet18", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    network = create_network(arch, encoder_name=encoder, num_outputs=2, model_options=SMALL | options)
    return with_statistics(network).double()


def merged(network: nn.Module, side: int = SIDE) -> nn.Module:
    return merge_upsampling(network, torch.zeros(1, 3, side, side, dtype=torch.float64))


def blocks_of(network: nn.Module) -> int:
    return sum(isinstance(layer, _Block) for layer in network.modules())


@torch.inference_mode()
def check_same(network: nn.Module, twin: nn.Module, height: int = SIDE, width: int = SIDE) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = network(images)
    torch.testing.assert_close(twin(images), expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


sides = st.integers(1, 7)


@settings(max_examples=60)
@given(
    st.integers(1, 5), st.integers(0, 4), st.integers(1, 5), st.tuples(sides, sides), st.booleans(), st.booleans(),
    st.tuples(st.integers(1, 15), st.integers(1, 15)), st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_convolution_of_the_enlarged_map_beside_the_other(
    channels, others, outputs, small_size, bias, doubled, other_size, seed
):
    torch.manual_seed(seed)
    convolution = nn.Conv2d(channels + others, outputs, 3, padding=1, bias=bias).double()
    small = torch.randn(2, channels, *small_size, dtype=torch.float64)
    size = (2 * small_size[0], 2 * small_size[1]) if doubled else other_size
    beside = torch.randn(2, others, *size, dtype=torch.float64)
    with torch.inference_mode():
        joined = torch.cat([F.interpolate(small, size=size, mode="nearest"), beside], dim=1)
        found = DoublingConvolution(convolution, channels)(small, size, beside if others else None)
        torch.testing.assert_close(found, convolution(joined), rtol=0, atol=1e-12)


def test_it_takes_four_ninths_of_the_products():
    convolution, small = nn.Conv2d(6, 5, 3, padding=1), torch.rand(1, 6, 4, 4)
    doubling = DoublingConvolution(convolution, 6)
    with torch.inference_mode(), FlopCounterMode(display=False) as plain:
        convolution(F.interpolate(small, scale_factor=2, mode="nearest"))
    with torch.inference_mode(), FlopCounterMode(display=False) as fewer:
        doubling(small, (8, 8))
    assert 9 * fewer.get_total_flops() == 4 * plain.get_total_flops()


def test_sums_of_weights_are_rounded_once():
    convolution = nn.Conv2d(3, 2, 3, padding=1)
    kernel = DoublingConvolution(convolution, 3).doubling.weight
    exact = DoublingConvolution(convolution.double(), 3).doubling.weight
    assert torch.equal(kernel, exact.float())


@pytest.mark.parametrize("arch", ["unet", "unetplusplus", "manet"])
def test_decoders_that_double_stay_the_same_function_with_every_block_replaced(arch):
    network = make_network(arch)
    twin = merged(network)
    assert blocks_of(twin) == len([*network.decoder.blocks.children()])
    check_same(network, twin)
    check_same(network, twin, 24, 40)


@pytest.mark.parametrize("arch", ["linknet", "fpn", "deeplabv3plus", "pspnet", "pan", "upernet", "segformer"])
def test_other_decoders_are_given_back(arch):
    network = create_network(arch, encoder_name="resnet18", num_outputs=1).eval()
    assert merge_upsampling(network, torch.zeros(1, 3, 64, 64)) is network


def test_maps_that_are_not_exactly_doubled_get_the_plain_convolution():
    network = make_network()
    check_same(network, merged(network), 27, 37)  # smp's Unet enlarges to the size of the map beside it


def test_a_map_of_no_channels_beside_changes_nothing():
    network = make_network(encoder="mit_b0", encoder_depth=5, decoder_channels=[8, 8, 8, 8, 8])
    twin = merged(network, 64)
    assert blocks_of(twin) == 5
    check_same(network, twin, 64, 64)


def test_blocks_that_weigh_joined_maps_are_left_alone():
    network = make_network(decoder_attention_type="scse", decoder_channels=[32, 32, 32])
    twin = merged(network)
    assert blocks_of(twin) == 1  # the last: nothing is beside, so nothing is weighed before its first convolution
    check_same(network, twin)


def watch(network: nn.Module) -> None:
    for block in network.decoder.blocks:
        block.attention1.register_forward_hook(lambda module, given, made: made * 2)


def replace(network: nn.Module) -> None:
    for block in network.decoder.blocks:
        block.forward = partial(type(block).forward, block)


def derive(network: nn.Module) -> None:
    for block in network.decoder.blocks:
        block.__class__ = type("Other", (type(block),), {})


def parametrize(network: nn.Module) -> None:
    for block in network.decoder.blocks:
        nn.utils.parametrizations.weight_norm(block.conv1[0])


def dilate(network: nn.Module) -> None:
    for block in network.decoder.blocks:
        block.conv1[0].dilation = block.conv1[0].padding = (2, 2)


@pytest.mark.parametrize("alter", [watch, replace, derive, parametrize, dilate])
def test_what_is_not_known_to_the_last_detail_is_left_alone(alter):
    network = make_network()
    alter(network)
    assert merged(network) is network


def test_another_interpolation_is_left_alone():
    network = make_network(decoder_interpolation="bilinear")
    assert merged(network) is network


def test_what_cannot_be_run_is_given_back():
    network = make_network()
    assert merge_upsampling(network, torch.zeros(1, 5, SIDE, SIDE, dtype=torch.float64)) is network


def test_what_does_not_agree_is_given_back(monkeypatch):
    network = make_network()
    monkeypatch.setattr("smp_ensemble.inference.upsampling.SUMS", ((0, 0, 1), (0, 1, 0), (1, 1, 0), (1, 0, 0)))
    assert merged(network) is network


def test_the_network_itself_stays_and_other_tensors_are_shared():
    network = make_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    twin = merged(network)
    assert twin.encoder.conv1.weight is network.encoder.conv1.weight
    assert twin.decoder.blocks[0].rest[2][0].weight is network.decoder.blocks[0].conv2[0].weight
    assert blocks_of(network) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def make_member(**options: Any) -> Member:
    return Member(make_network(**options).float(), imagenet()).eval()


def make_images() -> torch.Tensor:
    pixels = torch.randint(0, 256, (3, 3, 40, 28), generator=torch.Generator().manual_seed(0)).float()
    return pixels.contiguous(memory_format=torch.channels_last)


def test_only_on_a_cpu():
    member = make_member()
    assert blocks_of(fast_form(member, torch.device("cpu"), None)) == 3
    assert blocks_of(fast_form(member, torch.device("meta"), None)) == 0


def test_an_engine_gives_each_image_what_it_gets_alone_and_what_the_plain_network_gives():
    member, images = make_member(), make_images()
    engine = Engine(Ensemble([member], mode="multiclass"), "cpu", "32")
    found = engine(images)
    assert torch.equal(found, torch.cat([engine(image[None]) for image in images]))
    with torch.inference_mode():
        padded = F.pad(images, (0, 4, 0, 0), mode="replicate")
        torch.testing.assert_close(found, member(padded).softmax(1)[..., :28], rtol=0, atol=1e-5)


def test_in_bf16_it_is_as_near_to_the_network_as_the_plain_form():
    member, images = make_member(), make_images()[..., :24]
    folded = fold_batch_norms(member, torch.zeros(1, 3, 64, 64))
    with torch.inference_mode():
        expected = member(images).softmax(1)
        with torch.autocast("cpu", torch.bfloat16):
            plain = folded(images).softmax(1)
            found = fast_form(member, torch.device("cpu"), torch.bfloat16)(images).softmax(1)
    deviation, plain_deviation = ((each - expected).abs().mean() for each in (found, plain))
    assert deviation < 1.5 * plain_deviation


def test_passes_draw_dropout():
    ensemble = Ensemble([make_member(dropout=0.5)], mode="multiclass")
    engine = Engine(ensemble, "cpu", "32", passes=4)
    assert blocks_of(engine._runs[0]) == 3
    assert not torch.allclose(engine(make_images()), Engine(ensemble, "cpu", "32")(make_images()), atol=1e-4)
