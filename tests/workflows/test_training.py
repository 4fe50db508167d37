"""One training: its method and its params; what it leaves in MLflow is in `test_train`."""

from __future__ import annotations

import pytest

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.plans import PlannedTraining
from smp_ensemble.typing import Snapshot
from smp_ensemble.workflows.options import MainOptions, TrainOptions
from smp_ensemble.workflows.training import Training, configuration, method_of


@pytest.mark.parametrize("trainer", ["fge", "swa"])
def test_a_method_that_starts_from_trained_weights_has_no_ordinary_phase(trainer):
    assert method_of(TrainOptions(trainer=trainer)).start > 0
    assert method_of(TrainOptions(trainer=trainer, init="old.pt")).start == 0
    assert method_of(TrainOptions(trainer=trainer, init="old.pt", trainer_options={"start": 0.5})).start == 0.5


def test_a_method_without_such_a_phase_starts_as_always():
    assert method_of(TrainOptions(init="old.pt", cycles=3)) == method_of(TrainOptions(cycles=3))
    with pytest.raises(ConfigError, match="unknown trainer 'fgee': did you mean 'fge'"):
        method_of(TrainOptions(trainer="fgee", init="old.pt"))


def test_params_are_the_options_that_train_and_the_methods_own():
    options = MainOptions(trainer="single", trainer_options={"min_factor": 0.1}, folds=3, fold=1, seed=4)
    found = configuration(options, method_of(options), None)
    assert (found["trainer"], found["min_factor"]) == ("single", 0.1)
    assert (found["folds"], found["fold"], found["seed"], found["bootstrap"]) == (3, 1, 4, None)
    assert not {"trainer_options", "where", "pick", "register_as", "experiment"} & set(found)


def test_the_best_snapshot_is_that_of_validation_data():
    snapshots = [
        Snapshot(f"models:/m-{index}", "r", index, {"epoch": str(index)}, {"val_iou": val, "cv_iou": cv})
        for index, (val, cv) in enumerate([(0.4, 0.9), (0.6, 0.5), (0.5, 0.7)], 1)
    ]
    training = Training(PlannedTraining("fold-0", 0, 0), "r", "Default", "link", snapshots, None, 12.6)
    assert training.best.model_id == "m-2"
    assert training.row() == {
        "training": "fold-0", "best snapshot": "m-2", "val IoU": 0.6, "cv IoU": 0.5, "cv IoU combined": None,
        "seconds": 13,
    }  # fmt: skip
    assert [row["cv IoU"] for row in training.rows()] == [0.9, 0.5, 0.7]
