"""Post-processing chosen on validation data."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from smp_ensemble.ensembling.postprocessing import Crf, PostProcessing
from smp_ensemble.evaluation.postprocess_search import CANDIDATES, LEAST_GAIN, tune
from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.inference.crf import refine
from smp_ensemble.inference.postprocess import clean

R = 255
CHEAP = {name: values for name, values in CANDIDATES.items() if name != "crf"}
AREAS = {name: values for name, values in CHEAP.items() if name in {"min_area", "max_hole"}}


def half(probabilities: np.ndarray) -> np.ndarray:
    return (probabilities[0] >= 0.5).astype(np.uint8)


def most(probabilities: np.ndarray) -> np.ndarray:
    return probabilities.argmax(axis=0).astype(np.uint8)


def each(probabilities: np.ndarray) -> np.ndarray:
    return (probabilities >= 0.5).astype(np.uint8)


def scenes(count: int = 4, classes: int = 2, size: int = 64) -> list[np.ndarray]:
    """Large regions, one class id a pixel."""
    generator = np.random.default_rng(0)
    fields = generator.normal(size=(count, classes, size, size))
    smooth = [[ndimage.gaussian_filter(field, 7) for field in scene] for scene in fields]
    return [np.argmax(scene, axis=0).astype(np.uint8) for scene in smooth]


def salted(mask: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.where(generator.random(mask.shape) < share, generator.integers(0, classes, mask.shape), mask)


def blank(mask: np.ndarray) -> np.ndarray:
    return np.zeros((*mask.shape[-2:], 3), dtype=np.uint8)


def as_binary(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, 0.9, 0.1)[None].astype(np.float32)


def as_classes(mask: np.ndarray, classes: int) -> np.ndarray:
    return (0.1 + 0.6 * (np.arange(classes)[:, None, None] == mask)).astype(np.float32)


class Samples:
    """A callable that counts how often it is called."""

    def __init__(self, *samples):
        self.samples = samples
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return iter(self.samples)


def pooled_iou(pairs, classes) -> float:
    """Mean IoU over all pixels of known truth and decision, by hand."""
    mask, truth = (np.concatenate([array.ravel() for array in arrays]) for arrays in zip(*pairs, strict=True))
    known = (mask != R) & (truth != R)
    scores = []
    for index in classes:
        a, b = (mask == index)[known], (truth == index)[known]
        if (a | b).any():
            scores.append((a & b).sum() / (a | b).sum())
    return float(np.mean(scores))


def test_salt_and_pepper_is_cleaned():
    truths = scenes()
    for truth in truths:
        truth[:, ::16] = 1  # thin lines, which an opening would lose
    samples = Samples(*((blank(t), as_binary(salted(t, 0.06, 2, i)), t) for i, t in enumerate(truths)))
    settings, before, after = tune(samples, mode="binary", num_classes=2, decide=half, candidates=AREAS)
    assert settings.min_area > 0
    assert settings.max_hole > 0
    assert before < 0.97
    assert after > 0.98
    noisy = [half(probabilities) for _, probabilities, _ in samples.samples]
    assert before == pytest.approx(pooled_iou(zip(noisy, truths, strict=True), [1]), abs=1e-6)
    cleaned = [clean(mask, "binary", settings) for mask in noisy]
    assert after == pytest.approx(pooled_iou(zip(cleaned, truths, strict=True), [1]), abs=1e-6)
    assert samples.calls == 1
    again = tune(samples, mode="binary", num_classes=2, decide=half, candidates=AREAS)
    assert again == (settings, before, after)
    more = tune(samples, mode="binary", num_classes=2, decide=half, candidates=CHEAP)
    assert more.settings.opening == 0
    assert more.settings.min_area > 0
    assert more.score_after > after - LEAST_GAIN


def test_each_setting_is_the_best_of_its_list_given_those_before():
    truths = scenes()
    pairs = [(half(as_binary(salted(t, 0.1, 2, i))), t) for i, t in enumerate(truths)]
    samples = Samples(*((blank(t), as_binary(m), t) for m, t in pairs))
    settings, _, _ = tune(samples, mode="binary", num_classes=2, decide=half, candidates=CHEAP)

    def score(trial):
        return pooled_iou([(clean(mask, "binary", trial), truth) for mask, truth in pairs], [1])

    chosen = PostProcessing()
    for name, values in CHEAP.items():
        scores = [score(dataclasses.replace(chosen, **{name: value})) for value in values]
        if max(scores) > score(chosen) + LEAST_GAIN:
            chosen = dataclasses.replace(chosen, **{name: values[int(np.argmax(scores))]})
    assert settings == chosen


def test_multiclass_noise_is_cleaned_without_opening_and_closing():
    truths = scenes(classes=4)
    samples = Samples(*((blank(t), as_classes(salted(t, 0.06, 4, i), 4), t) for i, t in enumerate(truths)))
    settings, before, after = tune(samples, mode="multiclass", num_classes=4, decide=most, candidates=CHEAP)
    assert settings.min_area > 0
    assert (settings.opening, settings.closing) == (0, 0)
    assert after > before + 0.03
    cleaned = [(clean(most(p), "multiclass", settings), t) for _, p, t in samples.samples]
    assert after == pytest.approx(pooled_iou(cleaned, range(4)), abs=1e-6)


def test_multilabel_noise_is_cleaned_on_every_plane():
    truths = [np.stack([t, 1 - t]) for t in scenes()]
    samples = Samples(*((blank(t), np.where(salted(t, 0.06, 2, i), 0.9, 0.1), t) for i, t in enumerate(truths)))
    settings, before, after = tune(samples, mode="multilabel", num_classes=2, decide=each, candidates=AREAS)
    assert settings.min_area > 0
    assert after > before
    cleaned = [clean(each(p), "multilabel", settings) for _, p, _ in samples.samples]
    by_plane = [pooled_iou([(c[k], t[k]) for c, t in zip(cleaned, truths, strict=True)], [1]) for k in range(2)]
    assert after == pytest.approx(np.mean(by_plane), abs=1e-6)


def test_the_crf_is_chosen_where_colours_show_the_objects():
    generator = np.random.default_rng(1)
    truths = scenes(count=2, size=40)
    images = [(60 + 100 * t[..., None] + generator.normal(0, 4, (*t.shape, 3))).astype(np.uint8) for t in truths]
    blurred = [ndimage.gaussian_filter(t.astype(float), 2) + generator.normal(0, 0.2, t.shape) for t in truths]
    chances = [np.clip(b, 0.02, 0.98)[None].astype(np.float32) for b in blurred]
    candidates = {"crf": (Crf(iterations=1, bilateral_weight=1.0), Crf()), "min_area": (8,)}
    samples = Samples(*zip(images, chances, truths, strict=True))
    settings, before, after = tune(samples, mode="binary", num_classes=2, decide=half, candidates=candidates)
    assert settings.crf == Crf()
    assert after > before + 0.02
    refined = [refine(i, c, "binary", Crf()) for i, c in zip(images, chances, strict=True)]
    masks = [(clean(half(r), "binary", settings), t) for r, t in zip(refined, truths, strict=True)]
    assert after == pytest.approx(pooled_iou(masks, [1]), abs=1e-6)


@pytest.mark.parametrize("candidates", [None, {}, CHEAP])
def test_where_nothing_helps_nothing_is_chosen(candidates):
    truths = scenes(count=2, size=40)
    samples = Samples(*((blank(t), as_binary(t), t) for t in truths))
    settings, before, after = tune(samples, mode="binary", num_classes=2, decide=half, candidates=candidates)
    assert settings == PostProcessing()
    assert (before, after) == (1.0, 1.0)
    assert not settings.active


def test_unknown_truth_and_rejected_pixels_do_not_count():
    truth, chances = scenes(count=1)[0], np.full((1, 64, 64), 0.5, dtype=np.float32)
    chances[0, :32] = as_binary(truth)[0, :32]
    chances[0, :4, :8] = 1 - chances[0, :4, :8]
    unknown = truth.copy()
    unknown[:4, :8] = R

    def cautious(probabilities):
        return np.where(probabilities[0] == 0.5, R, probabilities[0] > 0.5).astype(np.uint8)

    samples = Samples((blank(truth), chances, unknown.astype(np.int64)))
    assert tune(samples, mode="binary", num_classes=2, decide=cautious, candidates=CHEAP) == (PostProcessing(), 1, 1)


def test_without_any_class_there_is_no_score():
    empty = np.zeros((8, 8), dtype=np.uint8)
    samples = Samples((blank(empty), as_binary(empty), empty))
    settings, before, after = tune(samples, mode="binary", num_classes=2, decide=half, candidates=CHEAP)
    assert settings == PostProcessing()
    assert np.isnan([before, after]).all()


def test_bad_input_is_refused():
    empty = np.zeros((8, 8), dtype=np.uint8)
    sample = blank(empty), as_binary(empty), empty
    with pytest.raises(ConfigError, match="unknown setting 'area' among the candidates: did you mean 'min_area'"):
        tune(Samples(sample), mode="binary", num_classes=2, decide=half, candidates={"area": (1,)})
    with pytest.raises(ConfigError, match="min_area as a whole number"):
        tune(Samples(sample), mode="binary", num_classes=2, decide=half, candidates={"min_area": (-1,)})
    with pytest.raises(DataError, match="at least one image"):
        tune(Samples(), mode="binary", num_classes=2, decide=half)
    with pytest.raises(DataError, match=r"the mask's shape \(8, 8\), came \(7, 8\)"):
        tune(Samples((*sample[:2], empty[1:])), mode="binary", num_classes=2, decide=half, candidates=CHEAP)


def test_candidates_are_settings_in_the_order_of_their_use():
    assert list(CANDIDATES) == ["crf", "opening", "closing", "min_area", "max_hole"]
    for name, values in CANDIDATES.items():
        assert len(set(values)) == len(values)
        for value in values:
            assert PostProcessing(**{name: value}).active
