"""One process holds a lock; when it dies, however it dies, the next one takes it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from smp_ensemble.locks import Lock

pytest.importorskip("fcntl", reason="two processes are not kept apart on this system")

HOLDS = """
import sys, time
from pathlib import Path
from smp_ensemble.locks import Lock

lock = Lock(Path(sys.argv[1]))
print(lock.take(), flush=True)
time.sleep(600)
"""


def test_another_process_is_kept_out_until_the_holder_dies(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDS, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "True"
        lock = Lock(path)
        assert not lock.take()
        assert lock.holder() == str(process.pid)
        process.kill()
        process.wait()
    assert lock.take()
    lock.let_go()
    lock.let_go()  # letting go twice does no harm
    with lock:
        assert lock.take()


def test_a_lock_that_nobody_took_has_no_holder(tmp_path):
    assert Lock(tmp_path / "lock").holder() == "unknown"
