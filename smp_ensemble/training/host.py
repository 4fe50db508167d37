"""The Lightning trainer that hosts a training: it loops, quietly; all else is the callbacks'."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy

from smp_ensemble.training.checkpointing import Checkpointing, DurableCheckpointIO
from smp_ensemble.training.processes import ALONE
from smp_ensemble.training.synced_batch_norm import BatchNormSync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from smp_ensemble.training.processes import Place


def make_host(
    epochs: int,
    device: torch.device,
    precision: str,
    callbacks: list[pl.Callback],
    *,
    checkpoint_folder: Path | None = None,
    clip_norm: float = 0.0,
    accumulate: int = 1,
    patience: int = 0,
    place: Place = ALONE,
) -> pl.Trainer:
    """The Lightning trainer: it loops; schedules, snapshots and tracking are the callback's."""
    terminal = sys.stderr.isatty()
    if patience:
        # Asked at the end of validation: the snapshot callback then keeps the last weights before training ends.
        stopping = EarlyStopping("val_iou", mode="max", patience=patience, check_on_train_epoch_end=False)
        callbacks = [stopping, *callbacks]
    if terminal:
        callbacks = [*callbacks, TQDMProgressBar(leave=False)]
    if checkpoint_folder is not None:
        callbacks = [*callbacks, Checkpointing(checkpoint_folder)]
    plugins: list[Any] = [DurableCheckpointIO()]
    if place.count > 1:
        plugins.append(TorchSyncBatchNorm() if device.type == "cuda" else BatchNormSync())
        if not place.external:
            plugins.append(LightningEnvironment())
    return pl.Trainer(
        max_epochs=epochs,
        accelerator=device.type,
        devices=place.on_machine,
        num_nodes=place.count // place.on_machine,
        # Encoders of less than their full depth keep layers that nothing goes through.
        strategy=DDPStrategy(find_unused_parameters=True) if place.count > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]  # one of Lightning's words: resolve_precision has checked it
        callbacks=callbacks,
        plugins=plugins,
        logger=False,
        enable_checkpointing=checkpoint_folder is not None,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=clip_norm or None,
        accumulate_grad_batches=accumulate,
    )


class EpochFromSteps:
    """The current epoch, from the host's completed steps."""

    def __init__(self) -> None:
        self._host: pl.Trainer | None = None
        self._steps_per_epoch = 1

    def bind(self, host: pl.Trainer, steps_per_epoch: int) -> None:
        """Says whose steps are counted."""
        self._host, self._steps_per_epoch = host, steps_per_epoch

    def __call__(self) -> int:
        """Completed epochs."""
        return self._host.global_step // self._steps_per_epoch if self._host else 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's advertisements and advice, which do not apply here, off the terminal."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # a frozen encoder is meant to be
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning's own, of torch
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
