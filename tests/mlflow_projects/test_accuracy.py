"""The study of accuracy: cells and recipes are as declared, statistics are formulas, and a tiny study runs whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import accuracy
import camvid
import mlflow
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from study import overview, plan, statistics
from study.folds import fold_splits, load_whole
from study.lines import CHOSEN, lines_of
from study.page import write_page
from study.systems import cross_fitted, greedy_system, systems_of

from smp_ensemble.data.forms import load_data
from smp_ensemble.typing import Task

FOLDER = Path(__file__).parents[2] / "mlflow_projects" / "benchmark"
RESULTS = sorted((FOLDER / "results").glob("*.jsonl"))


@pytest.fixture(scope="module")
def tiny():
    return plan.read_study(FOLDER / "studies" / "tiny.yaml")


@pytest.mark.parametrize("path", sorted((FOLDER / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_study_has_each_cell_once_and_as_many_seeds_and_folds_as_it_says_for_each_method(path):
    study = plan.read_study(path)
    cells = plan.cells_of(study)
    assert len({cell.id for cell in cells}) == len(cells)
    for method in study.methods:
        runs = [cell for cell in cells if (cell.method, cell.stage) == (method.name, plan.RUN)]
        seeds = len(study.seeds) if method.seeds is None else method.seeds
        assert len(runs) == seeds * study.folds * len(study.epochs)
        assert {cell.seed for cell in runs} == set(study.seeds[:seeds])


def written(folder, name, **values):
    (folder / f"{name}.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return folder / f"{name}.yaml"


SMALL = {
    "data": "synthetic", "epochs": [2], "seeds": [0, 1], "reference_seeds": 1, "tune_folds": [0],
    "grid": [{"lr": 0.1}, {"lr": 0.2}], "methods": {"single": {"trainer": "single"}},
}  # fmt: skip


def test_a_study_on_top_of_another_replaces_entries_whole_and_a_method_may_take_anothers_recipe(tmp_path):
    written(tmp_path, "base", **SMALL)
    methods = {
        "single": {"trainer": "single"},
        "snapshot2": {"trainer": "snapshot", "options": {"cycles": 2}, "seeds": 1, "recipe_of": "single"},
    }
    study = plan.read_study(written(tmp_path, "longer", base="base", epochs=[8], methods=methods))
    assert (study.name, study.epochs, study.seeds) == ("longer", (8,), (0, 1))
    cells = plan.cells_of(study)
    assert {cell.method for cell in cells if cell.stage == plan.TUNE} == {"single"}
    scores = {"tune-single-e8-f0-s100-r0": 0.1, "tune-single-e8-f0-s100-r1": 0.2}
    rows = {name: {"reported_val_iou": value} for name, value in scores.items()}
    runs = [cell for cell in cells if cell.stage == plan.RUN]
    assert {plan.recipe_for(cell, study, rows)["lr"] for cell in runs} == {0.2}
    assert [plan.recipe_for(cell, study, {}) for cell in runs] == [None] * len(runs)
    with pytest.raises(FileNotFoundError, match="nobody"):
        plan.read_study(written(tmp_path, "lost", base="nobody"))


def test_a_share_of_the_training_images_is_the_same_every_time_and_never_of_other_folds():
    whole = load_whole("synthetic:count=40,size=32", "mask")
    full, quarter = (fold_splits(whole, 4, 1, share) for share in (1.0, 0.25))
    assert len(quarter.train) == round(len(full.train) / 4)
    assert set(quarter.train.names) < set(full.train.names)
    assert (quarter.val.names, quarter.test.names) == (full.val.names, full.test.names)
    places = [full.train.names.index(name) for name in quarter.train.names]
    assert max(np.diff(places)) <= 5, "spread over what there is"


def test_a_tuning_fold_never_judges_the_recipe_of_the_fold_that_it_was_validated_on(tiny):
    """Fold 0 is validated on fold 1, so cell 1 asks fold 2 alone; others ask both."""
    scores = {(0, 0): 0.9, (0, 1): 0.1, (2, 0): 0.3, (2, 1): 0.4}
    rows = {
        plan.Cell("single", plan.TUNE, 4, fold, 100, recipe).id: {"reported_val_iou": value}
        for (fold, recipe), value in scores.items()
    }

    def chosen(fold):
        return plan.recipe_for(plan.Cell("single", plan.RUN, 4, fold, 0), tiny, rows)

    assert chosen(0) == chosen(2) == tiny.grid[0]
    assert chosen(1) == tiny.grid[1]
    rows.popitem()
    assert chosen(0) is None, "a recipe is not chosen before all are tried"


def test_rows_are_found_again_and_half_a_line_is_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    cell = plan.Cell("single", plan.RUN, 4, 0, 0)
    written = plan.append_row(path, cell, {"systems": {}})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "run-sin')
    assert plan.read_rows(path) == {cell.id: written}


def test_every_group_is_test_data_once_and_never_beside_itself(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    lines = ["image,mask,group"]
    for index in range(24):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(rng.integers(0, 2, (16, 16)).astype(np.uint8)).save(tmp_path / "masks" / f"{index}.png")
        lines.append(f"images/{index}.png,masks/{index}.png,g{index % 8}")
    (tmp_path / "splits.csv").write_text("\n".join(lines), encoding="utf-8")
    whole = load_whole(str(tmp_path), "mask")
    tested = []
    for fold in range(4):
        splits = fold_splits(whole, 4, fold)
        parts = [set(part.groups) for part in (splits.train, splits.val, splits.test)]
        assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
        assert parts[1] == set(fold_splits(whole, 4, (fold + 1) % 4).test.groups)
        tested += sorted(parts[2])
    assert sorted(tested) == sorted(set(whole.groups))


def system(counts, losses=((1.0, 10),), val=0.5, cost=1):
    groups = {
        f"g{index}": {"counts": one, "nll": list(losses[index % len(losses)])} for index, one in enumerate(counts)
    }
    clean = {"groups": groups, "ece": 0.1, "boundary_iou": 0.2, "aurc": 0.3}
    return {"val_iou": val, "cost": cost, "seconds": 1.0, "test": {"clean": clean}}


def test_scores_are_pooled_over_groups_and_averaged_over_seeds():
    first = system([[[8, 1, 1]], [[2, 4, 4]]], [(1.0, 10), (5.0, 20)])
    second = system([[[5, 0, 5]], [[10, 0, 0]]], [(3.0, 10), (3.0, 20)])
    table = statistics.table_of({(0, 0): first, (1, 0): second}, folds=1)
    assert statistics.pooled(table) == pytest.approx((10 / 20 + 15 / 20) / 2)
    assert statistics.pooled(table, "dice") == pytest.approx((20 / 30 + 30 / 35) / 2)
    assert statistics.pooled(table, "nll") == pytest.approx(6 / 30)
    assert statistics.table_of({(0, 0): first}, folds=2) is None, "a seed with one of two folds says nothing yet"


def test_of_two_ways_to_measure_batch_norm_each_cell_takes_the_one_with_less_validation_loss():
    first, second = ({**system([[[value, 1, 1]]]), "val_nll": loss} for value, loss in ((8, 0.2), (2, 0.3)))
    rows = [
        {"stage": "run", "epochs": 1, "method": "swa", "seed": 0, "fold": fold, "systems": {"last": a, "crops": b}}
        for fold, (a, b) in enumerate([(first, second), (second, first)])
    ]
    found = statistics.collect(rows, 1)
    assert set(found) == {("swa", "last"), ("swa", "crops"), ("swa", "best of crops")}
    assert [found["swa", "best of crops"][0, fold]["val_nll"] for fold in (0, 1)] == [0.2, 0.2]
    assert [found["swa", "last"][0, fold]["val_nll"] for fold in (0, 1)] == [0.2, 0.3]


@given(
    st.lists(st.tuples(*[st.integers(1, 50)] * 3), min_size=3, max_size=8), st.integers(1, 9), st.integers(0, 2**32 - 1)
)
def test_a_difference_to_itself_is_nothing_and_a_better_copy_is_better_for_certain(counts, gain, seed):
    base = system([[list(one)] for one in counts])
    better = system([[[tp + gain, fp, fn]] for tp, fp, fn in counts])
    a, b = (statistics.table_of({(0, 0): one, (1, 0): one}, folds=1) for one in (better, base))
    same = statistics.difference(b, b, resamples=50, seed=seed)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    found = statistics.difference(a, b, resamples=50, seed=seed)
    assert found.certain
    assert 0 < found.low <= found.high


def test_the_interval_is_that_of_a_bootstrap_written_down_plainly():
    rng = np.random.default_rng(3)
    a, b = (
        {(seed, 0): system([[row.tolist()] for row in rng.integers(5, 60, (9, 3))]) for seed in range(4)}
        for _ in range(2)
    )
    found = statistics.difference(*(statistics.table_of(one, folds=1) for one in (a, b)), resamples=3000, seed=1)
    arrays = [
        np.array([[g["counts"][0] for g in one[seed, 0]["test"]["clean"]["groups"].values()] for seed in range(4)])
        for one in (a, b)
    ]
    draws = np.random.default_rng(1)
    values = []
    times = [draws.multinomial(n, np.full(n, 1 / n), size=3000) for n in (9, 4)]
    for group_times, seed_times in zip(*times, strict=True):
        groups, seeds = (np.repeat(np.arange(len(one)), one) for one in (group_times, seed_times))
        sums = [one[seeds][:, groups].sum(axis=1) for one in arrays]
        ious = [(one[:, 0] / one.sum(axis=1)).mean() for one in sums]
        values.append(ious[0] - ious[1])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)


def test_the_choice_goes_by_validation_data_alone():
    good = {(0, fold): system([[[1, 9, 9]]], val=0.9 if fold else 0.1) for fold in range(2)}
    other = {(0, fold): system([[[9, 1, 1]]], val=0.5) for fold in range(2)}
    picked, names = statistics.choose({("a", "all"): good, ("b", "last"): other}, [("a", "all"), ("b", "last")], 2)
    assert names == {0: ("b", "last"), 1: ("a", "all")}
    assert picked == {(0, 0): other[0, 0], (0, 1): good[0, 1]}


def test_what_was_selected_on_validation_data_is_judged_by_its_cross_fitted_score():
    fitted = {(0, 0): {**system([[[1, 9, 9]]], val=0.9), "cross_iou": 0.4}}
    plain = {(0, 0): system([[[9, 1, 1]]], val=0.5)}
    systems = {("a", "greedy"): fitted, ("b", "last"): plain}
    assert statistics.choose(systems, list(systems), 1)[1] == {0: ("b", "last")}
    assert statistics.choose(systems, list(systems), 1, own=True)[1] == {0: ("a", "greedy")}


def test_cross_fitted_probabilities_of_a_group_come_from_what_the_others_choose():
    """Network 1 is right in group a alone, network 0 everywhere else: what a's images get was chosen without a."""
    truth = torch.zeros(9, 2, 2, dtype=torch.int64)
    truth[:, 0] = 1
    groups = ["a", "a", "b", "b", "c", "c", "c", "d", "d"]
    right = torch.where(truth == 1, 0.9, 0.1)[:, None].half()
    of_a = torch.tensor([group == "a" for group in groups])[:, None, None, None]
    networks = [torch.where(of_a, 1 - right, right), torch.where(of_a, right, 1 - right)]
    seen = []

    def fit(validation, masks):
        seen.append(len(masks))
        return greedy_system(validation, masks, Task("binary", ("no", "roof")), range(2))

    found = cross_fitted(networks, truth, groups, fit)
    assert seen == [7, 7, 6, 7]
    assert torch.equal(found[:2], networks[0][:2]), "the other groups prefer network 0"
    assert torch.equal(found[2:], networks[0][2:])
    assert cross_fitted(networks, truth, ["a"] * 9, fit) is None


