"""What a training keeps on local disk while it runs, so that another process can go on with it.

A folder for each training and each plan, `.smp_ensemble/trainings/TOKEN/`: `training.json` says what it is of,
`last.ckpt` where it stands, `spool/` what is not delivered yet and what was. It goes when the training is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smp_ensemble.durable import sync_folder, write_json
from smp_ensemble.exceptions import ConfigError, IntegrityError
from smp_ensemble.locks import Lock
from smp_ensemble.training.checkpointing import CHECKPOINT_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(".smp_ensemble") / "trainings"
STATE_FILE, LOCK_FILE = "training.json", "lock"


@dataclass(frozen=True)
class Identity:
    """What determines the result of a training or a plan: equal ones are the same training.

    Attributes:
        kind: `training` or `plan`.
        values: Options by name, and digests of the data, as text.
        parent_run_id: The run of the plan that it belongs to.
    """

    kind: str
    values: Mapping[str, str]
    parent_run_id: str | None = None

    @property
    def digest(self) -> str:
        """A short name for all of it but the plan."""
        return hashlib.sha256(json.dumps([self.kind, dict(self.values)], sort_keys=True).encode()).hexdigest()[:32]

    def difference(self, other: Mapping[str, str]) -> tuple[str, str, str] | None:
        """The first value that is another one there: its name, that one, and this one."""
        for name, value in self.values.items():
            if name in other and other[name] != value:
                return name, other[name], value
        return None


@dataclass(frozen=True)
class TrainingState:
    """The folder of one training or plan, held by this process.

    Attributes:
        folder: It.
        identity: What it is a training of.
        versions: What it began on: numbers may differ in their last bits on another.
        run_id: Its run; None where the process died before it was known.
        is_continued: Whether an earlier process began it.
    """

    folder: Path
    identity: Identity
    versions: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    is_continued: bool = False

    @property
    def token(self) -> str:
        """What tags its run from the first moment."""
        return self.folder.name

    @property
    def spool(self) -> Path:
        """Where its store keeps what is not delivered yet."""
        return self.folder / "spool"

    @property
    def checkpoint(self) -> Path | None:
        """The end of its last whole epoch; None: there is none yet."""
        path = self.folder / CHECKPOINT_FILE
        return path if path.exists() else None

    def with_run(self, run_id: str) -> TrainingState:
        """The same with its run, which is remembered on the disk."""
        found = replace(self, run_id=run_id)
        found.write()
        return found

    def write(self) -> None:
        """Writes `training.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder / STATE_FILE,
            {
                "format": 1,
                "kind": self.identity.kind,
                "values": dict(self.identity.values),
                "parent_run_id": self.identity.parent_run_id,
                "versions": dict(self.versions),
                "run_id": self.run_id,
            },
        )

    def discard(self) -> None:
        """Deletes the folder, at once for whoever looks, and those around it that are empty now."""
        gone = self.folder.with_name(f".gone-{self.folder.name}")
        self.folder.rename(gone)
        sync_folder(gone.parent)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: another training's
            for parent in list(self.folder.parents)[:2]:
                parent.rmdir()


def read_state(folder: Path) -> TrainingState:
    """What an earlier process wrote.

    Raises:
        IntegrityError: `training.json` cannot be read.
    """
    path = folder / STATE_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        identity = Identity(values["kind"], values["values"], values["parent_run_id"])
        return TrainingState(folder, identity, values["versions"], values["run_id"], is_continued=True)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} does not describe a training ({type(error).__name__}): delete its folder to train anew"
        ) from error


def unfinished(kind: str) -> list[TrainingState]:
    """All that was begun in this working folder and is not finished, the newest first."""
    found = [
        (path.stat().st_mtime_ns, read_state(path.parent))
        for path in ROOT.glob(f"*/{STATE_FILE}")
        if not path.parent.name.startswith(".")
    ]
    return [state for _, state in sorted(found, key=lambda one: -one[0]) if state.identity.kind == kind]


def matching(identity: Identity) -> TrainingState | None:
    """The newest one that is of the same training."""
    for state in unfinished(identity.kind):
        if state.identity.digest == identity.digest and state.identity.parent_run_id == identity.parent_run_id:
            return state
    return None


def of_run(kind: str, run_id: str) -> TrainingState | None:
    """The one of a run."""
    return next((state for state in unfinished(kind) if state.run_id == run_id), None)


def new_state(identity: Identity, versions: Mapping[str, str]) -> TrainingState:
    """A folder for a training that begins now."""
    state = TrainingState(ROOT / uuid.uuid4().hex, identity, versions)
    state.write()
    return state


@contextlib.contextmanager
def held(state: TrainingState) -> Iterator[None]:
    """Keeps other processes from the same training while the block runs; a process that dies lets go.

    Raises:
        ConfigError: Another process is at it.
    """
    lock = Lock(state.folder / LOCK_FILE)
    if not lock.take():
        raise ConfigError(
            f"another process is at work on this training (process {lock.holder()}, run {state.run_id}, "
            f"{state.folder}): wait for it, or end it first"
        )
    with lock:
        yield
