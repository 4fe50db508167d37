"""Third parties' distributions, installed by pip, bring training methods and combiners by their entry points alone."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import DATA, TINY
from torch import nn

from smp_ensemble import registry
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling import combiners
from smp_ensemble.ensembling.artifact import load_ensemble, save_ensemble
from smp_ensemble.ensembling.combiners import casts_votes, combiner_class, default_reject, fits_weights
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.testing import check_combiner, check_trainer
from smp_ensemble.training.trainers import GROUP, describe, make_trainer
from smp_ensemble.typing import MODES, FittedCombiner, PixelSample

PLUGINS = Path(__file__).parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folders to put on the path, into which pip has installed each plugin."""
    folders = {}
    for name in ("polynomial", "clash", "extreme"):
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


@pytest.fixture
def extreme(installed, monkeypatch):
    """The plugin on the path; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(installed["extreme"]))
    yield
    sys.modules.pop("extreme_combiners", None)
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


def test_combiners_are_listed_without_being_imported(extreme):
    assert {"best", "max", "mean"} <= set(registry.names(combiners.GROUP))
    assert "extreme_combiners" not in sys.modules
    with pytest.raises(ConfigError, match=r"unknown combiner 'maxi': did you mean 'max'\?"):
        combiner_class("maxi")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["max", "best"])
def test_they_keep_a_combiners_promises(extreme, name, mode):
    check_combiner(combiner_class(name), mode)


def test_what_they_do_not_say_has_its_default(extreme):
    for name in ("max", "best"):
        found = combiner_class(name)
        assert (casts_votes(found), default_reject(found), fits_weights(found)) == (False, 0, False)
    assert not isinstance(combiner_class("max"), FittedCombiner)
    assert isinstance(combiner_class("best"), FittedCombiner)


def test_an_ensemble_combines_by_its_name(extreme):
    stack = torch.rand(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    ensemble = Ensemble([nn.Identity()] * 3, mode="multiclass", combiner="max")
    largest = stack.amax(dim=0)
    torch.testing.assert_close(ensemble.combine(iter(stack)), largest / largest.sum(dim=1, keepdim=True))
    assert (ensemble.reject, ensemble.votes, ensemble.state) == (0, False, {})


def test_what_it_was_fitted_to_travels_with_the_model(extreme, make_tiny_network, tmp_path, installed, monkeypatch):
    truth = torch.tensor([0, 1, 1])
    bad, good = torch.tensor([0.6, 0.5, 0.4]), torch.tensor([0.1, 0.9, 0.8])
    state = combiner_class("best").fit(PixelSample(torch.stack([bad, good], dim=1)[..., None], truth, "binary"))
    members = [Member(make_tiny_network(seed), imagenet()) for seed in (0, 1)]
    ensemble = Ensemble(members, mode="binary", combiner="best", state=state, class_names=("ground", "roof"))
    save_ensemble(ensemble, tmp_path / "model")
    images = torch.linspace(0, 255, 3 * 16 * 16).view(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(load_ensemble(tmp_path / "model")(images), members[1](images).sigmoid())
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(installed["extreme"])])
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="unknown combiner 'best'"):
        load_ensemble(tmp_path / "model")
