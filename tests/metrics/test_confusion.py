"""Pooled IoU, Dice and accuracy: against scikit-learn, torchmetrics and counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from torchmetrics.functional import jaccard_index

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.confusion import SegmentationScores, confusion_counts
from smp_ensemble.metrics.decision import decide
from smp_ensemble.typing import IGNORE_INDEX, MODES, Mode, Task

TASKS = {
    "binary": Task("binary", ("background", "roof")),
    "multiclass": Task("multiclass", ("water", "grass", "road")),
    "multilabel": Task("multilabel", ("tree", "shadow", "car")),
}


def random_batch(mode: Mode, seed: int, ignored: float = 0.3, size: tuple[int, int, int] = (3, 7, 6)):
    """Probabilities and target of a mode; each entry is ignored with probability `ignored`."""
    generator = torch.Generator().manual_seed(seed)
    n, h, w = size
    logits = 3 * torch.randn(n, TASKS[mode].num_outputs, h, w, generator=generator)
    probabilities = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
    shape = logits.shape if mode == "multilabel" else (n, h, w)
    target = torch.randint(0, 3 if mode == "multiclass" else 2, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = IGNORE_INDEX
    return probabilities, target


def scores_of(mode: Mode, *batches, threshold: float = 0.5) -> dict[str, float]:
    metric = SegmentationScores(TASKS[mode], threshold)
    for probabilities, target in batches:
        metric.update(probabilities, target)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn_on_valid_pixels(mode: Mode, seed: int) -> None:
    probabilities, target = random_batch(mode, seed)
    scores = scores_of(mode, (probabilities, target))
    decision = decide(probabilities, mode)
    valid = target != IGNORE_INDEX
    if mode == "multilabel":
        per_class = [(target[:, k][valid[:, k]], decision[:, k][valid[:, k]]) for k in range(3)]
        iou = [jaccard_score(true, predicted) for true, predicted in per_class]
        dice = [f1_score(true, predicted) for true, predicted in per_class]
    else:
        average = "binary" if mode == "binary" else None
        iou = np.atleast_1d(jaccard_score(target[valid], decision[valid], average=average))
        dice = np.atleast_1d(f1_score(target[valid], decision[valid], average=average))
    for k, name in enumerate(TASKS[mode].output_names):
        assert scores[f"iou/{name}"] == pytest.approx(iou[k])
        assert scores[f"dice/{name}"] == pytest.approx(dice[k])
    assert scores["iou"] == pytest.approx(np.mean(iou))
    assert scores["dice"] == pytest.approx(np.mean(dice))
    assert scores["accuracy"] == pytest.approx(accuracy_score(target[valid], decision[valid]))


def test_equals_torchmetrics() -> None:
    probabilities, target = random_batch("multiclass", 5)
    expected = jaccard_index(probabilities, target, "multiclass", num_classes=3, ignore_index=IGNORE_INDEX)
    assert scores_of("multiclass", (probabilities, target))["iou"] == pytest.approx(float(expected))
    probabilities, target = random_batch("binary", 5)
    expected = jaccard_index(probabilities[:, 0], target, "binary", ignore_index=IGNORE_INDEX)
    assert scores_of("binary", (probabilities, target))["iou"] == pytest.approx(float(expected))


@pytest.mark.parametrize("mode", MODES)
@given(cut=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_batches_do_not_matter(mode: Mode, cut: int, seed: int) -> None:
    """Streaming in any two parts gives the same bits as everything at once."""
    probabilities, target = random_batch(mode, seed, size=(6, 4, 5))
    whole = scores_of(mode, (probabilities, target))
    parts = scores_of(mode, (probabilities[cut:], target[cut:]), (probabilities[:cut], target[:cut]))
    assert whole == pytest.approx(parts, abs=0, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
def test_ignored_pixels_do_not_matter(mode: Mode) -> None:
    probabilities, target = random_batch(mode, 1)
    other = random_batch(mode, 2)[0]
    ignored = target == IGNORE_INDEX if mode == "multilabel" else (target == IGNORE_INDEX).unsqueeze(1)
    assert scores_of(mode, (torch.where(ignored, other, probabilities), target)) == scores_of(
        mode, (probabilities, target)
    )


@pytest.mark.parametrize("mode", MODES)
def test_nothing_valid_is_nan_and_adds_nothing(mode: Mode) -> None:
    probabilities, target = random_batch(mode, 3)
    blank = torch.full_like(target, IGNORE_INDEX)
    empty = scores_of(mode, (probabilities, blank))
    assert set(empty) == {"iou", "dice", "accuracy"}
    assert all(math.isnan(value) for value in empty.values())
    assert scores_of(mode, (probabilities, blank), (probabilities, target)) == scores_of(mode, (probabilities, target))
    assert scores_of(mode, (probabilities[:0], target[:0]), (probabilities, target)) == scores_of(
        mode, (probabilities, target)
    )


def test_a_class_that_is_nowhere_is_left_out_of_the_mean() -> None:
    decided = torch.tensor([[[0, 0, 2, 2]]])
    probabilities = torch.nn.functional.one_hot(decided, 3).movedim(-1, 1).float()
    scores = scores_of("multiclass", (probabilities, torch.tensor([[[0, 2, 2, 2]]])))
    assert scores == pytest.approx(
        {"iou": (1 / 2 + 2 / 3) / 2, "dice": (2 / 3 + 4 / 5) / 2, "accuracy": 0.75}
        | {"iou/water": 1 / 2, "iou/road": 2 / 3, "dice/water": 2 / 3, "dice/road": 4 / 5}
    )


def test_a_class_that_is_only_predicted_scores_zero() -> None:
    scores = scores_of("binary", (torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 2, dtype=torch.int64)))
    assert scores == {"iou": 0.0, "iou/roof": 0.0, "dice": 0.0, "dice/roof": 0.0, "accuracy": 0.0}


def test_pooled_not_averaged_over_images() -> None:
    """One wrong pixel in a small object weighs as one pixel: 9 hits and 1 miss are 0.9, not the mean of 1 and 0."""
    probabilities = torch.ones(2, 1, 1, 9)
    probabilities[1] = 0
    target = torch.ones(2, 1, 9, dtype=torch.int64)
    target[1, 0, 1:] = 0
    assert scores_of("binary", (probabilities, target))["iou"] == pytest.approx(0.9)


def test_the_threshold_itself_is_foreground_and_may_be_set_later() -> None:
    metric = SegmentationScores(TASKS["binary"])
    metric.threshold = 0.25
    metric.update(torch.tensor([0.25, 0.2]).view(1, 1, 1, 2), torch.tensor([[[1, 0]]]))
    assert metric.compute()["iou"] == 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_count_as_their_float32_values(mode: Mode, dtype: torch.dtype) -> None:
    probabilities, target = random_batch(mode, 4)
    low = probabilities.to(dtype)
    assert scores_of(mode, (low, target)) == scores_of(mode, (low.float(), target))


def test_counts_by_hand_and_in_int64() -> None:
    decision, target = torch.tensor([[[0, 1, 2, 1, 0]]]), torch.tensor([[[0, 2, 2, IGNORE_INDEX, 1]]])
    counts = confusion_counts(decision, target, "multiclass", 3)
    assert [count.tolist() for count in counts] == [[1, 0, 1], [1, 1, 0], [0, 1, 1], 4]
    assert {count.dtype for count in counts} == {torch.int64}
    labels = torch.tensor([[[[1, 1]], [[0, 1]]]])
    counts = confusion_counts(torch.tensor([[[[1, 0]], [[1, 1]]]]), labels, "multilabel", 2)
    assert [count.tolist() for count in counts] == [[1, 1], [0, 1], [1, 0], 4]


def test_uint8_targets_count_too() -> None:
    probabilities, target = random_batch("multiclass", 6)
    assert scores_of("multiclass", (probabilities, target.to(torch.uint8))) == scores_of(
        "multiclass", (probabilities, target)
    )


def test_states_are_sums_for_every_rank() -> None:
    """Counts of two ranks, added, are the counts of one rank that saw both."""
    batches = [random_batch("multiclass", seed) for seed in (0, 1)]
    ranks = []
    for batch in batches:
        metric = SegmentationScores(TASKS["multiclass"])
        metric.update(*batch)
        ranks.append(metric)
    for name, reduction in ranks[0]._reductions.items():
        setattr(ranks[0], name, reduction(torch.stack([getattr(rank, name) for rank in ranks])))
    together = {name: float(value) for name, value in ranks[0].compute().items()}
    assert together == scores_of("multiclass", *batches)


def test_errors_say_what_came() -> None:
    with pytest.raises(ConfigError, match=r"threshold in 0..1, came 1.5"):
        SegmentationScores(TASKS["binary"], 1.5)
    with pytest.raises(ConfigError, match="use mode 'binary'"):
        SegmentationScores(Task("multiclass", ("roof",)))
    with pytest.raises(DataError, match="decisions of the target's shape"):
        confusion_counts(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3), "binary", 1)
