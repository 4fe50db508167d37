"""The comparison of an exported file with the engine: it lets equal ones pass and says how large a difference is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from smp_ensemble.data.normalization import Normalization, imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import NetworkError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.export_check import TOLERANCE, compare, random_batches


def make_engine(combiner: str = "mean", mode: str = "binary", outputs: int = 1) -> Engine:
    torch.manual_seed(0)
    members = [Member(nn.Conv2d(3, outputs, 3, padding=1), imagenet()) for _ in range(2)]
    return Engine(Ensemble(members, mode=mode, combiner=combiner), "cpu", "32")


def batches_of(engine: Engine, at_least: int = 6) -> list[torch.Tensor]:
    return list(random_batches(engine.ensemble, 3, 4, at_least))


def test_batches_grow_until_there_are_enough_images_of_several_sizes():
    member = Member(nn.Conv2d(2, 1, 1), Normalization("none", [0, 0], [1, 1], 4095))
    batches = list(random_batches(Ensemble([member], mode="binary"), 2, 8, 10))
    assert [tuple(batch.shape) for batch in batches] == [(1, 2, 32, 32), (2, 2, 16, 48), (3, 2, 40, 24), (4, 2, 64, 16)]
    for batch in batches:
        assert torch.equal(batch, batch.round())
        assert batch.min() >= 0
        assert 2000 < batch.max() <= 4095


def test_the_engine_itself_does_not_differ():
    engine = make_engine()
    found = compare(engine, engine, batches_of(engine))
    assert (found.difference, found.images, found.undecided) == (0, 6, 0)


@pytest.mark.parametrize("moved", [0.4 * TOLERANCE, 3 * TOLERANCE])
def test_one_pixel_that_differs_is_found(moved):
    engine = make_engine()

    def run(images):
        found = engine(images).clone()
        found[-1, 0, 3, 2] += moved
        return found

    if moved < TOLERANCE:
        assert compare(engine, run, batches_of(engine)).difference == pytest.approx(moved, rel=0.01)
    else:
        with pytest.raises(NetworkError, match=r"by 0.0003 in probability on images of shape \(1, 3, 16, 16\)"):
            compare(engine, run, batches_of(engine))


@pytest.mark.parametrize("wrong", [lambda found: found[..., 1:], lambda found: found * math.nan])
def test_another_shape_and_values_that_are_no_numbers_are_infinitely_wrong(wrong):
    engine = make_engine()
    with pytest.raises(NetworkError, match="by inf"):
        compare(engine, lambda images: wrong(engine(images)), batches_of(engine))


@pytest.mark.parametrize(("mode", "outputs"), [("binary", 1), ("multiclass", 3), ("multilabel", 2)])
def test_votes_that_rounding_decides_are_left_out_and_counted(mode, outputs):
    engine = make_engine("vote", mode, outputs)
    other = make_engine("vote", mode, outputs)
    with torch.no_grad():
        for member in other.ensemble.members:  # moves each probability by less than the tolerance
            member.network.bias += 1e-4 * torch.arange(1, outputs + 1)
    batches = batches_of(engine, 28)
    assert max(float((other(batch) - engine(batch)).abs().max()) for batch in batches) > 0.4  # some votes turn
    found = compare(engine, other, batches)
    assert found.difference < TOLERANCE
    assert 0 < found.undecided < 0.05


def test_a_vote_that_turns_without_a_reason_is_found():
    engine = make_engine("vote", "multiclass", 3)
    with pytest.raises(NetworkError, match="differs from the engine by"):
        compare(engine, lambda images: engine(images).roll(1, dims=1), batches_of(engine))
