"""Every option of every command, once: name, default and help text; the command line and MLproject follow from here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

PASSES_HELP = "passes of each member with dropout on, averaged (MC dropout); 1: one pass, dropout off"

BATCH_NORM_HELP = (
    "what batch norm is measured on anew before a snapshot is scored: images (whole training images), crops "
    "(augmented, as in training), or best (what gives the least log-loss on validation data)"
)

VIEWS_HELP = "test-time views: none, flips, d4, scales:0.75,1,1.25, or a product such as d4+scales:0.75,1"

_TRUE, _FALSE = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


def parse_bool(text: str) -> bool:
    """`true` or `false`, as `mlflow run -P` passes them."""
    if text.lower() not in _TRUE | _FALSE:
        raise ConfigError(f"expected true or false, got '{text}'")
    return text.lower() in _TRUE


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected a JSON object like {{\"name\": 1}}, got '{text}': {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"expected a JSON object like {{\"name\": 1}}, got '{text}'")
    return value


def parse_weights(text: str) -> str | None:
    """`none`, `null` and nothing mean no pretrained weights."""
    return None if text.lower() in {"", "none", "null"} else text


def parse_share(text: str) -> float | None:
    """A number; nothing and `none` for none."""
    if text.strip().lower() in {"", "none"}:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"expected a share such as 0.001, or nothing, got '{text}'") from error


def parse_seconds(text: str) -> float:
    """A time in seconds, 0 or more."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ConfigError(f"expected 0 or more seconds, got {text}")
    return value


def parse_positive(text: str) -> int:
    """A whole number above 0."""
    try:
        value = int(text)
    except ValueError as error:
        raise ConfigError(f"expected a whole number above 0, got '{text}'") from error
    if value < 1:
        raise ConfigError(f"expected a whole number above 0, got {value}")
    return value


def parse_devices(text: str) -> int | str:
    """`auto`, or a whole number above 0."""
    return text if text == "auto" else parse_positive(text)


