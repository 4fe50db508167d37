"""How members differ: by hand, against NumPy and scikit-learn, and Krogh & Vedelsby's identity."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import matthews_corrcoef, zero_one_loss

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.decision import decide
from smp_ensemble.metrics.diversity import Diversity, DiversityScores
from smp_ensemble.typing import IGNORE_INDEX, MODES, Mode, Task

TASKS = {
    "binary": Task("binary", ("background", "roof")),
    "multiclass": Task("multiclass", ("water", "grass", "road")),
    "multilabel": Task("multilabel", ("tree", "shadow", "car")),
}


def random_batch(mode: Mode, seed: int, members: int = 3, ignored: float = 0.2, n: int = 2):
    """Probabilities `(M, N, K, H, W)` that resemble a truth and each other, and that truth."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, TASKS[mode].num_outputs, 9, 7, generator=generator)
    logits = shared + torch.randn(members, *shared.shape, generator=generator)
    probabilities = logits.softmax(2) if mode == "multiclass" else logits.sigmoid()
    target = decide((shared + 0.7 * torch.randn(shared.shape, generator=generator)).sigmoid(), mode)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE_INDEX
    return probabilities, target


def filled(scores: DiversityScores, *batches) -> DiversityScores:
    for probabilities, target in batches:
        batch = scores.batch(target)
        for member in probabilities:
            batch.add(member, decide(member, scores.task.mode))
        batch.close()
    return scores


def diversity_of(mode: Mode, *batches, weights=None) -> Diversity:
    return filled(DiversityScores(TASKS[mode], len(batches[0][0]), weights), *batches).diversity()


def same(one: Diversity, other: Diversity) -> bool:
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name), equal_nan=True) for f in fields(Diversity))


