"""The names that people import, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import smp_ensemble

PROMISED = {
    "fit",
    "SnapshotCallback",
    "average_weights",
    "refresh_batch_norm",
    "log_snapshot",
    "trainers",
    "schedules",
    "search_snapshots",
    "build_ensemble",
    "Ensemble",
    "Engine",
    "log_model",
    "save_model",
    "load_model",
}


def run_python(code: str) -> None:
    """Runs code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_promised_is_public():
    assert set(smp_ensemble.__all__) >= PROMISED
    assert smp_ensemble.__all__ == sorted(smp_ensemble.__all__) == dir(smp_ensemble)


@pytest.mark.parametrize("name", sorted(smp_ensemble.__all__))
def test_every_public_name_imports_and_is_described(name):
    found = getattr(smp_ensemble, name)
    assert inspect.getdoc(found)
    assert found.__name__.rpartition(".")[2] == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'smp_ensemble' has no attribute 'Ensembel'"):
        smp_ensemble.Ensembel  # noqa: B018


def test_importing_the_package_and_mistyping_a_command_are_fast():
    run_python(
        "import os, sys\n"
        "os.environ.pop('MLFLOW_RUN_ID', None)\n"
        "import smp_ensemble\n"
        "from smp_ensemble.cli import main\n"
        "assert main(['train', '--epoch', '5']) == 2\n"
        "heavy = {'torch', 'mlflow', 'lightning', 'segmentation_models_pytorch', 'albumentations'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_a_served_model_imports_only_what_it_requires():
    run_python(
        "import sys\n"
        "missing = {'lightning', 'pytorch_lightning', 'albumentations', 'sklearn', 'torchmetrics'}\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return None if name in missing else self.finder.find_spec(name, path, target)\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.finder, name)\n"
        "sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]\n"
        "import smp_ensemble.tracking.flavor\n"
        "assert not missing & set(sys.modules), missing & set(sys.modules)\n"
    )
