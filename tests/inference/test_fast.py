"""The fast form of a member: the numbers of autocast with weights cast once, and compiled only where that works."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.fast import Compiled, fast_form
from smp_ensemble.inference.folding import fold_batch_norms
from smp_ensemble.inference.upsampling import merge_upsampling

CPU = torch.device("cpu")


@pytest.fixture
def member(make_tiny_network) -> Member:
    return Member(make_tiny_network(0, 2), imagenet()).eval()


def make_images() -> torch.Tensor:
    pixels = torch.randint(0, 256, (2, 3, 32, 24), generator=torch.Generator().manual_seed(0)).float()
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_casting_weights_once_changes_nothing(member):
    example = torch.zeros(1, 3, 64, 64)
    merged = merge_upsampling(fold_batch_norms(member, example), example).to(memory_format=torch.channels_last)
    fast = fast_form(member, CPU, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(make_images()), merged(make_images()))


def test_only_what_multiplies_is_cast(member):
    fast = fast_form(member, CPU, torch.bfloat16)
    for layer in fast.modules():
        expected = torch.bfloat16 if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else torch.float32
        assert {tensor.dtype for tensor in layer.parameters(recurse=False)} <= {expected}
    assert {tensor.dtype for tensor in fast.normalization.buffers()} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in fast.parameters())


def test_members_of_unknown_kind_run_as_they_are():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, images):
            return images[:, :1] * self.scale

    odd = Odd().eval()
    assert torch.equal(fast_form(odd, CPU, None)(make_images()), odd(make_images()))


def test_where_compiling_fails_the_network_runs_and_a_warning_says_so_once(member, caplog):
    calls = []

    def compiler(network, options):
        assert options == {"freezing": True}

        def run(images):
            calls.append(1)
            raise RuntimeError("InvalidCxxCompiler: no g++\nmore")

        return run

    compiled = Compiled(member, compiler)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        for _ in range(2):
            assert torch.equal(compiled(make_images()), member(make_images()))
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile failed, the network runs without: InvalidCxxCompiler: no g++; is a C++ compiler installed "
        "(apt-get install g++)?"
    ]


def test_passes_are_never_compiled(make_tiny_network):
    member = Member(make_tiny_network(0, 2, dropout=0.5), imagenet())
    engine = Engine(Ensemble([member], mode="multiclass"), "cpu", "32", compile=True)
    assert isinstance(engine._runs[0], Compiled)
    several = engine.with_options(passes=3)
    expected = Engine(engine.ensemble, "cpu", "32", passes=3)(make_images())
    assert torch.equal(several(make_images()), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_kernels_give_the_same(member, caplog):
    ensemble = Ensemble([member], mode="multiclass")
    images = make_images()
    found = Engine(ensemble, "cpu", "32", compile=True)(images)
    torch.testing.assert_close(found, Engine(ensemble, "cpu", "32")(images), rtol=0, atol=1e-5)
    if any("torch.compile failed" in record.getMessage() for record in caplog.records):
        pytest.skip(caplog.records[-1].getMessage())