def rows(mode: Mode, probabilities: torch.Tensor, target: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decisions `(M, P)`, probabilities `(M, P, C)` and truth `(P, C)` of valid entries, in NumPy."""
    valid = (target != IGNORE_INDEX).numpy()
    decisions = np.stack([decide(member, mode).numpy()[valid] for member in probabilities])
    p = probabilities.double().numpy()
    truth = target.numpy()[valid]
    if mode == "multiclass":
        return decisions, np.moveaxis(p, 2, -1)[:, valid], np.eye(3)[truth]
    p = p[:, :, 0] if mode == "binary" else p
    return decisions, p[:, valid][..., None], truth[:, None].astype(float)


def test_three_members_by_hand() -> None:
    """Ten pixels, all of them foreground: a member is wrong where it decides 0."""
    decisions = torch.tensor(
        [
            [0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
            [0, 0, 1, 1, 0, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 0, 0, 1, 1, 1],
        ]
    )
    batch = (decisions.float().view(3, 1, 1, 1, 10), torch.ones(1, 1, 10, dtype=torch.int64))
    found = diversity_of("binary", batch)
    assert found.errors.tolist() == [0.4, 0.3, 0.2]
    assert found.disagreement.tolist() == [[0.0, 0.3, 0.6], [0.3, 0.0, 0.5], [0.6, 0.5, 0.0]]
    assert found.double_fault.tolist() == [[0.4, 0.2, 0.0], [0.2, 0.3, 0.0], [0.0, 0.0, 0.2]]
    phi = (0.2 - 0.12) / math.sqrt(0.24 * 0.21), (0 - 0.08) / math.sqrt(0.24 * 0.16), -0.06 / math.sqrt(0.21 * 0.16)
    expected = [[1, phi[0], phi[1]], [phi[0], 1, phi[2]], [phi[1], phi[2], 1]]
    assert found.error_correlation == pytest.approx(np.array(expected))
    assert found.member_error == pytest.approx(0.3)  # of zeros and ones it is the error rate
    votes = decisions.sum(0).numpy() / 3
    assert found.ensemble_error == pytest.approx(((1 - votes) ** 2).mean(), abs=1e-7)
    assert found.ambiguity == pytest.approx((votes * (1 - votes)).mean(), abs=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_numpy_and_scikit_learn(mode: Mode, seed: int) -> None:
    batch = random_batch(mode, seed, members=4)
    found = diversity_of(mode, batch)
    decisions, _, truth = rows(mode, *batch)
    labels = truth.argmax(1) if mode == "multiclass" else truth[:, 0].astype(int)
    wrong = decisions != labels
    assert found.error_correlation == pytest.approx(np.corrcoef(wrong))
    for i in range(4):
        assert found.errors[i] == pytest.approx(zero_one_loss(labels, decisions[i]))
        for j in range(4):
            assert found.disagreement[i, j] == pytest.approx(zero_one_loss(decisions[i], decisions[j]))
            assert found.error_correlation[i, j] == pytest.approx(matthews_corrcoef(wrong[i], wrong[j]))
            assert found.double_fault[i, j] == pytest.approx((wrong[i] & wrong[j]).mean())
    assert all(getattr(found, f.name).dtype == np.float64 for f in fields(found)[:4])


@given(
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 10_000),
    weights=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5),
)
@settings(max_examples=40)
def test_ambiguity_is_what_averaging_gains(mode: Mode, seed: int, weights: list[float]) -> None:
    """Krogh & Vedelsby: the ensemble's error is the members' minus the ambiguity; each equals NumPy's."""
    batch = random_batch(mode, seed, members=len(weights))
    found = diversity_of(mode, batch, weights=weights)
    assert found.member_error - found.ambiguity == pytest.approx(found.ensemble_error, abs=1e-6)
    _, p, truth = rows(mode, *batch)
    mean = np.average(p, axis=0, weights=weights)
    briers = ((p - truth) ** 2).sum(-1).mean(-1)
    distances = ((p - mean) ** 2).sum(-1).mean(-1)
    assert found.member_error == pytest.approx(np.average(briers, weights=weights), abs=1e-6)
    assert found.ensemble_error == pytest.approx(((mean - truth) ** 2).sum(-1).mean(), abs=1e-6)
    assert found.ambiguity == pytest.approx(np.average(distances, weights=weights), abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_errors_are_the_brier_scores_of_calibration(mode: Mode) -> None:
    probabilities, target = random_batch(mode, 3)
    found = diversity_of(mode, (probabilities, target))
    briers = []
    for each in (*probabilities, probabilities.mean(0)):
        calibration = CalibrationScores(TASKS[mode])
        calibration.update(each, target)
        briers.append(float(calibration.compute()["brier"]))
    assert found.member_error == pytest.approx(np.mean(briers[:-1]), abs=1e-6)
    assert found.ensemble_error == pytest.approx(briers[-1], abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("members", [1, 3, 7])
def test_copies_do_not_differ(mode: Mode, members: int) -> None:
    probabilities, target = random_batch(mode, 4, members=1)
    found = diversity_of(mode, (probabilities.repeat(members, 1, 1, 1, 1), target))
    assert not found.disagreement.any()
    assert found.ambiguity == 0.0
    assert found.ensemble_error == found.member_error
    assert np.array_equal(found.double_fault, np.full((members, members), found.errors[0]))
    assert found.error_correlation == pytest.approx(np.ones((members, members)))


@pytest.mark.parametrize("mode", MODES)
def test_ignored_pixels_do_not_matter(mode: Mode) -> None:
    probabilities, target = random_batch(mode, 5)
    ignored = target == IGNORE_INDEX if mode == "multilabel" else (target == IGNORE_INDEX).unsqueeze(1)
    other = torch.where(ignored, random_batch(mode, 6)[0], probabilities)
    assert same(diversity_of(mode, (other, target)), diversity_of(mode, (probabilities, target)))


@pytest.mark.parametrize("mode", MODES)
def test_merging_is_one_pass(mode: Mode) -> None:
    batches = [random_batch(mode, seed, n=seed + 1) for seed in range(3)]
    weights = [1.0, 2.0, 0.5]
    whole = diversity_of(mode, *batches, weights=weights)
    parts = [filled(DiversityScores(TASKS[mode], 3, weights), *some) for some in (batches[2:], batches[:2])]
    parts[0].merge_state(parts[1])
    assert same(parts[0].diversity(), whole)
    together = torch.cat([probabilities for probabilities, _ in batches], 1), torch.cat([t for _, t in batches])
    assert same(diversity_of(mode, together, weights=weights), whole)


def test_two_batches_may_be_open_and_a_weight_may_be_zero() -> None:
    first, second = random_batch("multiclass", 7), random_batch("multiclass", 8)
    scores = DiversityScores(TASKS["multiclass"], 3, [3, 1, 0])
    batches = [scores.batch(target) for _, target in (first, second)]
    for members in zip(first[0], second[0], strict=True):
        for batch, member in zip(batches, members, strict=True):
            batch.add(member, decide(member, "multiclass").to(torch.uint8))
    for batch in batches:
        batch.close()
    found = scores.diversity()
    assert same(found, diversity_of("multiclass", first, second, weights=[0.75, 0.25, 0.0]))
    two = [(probabilities[:2], target) for probabilities, target in (first, second)]
    assert found.ambiguity == diversity_of("multiclass", *two, weights=[3, 1]).ambiguity


def test_members_that_are_never_or_always_wrong_have_no_correlation() -> None:
    truth = torch.ones(1, 1, 4, dtype=torch.int64)
    members = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]).view(4, 1, 1, 1, 4)
    nan = math.nan
    expected = [[nan, nan, nan, nan], [nan, nan, nan, nan], [nan, nan, 1, -1], [nan, nan, -1, 1]]
    assert np.array_equal(diversity_of("binary", (members, truth)).error_correlation, expected, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_valid_is_nan_and_adds_nothing(mode: Mode) -> None:
    probabilities, target = random_batch(mode, 9)
    blank = (probabilities, torch.full_like(target, IGNORE_INDEX))
    empty = diversity_of(mode, blank)
    assert all(np.isnan(getattr(empty, f.name)).all() for f in fields(Diversity))
    assert same(diversity_of(mode, blank, (probabilities, target)), diversity_of(mode, (probabilities, target)))


def test_decisions_are_the_members_own() -> None:
    """At thresholds of their own, two members with the same probabilities differ; the squared errors know none."""
    probabilities = torch.tensor([0.3, 0.6, 0.9]).view(1, 1, 1, 3)
    scores = DiversityScores(TASKS["binary"], 2)
    batch = scores.batch(torch.tensor([[[0, 0, 1]]]))
    for threshold in (0.25, 0.75):
        batch.add(probabilities, decide(probabilities, "binary", threshold))
    batch.close()
    found = scores.diversity()
    assert found.errors == pytest.approx([2 / 3, 0])
    assert found.disagreement[0, 1] == pytest.approx(2 / 3)
    assert found.ambiguity == 0


def test_what_is_handed_over_stays_as_it_is() -> None:
    probabilities, target = random_batch("binary", 10)
    probabilities = probabilities.double()
    before = probabilities.clone()
    diversity_of("binary", (probabilities, target), weights=[1, 2, 3])
    assert torch.equal(probabilities, before)


def test_errors_say_what_came() -> None:
    probabilities, target = random_batch("multiclass", 11)
    decision = decide(probabilities[0], "multiclass")
    scores = DiversityScores(TASKS["multiclass"], 2)
    batch = scores.batch(target)
    batch.add(probabilities[0], decision)
    with pytest.raises(ConfigError, match="expected 2 members in a batch, came 1"):
        batch.close()
    batch.add(probabilities[1], decision)
    with pytest.raises(ConfigError, match="expected 2 members in a batch, came another"):
        batch.add(probabilities[2], decision)
    batch.close()
    with pytest.raises(ConfigError, match="expected 2 members in a batch, came 0"):
        batch.close()
    batch = scores.batch(target)
    with pytest.raises(DataError, match=r"target's shape \(2, 9, 7\), came \(1, 9, 7\)"):
        batch.add(probabilities[0], decision[:1])
    with pytest.raises(DataError, match="came torch.float32: decide before"):
        batch.add(probabilities[0], decision.float())
    with pytest.raises(DataError, match=r"decisions 0..2, came 255: members reject no pixels"):
        batch.add(probabilities[0], torch.full_like(decision, 255))
    with pytest.raises(DataError, match=r"probabilities in 0..1, came"):
        batch.add(probabilities[0] * 5, decision)
    with pytest.raises(DataError, match="class ids 0..2"):
        scores.batch(target + 3)
    with pytest.raises(ConfigError, match="at least one member, came 0"):
        DiversityScores(TASKS["binary"], 0)
    for weights in ([1.0], [1.0, -1.0, 2.0], [0.0, 0.0, 0.0], [1.0, math.nan, 1.0]):
        with pytest.raises(ConfigError, match="expected 3 weights of 0 and more"):
            DiversityScores(TASKS["binary"], 3, weights)
