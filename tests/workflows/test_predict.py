"""`predict` and `evaluate`: views, uncertainty and passes are the engine's, and an error where there is no dropout."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import DATA, SHORT

from smp_ensemble.data.images import read_image
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import StorageError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.files import find_images
from smp_ensemble.inference.payload import predict_as
from smp_ensemble.inference.uncertainty import draw_heatmap
from smp_ensemble.inference.writing import FileWriter
from smp_ensemble.tracking.flavor import load_model, save_model


@pytest.fixture
def models(make_tiny_network, tmp_path):
    """Two saved models: `dropping` and `plain`."""
    for name, options in (("dropping", {"dropout": 0.5}), ("plain", {})):
        member = Member(make_tiny_network(1, **options), imagenet())
        save_model(Ensemble([member], mode="binary", class_names=("background", "building")), tmp_path / name)
    return tmp_path


def test_predict_averages_passes(command, models):
    image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    Image.fromarray(image).save(models / "one.png")
    arguments = ("--model", "dropping", "--input", "one.png", "--kind", "probabilities", "--precision", "32")
    found = {}
    for passes in (1, 5):
        code, _, _ = command(
            "predict", *arguments, "--accelerator", "cpu", "--output", f"out{passes}", "--passes", str(passes)
        )
        assert code == 0
        found[passes] = np.load(models / f"out{passes}" / "one.npy", allow_pickle=False)
    ensemble = load_model("dropping")
    for passes, probabilities in found.items():
        expected = Engine(ensemble, "cpu", "32", passes=passes)(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
        assert np.array_equal(probabilities, expected[0].numpy())
    assert not np.array_equal(found[1], found[5])


@pytest.fixture
def turning(make_tiny_network, tmp_path):
    """A saved model of two members with views of its own, and two images."""
    members = [Member(make_tiny_network(seed), imagenet()) for seed in (1, 2)]
    ensemble = Ensemble(members, mode="binary", class_names=("background", "building"), views="flips")
    save_model(ensemble, tmp_path / "turning")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    images = {name: generator.integers(0, 256, (21, 34, 3), dtype=np.uint8) for name in ("a.png", "b.png")}
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / "images" / name)
    return images


@pytest.mark.parametrize("views", [None, "own", "none", "d4+scales:0.75,1"])
def test_predict_uses_the_models_own_views_or_others(command, turning, tmp_path, views):
    chosen = () if views is None else ("--views", views)
    code, _, _ = command(
        "predict", "--model", "turning", "--input", "images", "--kind", "probabilities", "--precision", "32",
        "--accelerator", "cpu", *chosen,
    )  # fmt: skip
    assert code == 0
    engine = Engine(load_model("turning"), "cpu", "32", views=views if views != "own" else "flips")
    for name, expected in zip(turning, engine.predict(list(turning.values())), strict=True):
        found = np.load(tmp_path / "predictions" / f"{name[0]}.npy", allow_pickle=False)
        assert np.array_equal(found, expected)


def test_predict_says_how_unsure_it_is(command, turning, tmp_path):
    code, values, _ = command(
        "predict", "--model", "turning", "--input", "images", "--kind", "uncertainty", "--precision", "32",
        "--accelerator", "cpu",
    )  # fmt: skip
    assert code == 0
    assert values["count"] == 2
    expected = Engine(load_model("turning"), "cpu", "32").uncertainty(list(turning.values()))
    table = pd.read_csv(tmp_path / "predictions" / "uncertainty.csv", index_col="name")
    assert table.index.tolist() == ["a.png", "b.png"]
    for name, maps in zip(turning, expected, strict=True):
        assert np.array_equal(np.load(tmp_path / "predictions" / f"{name[0]}.npy", allow_pickle=False), maps)
        np.testing.assert_allclose(table.loc[name], maps.astype(np.float64).mean(axis=(1, 2)), rtol=1e-12)
        with Image.open(tmp_path / "predictions" / name) as picture:
            assert np.array_equal(np.asarray(picture), draw_heatmap(maps[0], np.log(2)))


def test_unknown_views_are_refused_before_anything_is_read(command, tmp_path):
    code, _, errors = command("predict", "--model", "nowhere", "--input", "nowhere", "--views", "d5")
    assert code == 2
    assert "unknown views 'd5': did you mean 'd4'" in errors[0]


def test_evaluate_scores_passes_and_says_how_many(command, models, tracking):
    scores = {}
    for passes in ("1", "3", "3"):
        code, values, _ = command("evaluate", *DATA, *SHORT, "--model", "dropping", "--passes", passes)
        assert code == 0
        assert tracking.get_run(values["run_id"]).data.params["passes"] == passes
        scores.setdefault(passes, []).append(values["metrics"]["nll"])
    assert scores["3"][0] == scores["3"][1] != scores["1"][0]


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_a_model_without_dropout_is_told_what_adds_some(command, models, name):
    Image.new("RGB", (16, 16)).save(models / "one.png")
    what = ("--input", "one.png") if name == "predict" else DATA
    code, _, errors = command(name, "--model", "plain", *what, "--passes", "3")
    assert code == 2
    assert len(errors) == 1
    assert "passes=3 needs dropout, but member 0 (Unet) holds none" in errors[0]
    assert '{"dropout": 0.2}' in errors[0]
    assert not (models / "predictions").exists()


def test_no_passes_at_all_are_refused(command, models):
    code, _, errors = command("predict", "--model", "plain", "--input", "one.png", "--passes", "0")
    assert code == 2
    assert "--passes: expected a whole number above 0, got 0" in errors[0]


def write_images(folder, shapes):
    """Images of several sizes: PNG, and JPEG in turn."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index, shape in enumerate(shapes):
        image = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
        image.save(folder / f"{index:02d}.{('png', 'jpg')[index % 2]}")
    return find_images(str(folder))


