"""Every score refuses what it cannot count, in one line with the remedy."""

from __future__ import annotations

import pytest
import torch

from smp_ensemble.exceptions import DataError
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.metrics.inputs import check_probabilities, check_target
from smp_ensemble.metrics.threshold import ThresholdCurve
from smp_ensemble.typing import Task

TASK = Task("binary", ("background", "roof"))
HALF = torch.full((1, 1, 2, 2), 0.5)
ZEROS = torch.zeros(1, 2, 2, dtype=torch.int64)


@pytest.fixture(params=["scores", "calibration", "curve"])
def metric(request):
    return {
        "scores": lambda: SegmentationScores(TASK),
        "calibration": lambda: CalibrationScores(TASK),
        "curve": ThresholdCurve,
    }[request.param]()


@pytest.mark.parametrize(
    ("probabilities", "target", "message"),
    [
        (8 * HALF, ZEROS, r"probabilities in 0..1, came 4..4: apply sigmoid or softmax"),
        (HALF - 1, ZEROS, r"came -0.5..-0.5"),
        (HALF * torch.nan, ZEROS, "lower the learning rate"),
        (HALF.expand(1, 2, 2, 2), ZEROS, r"shape \(N, 1, H, W\), came \(1, 2, 2, 2\)"),
        (HALF[0], ZEROS, r"shape \(N, 1, H, W\), came \(1, 2, 2\)"),
        (HALF, ZEROS.unsqueeze(1), r"binary target of shape \(1, 2, 2\), came \(1, 1, 2, 2\)"),
        (HALF, ZEROS + 2, r"class ids 0..1 or 255 .* came 2"),
        (HALF, ZEROS - 1, r"class ids 0..1 or 255 .* came -1"),
        (HALF, ZEROS.float(), r"integer class ids .* came torch.float32"),
        (HALF, ZEROS.bool(), r"integer class ids .* came torch.bool"),
        (HALF.long(), ZEROS, "floating point, came torch.int64"),
    ],
)
def test_refuses(metric, probabilities: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric.update(probabilities, target)


def test_rounding_beyond_one_is_clamped() -> None:
    """A weighted mean in bf16 may give 1.0001; that is a probability of 1."""
    checked = check_probabilities(torch.tensor([[[[1.0001, -0.0001]]]]), torch.zeros(1, 1, 2), "binary", 1)
    assert checked.flatten().tolist() == [1.0, 0.0]


def test_valid_pixels() -> None:
    assert check_target(torch.tensor([0, 4, 255]), 5).tolist() == [True, True, False]
