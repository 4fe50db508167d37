"""One cell: a training by one method, everything it can be made into, and what that scores."""

from __future__ import annotations

import copy
import gc
import platform
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.data.loading import training_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.teaching import teach
from smp_ensemble.inference.engine import Engine, to_tensor
from smp_ensemble.precision import autocast_dtype, choose_device, resolve_precision
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.batch_norm import refresh_batch_norm
from smp_ensemble.training.distillation import Lesson
from smp_ensemble.training.fit import FitOptions, fit
from smp_ensemble.training.refreshing import refresh_on_images
from smp_ensemble.training.trainers import make_trainer
from smp_ensemble.training.weights import average_weights
from study import measures
from study.corruptions import corrupt
from study.folds import fold_splits, groups_of
from study.plan import BASELINE, REFERENCE, RUN, STUDENT, STUDENT_SEED, TUNE, Cell, Method, Study, reference_cells
from study.systems import AVERAGED, System, greedy_system, reported_name, systems_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits

CROP_EPOCHS = 2
"""Epochs of augmented crops that batch norm is measured on, where it is not measured on whole images."""

TRAIN_IMAGES = 100
"""So many training images are scored for the gap between training and validation."""


@dataclass(frozen=True)
class Setting:
    """Where a cell runs.

    Attributes:
        accelerator: As for `smp-ensemble train`.
        precision: Lightning's words, or `auto`.
        scratch: Folder for weights that references need.
    """

    accelerator: str
    precision: str
    scratch: Path


