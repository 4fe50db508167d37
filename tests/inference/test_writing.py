"""Predictions written: each file whole or not at all, and never over anything else."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from smp_ensemble.exceptions import DataError, InputError, StorageError
from smp_ensemble.inference.files import InputImage, find_images
from smp_ensemble.inference.writing import FileWriter

MASK = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(path)
    return folder


def open_writer(output: Path, kind: str, *names: str, planes: int = 0) -> tuple[FileWriter, list[InputImage]]:
    images = [InputImage(name, Path("photos") / name) for name in names]
    return FileWriter(output, kind, images, planes=planes), images


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_masks_read_back(tmp_path):
    writer, images = open_writer(tmp_path / "out", "mask", "a.jpg", "sub/b.tif")
    for image in images:
        writer.write(image, MASK)
    assert writer.close() == tmp_path / "out"
    for name in ("a.png", "sub/b.png"):
        assert np.array_equal(read_png(tmp_path / "out" / name), MASK)


def test_multilabel_masks_are_a_file_for_each_class(tmp_path):
    writer, (image,) = open_writer(tmp_path, "mask", "a.jpg", planes=2)
    writer.write(image, np.stack([MASK == 1, MASK == 2]).astype(np.uint8))
    for index in (0, 1):
        assert np.array_equal(read_png(tmp_path / f"a_{index}.png"), index + 1 == MASK)


def test_overlays_read_back(tmp_path):
    overlay = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    writer, (image,) = open_writer(tmp_path, "overlay", "a.jpg")
    writer.write(image, overlay)
    assert np.array_equal(read_png(tmp_path / "a.png"), overlay)


def test_probabilities_read_back(tmp_path):
    probabilities = np.random.default_rng(0).random((2, 3, 4), dtype=np.float32)
    writer, (image,) = open_writer(tmp_path, "probabilities", "a.jpg")
    writer.write(image, probabilities)
    found = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert found.dtype == np.float32
    assert np.array_equal(found, probabilities)


def test_uncertainty_is_maps_a_heat_map_and_a_table(tmp_path):
    maps = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    maps[0, 0], maps[1, 0] = 0.0, math.log(5)
    images = [InputImage(name, Path("photos") / name) for name in ("sub/b.01.jpg", "a.png")]
    writer = FileWriter(tmp_path / "out", "uncertainty", images, max_entropy=math.log(5))
    for image, one in zip(images, maps, strict=True):
        writer.write(image, one)
    assert writer.close() == tmp_path / "out"
    for name, one, colour in (("sub/b.01", maps[0], (68, 1, 84)), ("a", maps[1], (253, 231, 37))):
        assert np.array_equal(np.load(tmp_path / "out" / f"{name}.npy", allow_pickle=False), one)
        picture = read_png(tmp_path / "out" / f"{name}.png")
        assert picture.shape == (4, 5, 3)
        assert (picture == colour).all()
    table = pd.read_csv(tmp_path / "out" / "uncertainty.csv")
    assert list(table.columns) == ["name", "entropy", "mutual_information", "variation_ratio"]
    assert table["name"].tolist() == ["sub/b.01.jpg", "a.png"]
    expected = maps.astype(np.float64).mean(axis=(2, 3))
    np.testing.assert_allclose(table.iloc[:, 1:].to_numpy(), expected, rtol=1e-12)


def test_a_heat_map_never_replaces_an_image(tmp_path):
    make(tmp_path, "a.png")
    with pytest.raises(InputError, match="would be overwritten"):
        FileWriter(tmp_path, "uncertainty", find_images(str(tmp_path)))


@pytest.mark.parametrize("output", ["out", "out/submission.csv"])
def test_run_lengths_are_one_table_in_order(tmp_path, output):
    writer, images = open_writer(tmp_path / output, "rle", "b.jpg", "a.jpg", "a.png", "sub/c,d.png")
    for image, runs in zip(images, ["1 2", "", "3 4", '{"roof": "1 2"}'], strict=True):
        writer.write(image, runs)
    path = writer.close()
    assert path == tmp_path / (output if output.endswith(".csv") else "out/predictions.csv")
    table = pd.read_csv(path, keep_default_na=False)
    assert table.to_dict("list") == {
        "name": ["b.jpg", "a.jpg", "a.png", "sub/c,d.png"],
        "mask": ["1 2", "", "3 4", '{"roof": "1 2"}'],
    }
    assert list(path.parent.iterdir()) == [path]


def test_dots_in_a_name_are_kept(tmp_path):
    writer, images = open_writer(tmp_path, "mask", "scene.01", "scene.02", "scene.03.tif")
    for image in images:
        writer.write(image, MASK)
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.01.png", "scene.02.png", "scene.03.png"]


@pytest.mark.parametrize("name", ["../../photos/a.png", "../photos/a.png", "{}/photos/a.png"])
def test_an_image_named_by_another_path_is_never_overwritten(tmp_path, name):
    photo = make(tmp_path / "photos", "a.png") / "a.png"
    before = photo.read_bytes()
    image = InputImage(name.format(tmp_path.as_posix()), photo)
    writer = FileWriter(tmp_path / "work" / "out", "mask", [image])
    writer.write(image, MASK)
    (written,) = (path for path in (tmp_path / "work" / "out").rglob("*") if path.is_file())
    assert np.array_equal(read_png(written), MASK)
    assert photo.read_bytes() == before


def test_results_beside_the_images_would_overwrite_them(tmp_path):
    make(tmp_path, "a.png")
    with pytest.raises(
        InputError, match=r"a\.png is an image to predict and would be overwritten: choose another output"
    ):
        FileWriter(tmp_path, "mask", find_images(str(tmp_path)))
    FileWriter(tmp_path, "probabilities", find_images(str(tmp_path)))


def test_two_images_with_one_result_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"'a\.jpg' and 'a\.png' would both be written to .*a\.png: rename one"):
        open_writer(tmp_path / "out", "mask", "a.jpg", "b.jpg", "a.png")
    assert not (tmp_path / "out").exists()


def test_an_output_in_the_way_is_explained(tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(InputError, match=r"output '.*file' is a file: name a folder"):
        open_writer(tmp_path / "file", "mask")
    with pytest.raises(InputError, match=r"output '.*out\.csv' is a CSV, which only kind=rle writes: name a folder"):
        open_writer(tmp_path / "out.csv", "mask")


def test_predicting_again_replaces_the_results(tmp_path):
    for value in (MASK, 2 - MASK):
        writer, (image,) = open_writer(tmp_path, "mask", "a.jpg")
        writer.write(image, value)
    assert np.array_equal(read_png(tmp_path / "a.png"), 2 - MASK)


class Disk:
    """Refuses to write files of some names, as a full disk does: after a few bytes."""

    def __init__(self, monkeypatch, code, *names):
        write = Path.write_bytes

        def refuse(path, content):
            if not any(name in path.name for name in names):
                return write(path, content)
            write(path, bytes(content)[:5])
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(Path, "write_bytes", refuse)


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, StorageError), (errno.EDQUOT, StorageError),
                                                (errno.EROFS, StorageError), (errno.EACCES, DataError)])  # fmt: skip
@pytest.mark.parametrize("kind", ["mask", "probabilities", "uncertainty"])
def test_what_cannot_be_written_leaves_nothing_half_written(tmp_path, monkeypatch, kind, code, expected):
    result = MASK if kind == "mask" else np.ones((3, 2, 3), np.float32)
    writer, images = open_writer(tmp_path, kind, "a.jpg", "b.jpg")
    writer.save(images[0], result)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    Disk(monkeypatch, code, "b.")
    with pytest.raises(expected, match=r"cannot write .*b\..*: ") as error:
        writer.save(images[1], result)
    assert type(error.value) is expected
    assert ("skip-existing" in str(error.value)) == (expected is StorageError)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    writer.stop()


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    writer, (image,) = open_writer(tmp_path, "mask", "a.jpg")
    writer.save(image, MASK)

    def interrupted(path, content):
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.save(image, 2 - MASK)
    assert np.array_equal(read_png(tmp_path / "a.png"), MASK)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_in_the_way_of_a_file_concerns_that_image_alone(tmp_path):
    writer, images = open_writer(tmp_path, "mask", "a.jpg", "b.jpg")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*a\.png: Is a directory"):
        writer.save(images[0], MASK)
    writer.save(images[1], MASK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


RESULTS = {
    "mask": np.stack([MASK == 1, MASK == 2]).astype(np.uint8),
    "probabilities": np.ones((2, 2, 3), np.float32),
    "uncertainty": np.ones((3, 2, 3), np.float32),
    "overlay": np.zeros((2, 3, 3), np.uint8),
    "rle": "1 2",
}


@pytest.mark.parametrize("kind", RESULTS)
def test_what_has_a_newer_result_is_left_out_and_kept(tmp_path, kind):
    make(tmp_path / "photos", "a.jpg", "b.jpg", "c.jpg")
    images = find_images(str(tmp_path / "photos"))

    def writer(*, resume=True):
        return FileWriter(tmp_path / "out", kind, images, planes=2, resume=resume)

    first = writer(resume=False)
    assert first.todo() == images
    for image in images[:2]:
        first.write(image, RESULTS[kind])
    first.stop()
    interrupted = writer()
    assert interrupted.todo() == images[2:]
    interrupted.write(images[2], RESULTS[kind])
    interrupted.close()
    assert writer().todo() == []
    written = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert writer().close().exists()
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written
    os.utime(images[1].path, (2**33, 2**33))  # an image that was changed
    if kind == "rle":  # one table: whatever is older than it is done
        assert writer().todo() == [images[1]]
        return
    last = max(path for path in written if path.name.startswith("c"))
    last.unlink()  # one of its files
    assert writer().todo() == images[1:]


def test_an_image_that_is_gone_is_to_be_done(tmp_path):
    writer, (image,) = open_writer(tmp_path, "mask", "a.jpg")
    writer.save(image, MASK)
    assert writer.todo() == [image]
