"""How a training stops before its end, and what it says: told to by Ctrl-C or the system, or unable to go on."""

from __future__ import annotations

import errno
import logging
import math
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch.callbacks import Callback

from smp_ensemble.exceptions import DivergedError, Interrupted, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as pl

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
CHECK_EVERY_STEPS = 50
"""How often the loss is looked at on an accelerator, which has to be waited for; on the CPU after each step."""

logger = logging.getLogger(__name__)


class StopRequest:
    """While the block runs, the first Ctrl-C or SIGTERM is noted, and acted on after the step; the second acts at once.

    Outside the main thread, where Python knows no signals, nothing changes.

    Attributes:
        signal_number: What came; None: nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()  # Lightning leaves Ctrl-C switched off after one

    def _note(self, number: int, frame: object) -> None:
        self.signal_number = number
        self._restore()
        logger.warning("stopping after this step; once more: at once")

    def act(self, trainer: pl.Trainer) -> None:
        """Raises if a signal came.

        Raises:
            Interrupted: Says where training stopped.
        """
        if self.signal_number is not None:
            raise Interrupted(f"interrupted {_where(trainer)}", self.signal_number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class StopAfterStep(Callback):
    """Ends the training after the step, or the batch of validation, during which it was told to.

    Args:
        request: Says whether it was.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """After each batch of training."""
        self._request.act(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """After each batch of validation."""
        self._request.act(trainer)


class FiniteLoss(Callback):
    """Ends the training when the loss is no number any more, before such weights reach a snapshot or a checkpoint.

    With a gradient scaler (16-mixed) a loss that overflows is skipped by it; then the epoch's mean is looked at alone.
    """

    def __init__(self) -> None:
        self._bad_step: torch.Tensor | None = None  # on the loss's device; -1: none yet

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the last epoch."""
        self._bad_step = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the first step whose loss is no number, without waiting for the device."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, device=loss.device)
        new = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(new, trainer.global_step, self._bad_step)
        if loss.device.type == "cpu" or (batch_idx + 1) % CHECK_EVERY_STEPS == 0:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at what was noted, and at the epoch's mean."""
        self._check(trainer)
        mean = float(trainer.callback_metrics.get("train_loss", 0.0))
        if not math.isfinite(mean) and getattr(trainer.precision_plugin, "scaler", None) is None:
            raise _no_number(f"the mean loss of epoch {trainer.current_epoch + 1}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in pl_module.parameters()):
            raise _no_number(f"a weight after epoch {trainer.current_epoch + 1}")

    def _check(self, trainer: pl.Trainer) -> None:
        step = -1 if self._bad_step is None else int(self._bad_step)
        if step >= 0:
            raise _no_number(f"the loss in epoch {trainer.current_epoch + 1}, at step {step},")


def _no_number(what: str) -> DivergedError:
    return DivergedError(
        f"{what} is not a finite number: the training has diverged; what was kept before it is whole. Train with a "
        "smaller lr, with warmup-epochs or clip-norm, or with precision=32"
    )


def explained(error: BaseException, trainer: pl.Trainer, batch_size: int) -> TrainingError | None:
    """One line for an error that the machine is to blame for, with a remedy; None for all others."""
    for cause in _causes(error):
        if _is_full_disk(cause):
            return TrainingError(
                f"no room is left on the disk, {_where(trainer)}: what was written before is whole. Free some room, "
                "then go on"
            )
        if _is_out_of_memory(cause):
            return TrainingError(
                f"out of memory {_where(trainer)}, with batch-size={batch_size}: free memory and go on, or train with "
                "a smaller batch-size (and accumulate, for as large steps), a smaller crop-size or "
                "precision=bf16-mixed"
            )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _is_full_disk(error: BaseException) -> bool:
    # safetensors knows no numbers.
    return (isinstance(error, OSError) and error.errno in FULL) or "No space left on device" in str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def _where(trainer: pl.Trainer) -> str:
    return f"in epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, after step {trainer.global_step}"