def test_a_wide_choice_asks_every_fold_but_the_one_that_is_validated_on_the_test_data():
    """For fold 2 of 3 it asks folds 0 and 2: fold 1 is validated on fold 2's test data."""
    loud = {(0, fold): system([[[1, 9, 9]]], val=one) for fold, one in enumerate((0.5, 0.99, 0.5))}
    good = {(0, fold): system([[[9, 1, 1]]], val=0.6) for fold in range(3)}
    systems = {("a", "all"): loud, ("b", "last"): good}
    _, names = statistics.choose(systems, list(systems), 3, wide=True)
    assert names == {0: ("a", "all"), 1: ("a", "all"), 2: ("b", "last")}
    _, narrow = statistics.choose(systems, list(systems), 3)
    assert narrow == {0: ("b", "last"), 1: ("a", "all"), 2: ("b", "last")}


def test_the_price_is_the_number_of_networks_that_run():
    found = {one.name: one.cost for one in systems_of(3, {"soup": 3, "refreshed": 4, "flips": 5})}
    assert found == {"last": 1, "all": 3, "member 0": 1, "member 1": 1, "soup": 1, "refreshed": 1, "flips": 4}


def test_students_come_after_what_teaches_them_train_as_single_does_and_are_never_chosen(tiny):
    cells = plan.cells_of(tiny)
    students = [cell for cell in cells if cell.stage == plan.STUDENT]
    assert len(students) == tiny.folds * tiny.student_seeds
    for student in students:
        needed = plan.reference_cells(tiny, student)
        assert {one.fold for one in needed} == {student.fold}
        assert max(cells.index(one) for one in needed) < cells.index(student)
        assert student.seed + plan.STUDENT_SEED not in {one.seed for one in needed}
    scores = {
        plan.Cell("single", plan.TUNE, 4, fold, 100, recipe).id: {"reported_val_iou": float(recipe)}
        for fold in tiny.tune_folds
        for recipe in range(2)
    }
    assert plan.recipe_for(students[0], tiny, scores) == tiny.grid[1]
    good, best = system([[[5, 5, 5]]], val=0.5), system([[[9, 1, 1]]], val=0.9)
    systems = {
        ("single", "last"): {(0, fold): good for fold in range(4)},
        ("seeds", "all"): {(-1, fold): best for fold in range(4)},
        ("student", "last"): {(0, fold): best for fold in range(4)},
    }
    found = {line.key: line for line in lines_of(tiny, systems)}
    assert found["chosen on val", ""].iou.value == 0
    assert found["student", "last"].iou.value > 0.4


