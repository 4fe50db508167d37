"""Kills trainings at random moments, goes on with them, and compares what they leave with an undisturbed training.

    python tests/faults/kills.py --kills 50 --seconds 3600 --seed 1

Imports take most of a short process: they are done once, and each training is a fork of this process that runs the
real command. A kill is `SIGKILL`, after a random time or at a random call of a function that changes something on the
disk or in the tracking store, before or after it does. Prints a table; `--json FILE` writes it for machines.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

NETWORK = '{"encoder_depth": 3, "decoder_channels": [8, 8, 8], "dropout": 0.3}'
COMMON = (
    *("train", "--json", "--data", "synthetic:count=24,size=64,seed=5", "--crop-size", "32", "--batch-size", "4"),
    *("--precision", "32", "--accelerator", "cpu", "--encoder-name", "tu-test_resnet", "--model-options", NETWORK),
    *("--epochs", "4", "--lr", "0.02"),
)
CASES = {
    "single": ("--trainer", "single"),
    "snapshot": ("--trainer", "snapshot", "--cycles", "2"),
    "checkpoints": ("--trainer", "checkpoints", "--trainer-options", '{"every_epochs": 2}'),
    "fge": ("--trainer", "fge", "--trainer-options", '{"start": 0.5}'),
    "swa": ("--trainer", "swa", "--trainer-options", '{"start": 0.5}'),
    "ema": ("--trainer", "ema", "--trainer-options", '{"decay": 0.9}'),
    "boost": ("--trainer", "boost", "--cycles", "4"),
    "lookahead": ("--trainer", "snapshot", "--cycles", "2", "--optimizer", "lookahead_sgd"),
    "workers=2": ("--trainer", "snapshot", "--cycles", "2", "--workers", "2"),
    "boost, workers=2": ("--trainer", "boost", "--cycles", "2", "--workers", "2"),
    "2 folds, keep=1": ("--trainer", "snapshot", "--cycles", "2", "--folds", "2", "--keep", "1", "--epochs", "2"),
}
MOMENTS = {
    "a step": ("smp_ensemble.training.module", "SegmentationModule.training_step"),
    "validation": ("smp_ensemble.training.module", "SegmentationModule.validation_step"),
    "a checkpoint": ("smp_ensemble.training.checkpointing", "DurableCheckpointIO.save_checkpoint"),
    "measuring for boosting": ("smp_ensemble.training.boosting", "Boosting.measure"),
    "a flush to the disk": ("os", "fsync"),
    "a file put in place": ("pathlib", "Path.replace"),
    "a folder put in place": ("pathlib", "Path.rename"),
    "the spool": ("smp_ensemble.tracking.spool", "Spool.put"),
    "the ledger": ("smp_ensemble.tracking.ledger", "Ledger.add"),
    "the state": ("smp_ensemble.workflows.states", "TrainingState.write"),
    "the state's end": ("smp_ensemble.workflows.states", "TrainingState.discard"),
    "opening a run": ("mlflow", "MlflowClient.create_run"),
    "ending a run": ("mlflow", "MlflowClient.set_terminated"),
    "creating a model": ("mlflow", "MlflowClient.create_logged_model"),
    "uploading a model": ("mlflow", "MlflowClient.log_model_artifacts"),
    "copying a file": ("shutil", "copy2"),
    "finishing a model": ("mlflow", "MlflowClient.finalize_logged_model"),
    "linking a model": ("mlflow", "MlflowClient.log_outputs"),
    "deleting a model": ("mlflow", "MlflowClient.delete_logged_model"),
    "logging": ("mlflow", "MlflowClient.log_batch"),
}
LONGEST_SECONDS = 300.0
"""A process that takes longer hangs."""


@dataclass(frozen=True)
class Kill:
    """When a process is to die: after so many seconds, or at the call of that number, before or after it."""

    seconds: float | None = None
    moment: str = ""
    call: int = 0
    after: bool = False

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"after {self.seconds:.1f} s"
        return f"{'after' if self.after else 'before'} call {self.call} of {self.moment}"


@dataclass
class Row:
    """What became of one training method.

    Attributes:
        kills: Processes that were killed.
        resumed: Of these, how many another process went on from, to the end or to its own kill.
        trainings: Trainings that were finished.
        identical: Of these, how many left what the undisturbed one left, bit for bit and each thing once.
        moments: When they were killed.
        faults: What was wrong.
    """

    trainer: str
    kills: int = 0
    resumed: int = 0
    trainings: int = 0
    identical: int = 0
    moments: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def place_of(moment: str):
    module, path = MOMENTS[moment]
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def watch(kill: Kill | None, counts: collections.Counter) -> None:
    """Counts calls at all moments; at the one of `kill` the process dies."""

    def wrapped(moment: str, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            counts[moment] += 1
            dies = kill is not None and kill.moment == moment and counts[moment] == kill.call
            if dies and not kill.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for moment in MOMENTS:
        owner, name = place_of(moment)
        setattr(owner, name, wrapped(moment, getattr(owner, name)))


def warm_up() -> None:
    """All that a training imports, and nothing that must not be forked: no thread, no open database."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", OMP_NUM_THREADS="1", SMP_ENSEMBLE_CACHE="off")
    import torch

    torch.set_num_threads(1)
    for module in (
        *("smp_ensemble.cli", "smp_ensemble.workflows.main", "smp_ensemble.workflows.train", "mlflow.tracking"),
        *("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.artifact.local_artifact_repo", "mlflow.pyfunc"),
        *("matplotlib.pyplot", "cv2", "albumentations", "segmentation_models_pytorch", "timm", "lightning.pytorch"),
    ):
        importlib.import_module(module)
    importlib.import_module("smp_ensemble.tracking.report").DPI = 40


