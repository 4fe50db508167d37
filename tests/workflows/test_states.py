"""What a training keeps on local disk: found again by what it is of, held by one process, gone at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from smp_ensemble.exceptions import ConfigError, IntegrityError
from smp_ensemble.workflows.states import ROOT, Identity, held, matching, new_state, of_run, read_state, unfinished


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def identity(lr="0.1", *, kind="training", parent=None):
    return Identity(kind, {"lr": lr, "epochs": "4"}, parent)


def test_a_state_is_found_by_what_it_is_of():
    first = new_state(identity(), {"torch": "2"})
    other, plan, child = (
        new_state(one, {}) for one in (identity("0.2"), identity(kind="plan"), identity(parent="run"))
    )
    for state, wanted in ((first, identity()), (other, identity("0.2")), (child, identity(parent="run"))):
        found = matching(wanted)
        assert (found.folder, found.is_continued) == (state.folder, True)
    assert matching(identity("0.3")) is None
    assert {state.token for state in unfinished("training")} == {first.token, other.token, child.token}
    assert [state.token for state in unfinished("plan")] == [plan.token]
    assert read_state(first.folder).versions == {"torch": "2"}


def test_the_newest_of_equal_ones_is_gone_on_with():
    states = [new_state(identity(), {}) for _ in range(3)]
    for age, state in zip((30, 10, 20), states, strict=True):
        os.utime(state.folder / "training.json", (1_000_000 - age, 1_000_000 - age))
    assert matching(identity()).token == states[1].token


def test_a_run_is_remembered():
    state = new_state(identity(), {})
    assert of_run("training", "run") is None
    assert state.with_run("run").run_id == "run"
    assert of_run("training", "run").token == state.token
    assert of_run("plan", "run") is None


def test_a_discarded_state_is_gone_and_leaves_no_empty_folders(tmp_path):
    first, second = new_state(identity(), {}), new_state(identity(), {})
    first.spool.mkdir()
    assert first.checkpoint is None
    (first.folder / "last.ckpt").write_bytes(b"")
    assert first.checkpoint is not None
    first.discard()
    assert [path.name for path in ROOT.iterdir()] == [second.token]
    second.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{broken", "[]", "{}", '{"kind": "training"}'])
def test_a_state_that_cannot_be_read_is_named(content):
    state = new_state(identity(), {})
    (state.folder / "training.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"training.json does not describe a training .*: delete its folder"):
        unfinished("training")


def test_the_first_difference_is_named():
    assert identity().difference({"lr": "0.1", "epochs": "4"}) is None
    assert identity().difference({"lr": "0.1", "epochs": "5", "more": "x"}) == ("epochs", "5", "4")
    assert identity().digest == identity(parent="run").digest != identity("0.2").digest


@pytest.mark.skipif(os.name != "posix", reason="processes are kept apart on POSIX")
def test_another_process_is_kept_out_and_one_that_dies_lets_go():
    state = new_state(identity(), {})
    program = (
        "import pathlib, sys, time\n"
        "from smp_ensemble.workflows.states import held, read_state\n"
        "with held(read_state(pathlib.Path(sys.argv[1]))):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, state.folder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is at work on this training"), held(state):
            pass
    finally:
        process.kill()
        process.communicate()
    with held(state):
        pass
