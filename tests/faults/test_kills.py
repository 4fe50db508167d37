"""A training that is killed at random moments, and gone on with, leaves what an undisturbed one leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from tiny import DATA, TINY

from smp_ensemble.tracking import names

SECONDS = os.environ.get("SMP_ENSEMBLE_FAULT_SECONDS", "60")
KILLS = os.environ.get("SMP_ENSEMBLE_FAULT_KILLS", "6")
SCRIPT = Path(__file__).with_name("kills.py")

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="trainings are forks of a process that has all imports"),
]


def test_killed_trainings_end_bit_for_bit_alike(tmp_path):
    """Of a few methods, drawn anew each time; the seed that is printed repeats them."""
    command = [sys.executable, SCRIPT, "--kills", KILLS, "--seconds", SECONDS, "--json", tmp_path / "found.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert sum(row["kills"] for row in rows) > 0
    for row in rows:
        assert row["resumed"] == row["kills"]
        assert row["identical"] == row["trainings"] > 0


def start(folder, *arguments):
    small = ("--encoder-name", "tu-test_resnet", "--epochs", "60", "--cycles", "2")
    command = [shutil.which("smp-ensemble") or "smp-ensemble", "train", *DATA, *TINY, *small]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, *arguments], cwd=folder, stdout=log, stderr=log)


def wait_for_checkpoint(folder, process):
    while not list(folder.glob(".smp_ensemble/trainings/*/last.ckpt")):
        assert process.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.05)


def test_the_command_itself_goes_on_after_ctrl_c_and_after_a_kill(tracking, tmp_path):
    process = start(tmp_path)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    (error,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("error: ")]
    assert error.startswith("error: interrupted in epoch ")
    assert " --epochs 60 --cycles 2 --batch-size 4 --crop-size 32 --precision 32 --accelerator cpu " in error
    assert error.endswith(" --resume auto")
    (run,) = tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'training'")
    assert run.info.status == "KILLED"

    (checkpoint,) = tmp_path.glob(".smp_ensemble/trainings/*/last.ckpt")
    before = checkpoint.stat().st_mtime_ns
    process = start(tmp_path, "--resume", "auto")
    while checkpoint.stat().st_mtime_ns == before:  # not before it goes on
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert mlflow.get_run(run.info.run_id).info.status == "RUNNING"

    process = start(tmp_path, "--resume", "auto")
    assert process.wait() == 0, (tmp_path / "log.txt").read_text()
    (found,) = tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'training'")
    assert (found.info.run_id, found.info.status) == (run.info.run_id, "FINISHED")
    assert names.ERROR not in found.data.tags
    steps = [point.step for point in tracking.get_metric_history(run.info.run_id, "val_iou")]
    assert steps == list(range(4, 244, 4))
    assert not (tmp_path / ".smp_ensemble").exists()
