"""`train` in several processes leaves what one would; trainings at once on one store leave each other alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from at_once import kept, trainings_at_once
from tiny import DATA, TINY

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.processes import ALONE, Place
from smp_ensemble.workflows.joining import place_for, refuse_finished
from smp_ensemble.workflows.options import TrainOptions


@pytest.mark.slow
def test_two_processes_leave_one_run_and_each_snapshot_once(tracking, tmp_path):
    command = [sys.executable, "-m", "smp_ensemble.cli", "train", *DATA, *TINY, "--epochs", "2", "--cycles", "2"]
    done = subprocess.run(
        [*command, "--devices", "2"], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("see and pick snapshots") == 1
    found = kept(mlflow.get_tracking_uri())
    assert found["runs"] == {"training FINISHED": 1, "snapshot FINISHED": 2}
    assert found["snapshots"] == {"seed 0, epoch 1": 1, "seed 0, epoch 2": 1}
    assert not Path(".smp_ensemble").exists()


@pytest.mark.slow
def test_two_trainings_at_once_on_one_sqlite_store(tracking, tmp_path):
    results = trainings_at_once(2, mlflow.get_tracking_uri(), tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    found = kept(mlflow.get_tracking_uri())
    assert found["runs"] == {"training FINISHED": 2, "snapshot FINISHED": 4}
    assert found["snapshots"] == {f"seed {seed}, epoch {epoch}": 1 for seed in (0, 1) for epoch in (1, 2)}


@pytest.mark.parametrize(
    ("name", "more"), [("train", ("--folds", "3")), ("distill", ("--model", "models:/m-1"))], ids=["train", "distill"]
)
def test_what_runs_in_one_process_says_so(command, name, more):
    code, _, errors = command(name, *DATA, *TINY, *more, "--devices", "2")
    assert code == 2
    assert "in one process, got" in errors[0]


def test_one_process_is_alone():
    assert place_for(TrainOptions(accelerator="cpu"), trainings=5) == ALONE


def test_others_that_wait_are_not_left_waiting():
    refuse_finished(Place(0, 2, 2), "run")  # nothing was started yet
    with pytest.raises(ConfigError, match="finished already: run abc"):
        refuse_finished(Place(0, 2, 2, launched=True, external=True), "abc")