def option(default: Any, help_text: str, parse: Callable[[str], Any] | None = None, **extra: Any) -> Any:
    """A dataclass field that is an option: `parse` turns what was typed into its value."""
    metadata = {"help": help_text, "parse": parse or type(default), **extra}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What data, and how it is split."""

    data: str = option(
        "synthetic",
        "a folder with images/ and masks/, a contest CSV (name,mask as run lengths), or "
        "'synthetic[:count=120,size=128]'",
    )
    mode: str | None = option(None, "binary, multiclass or multilabel; by default the data says", str)
    mask_column: str = option("mask", "target column of splits.csv")
    holdout: str = option("0.15,0.15", "shares of validation and test data where the data brings no splits")
    split_seed: int = option(0, "seed of the splits; the training seed never changes them")


@dataclass(frozen=True, kw_only=True)
class PartOptions(DataOptions):
    """Which part of the training images; validation and test data stay as they are."""

    folds: int | None = option(
        None, "divide the training images into so many folds, and train without each in turn", parse_positive
    )
    bootstrap: int | None = option(
        None, "train on so many bootstrap samples of the training images, drawn with replacement", parse_positive
    )
    fold: int | None = option(
        None,
        "which fold is left out, or which bootstrap sample, counted from 0; none: all, one after the other (each may "
        "also run on its own machine: mlflow run . -P folds=5 -P fold=3)",
        int,
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(PartOptions):
    """How to train."""

    arch: str = option("unet", "architecture: any of smp's, or a plugin's")
    encoder_name: str = option("resnet18", "encoder: any of smp's, or tu-NAME for any timm model")
    encoder_weights: str | None = option(
        None, "pretrained weights of the encoder, such as imagenet; none: from scratch", parse_weights
    )
    in_channels: int | None = option(None, "bands of the images; by default the data says", parse_positive)
    model_options: dict[str, Any] = option(
        {}, 'further arguments of the architecture, as JSON: {"decoder_attention_type": "scse"}', parse_json
    )
    normalization: str = option("imagenet", "imagenet, dataset, min-max, per-image or none; kept with each member")
    trainer: str = option(
        "snapshot",
        "training method: single, snapshot, fge, swa, ema, checkpoints, boost, or a plugin's (docs/methods.md)",
    )
    trainer_options: dict[str, Any] = option({}, "options of the method, as JSON", parse_json)
    epochs: int = option(20, "epochs of the whole training", parse_positive)
    cycles: int | None = option(None, "cycles, and so snapshots, of the methods snapshot and boost (5)", parse_positive)
    loss: str = option("auto", "such as dice+bce or 0.5*lovasz+0.5*focal(gamma=2); auto: dice+bce, or dice+ce")
    class_weights: str = option(
        "none", "of cross-entropy: none, balanced, sqrt (from the pixels of each class), or numbers separated by commas"
    )
    optimizer: str = option("sgd", "any optimizer that timm knows; lookahead_NAME wraps it in Lookahead")
    lr: float = option(0.05, "maximum learning rate")
    weight_decay: float = option(1e-4, "on weights of two or more dimensions")
    encoder_lr_scale: float = option(1.0, "the encoder's rate as a factor of lr")
    freeze_encoder: bool = option(False, "keep the encoder as it is", parse_bool)
    warmup_epochs: float = option(0.0, "epochs over which the rate climbs from 0; may be a fraction")
    clip_norm: float = option(0.0, "largest norm of the gradients; 0: no limit")
    accumulate: int = option(1, "batches whose gradients make one step", parse_positive)
    patience: int = option(0, "stop after so many epochs without a better val_iou; 0: never")
    batch_size: int = option(8, "images in a batch, of all processes together", parse_positive)
    crop_size: int = option(128, "side of the square training crops, in pixels", parse_positive)
    augment: str = option("default", "level of augmentation: default, flips or none")
    batch_norm: str = option("auto", f"{BATCH_NORM_HELP}; auto: best for averages of weights, and nothing for all else")
    workers: int = option(0, "data loading processes; 0: none, and the same batches")
    precision: str = option("auto", "Lightning's words (32, bf16-mixed, ...) or auto")
    accelerator: str = option("auto", "auto, cpu, cuda or mps")
    devices: int | str = option(
        1,
        "processes on each machine that train together, each with its part of each batch: a whole number, or auto, one "
        "for each GPU (docs/scaling.md)",
        parse_devices,
    )
    num_nodes: int = option(1, "machines; with more than one, torchrun or srun starts the processes", parse_positive)
    init: str = option(
        "",
        "start from trained weights: models:/m-... of a tracked snapshot, a checkpoint file or a folder of smp's; "
        "empty: from new ones",
    )
    seed: int = option(0, "seed of weights, batches and augmentation")
    seeds: int | None = option(None, "train so many times, with the seeds seed, seed+1, ...", parse_positive)
    keep: int | None = option(None, "keep the weights of the best so many snapshots; scores stay", parse_positive)
    resume: str = option(
        "",
        "go on with a training that broke off: auto, the one of this very configuration if one was begun in this "
        "folder; or its run id; empty: train anew (docs/reliability.md)",
    )
    experiment: str | None = option(None, "MLflow experiment, by name", str)
    run_name: str | None = option(None, "name of the training's run", str)


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions):
    """How one student learns from an ensemble; all else is as in a training."""

    model: str = option(
        "", "the teacher, any model of ours: models:/name@alias, models:/m-..., or a folder", required=True
    )
    unlabelled: str = option(
        "", "images without masks that the student learns from too: a folder, a glob, or a CSV with a column 'image'"
    )
    # Evidence: aerial-binary-small, 6 epochs, student-0.5 last: +0.43 points
    # Evidence: aerial-binary-small, 6 epochs, student-0.1 last: -0.21 points
    alpha: float = option(0.5, "share of the masks in the loss, 0 to 1; the teacher has the rest")
    soften: float = option(1.0, "temperature at which student and teacher are compared; above 1: softer")
    views: str = option("own", f"of the teacher: {VIEWS_HELP}; own: the teacher's")
    arch: str = option("", "architecture of the student: any of smp's, or a plugin's; empty: the first member's")
    encoder_name: str = option(
        "", "its encoder: any of smp's, or tu-NAME for any timm model; empty: the first member's"
    )
    trainer: str = option(
        "single",
        "training method: single, snapshot, fge, swa, ema, checkpoints, boost, or a plugin's (docs/methods.md)",
    )
    init: str = option(
        "",
        "start from trained weights: teacher (its best member), models:/m-... of a tracked snapshot, a checkpoint file "
        "or a folder of smp's; empty: from new ones",
    )


@dataclass(frozen=True, kw_only=True)
class EnsembleOptions(DataOptions):
    """How to build an ensemble."""

    where: str = option("", "filter on snapshot runs, as typed in the tracking UI; empty: all")
    pick: str = option("", "tag value given in the UI (ensemble=NAME), model ids, or a registered model's name")
    experiment: str | None = option(None, "MLflow experiments, by name, separated by commas", str)
    metric: str = option(
        "val_iou", "ranks the candidates, and is what greedy makes best: then val_iou, val_dice or val_nll"
    )
    selector: str = option(
        "top-k",
        "which candidates join: top-k, last, all, greedy (those whose mean is best on validation data, with weights), "
        "diverse (good ones that differ), or a plugin's (docs/selection.md)",
    )
    max_members: int = option(5, "at most so many members", parse_positive)
    max_candidates: int = option(
        50, "greedy and diverse look at the predictions of so many candidates, the best by metric", parse_positive
    )
    cross_fit: int = option(
        3,
        "what greedy and diverse choose is scored on images that had no say: validation data in so many parts, each "
        "judged by what is chosen on the others; 0: not",
    )
    combiner: str = option(
        "mean",
        "how member probabilities become one: mean, weighted (weights fitted on validation data), geometric, vote, "
        "majority (a vote that rejects pixels without one), stacking, or a plugin's (docs/combining.md)",
    )
    weights: str | None = option(
        None, "weight of each member, separated by commas, best first; fit: on validation data", str
    )
    reject: float | None = option(
        None,
        "pixels whose decision gets no more probability (or share of votes) than this become 255; by default none, "
        "and 0.5 with combiner=majority",
        float,
    )
    # Four flips gain less than an average of weights does, at four times the cost of prediction.
    # Evidence: aerial-binary, 60 epochs, single flips: +0.62 points
    views: str = option("none", VIEWS_HELP)
    calibrate: str = option("temperature", "temperature (fitted on validation data by log-loss), or none")
    postprocess: str = option(
        "none",
        'none, auto (tuned on validation data), or JSON such as {"min_area": 64, "max_hole": 32} '
        "(docs/postprocessing.md)",
    )
    adaptive: float | None = option(
        None,
        "fit a rule by which images may skip members, so that at most this share of pixels changes, such as 0.001; "
        "empty: none (docs/adaptive.md)",
        parse_share,
    )
    batch_size: int = option(8, "images in a batch", parse_positive)
    precision: str = option("auto", "Lightning's words (32, bf16-mixed, ...) or auto")
    accelerator: str = option("auto", "auto, cpu, cuda or mps")
    register_as: str | None = option(None, "register the ensemble under this name", str)
    alias: str | None = option(
        None, "and give the new version this alias, such as champion, if it is better than the one that has it", str
    )
    promote: str = option(
        "better",
        "better: move the alias only if the lower end of the interval of the difference in test IoU exceeds min-gain; "
        "always: move it without a comparison (docs/promotion.md)",
    )
    min_gain: float = option(0.0, "test IoU that the new version must gain on the one that has the alias")
    confidence: float = option(0.95, "level of that interval, by a paired bootstrap over images or groups")


@dataclass(frozen=True, kw_only=True)
class MainOptions(TrainOptions, EnsembleOptions):
    """Train, select, combine, evaluate, register."""


@dataclass(frozen=True, kw_only=True)
class SoupOptions(DataOptions):
    """Which snapshots to average."""

    where: str = option("", "filter on snapshot runs, as typed in the tracking UI; empty: all but soups")
    pick: str = option("", "tag value given in the UI (ensemble=NAME), model ids, or a registered model's name")
    experiment: str | None = option(None, "MLflow experiments, by name, separated by commas", str)
    metric: str = option("val_iou", "ranks the candidates, and says whether an average is no worse")
    selector: str = option(
        "greedy", "greedy: each in turn, kept where the average gets no worse; uniform: the average of all"
    )
    batch_norm: str = option("best", BATCH_NORM_HELP)
    crop_size: int = option(128, "side of these crops, in pixels", parse_positive)
    augment: str = option("default", "their level of augmentation: default, flips or none")
    max_members: int = option(10, "at most so many candidates, the best", parse_positive)
    batch_size: int = option(8, "images in a batch", parse_positive)
    precision: str = option("auto", "Lightning's words (32, bf16-mixed, ...) or auto")
    accelerator: str = option("auto", "auto, cpu, cuda or mps")
    run_name: str | None = option(None, "name of the run that holds the soup", str)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(PartOptions):
    """What to score, on what."""

    model: str = option("", "any model of ours: models:/name@alias, models:/m-..., or a folder", required=True)
    split: str = option("test", "train, val or test; left-out: the images of --fold")
    views: str = option("own", f"{VIEWS_HELP}; own: the model's")
    passes: int = option(1, PASSES_HELP, parse_positive)
    batch_size: int = option(8, "images in a batch", parse_positive)
    precision: str = option("auto", "Lightning's words (32, bf16-mixed, ...) or auto")
    accelerator: str = option("auto", "auto, cpu, cuda or mps")
    experiment: str | None = option(None, "MLflow experiment, by name", str)


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Images to files."""

    model: str = option("", "any model of ours: models:/name@alias, models:/m-..., or a folder", required=True)
    input: str = option("", "an image, a folder, a glob, or a CSV with a column 'image' or 'name'", required=True)
    output: str = option("predictions", "folder for the results; for kind=rle also a .csv file")
    kind: str = option("mask", "mask, probabilities, uncertainty, rle or overlay")
    views: str = option("own", f"{VIEWS_HELP}; own: the model's")
    tile: int | None = option(
        None,
        "predict in tiles with this side in pixels (docs/large_images.md); none: only images of more than 4096 x 4096 "
        "pixels, in tiles of 512",
        parse_positive,
    )
    overlap: float = option(0.25, "share of a tile's side that neighbours have in common", float)
    passes: int = option(1, PASSES_HELP, parse_positive)
    adaptive: bool = option(
        False, "let images skip members by the rule that the model was built with (docs/adaptive.md)", parse_bool
    )
    skip_existing: bool = option(
        False, "leave out images that have a result newer than they are: after an interruption, go on", parse_bool
    )
    batch_size: int = option(8, "images in a batch", parse_positive)
    io_threads: int = option(4, "threads that read images and write results", parse_positive)
    precision: str = option("auto", "Lightning's words (32, bf16-mixed, ...) or auto")
    accelerator: str = option("auto", "auto, cpu, cuda or mps")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """A model as one file."""

    model: str = option("", "any model of ours: models:/name@alias, models:/m-..., or a folder", required=True)
    format: str = option("onnx", "onnx, or torch-export (docs/export.md)")
    output: str | None = option(None, "the file; by default ensemble.onnx or ensemble.pt2", str)
    views: str = option("own", "test-time views: own (the model's), none, flips or d4")
    opset: int = option(18, "version of ONNX's operators, 18 to 23", parse_positive)
    check_images: int = option(
        10, "random images, at least so many, for which the file must give what the engine gives", parse_positive
    )