@pytest.mark.figures
@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_the_page_follows_from_the_committed_rows(tmp_path, results):
    study = plan.read_study(FOLDER / "studies" / f"{results.stem}.yaml")
    rows = plan.read_rows(results)
    assert set(rows) <= {cell.id for cell in plan.cells_of(study)}, "rows that no cell of the study names"
    write_page(study, rows, tmp_path / "page.md", tmp_path / "figures")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    names = set()
    for epochs in study.epochs:
        lines = lines_of(study, statistics.collect(rows.values(), epochs))
        assert lines[0].key == ("single", "last")
        assert f"| {100 * statistics.pooled(lines[0].table):.2f} |" in text
        names |= {f"{study.name}-{epochs}.png", f"{study.name}-{epochs}-curves.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names


@pytest.mark.slow
def test_a_tiny_study_runs_whole_is_tracked_and_is_not_run_twice(tracking, tmp_path, capsys):
    declared = {
        "data": "synthetic:count=18,size=64,seed=5", "folds": 3, "epochs": [2], "seeds": [0, 1], "reference_seeds": 2,
        "fixed": {"batch_size": 8, "crop_size": 32}, "grid": [{"lr": 0.05}], "corruptions": ["jpeg"],
        "methods": {"single": {"trainer": "single"}, "snapshot2": {"trainer": "snapshot", "options": {"cycles": 2}}},
        "students": {"student": {"alpha": 0.3}}, "student_seeds": 1, "flips": False,
        "crop_statistics": True, "watched": 2, "train_share": 0.9,
    }  # fmt: skip
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(declared), encoding="utf-8")  # JSON is YAML
    arguments = [
        "--study", str(path), "--rows", str(tmp_path / "rows.jsonl"), "--page", str(tmp_path / "page.md"),
        "--scratch", str(tmp_path / "weights"), "--accelerator", "cpu", "--precision", "32", "--jobs", "2",
    ]  # fmt: skip
    accuracy.main(arguments)
    rows = plan.read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 2 * 2 * 3 + 3 + 3
    assert "18 of 18 cells" in capsys.readouterr().out
    row = rows["run-snapshot2-e2-f1-s1"]
    assert row["systems"]["all"]["cost"] == 2
    assert row["systems"]["soup"]["val_nll"] != row["systems"]["soup crops"]["val_nll"]
    assert row["systems"]["all refreshed"]["cost"] == 2
    assert row["systems"]["all refreshed"]["val_nll"] != row["systems"]["all"]["val_nll"]
    assert set(row["systems"]["greedy"]["test"]) == {"clean", "jpeg"}
    for name in ("greedy", "greedy refreshed"):
        assert 0 <= row["systems"][name]["cross_iou"] <= 1
        assert row["systems"][name]["cross_nll"] > 0
    assert "cross_iou" not in row["systems"]["all"]
    assert rows["reference-seeds-e2-f0-s-1"]["systems"]["all"]["cost"] == 2
    student, single = rows["student-student-e2-f0-s0"], rows["run-single-e2-f0-s0"]
    assert set(student["systems"]) == {"last", "refreshed"}
    assert student["steps"] == single["steps"], "a student's own budget is that of every method"
    assert student["history"] != single["history"]
    runs = mlflow.search_runs(output_format="list", max_results=100)
    assert {run.info.run_name for run in runs} >= set(rows)
    assert {run.info.status for run in runs} == {"FINISHED"}
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "snapshot2, mean of all" in text
    assert "seeds, mean of all" in text
    assert "| student (alpha 0.3) | 1 |" in text
    before = (tmp_path / "rows.jsonl").read_bytes()
    accuracy.main([*arguments, "--track", "false"])
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_system_with_fewer_seeds_is_shown_and_never_chosen(tmp_path):
    methods = {"single": {"trainer": "single"}, "ema": {"trainer": "ema", "seeds": 1}}
    study = plan.read_study(written(tmp_path, "few", **{**SMALL, "folds": 1, "methods": methods}))
    systems = {
        ("single", "last"): {(seed, 0): system([[[5, 5, 5]]], val=0.1) for seed in (0, 1)},
        ("ema", "last"): {(0, 0): system([[[9, 1, 1]]], val=0.9)},
    }
    found = {line.key: line for line in lines_of(study, systems)}
    assert len(found["ema", "last"].table.seeds) == 1
    assert len(found[CHOSEN].table.seeds) == 2
    assert found[CHOSEN].iou.value == 0


