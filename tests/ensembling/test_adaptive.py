"""The adaptive rule: plain values, never growing with the margin, and what is called settled is settled."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.ensembling.adaptive import AdaptiveRule, decision_margins, settled
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.exceptions import ConfigError

RULE = AdaptiveRule(0.01, 0.02, 0.5, ((0.5, 0.25, 0.125), (0.3, 0.2, 0.0)))
ADDITIVE = ("mean", "weighted", "geometric", "vote", "majority")


@st.composite
def rules(draw) -> AdaptiveRule:
    bins = draw(st.integers(1, 6))
    row = st.lists(st.floats(0, 1), min_size=bins, max_size=bins).map(lambda one: tuple(sorted(one, reverse=True)))
    rows = tuple(draw(st.lists(row, max_size=4)))
    return AdaptiveRule(draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.floats(0.01, 10)), rows)


@given(rules())
def test_a_rule_comes_back_from_json(rule):
    assert AdaptiveRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@given(rules(), st.lists(st.floats(0, 50), min_size=2, max_size=9), st.floats(0, 5))
def test_larger_margins_never_promise_more_changes(rule, margins, more):
    now = torch.tensor([margins], dtype=torch.float32)
    for stage in range(1, rule.members):
        before, after = (float(rule.expected_changes(stage, one)) for one in (now, now + more))
        assert after <= before + 1e-6
        assert 0 <= after <= 1


def test_expected_changes_are_the_mean_of_the_table_by_hand():
    margins = torch.tensor([[[0.1, 0.6], [99.0, 1.4]]])
    assert RULE.expected_changes(1, margins).tolist() == [(0.5 + 0.25 + 0.125 + 0.125) / 4]
    assert RULE.expected_changes(2, margins).tolist() == pytest.approx([(0.3 + 0.2) / 4])
    final = torch.tensor([[[True, False], [False, False]]])
    assert RULE.expected_changes(1, margins, final).tolist() == [(0.25 + 0.125 + 0.125) / 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": -0.1}, "expected tolerance of an adaptive rule as a number from 0 to 1, got -0.1"),
        ({"limit": math.nan}, "expected limit of an adaptive rule"),
        ({"limit": math.inf}, "expected limit of an adaptive rule"),
        ({"limit": True}, "expected limit of an adaptive rule as a number from 0 to 1, got True"),
        ({"limit": 10**400}, "expected limit of an adaptive rule"),
        ({"width": 0}, "expected width of an adaptive rule as a number from 0.001 to 100, got 0"),
        ({"width": "wide"}, "expected width of an adaptive rule"),
        ({"changes": [[0.1, 0.2]]}, "expected changes that do not grow with the margin"),
        ({"changes": [[0.1], [0.2, 0.1]]}, "as many bins in each row"),
        ({"changes": [[]]}, "expected changes with 1 to 4096 bins in a row, got 0"),
        ({"changes": [[0.0] * 4097]}, "expected changes with 1 to 4096 bins in a row, got 4097"),
        ({"changes": [[None]]}, "expected changes of an adaptive rule as a number"),
        ({"changes": [0.1]}, "expected changes as a list of lists of numbers"),
        ({"changes": {}}, "expected changes as a list of lists of numbers"),
        ({"chnges": []}, "unknown setting 'chnges' of an adaptive rule: did you mean 'changes'"),
    ],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveRule.from_dict({**RULE.to_dict(), **change})


@pytest.mark.parametrize("content", [{}, [], None, "rule", {"tolerance": 0.1, "limit": 0.1, "width": 1}])
def test_what_is_no_rule_is_refused(content):
    with pytest.raises(ConfigError, match="expected an adaptive rule as a JSON object with tolerance, limit, width"):
        AdaptiveRule.from_dict(content)


def make_ensemble(combiner: str, count: int = 3, mode: str = "binary", **options) -> Ensemble:
    outputs = 1 if mode == "binary" else 3
    return Ensemble([nn.Conv2d(3, outputs, 1) for _ in range(count)], mode=mode, combiner=combiner, **options)


class Max:
    """A combiner that says nothing of itself."""

    def __init__(self, context) -> None:
        pass


def test_an_ensemble_takes_a_rule_that_fits_it_only(monkeypatch):
    make_ensemble("mean", adaptive=RULE)
    with pytest.raises(ConfigError, match="expected an adaptive rule for 2 members, got one for 3"):
        make_ensemble("mean", 2, adaptive=RULE)
    with pytest.raises(ConfigError, match="members in the order of their weights, heaviest first"):
        make_ensemble("mean", weights=[1, 2, 1], adaptive=RULE)
    monkeypatch.setattr("smp_ensemble.ensembling.ensemble.combiner_class", lambda name: Max)
    with pytest.raises(ConfigError, match="adaptive needs a combiner that adds members up .*; 'max' does not say"):
        make_ensemble("max", adaptive=RULE)


def draw_probabilities(mode: str, count: int, seed: int, sharpness: float = 3.0) -> torch.Tensor:
    """Of `count` members for two images of 4 x 5: `(count, 2, K, 4, 5)`."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(count, 2, 1 if mode == "binary" else 3, 4, 5, generator=generator)
    return logits.softmax(dim=2) if mode == "multiclass" else logits.sigmoid()