def in_fork(work, log: Path, seconds: float | None = None) -> tuple[int | None, float]:
    """Runs `work` in a fork; its exit code, None where it was killed, and how long it took."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = work()
            sys.stdout.flush()
        finally:
            os._exit(code)
    deadline = began + (LONGEST_SECONDS if seconds is None else seconds)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if seconds is None:
                raise RuntimeError(f"a training hangs, see {log}: {log.read_text()[-2000:]}")
            break
        time.sleep(0.01)
    took = time.monotonic() - began
    return (None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), took


class Place:
    """A working folder with a tracking store of its own.

    Args:
        folder: Created.
        template: An empty store.
    """

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.database = folder / "mlflow.db"
        shutil.copy(template, self.database)
        with contextlib.closing(sqlite3.connect(self.database)) as database, database:
            database.execute("UPDATE experiments SET artifact_location = ?", [(folder / "mlruns" / "0").as_uri()])
        self.log = folder / "log.txt"

    def train(self, arguments, *, resume: bool, kill: Kill | None = None) -> tuple[int | None, float]:
        """Runs the command in a fork, and lets it die where asked."""

        def work() -> int:
            os.chdir(self.folder)
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.database}"
            counts: collections.Counter = collections.Counter()
            watch(kill if kill is not None and kill.seconds is None else None, counts)
            from smp_ensemble.cli import main

            print(f"\n== {'resumed' if resume else 'begun'}, to die {kill}", flush=True)
            code = main([*COMMON, *arguments, *(("--resume", "auto") if resume else ())])
            (self.folder / "counts.json").write_text(json.dumps(counts))
            return code

        return in_fork(work, self.log, kill.seconds if kill is not None else None)

    def counts(self) -> dict[str, int]:
        return json.loads((self.folder / "counts.json").read_text())

    def left(self) -> dict[str, object]:
        """What is there now, as far as it must not depend on kills: weights, scores, points; nothing that is open."""
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            ask = lambda query: database.execute(query).fetchall()  # noqa: E731
            kinds = dict(ask("SELECT run_uuid, value FROM tags WHERE key = 'smp_ensemble.kind'"))
            named = dict(ask("SELECT run_uuid, value FROM params WHERE key = 'fold'"))
            runs = ask("SELECT run_uuid, status FROM runs WHERE lifecycle_stage = 'active'")
            points = ask("SELECT run_uuid, key, step, value FROM metrics ORDER BY key, step, value")
            models = ask("SELECT status, lifecycle_stage FROM logged_models")
            scores = ask("SELECT metric_name, metric_step, metric_value FROM logged_model_metrics ORDER BY 1, 2, 3")
            inputs = ask("SELECT COUNT(*) FROM inputs WHERE source_type = 'DATASET'")
        files = {}
        for path in sorted((self.folder / "mlruns").rglob("*")):
            if path.name.startswith(".artifact"):
                files.setdefault("uploads that broke off", []).append(path.name)
            if path.name == "model.safetensors":
                files.setdefault("weights", []).append(hashlib.sha256(path.read_bytes()).hexdigest())
        return {
            "runs": sorted([kinds.get(run, "none"), status] for run, status in runs),
            "points": sorted(
                [kinds.get(run, ""), named.get(run, ""), key, step, value] for run, key, step, value in points
            ),
            "models": sorted(map(list, models)),
            "scores": [list(score) for score in scores],
            "datasets": inputs,
            "weights": sorted(files.get("weights", [])),
            "uploads that broke off": files.get("uploads that broke off", []),
            "state": sorted(str(path.name) for path in self.folder.glob(".smp_ensemble/*/*")),
        }


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """In what two trainings differ, shortly."""
    return [
        f"{name}: expected {str(value)[:300]}, found {str(found[name])[:300]}"
        for name, value in expected.items()
        if found[name] != value
    ]


def random_kill(draw: random.Random, counts: dict[str, int], seconds: float) -> Kill:
    """One in three by the clock, the others at a call of a moment that this training has."""
    if draw.random() < 1 / 3:
        return Kill(seconds=draw.uniform(0, seconds))
    moment = draw.choice(sorted(set(counts) & set(MOMENTS)))
    return Kill(moment=moment, call=draw.randint(1, counts[moment]), after=draw.random() < 0.5)


def torment(case: str, kills: int, folder: Path, template: Path, draw: random.Random, until: float) -> Row:
    """Kills trainings of one case so often, at most three times each, and compares what each leaves at its end."""
    row, arguments = Row(case), CASES[case]
    whole = Place(folder / "whole", template)
    code, seconds = whole.train(arguments, resume=False)
    if code != 0:
        row.faults.append(f"the undisturbed training failed: {whole.log.read_text()[-1000:]}")
        return row
    expected, counts = whole.left(), whole.counts()
    attempt = 0
    while row.kills < kills and time.monotonic() < until:
        attempt += 1
        place = Place(folder / f"attempt-{attempt}", template)
        pending, resume = 0, False
        for _ in range(3):
            kill = random_kill(draw, counts, seconds) if row.kills < kills else None
            code, _ = place.train(arguments, resume=resume, kill=kill)
            row.resumed += pending if code in {None, 0} else 0
            pending, resume = int(code is None), True
            if code is not None:
                break
            row.kills += 1
            row.moments.append(str(kill))
        if code is None:
            code, _ = place.train(arguments, resume=True)
            row.resumed += pending if code == 0 else 0
        row.trainings += 1
        wrong = (
            differences(place.left(), expected) if code == 0 else [f"exit code {code}: {place.log.read_text()[-800:]}"]
        )
        if wrong:
            row.faults += [f"{place.folder} ({'; '.join(row.moments[-3:])}): {one}" for one in wrong]
        else:
            row.identical += 1
            shutil.rmtree(place.folder)
    return row


def table(rows: list[Row]) -> str:
    """For people, as Markdown."""
    lines = ["| training | kills | resumed | trainings | bit-identical |", "|---|---|---|---|---|"]
    lines += [f"| {row.trainer} | {row.kills} | {row.resumed} | {row.trainings} | {row.identical} |" for row in rows]
    total = [sum(getattr(row, name) for row in rows) for name in ("kills", "resumed", "trainings", "identical")]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, total))} |"])


def main(arguments: list[str] | None = None) -> int:
    """Runs as many kills as asked, spread over all cases, and says what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing new after that")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: another one each time")
    parser.add_argument("--cases", default=",".join(CASES).replace(", ", "+"), help="separated by commas")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    chosen = parser.parse_args(arguments)
    seed = random.randrange(2**32) if chosen.seed is None else chosen.seed
    draw = random.Random(seed)
    warm_up()
    until = time.monotonic() + chosen.seconds
    cases = [case.replace("+", ", ") for case in chosen.cases.split(",")]
    draw.shuffle(cases)
    rows, left = [], chosen.kills
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = chosen.folder or Path(scratch)
        template = folder / "empty.db"
        folder.mkdir(parents=True, exist_ok=True)

        def make_store() -> int:
            import mlflow

            mlflow.MlflowClient(f"sqlite:///{template}").search_experiments()
            return 0

        in_fork(make_store, folder / "store.txt")
        for index, case in enumerate(cases):
            share = -(-left // (len(cases) - index))
            if share and time.monotonic() < until:
                rows.append(torment(case, share, folder / f"case-{index}", template, draw, until))
                left -= rows[-1].kills
                print(f"{case}: {rows[-1].kills} kills, faults: {rows[-1].faults}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: list(CASES).index(row.trainer))
    print(f"seed {seed}\n{table(rows)}")
    for row in rows:
        for fault in row.faults:
            print(f"{row.trainer}: {fault}")
    if chosen.json:
        chosen.json.write_text(json.dumps({"seed": seed, "rows": [asdict(row) for row in rows]}))
    return int(any(row.faults or row.resumed != row.kills for row in rows))


if __name__ == "__main__":
    sys.exit(main())
