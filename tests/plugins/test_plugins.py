"""A third party's distribution, installed by pip, brings a training method by its entry point and nothing else."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import DATA, TINY

from smp_ensemble import registry
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.testing import check_trainer
from smp_ensemble.training.trainers import GROUP, describe, make_trainer

PLUGINS = Path(__file__).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folders to put on the path, into which pip has installed each plugin."""
    folders = {}
    for name in ("polynomial", "clash"):
        source = tmp_path_factory.mktemp("source") / name  # a build leaves files beside what it builds
        shutil.copytree(PLUGINS / name, source)
        folders[name] = tmp_path_factory.mktemp(name)
        subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
                "--disable-pip-version-check", "--target", str(folders[name]), str(source),
            ],
            check=True,
        )  # fmt: skip
    return folders


@pytest.fixture
def polynomial(installed, monkeypatch):
    """The plugin on the path; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(installed["polynomial"]))
    yield
    sys.modules.pop("polynomial_trainer", None)
    importlib.invalidate_caches()


def test_before_it_is_installed_the_name_is_unknown():
    with pytest.raises(ConfigError, match=r"unknown trainer 'polynomial': .*Known: boost, checkpoints, ema, fge,"):
        make_trainer("polynomial")


def test_its_name_is_listed_without_importing_it(polynomial):
    assert "polynomial" in registry.names(GROUP)
    assert "polynomial_trainer" not in sys.modules


def test_it_keeps_a_trainers_promises_and_takes_options(polynomial):
    trainer = make_trainer("polynomial", {"power": 2.0})
    check_trainer(trainer)
    assert describe(trainer) == {"trainer": "polynomial", "power": 2.0}
    assert trainer.schedule(4, 2).factor(4) == 0.25


def test_its_mistakes_are_explained_as_those_of_built_ins(polynomial):
    with pytest.raises(ConfigError, match=r"trainer 'polynomial' has no option 'powr': did you mean 'power'\?"):
        make_trainer("polynomial", {"powr": 2.0})
    with pytest.raises(ConfigError, match=r"unknown trainer 'polynomal': did you mean 'polynomial'\?"):
        make_trainer("polynomal")


def test_it_trains_from_the_command_line(polynomial, command, tracking):
    options = ("--trainer", "polynomial", "--trainer-options", '{"power": 1.5}', "--epochs", "2")
    code, values, _ = command("train", *DATA, *TINY, *options)
    assert code == 0
    assert [row["step"] for row in values["snapshots"]] == [4, 8]
    params = tracking.get_run(values["run_id"]).data.params
    assert (params["trainer"], params["power"]) == ("polynomial", "1.5")


def test_a_name_that_two_distributions_claim_is_an_error_that_names_both(installed, monkeypatch):
    monkeypatch.syspath_prepend(str(installed["clash"]))
    with pytest.raises(ConfigError, match=r"trainer 'snapshot' is claimed by .*clashing-trainer") as caught:
        make_trainer("snapshot")
    assert "smp-ensemble (smp_ensemble.training.trainers:SSE)" in str(caught.value)
    assert make_trainer("single").name == "single"
