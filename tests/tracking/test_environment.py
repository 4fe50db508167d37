"""Variables are set for a while, those that somebody set stay theirs, and nothing is left behind."""

from __future__ import annotations

import os

import pytest

from smp_ensemble.tracking.environment import unless_set


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_set_is_gone_afterwards_and_what_was_set_holds(monkeypatch, fails):
    monkeypatch.setenv("SMP_A", "theirs")
    monkeypatch.delenv("SMP_B", raising=False)

    def within():
        with unless_set({"SMP_A": 1, "SMP_B": 2}):
            assert (os.environ["SMP_A"], os.environ["SMP_B"]) == ("theirs", "2")
            assert 1 / (not fails)

    if fails:
        with pytest.raises(ZeroDivisionError):
            within()
    else:
        within()
    assert os.environ["SMP_A"] == "theirs"
    assert "SMP_B" not in os.environ
