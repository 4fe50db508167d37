"""Scores of a cell: what its networks predict, what systems make of that, and how good it is."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine, to_tensor
from smp_ensemble.precision import choose_device
from study import measures
from study.corruptions import corrupt
from study.folds import evenly, groups_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.typing import Task
    from study.networks import Setting
    from study.plan import Study
    from study.systems import System

TRAIN_IMAGES = 100
"""So many training images are scored for the gap between training and validation."""


class Predictor:
    """Probabilities of networks that differ in weights alone, float16 on the device."""

    def __init__(
        self, network: nn.Module, weights: Sequence[dict[str, Tensor]], splits: DataSplits, setting: Setting
    ) -> None:
        self._device = choose_device(setting.accelerator)
        self._precision = setting.precision
        self._task = splits.task
        self._runs = [(one, "none") for one in weights]
        self._network = network.cpu()

    def add_flips(self, index: int) -> None:
        """One more network: the one at `index`, averaged over flips."""
        self._runs.append((self._runs[index][0], "flips"))

    @staticmethod
    def images(data: SegmentationDataset) -> list[Any]:
        """All images, raw."""
        return [data.read(index)[0] for index in range(len(data))]

    def predict(self, data: SegmentationDataset) -> list[Tensor]:
        """Of each network."""
        images = self.images(data)
        return [self.predict_one(index, images) for index in range(len(self._runs))]

    def predict_one(self, index: int, images: Sequence[Any]) -> Tensor:
        """Of one network, `(N, K, H, W)`; all images have one size."""
        weights, views = self._runs[index]
        network = copy.deepcopy(self._network)
        network.load_state_dict(weights)
        member = Member(network.eval(), imagenet(self._task.in_channels))
        ensemble = Ensemble([member], mode=self._task.mode, views=views, class_names=self._task.class_names)
        engine = Engine(ensemble, self._device, self._precision)
        parts = [
            engine(torch.stack([to_tensor(np.array(image)) for image in images[at : at + measures.AT_ONCE]])).half()
            for at in range(0, len(images), measures.AT_ONCE)
        ]
        return torch.cat(parts)


def truth_of(data: SegmentationDataset, device: torch.device) -> Tensor:
    """All masks, `(N, H, W)`."""
    masks = np.stack([data.read(index)[1] for index in range(len(data))])
    return torch.from_numpy(masks.astype(np.int64)).to(device)


def score_systems(
    systems: Sequence[System],
    predictor: Predictor,
    validation: list[Tensor],
    truth: Tensor,
    splits: DataSplits,
    study: Study,
    *,
    clean_only: bool,
    fitted: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Any]:
    """Every system calibrated on validation data, and measured there and on test data.

    Args:
        systems: What to score.
        predictor: Of the networks.
        validation: What each network predicts on validation data.
        truth: Masks of validation data.
        splits: The data.
        study: Says how test data are corrupted.
        clean_only: Leaves test data out.
        fitted: Of systems that were fitted on validation data, their probabilities there from `cross_fitted`; they get
            a second score, `cross_iou` and `cross_nll`, which is calibrated in the same way.
    """
    task, found = splits.task, {}
    calibrations = {}

    def on_validation(combined: Tensor, *, whole: bool) -> tuple[tuple[float, float], dict[str, Any]]:
        temperature, threshold = measures.calibrate(combined, truth, task.mode)
        return (temperature, threshold), measures.measure(
            combined, truth, groups_of(splits.val), task, temperature=temperature, threshold=threshold, whole=whole
        )

    for system in systems:
        calibrations[system.name], val = on_validation(system.combine(validation), whole=not clean_only)
        temperature, threshold = calibrations[system.name]
        found[system.name] = {
            **asdict(system),
            "cost": system.cost,
            "temperature": round(temperature, 4),
            "threshold": round(threshold, 4),
            **_totals(val, task, "val"),
            "val_ece": val.get("ece"),
        }
        if fitted and (unseen := fitted.get(system.name)) is not None:
            found[system.name] |= _totals(on_validation(unseen, whole=False)[1], task, "cross")
    if clean_only:
        return found
    assert splits.test is not None
    test_truth = truth_of(splits.test, truth.device)
    images = predictor.images(splits.test)
    for kind in ("clean", *study.corruptions):
        shown = images if kind == "clean" else corrupt(images, kind)
        probabilities = [predictor.predict_one(index, shown) for index in range(len(validation))]
        for system in systems:
            temperature, threshold = calibrations[system.name]
            found[system.name].setdefault("test", {})[kind] = measures.measure(
                system.combine(probabilities), test_truth, groups_of(splits.test), task,
                temperature=temperature, threshold=threshold, whole=kind == "clean",
            )  # fmt: skip
    return found


def _totals(measured: dict[str, Any], task: Task, prefix: str) -> dict[str, float]:
    """IoU and log-loss over all groups."""
    iou, loss = measures.iou_of(measures.total_counts(measured), task), measures.mean_loss(measured)
    return {f"{prefix}_iou": round(iou, 6), f"{prefix}_nll": round(loss, 6)}


def train_iou(predictor: Predictor, index: int, splits: DataSplits) -> float:
    """IoU of one network on some training images, at 0.5 and uncalibrated."""
    some = splits.train.subset(evenly(len(splits.train), TRAIN_IMAGES))
    probabilities = predictor.predict_one(index, predictor.images(some))
    measured = measures.measure(
        probabilities, truth_of(some, probabilities.device), groups_of(some), splits.task,
        temperature=1.0, threshold=0.5, whole=False,
    )  # fmt: skip
    return round(measures.iou_of(measures.total_counts(measured), splits.task), 6)


def disagreement(validation: Sequence[Tensor], truth: Tensor, splits: DataSplits) -> float:
    """Share of valid pixels on which two members decide differently at 0.5, mean over pairs."""
    valid = truth != 255
    decisions = [
        one.argmax(dim=1) if splits.task.mode == "multiclass" else (one[:, 0] >= 0.5).long() for one in validation
    ]
    pairs = [
        float((decisions[i] != decisions[j])[valid].float().mean()) for i in range(len(decisions)) for j in range(i)
    ]
    return round(sum(pairs) / len(pairs), 6)
