"""Losses: smp's own without ignored pixels, and with them exactly what they would be if those did not exist."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch import losses as smp
from torch import Tensor

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.training.losses import make_loss
from smp_ensemble.typing import IGNORE_INDEX, MODES, Mode

EVERYWHERE = [
    "dice",
    "dice(log_loss=true,smooth=1.0)",
    "jaccard",
    "tversky(alpha=0.3,beta=0.7)",
    "tversky(gamma=0.75)",
    "focal",
    "focal(gamma=3,alpha=0.25,normalized=true)",
    'focal(reduced_threshold=0.5,reduction="sum")',
    "lovasz",
]
SPECS: list[tuple[Mode, str]] = [
    *((mode, spec) for mode in MODES for spec in EVERYWHERE),
    ("binary", "mcc"),
    *((mode, f"bce{given}") for mode in ("binary", "multilabel") for given in ("", "(smooth_factor=0.1,pos_weight=3)")),
    ("multilabel", "bce(pos_weight=[1,2,3],weight=[0.5,1,2])"),
    ("multiclass", "ce"),
    ("multiclass", "ce(smooth_factor=0.1)"),
    *((mode, f"{name}(class_weights=[1,2,3])") for mode in ("multiclass", "multilabel") for name in ("dice", "focal")),
    ("multiclass", "jaccard(classes=[0,2])"),
    *((mode, "0.5*lovasz+2*focal(gamma=2,alpha=0.25)+dice") for mode in MODES),
]
every_loss = pytest.mark.parametrize(("mode", "spec"), SPECS)


def outputs(mode: Mode) -> int:
    return 1 if mode == "binary" else 3


def random_batch(mode: Mode, seed: int = 0, ignored: float = 0.0, size: tuple[int, int, int] = (3, 6, 5)):
    generator = torch.Generator().manual_seed(seed)
    n, h, w = size
    logits = 2 * torch.randn(n, outputs(mode), h, w, generator=generator)
    shape = logits.shape if mode == "multilabel" else (n, h, w)
    target = torch.randint(0, 3 if mode == "multiclass" else 2, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = IGNORE_INDEX
    return logits, target


def value_and_gradient(loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    assert value.ndim == 0
    return value.detach(), torch.autograd.grad(value, logits)[0]


def ignored_entries(mode: Mode, target: Tensor) -> Tensor:
    """Where logits must not matter, in their own shape (one channel for all but multilabel)."""
    return target == IGNORE_INDEX if mode == "multilabel" else (target == IGNORE_INDEX).unsqueeze(1)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


REFERENCES = {
    "dice": smp.DiceLoss,
    "dice(log_loss=true,smooth=1.0)": lambda mode: smp.DiceLoss(mode, log_loss=True, smooth=1.0),
    "jaccard": smp.JaccardLoss,
    "jaccard(classes=[0,2])": lambda mode: smp.JaccardLoss(mode, classes=[0, 2]),
    "tversky(alpha=0.3,beta=0.7)": lambda mode: smp.TverskyLoss(mode, alpha=0.3, beta=0.7),
    "tversky(gamma=0.75)": lambda mode: smp.TverskyLoss(mode, gamma=0.75),
    "focal": smp.FocalLoss,
    "focal(gamma=3,alpha=0.25,normalized=true)": lambda mode: smp.FocalLoss(mode, 0.25, 3, normalized=True),
    'focal(reduced_threshold=0.5,reduction="sum")': lambda mode: smp.FocalLoss(
        mode, reduced_threshold=0.5, reduction="sum"
    ),
    "lovasz": smp.LovaszLoss,
    "lovasz(per_image=true)": lambda mode: smp.LovaszLoss(mode, per_image=True),
    "dice(class_weights=[1,2,3])": lambda mode: smp.DiceLoss(mode, class_weights=[1, 2, 3]),
    "focal(class_weights=[1,2,3])": lambda mode: smp.FocalLoss(mode, class_weights=[1, 2, 3]),
    "mcc": lambda mode: lambda logits, target: smp.MCCLoss()(logits.sigmoid(), target),
    "bce": lambda mode: smp.SoftBCEWithLogitsLoss(),
    "bce(smooth_factor=0.1,pos_weight=3)": lambda mode: smp.SoftBCEWithLogitsLoss(
        smooth_factor=0.1, pos_weight=torch.tensor(3.0)
    ),
    "bce(pos_weight=[1,2,3],weight=[0.5,1,2])": lambda mode: smp.SoftBCEWithLogitsLoss(
        pos_weight=column([1, 2, 3]), weight=column([0.5, 1, 2])
    ),
    "ce": lambda mode: smp.SoftCrossEntropyLoss(smooth_factor=0.0),
    "ce(smooth_factor=0.1)": lambda mode: smp.SoftCrossEntropyLoss(smooth_factor=0.1),
}


@pytest.mark.parametrize(
    ("mode", "spec"),
    [*(pair for pair in SPECS if "*" not in pair[1]), *((mode, "lovasz(per_image=true)") for mode in MODES)],
)
def test_equals_smp_without_ignored_pixels(mode: Mode, spec: str) -> None:
    """smp's own ignoring is off in the reference; its BCE wants the target as float, with a channel."""
    logits, target = random_batch(mode)
    given = target
    if spec.startswith("bce"):
        given = (target.unsqueeze(1) if mode == "binary" else target).float()
    expected = value_and_gradient(REFERENCES[spec](mode), logits, given)
    for ours, theirs in zip(
        value_and_gradient(make_loss(spec, mode, outputs(mode)), logits, target), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@every_loss
@given(seed=st.integers(0, 10_000), ignored=st.sampled_from([0.1, 0.5, 0.95]))
@settings(max_examples=3, deadline=None)
def test_logits_of_ignored_pixels_do_not_matter(mode: Mode, spec: str, seed: int, ignored: float) -> None:
    logits, target = random_batch(mode, seed, ignored)
    loss = make_loss(spec, mode, outputs(mode))
    value, gradient = value_and_gradient(loss, logits, target)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    entries = ignored_entries(mode, target)
    assert not gradient[entries.expand_as(gradient)].any()
    for other in (torch.full_like(logits, 1e30), torch.full_like(logits, torch.nan), random_batch(mode, seed + 1)[0]):
        replaced = value_and_gradient(loss, torch.where(entries, other, logits), target)
        assert torch.equal(replaced[0], value)
        assert torch.equal(replaced[1], gradient)


@every_loss
@given(seed=st.integers(0, 10_000))
@settings(max_examples=3, deadline=None)
def test_as_if_ignored_pixels_did_not_exist(mode: Mode, spec: str, seed: int) -> None:
    """Valid pixels alone, laid out as one image, give the same value and the same gradients."""
    logits, target = random_batch(mode, seed)
    gone = torch.rand(target.shape[0], *target.shape[-2:], generator=torch.Generator().manual_seed(seed)) < 0.4
    if mode == "multilabel":
        target = torch.where(gone.unsqueeze(1), IGNORE_INDEX, target)
        alone = target.movedim(1, -1)[~gone].T.view(1, 3, 1, -1)
    else:
        target = torch.where(gone, IGNORE_INDEX, target)
        alone = target[~gone].view(1, 1, -1)
    loss = make_loss(spec, mode, outputs(mode))
    value, gradient = value_and_gradient(loss, logits, target)
    expected, expected_gradient = value_and_gradient(
        loss, logits.movedim(1, -1)[~gone].T.reshape(1, outputs(mode), 1, -1), alone
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient.movedim(1, -1)[~gone], expected_gradient[0, :, 0].T, atol=1e-6, rtol=1e-4)


@every_loss
def test_nothing_valid_gives_zero(mode: Mode, spec: str) -> None:
    logits, target = random_batch(mode)
    value, gradient = value_and_gradient(
        make_loss(spec, mode, outputs(mode)), logits, torch.full_like(target, IGNORE_INDEX)
    )
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("spec", ["dice", "jaccard", "tversky(alpha=0.3,beta=0.7)", "focal(gamma=2,alpha=0.25)"])
def test_multilabel_classes_ignore_their_own_pixels(spec: str) -> None:
    """With a hole of its own in each class, the loss is the mean of the binary losses of the classes."""
    logits, target = random_batch("multilabel", 3, ignored=0.4)
    binary = make_loss(spec, "binary", 1)
    expected = torch.stack([binary(logits[:, k : k + 1], target[:, k]) for k in range(3)]).mean()
    torch.testing.assert_close(make_loss(spec, "multilabel", 3)(logits, target), expected)
    target[:, 1] = IGNORE_INDEX
    if spec.startswith("focal"):  # no pixel of a class: it has no mean, and takes no part
        expected = torch.stack([binary(logits[:, k : k + 1], target[:, k]) for k in (0, 2)]).mean()
        torch.testing.assert_close(make_loss(spec, "multilabel", 3)(logits, target), expected)


@pytest.mark.parametrize("mode", MODES)
def test_lovasz_per_image_leaves_out_images_without_valid_pixels(mode: Mode) -> None:
    logits, target = random_batch(mode, 5, ignored=0.2)
    target[1] = IGNORE_INDEX
    loss = make_loss("lovasz(per_image=true)", mode, outputs(mode))
    batchwise = make_loss("lovasz", mode, outputs(mode))
    expected = (batchwise(logits[:1], target[:1]) + batchwise(logits[2:], target[2:])) / 2
    value, gradient = value_and_gradient(loss, logits, target)
    torch.testing.assert_close(value, expected)
    assert not gradient[1].any()
    assert value_and_gradient(loss, logits, torch.full_like(target, IGNORE_INDEX))[0] == 0


@pytest.mark.parametrize("gamma", [0.5, 0.75, 1.0, 4 / 3])
def test_tversky_without_foreground_has_a_zero_gradient(gamma: float) -> None:
    """smp's gradient is NaN there for gamma below 1 (the power of 0)."""
    logits, target = random_batch("binary")
    value, gradient = value_and_gradient(make_loss(f"tversky(gamma={gamma})", "binary", 1), logits, target * 0)
    assert value == 0
    assert not gradient.any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_float32_under_autocast(mode: Mode, spec: str, dtype: torch.dtype) -> None:
    logits, target = random_batch(mode, 1, ignored=0.2)
    low = logits.to(dtype)
    loss = make_loss(spec, mode, outputs(mode))
    expected = loss(low.float(), target)
    with torch.autocast("cpu", dtype=dtype):
        value, gradient = value_and_gradient(loss, low, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_weighted_sum_by_hand(mode: Mode) -> None:
    logits, target = random_batch(mode, 4, ignored=0.2)
    total = make_loss("0.5*lovasz+2*focal(gamma=2,alpha=0.25)+dice", mode, outputs(mode))(logits, target)
    parts = [make_loss(spec, mode, outputs(mode)) for spec in ("lovasz", "focal(gamma=2,alpha=0.25)", "dice")]
    lovasz, focal, dice = (part(logits, target) for part in parts)
    torch.testing.assert_close(total, 0.5 * lovasz + 2 * focal + dice)


@pytest.mark.parametrize(
    ("mode", "spec"), [("binary", "dice+bce"), ("multilabel", "dice+bce"), ("multiclass", "dice+ce")]
)
def test_auto(mode: Mode, spec: str) -> None:
    logits, target = random_batch(mode, 6, ignored=0.2)
    for word in ("auto", " Auto "):
        assert torch.equal(
            make_loss(word, mode, outputs(mode))(logits, target), make_loss(spec, mode, outputs(mode))(logits, target)
        )


def test_label_smoothing_by_hand() -> None:
    """BCE mixes y with 1 - y; CE mixes the one-hot target with the uniform one, as torch's own does."""
    z, s = 1.5, 0.1
    positive, negative = math.log1p(math.exp(-z)), math.log1p(math.exp(z))
    value = make_loss("bce(smooth_factor=0.1)", "binary", 1)(torch.full((1, 1, 1, 3), z), torch.tensor([[[1, 0, 255]]]))
    by_hand = ((1 - s) * positive + s * negative + s * positive + (1 - s) * negative) / 2
    assert float(value) == pytest.approx(by_hand, rel=1e-6)
    logits, target = random_batch("multiclass", 7, ignored=0.3)
    torch.testing.assert_close(
        make_loss("ce(smooth_factor=0.1)", "multiclass", 3)(logits, target),
        torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, label_smoothing=0.1),
    )


@pytest.mark.parametrize(
    ("mode", "spec", "message"),
    [
        ("binary", "dcie", "unknown loss 'dcie': did you mean 'dice'"),
        ("binary", "dice+auto", "unknown loss 'auto'"),
        ("multiclass", "bce", "loss 'bce' works in binary and multilabel mode, came multiclass: use 'ce'"),
        ("binary", "ce", "loss 'ce' works in multiclass mode, came binary: use 'bce'"),
        ("multilabel", "ce", "came multilabel: use 'bce'"),
        ("multiclass", "mcc", "loss 'mcc' works in binary mode, came multiclass: use 'dice' or 'tversky'"),
        ("binary", "focal(gama=2)", r"loss 'focal' has no parameter 'gama': did you mean 'gamma'\? Known: alpha, "),
        ("binary", "dice(mode=1)", "has no parameter 'mode'"),
        ("binary", "dice(ignore_index=1)", "has no parameter 'ignore_index'"),
        ("binary", "dice(from_logits=false)", "has no parameter 'from_logits'"),
        ("binary", 'bce(reduction="none")', "expected reduction 'mean' or 'sum', came 'none'"),
        ("binary", "dice(class_weights=[1])", "not supported with mode=binary"),
        ("multiclass", "dice(class_weights=2)", r"expected a list, came class_weights=2: write class_weights=\[2\]"),
        ("multiclass", "dice(class_weights=[1,2])", "expected 3 class_weights, came 2"),
        ("multiclass", "dice(class_weights=[0,0,0])", "expected a finite scalar, came nan"),
        ("multiclass", "dice(classes=[7])", "does not take .* in multiclass mode"),
        ("multilabel", "bce(pos_weight=[1,2])", "does not take .* in multilabel mode"),
        ("binary", 'focal(gamma="two")', "does not take .* in binary mode"),
    ],
)
def test_refuses(mode: Mode, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_loss(spec, mode, outputs(mode))
    assert "\n" not in str(caught.value)


def test_refuses_shapes_that_do_not_fit() -> None:
    loss = make_loss("auto", "binary", 1)
    logits, target = random_batch("binary")
    with pytest.raises(DataError, match=r"logits of shape \(N, 1, H, W\), came \(3, 2, 6, 5\)"):
        loss(logits.expand(-1, 2, -1, -1), target)
    with pytest.raises(DataError, match=r"binary target of shape \(3, 6, 5\), came \(3, 1, 6, 5\)"):
        loss(logits, target.unsqueeze(1))


def test_weights_move_with_the_loss() -> None:
    """Tensor-valued parameters are buffers: they follow `.to(device)`."""
    loss = make_loss("bce(pos_weight=[1,2,3])", "multilabel", 3)
    assert {tuple(buffer.shape) for buffer in loss.buffers()} == {(3, 1, 1)}
