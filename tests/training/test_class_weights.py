"""Class weights: from the pixels of each class, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smp_ensemble.data.forms import load_data
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.class_weights import LARGEST, class_weights
from smp_ensemble.training.losses import make_loss


def pixels(data):
    """Pixels of each class, counted apart."""
    classes = len(data.task.class_names)
    if data.task.mode == "multilabel":
        masks = [data.read(index)[1] for index in range(len(data))]
        return np.array([sum((mask[..., k] == 1).sum() for mask in masks) for k in range(classes)]), sum(
            mask.shape[0] * mask.shape[1] for mask in masks
        )
    ids = np.concatenate([data.read(index)[1].ravel() for index in range(len(data))])
    return np.bincount(ids[ids != 255], minlength=classes), (ids != 255).sum()


def test_binary_weighs_the_foreground_against_the_background(tiny_splits):
    (background, foreground), _ = pixels(tiny_splits.train)
    (weight,) = class_weights("balanced", tiny_splits.train)
    assert weight == pytest.approx(background / foreground)
    assert class_weights("sqrt", tiny_splits.train) == pytest.approx([weight**0.5])


def test_multiclass_weights_are_inverse_to_pixels_with_a_mean_of_one_over_them():
    data = load_data("synthetic:count=12,size=64,seed=5", mode="multiclass").train
    counts, total = pixels(data)
    for spec, power in (("balanced", 1.0), ("sqrt", 0.5)):
        weights = np.array(class_weights(spec, data))
        assert weights / weights[0] == pytest.approx((counts[0] / counts) ** power)
        assert (weights * counts).sum() / total == pytest.approx(1.0)


def test_multilabel_weighs_each_layers_ones_against_its_zeros():
    data = load_data("synthetic:count=12,size=64,seed=5", mode="multilabel").train
    counts, total = pixels(data)
    assert class_weights("balanced", data) == pytest.approx(np.minimum((total - counts) / counts, LARGEST))


@pytest.mark.parametrize("spec", ["none", "", "NONE"])
def test_none_is_none(tiny_splits, spec):
    assert class_weights(spec, tiny_splits.train) is None


def test_numbers_are_taken_as_they_are(tiny_splits):
    assert class_weights("2.5", tiny_splits.train) == (2.5,)


@pytest.mark.parametrize("spec", ["1,2", "heavy", "0", "-1", "nan", "inf"])
def test_what_fits_no_class_is_refused(tiny_splits, spec):
    with pytest.raises(ConfigError, match="expected none, balanced, sqrt, or 1 numbers above 0"):
        class_weights(spec, tiny_splits.train)


def test_the_loss_takes_them_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    target = torch.randint(0, 3, (2, 4, 4), generator=generator)
    target[0, 0] = 255
    weights = torch.tensor([0.5, 1.0, 3.0])
    ours = make_loss("ce", "multiclass", 3, class_weights=weights.tolist())(logits, target)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, target, weights, ignore_index=255))
    smooth = make_loss("ce(smooth_factor=0.1)", "multiclass", 3, class_weights=weights.tolist())(logits, target)
    torch.testing.assert_close(
        smooth, torch.nn.functional.cross_entropy(logits, target, weights, ignore_index=255, label_smoothing=0.1)
    )


def test_binary_cross_entropy_takes_them_as_torchs_pos_weight():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 4, 4, generator=generator)
    target = torch.randint(0, 2, (2, 4, 4), generator=generator)
    ours = make_loss("bce", "binary", 1, class_weights=[4.0])(logits, target)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits[:, 0], target.float(), pos_weight=torch.tensor(4.0)
    )
    torch.testing.assert_close(ours, expected)


def test_weights_of_the_text_win():
    logits, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[1, 0]]])
    given = make_loss("bce(pos_weight=2)", "binary", 1, class_weights=[50.0])(logits, target)
    assert given.item() == pytest.approx((2 + 1) * np.log(2) / 2)


def test_ignored_pixels_alone_give_0():
    loss = make_loss("ce", "multiclass", 2, class_weights=[1.0, 2.0])
    assert loss(torch.zeros(1, 2, 1, 2), torch.full((1, 1, 2), 255)).item() == 0


@pytest.mark.parametrize(("spec", "mode"), [("dice", "binary"), ("dice+focal", "binary"), ("lovasz", "multiclass")])
def test_a_loss_that_takes_no_weights_says_so(spec, mode):
    with pytest.raises(ConfigError, match="class weights need a loss that takes them"):
        make_loss(spec, mode, 1 if mode == "binary" else 2, class_weights=[1.0])