@pytest.mark.figures
def test_the_overview_has_every_study_and_leaves_what_people_wrote(tmp_path):
    page = tmp_path / "results.md"
    page.write_text(f"Before.\n\n{overview.BEGIN}\nformer tables\n{overview.END}\n\nAfter.\n", encoding="utf-8")
    rows = overview.read_overview(FOLDER / "studies", FOLDER / "results")
    assert [row.study.name for row in rows] == sorted(path.stem for path in RESULTS)
    overview.write_overview(rows, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "former tables" not in text
    for row in rows:
        assert f"[{row.label}](results/{row.study.name}.md)" in text
        for line in row.picked.values():
            assert line.iou.text() in text
            assert line.nll.text(1000.0, 1) in text
    assert (tmp_path / "results" / "images" / "overview.png").stat().st_size > 1000
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the lines"):
        overview.write_overview(rows, page)


def test_studies_that_make_no_sense_are_refused(tmp_path, tiny):
    good = {"data": "synthetic", "epochs": [1], "seeds": [0], "grid": [{}], "reference_seeds": 1}
    for change, message in (
        ({"methods": {"swa": {"trainer": "swa"}}}, "expected a method 'single'"),
        ({"tune_seed": 0}, "choose another"),
        ({"reference_seeds": 2}, "more than 1 seeds"),
        ({"sede": 1}, "sede"),
        ({"students": {"student": {"alpha": 0.5}}}, "reference_seeds of 2 or more"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(json.dumps({"methods": {"single": {"trainer": "single"}}, **good, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            plan.read_study(path)
    assert dataclasses.replace(tiny, name="other").name == "other"


def test_camvid_becomes_a_folder_that_load_data_takes(tmp_path):
    source = tmp_path / "CamVid"
    rng = np.random.default_rng(0)
    for split, names in {"train": ["0001TP_1", "Seq05VD_2"], "val": ["0016E5_3"], "test": ["0006R0_4"]}.items():
        lines = []
        for name in names:
            for folder, shape, top in ((split, (8, 12, 3), 255), (f"{split}annot", (8, 12), 12)):
                (source / folder).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, top, shape, np.uint8)
                Image.fromarray(pixels).save(source / folder / f"{name}.png")
            lines.append(f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png")
        (source / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert camvid.convert(source, tmp_path / "out") == {"train": 2, "val": 1, "test": 1}
    data = load_data(str(tmp_path / "out"))
    assert data.task.mode == "multiclass"
    assert data.task.class_names == camvid.CLASSES
    truth = np.asarray(Image.open(source / "valannot" / "0016E5_3.png"))
    assert np.array_equal(data.val.read(0)[1], np.where(truth == 11, 255, truth))
    assert set(data.train.groups) == {"0001TP", "Seq05VD"}, "drives never fall into two folds"
    assert camvid.convert(source, tmp_path / "half", every=2) == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(FileExistsError, match="not empty"):
        camvid.convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("iou", "loss", "one", "said"),
    [
        ((0.012, 0.001, 0.02), -0.01, 0.009, "kept (one network 75 %)"),
        ((0.012, -0.001, 0.02), -0.01, 0.012, "missed: certainty"),
        ((0.008, 0.001, 0.02), 0.01, 0.004, "missed: IoU by 0.2 points, log-loss, one network (50 %)"),
        ((-0.01, -0.02, 0.0), -0.1, 0.01, "missed: IoU by 2.0 points, certainty, one network (0 %)"),
    ],
)
def test_the_target_is_kept_whole_or_what_is_missing_is_said(iou, loss, one, said):
    single = statistics.Estimate(one, one, one)
    assert overview.verdict(statistics.Estimate(*iou), statistics.Estimate(loss, loss, loss), single) == said
