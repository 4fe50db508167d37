"""Checkpoints that a training goes on from: one after each epoch, whole or not at all; loading executes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from smp_ensemble.durable import write_whole
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.training.random_states import random_states, restore_random_states

if TYPE_CHECKING:
    from collections.abc import Mapping

    import lightning.pytorch as pl

CHECKPOINT_FILE = "last.ckpt"


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the last one, flushes it to the disk, and only then puts it in its place."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes `checkpoint` to `path`."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, lambda file: torch.save(checkpoint, file))


class Checkpointing(Checkpoint):
    """Leaves a checkpoint after each epoch, when its snapshot is in the store: Lightning asks `Checkpoint`s last.

    Beside what Lightning and the other callbacks keep, it holds the states of all random generators, for networks with
    dropout, and whether the training had stopped early.

    Args:
        folder: Where `last.ckpt` is.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / CHECKPOINT_FILE
        self._stopped = False
        self._random: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a resume: goes on with the random numbers where they were, or not at all if training had stopped."""
        if self._random is not None:
            restore_random_states(self._random)
            self._random = None
        if self._stopped:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the checkpoint of this epoch in the place of the last one."""
        self._stopped = trainer.should_stop
        trainer.save_checkpoint(self._path)

    def state_dict(self) -> dict[str, Any]:
        """What no other part of a checkpoint holds."""
        return {"random": random_states(), "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; it takes effect when training starts."""
        self._random, self._stopped = state_dict["random"], bool(state_dict["stopped"])


def completed_epochs(checkpoint: Path) -> int:
    """Completed epochs of a checkpoint, which is read as far as that needs.

    Raises:
        IntegrityError: It cannot be read.
    """
    try:
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return int(loaded["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except OSError:
        raise
    except Exception as error:  # whatever torch says of a broken file
        raise IntegrityError(
            f"{checkpoint} is not a whole checkpoint: {type(error).__name__}: delete its folder {checkpoint.parent} to "
            "start that training anew"
        ) from error