SIZES = [(16, 24, 3), (9, 31, 3), (16, 24, 3), (33, 8, 3), (9, 31, 3), (16, 24, 3)] * 2 + [(9, 31, 3)]
RUN = ("predict", "--model", "plain", "--input", "images", "--precision", "32", "--accelerator", "cpu")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["mask", "probabilities", "overlay", "rle", "uncertainty"])
def test_files_are_those_of_a_plain_loop_whatever_the_batches(command, models, kind):
    images = write_images(models / "images", SIZES)
    engine = Engine(load_model("plain"), "cpu", "32")
    writer = FileWriter(models / "loop", kind, images)
    for image in images:
        writer.write(image, predict_as(engine, [read_image(image.path)], kind)[0])
    writer.close()
    for batch in ("1", "3"):
        code, values, _ = command(*RUN, "--kind", kind, "--output", f"out{batch}", "--batch-size", batch)
        assert (code, values["count"], values["errors"]) == (0, len(SIZES), {})
        assert contents(models / f"out{batch}") == contents(models / "loop")


def test_what_is_broken_in_any_way_is_listed_in_order_and_the_rest_is_predicted(command, models, monkeypatch):
    images = write_images(models / "images", SIZES)
    folder = models / "images"
    (folder / "00.png").write_bytes(b"")
    (folder / "03.jpg").write_bytes((folder / "03.jpg").read_bytes()[:200])
    Image.new("RGB", (24, 16)).save(folder / "04.png")
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:45])
    Image.new("RGB", (200, 300)).save(folder / "08.png")
    Image.new("L", (24, 16)).save(folder / "10.png")
    names = [image.name for image in reversed(images)]
    (folder / "list.csv").write_text("\n".join(["image", *names, "gone.png"]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    (models / "out" / "12.png").mkdir(parents=True)
    arguments = [*RUN[:4], "images/list.csv", *RUN[5:]]
    code, values, _ = command(*arguments, "--output", "out")
    assert code == 0
    assert values["count"] == 7
    reasons = pd.read_csv(models / "out" / "errors.csv").set_index("name")["error"]
    assert list(reasons.index) == ["12.png", "10.png", "08.png", "04.png", "03.jpg", "00.png", "gone.png"]
    assert reasons.to_dict() == values["errors"]
    for name, reason in {
        "00.png": "cannot read image images/00.png: expected PNG, JPEG, TIFF, BMP or WebP, found none",
        "03.jpg": "truncated", "04.png": "truncated", "08.png": "decompression bomb",
        "10.png": "images/10.png has 1 bands, the model takes 3", "12.png": "cannot write out/12.png: Is a directory",
        "gone.png": "No such file or directory",
    }.items():  # fmt: skip
        assert reason.lower() in reasons[name].lower()
    assert len(list((models / "out").glob("*.png"))) == 7 + 1
    assert not list((models / "out").glob("*partial"))
    code, values, _ = command(*arguments, "--output", "runs.csv", "--kind", "rle")
    good = [name for name in names if name not in reasons.drop("12.png")]
    assert pd.read_csv(models / "runs.csv", keep_default_na=False)["name"].tolist() == good


def test_none_at_all_is_an_error_and_none_left_is_none(command, models):
    (models / "images").mkdir()
    (models / "images" / "broken.png").write_bytes(b"no image")
    code, _, errors = command(*RUN)
    assert code == 2
    assert "none of the 1 images could be predicted; the first: cannot read image" in errors[0]
    assert (models / "predictions" / "errors.csv").exists()
    Image.new("RGB", (9, 9)).save(models / "images" / "good.png")
    for expected in ({"count": 1, "kept": 0}, {"count": 0, "kept": 1}):
        code, values, _ = command(*RUN, "--skip-existing", "true")
        assert code == 0
        assert values | expected == values
        assert list(values["errors"]) == ["broken.png"]
    (models / "images" / "broken.png").unlink()
    code, values, _ = command(*RUN, "--skip-existing", "true")
    assert values == {"output": "predictions", "count": 0, "kept": 1, "errors": {}, "members_used": None}
    assert not (models / "predictions" / "errors.csv").exists()


@pytest.mark.parametrize("kind", ["mask", "rle", "uncertainty"])
def test_a_full_disk_ends_it_and_the_next_call_goes_on(command, models, monkeypatch, kind):
    write_images(models / "images", SIZES)
    code, values, _ = command(*RUN, "--kind", kind, "--output", "whole")
    assert (code, values["count"]) == (0, len(SIZES))
    save, saved = FileWriter.save, set()

    def full(writer, image, result):
        if image.name == "09.jpg":
            deadline = time.monotonic() + 20
            while not {"00.png", "01.jpg", "02.png"} <= saved and time.monotonic() < deadline:
                time.sleep(0.01)  # they come first in the table; which thread is faster is chance
            raise StorageError("cannot write 09.png: No space left on device; what is written so far stays")
        row = save(writer, image, result)
        saved.add(image.name)
        return row

    monkeypatch.setattr(FileWriter, "save", full)
    code, _, errors = command(*RUN, "--kind", kind, "--output", "out", "--batch-size", "2")
    assert code == 1
    assert errors == ["error: cannot write 09.png: No space left on device; what is written so far stays"]
    monkeypatch.setattr(FileWriter, "save", save)
    code, values, _ = command(*RUN, "--kind", kind, "--output", "out", "--skip-existing", "true")
    assert code == 0
    assert values["kept"] > 0
    assert values["kept"] + values["count"] == len(SIZES)
    assert contents(models / "out") == contents(models / "whole")


@pytest.mark.slow
def test_ctrl_c_stops_at_once_with_whole_files_and_exit_code_130(models):
    write_images(models / "images", [(64, 64, 3), (48, 64, 3)] * 400)
    arguments = [*RUN, "--kind", "rle", "--output", "out/runs.csv", "--batch-size", "2"]
    program = [sys.executable, "-m", "smp_ensemble.cli"]
    process = subprocess.Popen([*program, *arguments], cwd=models, stderr=subprocess.PIPE, text=True)
    partial = models / "out" / "runs.csv.partial"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 8_000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 20
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted"
    assert [path.name for path in (models / "out").iterdir()] == [partial.name]
    rows = pd.read_csv(partial, keep_default_na=False)["name"].tolist()
    assert rows == [image.name for image in find_images(str(models / "images"))][: len(rows)]