@dataclass(frozen=True, kw_only=True)
class SnapshotsOptions:
    """Which snapshots to list."""

    where: str = option("", "filter on snapshot runs, as typed in the tracking UI; empty: all")
    experiment: str | None = option(None, "MLflow experiments, by name, separated by commas", str)
    metric: str = option("val_iou", "ranks them")
    dataset: str = option("", "digest (or its beginning) of the data that scores were measured on; empty: the only one")
    limit: int = option(20, "at most so many", parse_positive)


@dataclass(frozen=True, kw_only=True)
class SyncOptions:
    """What waits on local disk for a tracking server that was away."""

    spool: str = option("", "a spool, or a folder with some below it; empty: all that was begun in this working folder")
    tracking_uri: str = option("", "the server, if it has another address now; empty: the one that each was begun with")
    wait: float = option(30.0, "seconds to wait for a server that takes nothing", parse_seconds)
    dry_run: bool = option(False, "say what waits, and send nothing", parse_bool)


@dataclass(frozen=True, kw_only=True)
class ImportOptions(PartOptions):
    """Checkpoints that exist already."""

    files: str = option(
        "",
        "checkpoints (.pt .pth .ckpt .safetensors) or folders of smp's save_pretrained; globs, comma-separated",
        required=True,
    )
    arch: str = option("unet", "architecture of checkpoints that hold weights only")
    encoder_name: str = option("resnet18", "their encoder")
    model_options: dict[str, Any] = option({}, "their further arguments, as JSON", parse_json)
    normalization: str = option(
        "imagenet", "what their input went through: imagenet, dataset, min-max, per-image or none"
    )
    trained_on: str = option("unknown", "train: the training split of this data, checked by the leak guard; or unknown")
    batch_size: int = option(8, "images in a batch", parse_positive)
    precision: str = option("auto", "Lightning's words (32, bf16-mixed, ...) or auto")
    accelerator: str = option("auto", "auto, cpu, cuda or mps")
    experiment: str | None = option(None, "MLflow experiment, by name", str)
    run_name: str | None = option(None, "name of the run that holds them", str)