@st.composite
def combinations(draw) -> Ensemble:
    combiner = draw(st.sampled_from(ADDITIVE))
    weights = sorted(draw(st.lists(st.floats(0.05, 5), min_size=1, max_size=5)), reverse=True)
    return make_ensemble(
        combiner,
        len(weights),
        draw(st.sampled_from(["binary", "multiclass", "multilabel"])),
        weights=weights,
        threshold=draw(st.floats(0.1, 0.9)),
        temperature=1.0 if combiner in {"vote", "majority"} else draw(st.floats(0.3, 4)),
        reject=draw(st.none() | st.floats(0, 0.95)),
    )


@given(combinations(), st.integers(0, 10**6), st.sampled_from([1.0, 4.0, 12.0]), st.booleans())
def test_what_is_settled_no_later_member_changes(ensemble, seed, sharpness, spiteful):
    members = draw_probabilities(ensemble.mode, len(ensemble.weights), seed, sharpness)
    combiner, weights = ensemble.new_combiner(), ensemble.scaled_weights
    states = []
    for index, weight in enumerate(weights):
        combiner.update(members[index], weight)
        states.append((_mask(ensemble, combiner.compute()), settled(ensemble, combiner, sum(weights[index + 1 :]))))
        assert torch.equal(_mask(ensemble, combiner.compute()), states[-1][0])  # asking changed nothing
    for index, (mask, final) in enumerate(states):
        whole = combiner
        if spiteful:  # the others now say the contrary of the first ones, as surely as they can
            whole = ensemble.new_combiner()
            for place, weight in enumerate(weights):
                whole.update(
                    members[place] if place <= index else _contrary(ensemble.mode, members[: index + 1]), weight
                )
        assert torch.equal(mask[final], _mask(ensemble, whole.compute())[final])
    assert states[-1][1].all()


def _contrary(mode: str, members: torch.Tensor) -> torch.Tensor:
    mean = members.mean(dim=0)
    if mode != "multiclass":
        return (mean < 0.5).float()
    runner_up = mean.scatter(1, mean.argmax(dim=1, keepdim=True), -1.0).argmax(dim=1, keepdim=True)
    return torch.zeros_like(mean).scatter_(1, runner_up, 1.0)


def _mask(ensemble: Ensemble, pooled: torch.Tensor) -> torch.Tensor:
    from smp_ensemble.ensembling.temperature import apply_temperature

    return ensemble.decide(apply_temperature(pooled, ensemble.temperature, ensemble.mode))


@pytest.mark.parametrize("combiner", ["vote", "majority"])
def test_three_of_five_votes_settle_it(combiner):
    ensemble = make_ensemble(combiner, 5)
    running = ensemble.new_combiner()
    for seen in range(1, 6):
        running.update(torch.tensor([0.9, 0.1]).view(1, 1, 1, 2))
        assert settled(ensemble, running, 5 - seen).all() == (seen >= 3)


def test_the_mean_is_settled_from_the_member_on_that_arithmetic_says():
    ensemble = make_ensemble("mean", 5)
    running = ensemble.new_combiner()
    for seen in range(1, 6):
        running.update(torch.tensor([0.9, 0.7, 0.1]).view(1, 1, 1, 3))
        by_hand = [0.9 * seen / 5 > 0.5, 0.7 * seen / 5 > 0.5, (0.1 * seen + 5 - seen) / 5 < 0.5]
        assert settled(ensemble, running, 5 - seen).flatten().tolist() == by_hand


@given(combinations(), st.integers(0, 10**6))
def test_margins_are_leads_in_log_odds(ensemble, seed):
    p = draw_probabilities(ensemble.mode, 1, seed)[0]
    found = decision_margins(ensemble, p).numpy()
    assert found.shape == ensemble.decide(p).shape
    assert (found >= 0).all()
    if ensemble.reject:
        return
    values = p.double().numpy()
    if ensemble.mode == "multiclass":
        ordered = np.sort(values, axis=1)
        expected = np.log(ordered[:, -1]) - np.log(ordered[:, -2])
    else:
        cut = 0.5 if ensemble.votes else ensemble.threshold
        expected = np.abs(np.log(values / (1 - values)) - math.log(cut / (1 - cut)))
        expected = expected[:, 0] if ensemble.mode == "binary" else expected
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_limit_of_rejection_is_an_edge_too():
    ensemble = make_ensemble("mean", reject=0.8)
    p = torch.tensor([0.8, 0.81, 0.5, 0.99]).view(1, 1, 1, 4)
    margins = decision_margins(ensemble, p).flatten()
    assert margins[0] < 1e-5 < margins[1] < 0.1
    assert margins[2] == 0  # the threshold itself
    assert margins[3] > 3
