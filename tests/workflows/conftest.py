"""Commands, run in this process."""

from __future__ import annotations

import json

import pytest

from smp_ensemble.cli import main


@pytest.fixture
def command(tracking, capsys):
    """Runs a command in-process: exit code, values of `--json`, and the lines on stderr."""

    def run(*arguments: str, values: bool = True):
        capsys.readouterr()
        code = main([*arguments, *(["--json"] if values else [])])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        return code, (json.loads(out) if values and code == 0 else out), errors

    return run
