"""Several processes that train one network together: which one this is, and what they tell each other.

Each process takes its part of each batch. Logits and targets of all parts are brought together before the loss, so
that every process computes the loss of the whole batch, whatever the loss; its gradients reach the own part alone.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stubs forget it

from smp_ensemble.exceptions import ConfigError, InputError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

FAILED_KEY = "smp_ensemble/failed"
ANSWER_SECONDS = 3.0
"""How long one asks what went wrong elsewhere, when the connection to the others broke."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is.

    Attributes:
        rank: Counted from 0; the first one alone tracks, prints and keeps snapshots.
        count: Processes that train together, on all machines.
        on_machine: How many of them are on this machine.
        launched: Whether the others are there already.
        external: Whether torchrun or SLURM has started all of them.
    """

    rank: int = 0
    count: int = 1
    on_machine: int = 1
    launched: bool = False
    external: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this one tracks, prints and keeps snapshots."""
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        """The rank and the number of processes."""
        return self.rank, self.count


ALONE = Place()


def place_of(
    devices: int | str, num_nodes: int, device: torch.device, environment: Mapping[str, str] = os.environ
) -> Place:
    """Where this process stands, by its environment.

    Args:
        devices: Processes on each machine; `auto`: one for each GPU, and one where there is none.
        num_nodes: Machines.
        device: What computes.
        environment: Variables that torchrun, SLURM or the first process have set.

    Raises:
        ConfigError: More than there are, or not as many as were started.

    Example:
        >>> cpu = torch.device("cpu")
        >>> place_of(1, 1, cpu, {}).shard, place_of(2, 1, cpu, {"LOCAL_RANK": "1"}).shard
        ((0, 1), (1, 2))
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    here = (gpus or 1) if devices == "auto" else int(devices)
    if here < 1 or num_nodes < 1:
        raise ConfigError(f"expected devices and num-nodes of 1 or more, got {devices} and {num_nodes}")
    if device.type == "cuda" and here > gpus:
        raise ConfigError(f"devices={here}, but this machine has {gpus} GPUs: use at most devices={gpus}")
    if device.type == "mps" and here > 1:
        raise ConfigError(f"devices={here}, but mps is one device: use devices=1")
    count = here * num_nodes
    started = environment.get("WORLD_SIZE") if "RANK" in environment else None
    if started is not None and int(started) != count:
        raise ConfigError(
            f"{started} processes were started, but devices={here} and num-nodes={num_nodes} make {count}: let them "
            "agree"
        )
    if count == 1:
        return ALONE
    if started is not None:
        return Place(int(environment["RANK"]), count, here, launched=True, external=True)
    if environment.get("SLURM_STEP_ID") and environment.get("SLURM_NTASKS") == str(count):
        return Place(int(environment["SLURM_PROCID"]), count, here, launched=True, external=True)
    if num_nodes > 1:
        raise ConfigError(
            f"num-nodes={num_nodes} needs a process for each device on each machine, started by torchrun or srun "
            "(docs/scaling.md)"
        )
    return Place(int(environment.get("LOCAL_RANK", 0)), count, here, launched="LOCAL_RANK" in environment)


def part_of_batch(batch_size: int, images: int, place: Place) -> int:
    """How many images of each batch are this process's.

    Args:
        batch_size: Images in a batch of all processes together.
        images: In the training data; where there are fewer, they are the batch.
        place: Among how many.

    Raises:
        ConfigError: The batch cannot be divided evenly.

    Example:
        >>> part_of_batch(8, 100, Place(count=2))
        4
    """
    whole = min(batch_size, images)
    if whole % place.count:
        below = whole // place.count * place.count
        nearest = f"{below} or {below + place.count}" if below and below + place.count <= images else f"{below}"
        raise ConfigError(
            f"batch-size={batch_size} is that of all {place.count} processes together and must be a multiple of "
            + (f"{place.count}: use {nearest}" if below else f"{place.count}, but there are only {images} images")
        )
    return whole // place.count


def gathered(own: Tensor) -> Tensor:
    """The parts of all processes, one after the other; gradients flow to the own part alone.

    Args:
        own: Of the same shape in each process; the first dimension is the batch's.
    """
    count, rank = dist.get_world_size(), dist.get_rank()
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format, requires_grad=False) for _ in range(count)]
    dist.all_gather(parts, own.detach().contiguous())
    parts[rank] = own
    return torch.cat(parts)


def of_first(own: Tensor, device: torch.device) -> Tensor:
    """The tensor of the first process, in all of them; alone, one's own.

    Args:
        own: Of the same shape and type in each process.
        device: Where collectives happen.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return own
    moved = own.to(device)
    dist.broadcast(moved, src=0)
    return moved.to(own.device)


def told_by_first(text: str, device: torch.device) -> str:
    """What the first process says, in all of them.

    Args:
        text: Counts in the first process.
        device: Where collectives happen.
    """
    content = list(text.encode())
    length = of_first(torch.tensor([len(content)]), device)
    own = content if dist.get_rank() == 0 else [0] * int(length)
    return bytes(of_first(torch.tensor(own, dtype=torch.uint8), device).tolist()).decode() if int(length) else ""


def leave_group() -> None:
    """Ends what this process has with the others, when all have come this far; from here on each is alone."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        gc.collect()  # a wrapper (DDP) that only cycles hold keeps gloo's threads, which abort a process that ends soon
        dist.destroy_process_group()


def together(place: Place, error: Exception) -> TrainingError | None:
    """Why a training of several processes failed here: another one's reason, where it is only its echo.

    Args:
        place: Which process this is; all but the first leave their reason for it.
        error: What happened here.
    """
    if place.is_first and not isinstance(error, InputError | TrainingError):
        reason = failure_elsewhere()
        if reason is not None:
            return TrainingError(reason)
        if "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
            return TrainingError(f"one of the {place.count} processes was ended from outside, or its machine is gone")
    elif not place.is_first:
        tell_failure(place, error)
    return error if isinstance(error, TrainingError) else None


def tell_failure(place: Place, error: BaseException) -> None:
    """Leaves the reason where the first process finds it, if the processes had found each other."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        store = _meeting_point()
        if store is not None:
            store.set(FAILED_KEY, f"process {place.rank} of 0 to {place.count - 1} failed: {reason}")
    except (RuntimeError, OSError):  # the first process is gone: nobody is left to tell
        return


def failure_elsewhere(wait_seconds: float = ANSWER_SECONDS) -> str | None:
    """What another process said before it failed; None: nothing, for as long as one waits."""
    deadline = time.monotonic() + wait_seconds
    try:
        store = _meeting_point()
        while store is not None:
            if store.check([FAILED_KEY]):
                reason: str = store.get(FAILED_KEY).decode()
                return reason
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except (RuntimeError, OSError):
        return None
    return None


def _meeting_point() -> TCPStore | None:
    """Where the processes found each other, as one more of its clients; None: they had not looked for each other."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port or not dist.is_available():
        return None
    socket.create_connection((address, int(port)), timeout=5.0).close()  # torch's client complains at length
    return TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
