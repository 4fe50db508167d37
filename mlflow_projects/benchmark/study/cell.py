"""One cell: a training by one method, everything it can be made into, and what that scores."""

from __future__ import annotations

import gc
import platform
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.teaching import teach
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.distillation import Lesson
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.trainers import make_trainer
from smp_ensemble.training.weights import average_weights
from study.folds import evenly, fold_splits, groups_of
from study.networks import new_network, refreshed
from study.plan import BASELINE, REFERENCE, RUN, STUDENT_SEED, TUNE, Cell, Method, Study, reference_cells
from study.scoring import Predictor, disagreement, score_systems, train_iou, truth_of
from study.systems import AVERAGED, System, cross_fitted, greedy_system, reported_name, systems_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits
    from study.networks import Setting


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
    splits = fold_splits(whole, study.folds, cell.fold, study.train_share)
    if cell.stage == REFERENCE:
        return _reference(cell, study, splits, setting)
    method, seed = _training_of(cell, study)
    torch.manual_seed(seed)
    network = new_network(study, splits)
    store = MemoryStore()
    options = FitOptions(
        **{"batch_norm": "images" if method.trainer in AVERAGED else "auto", **study.fixed, **recipe},
        seed=seed, accelerator=setting.accelerator, precision=setting.precision,
    )  # fmt: skip
    watched = splits.val.subset(evenly(len(splits.val), study.watched or len(splits.val)))
    with _lesson(cell, study, splits, setting) if cell.student else nullcontext() as lesson:
        begin = time.perf_counter()
        fit(
            network, splits.train, watched, lesson=lesson,
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


def _training_of(cell: Cell, study: Study) -> tuple[Method, int]:
    """How a cell is trained, and from which seed."""
    if cell.student:
        return Method(cell.method, BASELINE), cell.seed + STUDENT_SEED
    return next(one for one in study.methods if one.name == cell.method), cell.seed


_CURVES = {"train_loss", "val_loss", "val_iou", "val_ece", "average/val_iou"}


def _weights_path(cell: Cell, setting: Setting) -> Path:
    return setting.scratch / f"{cell.id}.safetensors"


def _made_of(
    method: Method, weights: Sequence[dict[str, Tensor]], study: Study, measured: Callable[..., dict[str, Tensor]]
) -> tuple[list[dict[str, Tensor]], dict[str, int], list[int]]:
    """The networks of one training and those made of them, and the places that `systems_of` takes.

    Args:
        method: How it was trained.
        weights: Its snapshots.
        study: Says whether statistics of crops are looked at too.
        measured: Measures batch norm anew, on whole images or `crops`.
    """
    networks, extra, again = list(weights), {}, []
    if len(weights) > 1:
        extra["soup"] = len(networks)
        networks.append(measured(average_weights(weights)))
        if study.crop_statistics:
            extra["soup crops"] = len(networks)
            networks.append(measured(average_weights(weights), crops=True))
    if method.trainer not in AVERAGED:
        extra["refreshed"] = len(networks)
        networks.append(measured(weights[-1]))
        if study.crop_statistics:
            others = [measured(one) for one in weights[:-1]]
            again = [*range(len(networks), len(networks) + len(others)), extra["refreshed"]]
            networks += others
    elif study.crop_statistics:
        extra["crops"] = len(networks)
        networks.append(measured(weights[-1], crops=True))
    return networks, extra, again


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
    here = {"network": network, "splits": splits, "setting": setting, "options": options}
    networks, extra, again = list(weights), {}, []
    if not tuning:
        networks, extra, again = _made_of(method, weights, study, partial(refreshed, **here))
    predictor = Predictor(network, networks, splits, setting)
    validation = predictor.predict(splits.val)
    if study.flips and not tuning:
        extra["flips"] = len(networks)
        predictor.add_flips(len(weights) - 1)
        validation.append(predictor.predict_one(extra["flips"], predictor.images(splits.val)))
    truth = truth_of(splits.val, device)
    systems = systems_of(len(weights), extra, again)
    fitted: dict[str, Tensor | None] = {}
    if len(weights) > 1 and not tuning:
        for name, places in (("greedy", range(len(weights))), ("greedy refreshed", again)):
            if len(places) > 1:
                choose = partial(greedy_system, task=splits.task, places=places, name=name)
                systems.append(choose(validation, truth))
                fitted[name] = cross_fitted(validation, truth, groups_of(splits.val), choose)
    reported = reported_name(method.trainer, len(weights))
    if tuning:
        systems = [system for system in systems if system.name == reported]
    scored = score_systems(systems, predictor, validation, truth, splits, study, clean_only=tuning, fitted=fitted)
    found: dict[str, Any] = {
        "reported": reported,
        "reported_val_iou": scored[reported]["val_iou"],
        "systems": scored,
    }
    if not tuning:
        found["train_iou"] = train_iou(predictor, len(weights) - 1, splits)
        if len(weights) > 1:
            found["disagreement"] = disagreement(validation[: len(weights)], truth, splits)
    return found


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
        network = new_network(study, splits)
        network.load_state_dict(weights)
        members.append(Member(network.eval(), imagenet(splits.task.in_channels)))
    ensemble = Ensemble(members, mode=splits.task.mode, class_names=splits.task.class_names)
    engine = Engine(ensemble, choose_device(setting.accelerator), setting.precision)
    with tempfile.TemporaryDirectory() as folder:
        yield Lesson(teach(engine, splits.train, Path(folder)), **study.students[cell.method])


def _reference(cell: Cell, study: Study, splits: DataSplits, setting: Setting) -> dict[str, Any]:
    """The mean of the trainings with all seeds: what several budgets buy."""
    weights = _reference_weights(cell, study, setting)
    predictor = Predictor(new_network(study, splits), weights, splits, setting)
    validation = predictor.predict(splits.val)
    truth = truth_of(splits.val, choose_device(setting.accelerator))
    system = System("all", tuple(range(len(weights))), (1.0,) * len(weights))
    scored = score_systems([system], predictor, validation, truth, splits, study, clean_only=False)
    return {
        "reported": "all",
        "reported_val_iou": scored["all"]["val_iou"],
        "systems": scored,
        "disagreement": disagreement(validation, truth, splits),
        "budgets": len(weights),
        **_environment(setting),
    }


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
