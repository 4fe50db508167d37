"""The benchmarks, run in-process on next to nothing: what they compare is the same, what they print was measured."""

from __future__ import annotations

import importlib.util
import json
import random
import shlex
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from tiny import DATA as DATA_OPTION
from tiny import OPTIONS, SHORT, TINY

from smp_ensemble import Ensemble, search_snapshots
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.member import Member
from smp_ensemble.tracking.candidates import find_candidates

FOLDER = Path(__file__).parents[2] / "mlflow_projects" / "benchmark"
DATA = "synthetic:count=24,size=64,seed=5"


@pytest.fixture
def script():
    """Loads a script as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.slow
def test_fit_and_the_bare_loop_end_with_the_same_weights(script, tracking, capsys):
    arguments = ["--data", DATA, "--epochs", "2", "--batch-size", "4", "--crop-size", "32", "--repeats", "1"]
    script("training_loop").main([*arguments, "--precision", "32", "--accelerator", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("largest difference between their weights 0.0e+00" in line for line in lines) == 2
    assert lines[-1].startswith("median ratio ")
    (run,) = tracking.search_runs(["0"])
    assert run.data.metrics["median_ratio"] == run.data.metrics["ratio"]


@pytest.mark.slow
def test_a_row_is_what_the_commands_said_and_is_not_measured_twice(script, tracking, tmp_path, monkeypatch, capsys):
    methods = script("methods")
    arguments = ["--data", DATA, "--epochs", "2", "--cycles", "2", "--methods", "snapshot", "--accelerator", "cpu"]
    methods.main(arguments)
    row = json.loads(Path("methods.json").read_text(encoding="utf-8"))["snapshot"]
    assert (row["trainings"], row["members"]) == (1, 2)
    (ensemble,) = tracking.search_runs(["0"], "tags.`smp_ensemble.kind` = 'ensemble'")
    for split in ("val", "test"):
        assert row[f"combined_{split}"] == pytest.approx(ensemble.data.metrics[f"{split}_iou"])
        assert row[f"single_{split}"] == pytest.approx(ensemble.data.metrics[f"best_member_{split}_iou"])
    assert min(row["seconds"], row["cpu_seconds"], row["prediction"]) > 0
    printed = capsys.readouterr().out
    assert f"| snapshot | 1 | 2 | {row['single_val']:.4f} / {row['single_test']:.4f} |" in printed
    monkeypatch.setattr(methods, "command", lambda *_: pytest.fail("measured again"))
    methods.main(arguments)


@pytest.mark.slow
def test_combiners_in_views_score_as_the_command_does(script, command, capsys):
    command("train", *DATA_OPTION, *TINY, "--epochs", "2", "--cycles", "2")
    arguments = ["--data", DATA, "--accelerator", "cpu", "--precision", "32", "--repeats", "1"]
    script("combining").main([*arguments, "--views", "none;flips", "--combiners", "mean;majority"])
    rows = json.loads(Path("combining.json").read_text(encoding="utf-8"))
    assert {"none|mean", "flips|majority", "none|best member", "none|mean, reject=0.8"} <= set(rows)
    assert "mean, postprocess=auto" in capsys.readouterr().out
    for views, combiner in (("none", "mean"), ("flips", "majority")):
        _, values, _ = command("ensemble", *DATA_OPTION, *SHORT, "--views", views, "--combiner", combiner)
        row = rows[f"{views}|{combiner}"]
        for split in ("val", "test"):
            for name, value in row[split].items():
                assert value == pytest.approx(values[split][-1][name], nan_ok=True, abs=1e-6)
        assert row["threshold"] == values["thresholds"][-1]
        assert row["seconds"] > 0
    best = max(range(2), key=lambda index: values["val"][index]["iou"])
    assert rows["flips|best member"]["test"]["iou"] == pytest.approx(values["test"][best]["iou"])


@pytest.mark.slow
def test_a_filled_store_answers_and_the_table_has_a_row_for_each_size(script, tracking, empty_store, tmp_path, capsys):
    queries = script("queries")
    queries.main(["--sizes", "30", "--repeats", "1"])
    (run,) = mlflow.search_runs(output_format="list")
    rows = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/queries.json")["rows"]
    assert [row["snapshots"] for row in rows] == [30]
    assert all(row[column] > 0 for row in rows for column in queries.queries())
    assert "top 20 (s)" in capsys.readouterr().out
    shutil.copy(empty_store, tmp_path / "filled.db")
    queries.fill(tmp_path / "filled.db", 30, seed=1)
    mlflow.set_tracking_uri(f"sqlite:///{(tmp_path / 'filled.db').as_posix()}")
    draw = random.Random(1)
    scores = [0.5, *(draw.random() for _ in range(29))]
    found = search_snapshots()
    assert [one.metrics["val_iou"] for one in found] == pytest.approx(sorted(scores, reverse=True))
    assert len({one.run_id for one in found}) == 30
    assert len(search_snapshots("params.trainer = 'swa'")) == len(search_snapshots("dataset.digest LIKE '0%'")) / 5
    assert len(find_candidates(pick=queries.PICK)) == queries.PICKED


def test_an_unknown_row_is_named(script, tracking):
    with pytest.raises(SystemExit, match="unknown method 'snapshto': expected one of single; snapshot;"):
        script("methods").main(["--methods", "snapshto"])
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_the_engine_and_the_loops_of_others_give_the_same_masks(script, tracking, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    output = tmp_path / "speed.json"
    small = ["--members", "2", "--size", "64", "--images", "2", "--repeats", "1", "--train-data", DATA]
    network = ["--encoder", "resnet18", "--model-options", json.dumps(OPTIONS), "--crop-size", "32"]
    own = [*small, *network, "--cycle-epochs", "1", "--accelerator", "cpu", "--output", str(output)]
    script("main").main(["--suite", "speed", f"--options={shlex.join(own)}"])
    results = json.loads(output.read_text())
    rows = {row["what"]: row for row in results["table"]}
    assert {row["precision"] for row in rows.values()} <= {"32-true", "bf16-mixed"}
    assert all(len(row["seconds"]) == 1 and row["ratio"]["median"] > 0 for row in rows.values())
    for label, row in rows.items():
        assert row["max_difference"] <= (1e-5 if row["precision"] == "32-true" else 0.05), label
    assert {row["what"] for row in rows.values()} >= {"Engine, precision=32", "eager loop with ttach, fp32"}
    plain, _ = results["exactness"]
    assert plain["pixels"] == 2 * 64 * 64
    assert plain["max_difference"] <= 1e-5
    assert results["pyfunc"]["ratio"]["median"] > 0
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| Engine, precision=32 | 32-true |" in capsys.readouterr().out
    run = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    assert {item.path for item in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)} == {
        "speed.json", "speed.md", "speed.png",
    }  # fmt: skip


def test_ratios_are_of_repetitions_and_not_of_medians(script, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    found = script("speed").ratios([1.0, 20.0, 3.0], [2.0, 10.0, 3.0])
    assert found == {"median": 1.0, "least": 0.5, "greatest": 2.0}


def test_a_peer_that_is_missing_is_left_out_with_a_line(script, monkeypatch, capsys, make_tiny_network):
    monkeypatch.syspath_prepend(str(FOLDER))
    speed = script("speed")

    def missing(ensemble, device):
        raise ModuleNotFoundError("No module named 'ttach'", name="ttach")

    monkeypatch.setattr(speed.peers, "CONTESTANTS", {"theirs": missing})
    ensemble = Ensemble([Member(make_tiny_network(0), imagenet())], mode="binary", class_names=["building"])
    found = speed.contestants(ensemble, torch.device("cpu"), speed.parse(["--short"]))
    assert "theirs" not in found
    assert capsys.readouterr().out == "left out: theirs: ttach is not installed\n"


def test_step_times_of_an_outage_are_compared_by_their_medians(script):
    """Ten steps of 10 ms, half of them processor time; with the outage each takes a fifth longer, one far longer."""
    compare = script("outage").compare
    plain = [(0.01 * step, 0.005 * step) for step in range(11)]
    slow = [(0.012 * step + (9 if step > 4 else 0), 0.006 * step) for step in range(11)]
    there = ([3, 3], 1, 1, {"FINISHED"})
    row = compare(1, {"moments": plain, "arrived": there}, {"moments": slow, "arrived": there})
    assert row["steps"] == 11
    assert row["ms"] == pytest.approx(10)
    assert row["CPU ms"] == pytest.approx(5)
    for name in ("ratio", "ratio, CPU", "ratio, CPU, middle third"):
        assert row[name] == pytest.approx(1.2)
    assert row["all there, once"]
    lost = compare(1, {"moments": plain, "arrived": there}, {"moments": plain, "arrived": ([3, 2], 1, 1, {"FINISHED"})})
    assert not lost["all there, once"]