def run_cell(
    cell: Cell, study: Study, recipe: Mapping[str, Any], whole: SegmentationDataset, setting: Setting
) -> dict[str, Any]:
    """Runs one cell.

    Returns:
        Plain values: `systems` by name, each with its price and what it scores on validation and test data, clean and
        corrupted; curves, diversity, the gap to training data, seconds, hardware and versions.

    Raises:
        FileNotFoundError: A reference needs weights of trainings that are not in `scratch`.
    """
    splits = fold_splits(whole, study.folds, cell.fold)
    if cell.stage == REFERENCE:
        return _reference(cell, study, splits, setting)
    student = cell.stage == STUDENT
    method = Method(cell.method, BASELINE) if student else next(one for one in study.methods if one.name == cell.method)
    seed = cell.seed + STUDENT_SEED if student else cell.seed
    torch.manual_seed(seed)
    network = _new_network(study, splits)
    store = MemoryStore()
    options = FitOptions(
        **{**study.fixed, **recipe}, seed=seed, accelerator=setting.accelerator, precision=setting.precision
    )
    with _lesson(cell, study, splits, setting) if student else nullcontext() as lesson:
        begin = time.perf_counter()
        fit(
            network, splits.train, splits.val, lesson=lesson,
            trainer=make_trainer(method.trainer, method.options), epochs=cell.epochs, store=store, options=options,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    weights = [one.weights for one in store.kept]
    if cell.stage == RUN and method.trainer == "single":
        setting.scratch.mkdir(parents=True, exist_ok=True)
        save_file({name: one.cpu().contiguous() for name, one in weights[-1].items()}, _weights_path(cell, setting))
    found = _score(cell, method, weights, network, splits, study, setting, options)
    steps = store.kept[-1].record.step
    return {
        "recipe": dict(recipe),
        "steps": steps,
        "seconds": round(seconds, 1),
        "history": [
            {"step": step, **{name: round(value, 5) for name, value in point.items() if name in _CURVES}}
            for step, point in store.history
        ],
        **found,
        **_environment(setting),
    }


_CURVES = {"train_loss", "val_loss", "val_iou", "val_ece", "average/val_iou"}


def _new_network(study: Study, splits: DataSplits) -> nn.Module:
    task = splits.task
    return create_network(
        study.arch, encoder_name=study.encoder_name, in_channels=task.in_channels, num_outputs=task.num_outputs,
        model_options=study.model_options,
    )  # fmt: skip


def _weights_path(cell: Cell, setting: Setting) -> Path:
    return setting.scratch / f"{cell.id}.safetensors"


def _score(
    cell: Cell,
    method: Method,
    weights: list[dict[str, Tensor]],
    network: nn.Module,
    splits: DataSplits,
    study: Study,
    setting: Setting,
    options: FitOptions,
) -> dict[str, Any]:
    """All systems of one training; a tuning cell only says what its method reports on validation data."""
    tuning = cell.stage == TUNE
    device = choose_device(setting.accelerator)
    networks, extra = list(weights), {}
    if not tuning:
        if len(weights) > 1:
            extra["soup"] = len(networks)
            networks.append(_refreshed(average_weights(weights), network, splits, setting, options))
        if len(weights) > 1 and study.crop_statistics:
            extra["soup crops"] = len(networks)
            networks.append(_refreshed(average_weights(weights), network, splits, setting, options, crops=True))
        if method.trainer not in AVERAGED:
            extra["refreshed"] = len(networks)
            networks.append(_refreshed(weights[-1], network, splits, setting, options))
        elif study.crop_statistics:
            extra["crops"] = len(networks)
            networks.append(_refreshed(weights[-1], network, splits, setting, options, crops=True))
    predictor = _Predictor(network, networks, splits, setting)
    validation = predictor.predict(splits.val)
    if study.flips and not tuning:
        extra["flips"] = len(networks)
        predictor.add_flips(len(weights) - 1)
        validation.append(predictor.predict_one(extra["flips"], predictor.images(splits.val)))
    truth = _truth(splits.val, device)
    systems = systems_of(len(weights), extra)
    if len(weights) > 1 and not tuning:
        systems.append(greedy_system(validation, truth, splits.task, len(weights)))
    reported = reported_name(method.trainer, len(weights))
    if tuning:
        systems = [system for system in systems if system.name == reported]
    scored = _score_systems(systems, predictor, validation, truth, splits, study, clean_only=tuning)
    found: dict[str, Any] = {
        "reported": reported,
        "reported_val_iou": scored[reported]["val_iou"],
        "systems": scored,
    }
    if not tuning:
        found["train_iou"] = _train_iou(predictor, len(weights) - 1, splits)
        if len(weights) > 1:
            found["disagreement"] = _disagreement(validation[: len(weights)], truth, splits)
    return found


def _refreshed(
    weights: Mapping[str, Tensor],
    network: nn.Module,
    splits: DataSplits,
    setting: Setting,
    options: FitOptions,
    *,
    crops: bool = False,
) -> dict[str, Tensor]:
    """The same weights with batch norm measured anew on the whole training images, as averages have it.

    With `crops`, on two epochs of augmented crops as the training saw them.
    """
    device = choose_device(setting.accelerator)
    precision = resolve_precision(setting.precision, device)
    normalization = imagenet(splits.task.in_channels).to(device)
    twin = copy.deepcopy(network)
    twin.load_state_dict(dict(weights))
    twin.to(device).eval()
    if crops:
        transform = TrainTransform(options.crop_size, fill=normalization.raw_mean(), augment=options.augment)
        batches = (
            batch
            for epoch in range(CROP_EPOCHS)
            for batch in training_loader(
                splits.train, transform, batch_size=options.batch_size, seed=options.seed, workers=0,
                epoch_of=lambda epoch=epoch: epoch,
            )
        )  # fmt: skip
        dtype = autocast_dtype(precision)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            refresh_batch_norm(nn.Sequential(normalization, twin), batches)
    else:
        refresh_on_images(
            twin, normalization=normalization, data=splits.train, batch_size=options.batch_size, precision=precision
        )
    return {name: one.detach().cpu() for name, one in twin.state_dict().items()}


def _reference_weights(cell: Cell, study: Study, setting: Setting) -> list[dict[str, Tensor]]:
    paths = [_weights_path(one, setting) for one in reference_cells(study, cell)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{cell.id} needs the weights of {len(missing)} trainings that are not here: {missing}")
    return [load_file(path) for path in paths]


@contextmanager
def _lesson(cell: Cell, study: Study, splits: DataSplits, setting: Setting) -> Iterator[Lesson]:
    """What the reference says about the training images, in a folder that is there as long as it is needed."""
    members = []
    for weights in _reference_weights(cell, study, setting):
        network = _new_network(study, splits)
        network.load_state_dict(weights)
        members.append(Member(network.eval(), imagenet(splits.task.in_channels)))
    ensemble = Ensemble(members, mode=splits.task.mode, class_names=splits.task.class_names)
    engine = Engine(ensemble, choose_device(setting.accelerator), setting.precision)
    with tempfile.TemporaryDirectory() as folder:
        yield Lesson(teach(engine, splits.train, Path(folder)), **study.students[cell.method])


def _reference(cell: Cell, study: Study, splits: DataSplits, setting: Setting) -> dict[str, Any]:
    """The mean of the trainings with all seeds: what several budgets buy."""
    weights = _reference_weights(cell, study, setting)
    predictor = _Predictor(_new_network(study, splits), weights, splits, setting)
    validation = predictor.predict(splits.val)
    truth = _truth(splits.val, choose_device(setting.accelerator))
    system = System("all", tuple(range(len(weights))), (1.0,) * len(weights))
    scored = _score_systems([system], predictor, validation, truth, splits, study, clean_only=False)
    return {
        "reported": "all",
        "reported_val_iou": scored["all"]["val_iou"],
        "systems": scored,
        "disagreement": _disagreement(validation, truth, splits),
        "budgets": len(weights),
        **_environment(setting),
    }


class _Predictor:
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


def _truth(data: SegmentationDataset, device: torch.device) -> Tensor:
    masks = np.stack([data.read(index)[1] for index in range(len(data))])
    return torch.from_numpy(masks.astype(np.int64)).to(device)


def _score_systems(
    systems: Sequence[System],
    predictor: _Predictor,
    validation: list[Tensor],
    truth: Tensor,
    splits: DataSplits,
    study: Study,
    *,
    clean_only: bool,
) -> dict[str, Any]:
    """Every system calibrated on validation data, and measured there and on test data."""
    task, found = splits.task, {}
    fitted = {}
    for system in systems:
        combined = system.combine(validation)
        temperature, threshold = measures.calibrate(combined, truth, task.mode)
        fitted[system.name] = (temperature, threshold)
        val = measures.measure(
            combined, truth, groups_of(splits.val), task,
            temperature=temperature, threshold=threshold, whole=not clean_only,
        )  # fmt: skip
        found[system.name] = {
            **asdict(system),
            "cost": system.cost,
            "temperature": round(temperature, 4),
            "threshold": round(threshold, 4),
            "val_iou": round(measures.iou_of(measures.total_counts(val), task), 6),
            "val_nll": round(measures.mean_loss(val), 6),
            "val_ece": val.get("ece"),
        }
    if clean_only:
        return found
    assert splits.test is not None
    test_truth = _truth(splits.test, truth.device)
    images = predictor.images(splits.test)
    for kind in ("clean", *study.corruptions):
        shown = images if kind == "clean" else corrupt(images, kind)
        probabilities = [predictor.predict_one(index, shown) for index in range(len(validation))]
        for system in systems:
            temperature, threshold = fitted[system.name]
            found[system.name].setdefault("test", {})[kind] = measures.measure(
                system.combine(probabilities), test_truth, groups_of(splits.test), task,
                temperature=temperature, threshold=threshold, whole=kind == "clean",
            )  # fmt: skip
    return found


def _train_iou(predictor: _Predictor, index: int, splits: DataSplits) -> float:
    """IoU of one network on some training images, at 0.5 and uncalibrated."""
    some = splits.train.subset(np.linspace(0, len(splits.train) - 1, min(TRAIN_IMAGES, len(splits.train))).astype(int))
    probabilities = predictor.predict_one(index, predictor.images(some))
    measured = measures.measure(
        probabilities, _truth(some, probabilities.device), groups_of(some), splits.task,
        temperature=1.0, threshold=0.5, whole=False,
    )  # fmt: skip
    return round(measures.iou_of(measures.total_counts(measured), splits.task), 6)


def _disagreement(validation: Sequence[Tensor], truth: Tensor, splits: DataSplits) -> float:
    """Share of valid pixels on which two members decide differently at 0.5, mean over pairs."""
    valid = truth != 255
    decisions = [
        one.argmax(dim=1) if splits.task.mode == "multiclass" else (one[:, 0] >= 0.5).long() for one in validation
    ]
    pairs = [
        float((decisions[i] != decisions[j])[valid].float().mean()) for i in range(len(decisions)) for j in range(i)
    ]
    return round(sum(pairs) / len(pairs), 6)


def _environment(setting: Setting) -> dict[str, Any]:
    gc.collect()  # a trainer and its network refer to each other
    device = choose_device(setting.accelerator)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {
        "device": name,
        "precision": resolve_precision(setting.precision, device),
        "torch": torch.__version__,
        "smp": smp.__version__,
    }
