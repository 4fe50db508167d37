"""Distillation: the loss by its formula in NumPy, and a training that masks alone teach is the ordinary one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logit, softmax

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.distillation import DistillationLoss, DistillationModule, Lesson
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.losses import make_loss
from smp_ensemble.typing import MODES

OPTIONS = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu")
every_mode = pytest.mark.parametrize("mode", MODES)


def random_pair(mode, seed=0, unknown=0.3):
    """Logits of a student, probabilities of a teacher that says nothing here and there."""
    generator = np.random.default_rng(seed)
    outputs = 1 if mode == "binary" else 3
    student, teacher = generator.normal(0, 2, (2, 2, outputs, 5, 4)).astype(np.float32)
    soft = softmax(teacher, axis=1) if mode == "multiclass" else expit(teacher)
    shape = soft.shape if mode == "multilabel" else (2, 1, 5, 4)
    soft[np.broadcast_to(generator.random(shape) < unknown, soft.shape)] = np.nan
    return student, soft


def by_hand(student, soft, mode, soften):
    """The mean of each known pixel's divergence, one by one."""
    found = []
    for image, wanted in zip(student.astype(float), soft.astype(float), strict=True):
        for place in np.ndindex(image.shape[1:]):
            z, p = image[(slice(None), *place)], wanted[(slice(None), *place)]
            if mode == "multiclass":
                if np.isfinite(p).all():
                    log_q = log_softmax(np.log(p) / soften)
                    found.append((np.exp(log_q) * (log_q - log_softmax(z / soften))).sum())
                continue
            for one, share in zip(z, p, strict=True):
                if np.isfinite(share):
                    q, r = expit(logit(share) / soften), expit(one / soften)
                    found.append(q * np.log(q / r) + (1 - q) * np.log((1 - q) / (1 - r)))
    return soften**2 * np.mean(found)


@settings(max_examples=25)
@given(mode=st.sampled_from(MODES), soften=st.floats(0.5, 4), seed=st.integers(0, 1000))
def test_the_loss_is_the_mean_divergence_of_the_pixels_of_which_the_teacher_speaks(mode, soften, seed):
    student, soft = random_pair(mode, seed)
    loss = DistillationLoss(mode, soften)(torch.from_numpy(student), torch.from_numpy(soft))
    assert loss.item() == pytest.approx(by_hand(student, soft, mode, soften), rel=1e-4, abs=1e-5)


@every_mode
def test_the_gradient_is_that_of_cross_entropy_with_soft_targets_and_zero_elsewhere(mode):
    student, soft = random_pair(mode)
    soften = 2.0
    logits = torch.from_numpy(student).requires_grad_()
    DistillationLoss(mode, soften)(logits, torch.from_numpy(soft)).backward()
    known = np.isfinite(soft)
    count = known[:, 0].sum() if mode == "multiclass" else known.sum()
    if mode == "multiclass":
        difference = softmax(student / soften, axis=1) - softmax(np.log(soft) / soften, axis=1)
    else:
        difference = expit(student / soften) - expit(logit(soft) / soften)
    expected = np.where(known, soften * difference / count, 0)
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-6)


@every_mode
def test_a_student_that_says_the_same_has_no_loss(mode):
    student, _ = random_pair(mode)
    logits = torch.from_numpy(student)
    same = logits.softmax(dim=1) if mode == "multiclass" else logits.sigmoid()
    assert DistillationLoss(mode)(logits, same).item() == pytest.approx(0, abs=1e-6)


@every_mode
def test_nothing_known_is_no_loss_and_certainty_is_finite(mode):
    student, soft = random_pair(mode)
    logits = torch.from_numpy(student).requires_grad_()
    loss = DistillationLoss(mode)
    assert loss(logits, torch.full_like(logits, torch.nan)).item() == 0
    sure = torch.from_numpy(np.where(np.arange(soft.shape[1])[:, None, None] == 0, 1.0, 0.0) + 0 * student)
    value = loss(logits, sure)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


def test_it_is_computed_in_float32_under_autocast():
    student, soft = random_pair("multiclass")
    logits, wanted = torch.from_numpy(student), torch.from_numpy(soft)
    plain = DistillationLoss("multiclass")(logits, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DistillationLoss("multiclass")(logits, wanted), plain)


def test_other_shapes_and_shares_are_refused():
    with pytest.raises(DataError, match=r"expected soft targets of shape \(1, 2, 3, 3\), came \(1, 1, 3, 3\)"):
        DistillationLoss("multilabel")(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3))
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="expected alpha, the share of the masks in the loss, from 0 to 1"):
            Lesson(lambda index: None, alpha=alpha)
    for soften in (0.0, float("inf")):
        with pytest.raises(ConfigError, match="expected soften, a temperature"):
            Lesson(lambda index: None, soften=soften)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_losses_are_mixed(alpha, make_tiny_network, tiny_splits):
    loss = make_loss("auto", "binary", 1)
    module = DistillationModule(
        make_tiny_network(), imagenet(), tiny_splits.task, loss=loss, make_optimizer=lambda network: None,
        lesson=Lesson(lambda index: None, alpha),
    )  # fmt: skip
    student, soft = (torch.from_numpy(one) for one in random_pair("binary"))
    mask = torch.randint(0, 2, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    found = module.mixed_loss(student, {"mask": mask, "soft": soft})
    expected = alpha * loss(student, mask) + (1 - alpha) * DistillationLoss("binary")(student, soft)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def trained(network, splits, *, lr=0.02, **more):
    store, options = MemoryStore(), replace(OPTIONS, lr=lr)
    fit(network, splits.train, splits.val, trainer="single", epochs=2, store=store, options=options, **more)
    return store.kept[-1]


class Constant:
    """A teacher for whom every pixel is a building with the same probability."""

    def __init__(self, data, share=0.5):
        self.data, self.share = data, share

    def __call__(self, index):
        return np.full((*self.data.scans[index].size, 1), self.share, np.float32)


def test_masks_alone_are_the_ordinary_training_bit_for_bit(make_tiny_network, tiny_splits):
    plain = trained(make_tiny_network(), tiny_splits)
    taught = trained(make_tiny_network(), tiny_splits, lesson=Lesson(Constant(tiny_splits.train), alpha=1.0))
    for name, tensor in plain.weights.items():
        assert torch.equal(tensor, taught.weights[name]), name
    assert taught.record.metrics == plain.record.metrics


def test_a_student_says_what_its_teacher_says(make_tiny_network, tiny_splits):
    """Taught that nothing is a building, or that everything is, it believes so, whatever the masks say."""
    image, _ = tiny_splits.val.read(0)
    raw = imagenet()(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    means = []
    for share in (0.02, 0.98):
        network = make_tiny_network()
        trained(network, tiny_splits, lr=0.3, lesson=Lesson(Constant(tiny_splits.train, share), alpha=0.0))
        with torch.no_grad():
            means.append(network.eval()(raw).sigmoid().mean().item())
    assert means[0] < 0.35
    assert means[1] > 0.65
