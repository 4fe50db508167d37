"""`fit`: one training by any method, from a network and data to snapshots, hosted by Lightning."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smp_ensemble.architectures import output_stride
from smp_ensemble.data.loading import evaluation_loader, ordered_loader, training_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.training.boosting import Boosting
from smp_ensemble.training.callback import SnapshotCallback
from smp_ensemble.training.choosing import make_measure
from smp_ensemble.training.class_weights import class_weights
from smp_ensemble.training.distillation import DistillationModule
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.host import EpochFromSteps, make_host, quiet
from smp_ensemble.training.launching import launched
from smp_ensemble.training.losses import make_loss
from smp_ensemble.training.module import SegmentationModule
from smp_ensemble.training.optimizers import freeze_encoder, make_optimizer
from smp_ensemble.training.previews import predict_previews
from smp_ensemble.training.processes import part_of_batch, place_of, together, told_by_first
from smp_ensemble.training.stopping import FiniteLoss, StopAfterStep, StopRequest, explained
from smp_ensemble.training.stores import SilentStore, opened
from smp_ensemble.training.trainers import make_trainer
from smp_ensemble.typing import Resampling

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.loading import Batch
    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.training.distillation import Lesson
    from smp_ensemble.training.processes import Place
    from smp_ensemble.typing import Snapshot, SnapshotStore, Trainer


def fit(
    model: nn.Module,
    train_data: SegmentationDataset,
    val_data: SegmentationDataset,
    *,
    trainer: str | Trainer = "snapshot",
    epochs: int = 20,
    normalization: Normalization | None = None,
    store: SnapshotStore | None = None,
    options: FitOptions | None = None,
    params: Mapping[str, Any] | None = None,
    trained_on: Collection[str] | None = (),
    resume_from: Path | None = None,
    checkpoint_folder: Path | None = None,
    lesson: Lesson | None = None,
) -> list[Snapshot]:
    """Trains `model` by one method and returns references to its snapshots, all delivered.

    Args:
        model: An smp network that gives logits; trained in place.
        train_data: Images and masks.
        val_data: What snapshots are scored on, with the same task.
        trainer: Name of a method, or the method itself.
        epochs: Epochs of the whole training.
        normalization: Of the model's input; None: ImageNet's.
        store: Where snapshots go; None: MLflow, as configured by its environment variables.
        options: Loss, optimizer, batches and hardware.
        params: Further params to keep with each snapshot.
        trained_on: Digests of images that `model` was trained on before, for the leak guard; None: unknown.
        resume_from: A checkpoint of the same training to go on from.
        checkpoint_folder: Where to leave `last.ckpt` after each epoch; None: nowhere.
        lesson: What a teacher says about the training images; None: there is none.

    Raises:
        ConfigError: Options that do not fit the data or each other.
        TrainingError: The loss is no number any more, or there is no room on the disk or in memory.
            Or another process that trains with this one has failed.
        Interrupted: Ctrl-C or SIGTERM; training has stopped after its step.
    """
    options = options or FitOptions()
    if val_data.task != train_data.task:
        raise ConfigError(f"training and validation data must have one task: {train_data.task}, {val_data.task}")
    stride = output_stride([model])
    if options.crop_size % stride:
        raise ConfigError(f"crop-size must be a multiple of the network's stride {stride}, got {options.crop_size}")
    normalization = normalization or imagenet(train_data.task.in_channels)
    if options.freeze_encoder:
        freeze_encoder(model)
    device = choose_device(options.accelerator)
    precision = resolve_precision(options.precision, device)
    place = place_of(options.devices, options.num_nodes, device)
    part = part_of_batch(options.batch_size, len(train_data), place)
    if lesson is not None and place.count > 1:
        raise ConfigError(f"a student learns from its teacher in one process, got {place.count}: use devices=1")
    method = make_trainer(trainer) if isinstance(trainer, str) else trainer
    options.check_with(method)
    module = _module(model, normalization, train_data, options, lesson, place)
    transform = TrainTransform(options.crop_size, fill=normalization.raw_mean(), augment=options.augment)
    with opened(store if place.is_first else SilentStore()) as kept, launched(place, kept.close):
        callback = SnapshotCallback(
            method,
            mode=train_data.task.mode,
            class_names=train_data.task.class_names,
            normalization=normalization,
            store=kept,
            params=params,
            dataset=val_data.reference(),
            training_images=_together(train_data.image_digests, trained_on),
            previews=partial(predict_previews, data=val_data, normalization=normalization, precision=precision),
            warmup_epochs=options.warmup_epochs,
            refresh=make_measure(
                options.batch_norm,
                train_data=train_data,
                val_data=val_data,
                transform=transform,
                running=method.averager() is None,  # an average has no running statistics
                seed=options.seed,
                normalization=normalization,
                batch_size=options.batch_size,
                precision=precision,
                shard=place.shard,
            ),
            refresh_all=options.batch_norm != "auto",
            resampling=True,
        )  # fmt: skip
        boosting = None
        if isinstance(method, Resampling):
            crops = TrainTransform(options.crop_size, fill=normalization.raw_mean(), augment="none")
            boosting = Boosting(
                method,
                callback,
                normalization=normalization,
                mode=train_data.task.mode,
                crops=lambda seed: ordered_loader(
                    train_data, crops, batch_size=options.batch_size, seed=options.seed + seed
                ),
                precision=precision,
            )
        # The loader asks for its epoch when its iterator is made, which Lightning does before it counts the epoch up:
        # completed steps are the one count that is always right, after a resume too.
        epoch = EpochFromSteps()
        train_loader = training_loader(
            train_data,
            transform,
            batch_size=part,
            seed=options.seed,
            workers=options.workers,
            epoch_of=epoch,
            shard=place.shard,
            weights_of=lambda: boosting.weights if boosting else None,
            teaching=lesson.soft_targets if lesson is not None else None,
        )
        val_loader = evaluation_loader(
            val_data,
            batch_size=options.batch_size,
            workers=options.workers,
            divisor=stride,
            shard=place.shard,
            never_empty=True,
        )
        torch.manual_seed(options.seed + place.rank)  # dropout; batches and augmentation have seeds of their own
        with quiet(), StopRequest() as request:
            callbacks: list[pl.Callback] = [FiniteLoss(), callback, StopAfterStep(request)]
            if boosting is not None:
                callbacks.insert(2, boosting)
            host = make_host(
                epochs,
                device,
                precision,
                callbacks,
                checkpoint_folder=checkpoint_folder,
                clip_norm=options.clip_norm,
                accumulate=options.accumulate,
                patience=options.patience,
                place=place,
            )
            epoch.bind(host, -(-len(train_loader) // options.accumulate))
            _train(
                host,
                module,
                (train_loader, val_loader),
                resume_from=resume_from,
                request=request,
                batch_size=options.batch_size,
                place=place,
            )
            request.act(host)  # it came when the last step was done
        return kept.snapshots()


def _train(
    host: pl.Trainer,
    module: SegmentationModule,
    loaders: tuple[DataLoader[Batch], DataLoader[Batch]],
    *,
    resume_from: Path | None,
    request: StopRequest,
    batch_size: int,
    place: Place,
) -> None:
    """Lets the host loop; what goes wrong is an error that says so."""
    try:
        checkpoint = str(resume_from or "")
        if place.count > 1:
            host.strategy.setup_environment()  # the processes find each other
            checkpoint = told_by_first(checkpoint, host.strategy.root_device)
        host.fit(
            module,
            *loaders,
            ckpt_path=checkpoint or None,
            weights_only=True,  # a checkpoint holds tensors and plain values: nothing in it is executed
        )
    except SystemExit as error:
        # Lightning answers Ctrl-C by leaving the process; the one who called decides that.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        request.act(host)
        raise
    except Exception as error:
        known = explained(error, host, batch_size)
        if place.count > 1:
            known = together(place, known or error)
        if known is None:
            raise
        raise known from error


def _together(digests: Collection[str], earlier: Collection[str] | None) -> tuple[str, ...] | None:
    """Each digest once; None where nobody knows what the weights have seen."""
    return None if earlier is None else tuple(dict.fromkeys([*digests, *earlier]))


def _module(
    model: nn.Module,
    normalization: Normalization,
    data: SegmentationDataset,
    options: FitOptions,
    lesson: Lesson | None,
    place: Place,
) -> SegmentationModule:
    task = data.task
    weights = class_weights(options.class_weights, data)
    make = (
        partial(SegmentationModule, processes=place.count)
        if lesson is None
        else partial(DistillationModule, lesson=lesson)
    )
    return make(
        model,
        normalization,
        task,
        loss=make_loss(options.loss, task.mode, task.num_outputs, class_weights=weights),
        make_optimizer=partial(
            make_optimizer,
            name=options.optimizer,
            lr=options.lr,
            weight_decay=options.weight_decay,
            encoder_lr_scale=options.encoder_lr_scale,
        ),
    )
