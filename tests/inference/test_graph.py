"""An ensemble as one graph: the engine's numbers for every combiner, mode and view, each network at most twice."""

from __future__ import annotations

import pytest
import torch
from halving import COMBINERS, OUTPUTS, VOTES, make_ensemble
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.graph import EnsembleGraph, trace


@pytest.mark.parametrize("mode", OUTPUTS)
@pytest.mark.parametrize("combiner", COMBINERS)
@given(
    views=st.sampled_from(["none", "flips", "d4"]), batch=st.integers(1, 8), size=st.tuples(*[st.integers(2, 9)] * 2)
)
@settings(max_examples=8)
def test_it_gives_what_the_engine_gives(mode, combiner, views, batch, size):
    ensemble = make_ensemble(mode, combiner)
    graph = EnsembleGraph(ensemble, views)
    images = torch.randint(0, 256, (batch, 3, 2 * size[0], 2 * size[1])).float()
    expected = Engine(ensemble, "cpu", "32", views=views)(images)
    with torch.no_grad():
        difference = (graph(images) - expected).abs()
    if combiner not in VOTES:
        assert difference.max() <= 1e-6
    else:  # a vote that hangs on the last bit may turn
        assert (difference > 1e-6).float().mean() <= 0.02


@pytest.mark.parametrize(("views", "runs"), [("none", 1), ("flips", 1), ("d4", 2)])
def test_each_network_runs_once_or_twice_however_many_views_there_are(views, runs):
    ensemble = make_ensemble("multiclass", views=views)
    calls = []
    for member in ensemble.members:
        member.network.register_forward_hook(lambda network, *_: calls.append(network))
    EnsembleGraph(ensemble)(torch.zeros(1, 3, 8, 12))
    assert [calls.count(member.network) for member in ensemble.members] == [runs, runs]


def test_the_ensembles_own_views_are_the_default_and_others_take_their_place():
    ensemble = make_ensemble("binary", views="flips")
    assert EnsembleGraph(ensemble).views == EnsembleGraph(ensemble, "own").views == ("flips",)
    assert EnsembleGraph(ensemble, "d4").views == ("d4",)
    assert ensemble.views == ("flips",)


def test_scales_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"views 'flips\+scales:0.5,1' cannot be exported.*choose --views none"):
        EnsembleGraph(make_ensemble("binary"), "flips+scales:0.5,1")


def test_members_must_say_how_many_bands_they_take():
    with pytest.raises(ConfigError, match="wrap networks as Member"):
        EnsembleGraph(Ensemble([nn.Conv2d(3, 1, 1)], mode="binary"))


def test_a_traced_graph_takes_any_batch_and_size_and_knows_nothing_of_this_machine():
    ensemble = make_ensemble("multiclass", views="d4")
    program = trace(EnsembleGraph(ensemble))
    module = program.module()
    engine = Engine(ensemble, "cpu", "32")
    for batch in range(1, 9):
        for size in ((4, 4), (6, 10), (18, 4)):
            images = torch.randint(0, 256, (batch, 3, *size)).float()
            with torch.no_grad():
                assert torch.allclose(module(images), engine(images), rtol=0, atol=1e-6)
    assert program.example_inputs is None
    assert not any("stack_trace" in node.meta for node in program.graph.nodes)


class Branching(nn.Conv2d):
    """Asks for the values of its input."""

    def forward(self, images):
        return super().forward(images) if images.mean() > 0 else super().forward(-images)


def test_a_network_that_branches_on_values_is_refused_in_one_line():
    ensemble = Ensemble([Member(Branching(3, 1, 1), imagenet())], mode="binary")
    with pytest.raises(NetworkError, match="torch.export cannot trace this ensemble, ") as caught:
        trace(EnsembleGraph(ensemble))
    assert "\n" not in str(caught.value)
