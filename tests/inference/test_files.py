"""Images found, and predictions written: never over anything else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from smp_ensemble.exceptions import DataError, InputError
from smp_ensemble.inference.files import FileWriter, InputImage, find_images, write_csv

MASK = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(path)
    return folder


def names_of(spec: object) -> list[str]:
    found = find_images(str(spec))
    assert all(image.path.is_file() for image in found)
    return [image.name for image in found]


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = make(tmp_path / "photos", "b.png", "a.JPG", "sub/c.tif", "sub/deep/a.png", "e.webp")
    (folder / "notes.txt").write_text("no image")
    (folder / "folder.png").mkdir()
    return folder


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def open_writer(output: Path, kind: str, *names: str, source: str = "photos") -> tuple[FileWriter, list[InputImage]]:
    images = [InputImage(name, Path(source) / name) for name in names]
    return FileWriter(output, kind, images), images


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_a_folder_is_searched_to_the_bottom(photos):
    assert names_of(photos) == ["a.JPG", "b.png", "e.webp", "sub/c.tif", "sub/deep/a.png"]


def test_one_file(photos):
    assert names_of(photos / "b.png") == ["b.png"]


def test_a_glob(photos):
    assert names_of(photos / "*.png") == ["b.png"]
    assert names_of(photos / "sub" / "**" / "*.*") == ["a.png", "c.tif"]


def test_a_glob_with_one_name_in_two_folders_keeps_them_apart(photos):
    make(photos, "a.png")
    found = names_of(photos / "**" / "a.png")
    assert len(set(found)) == 2
    assert all(name.endswith("/a.png") for name in found)


def test_a_relative_glob(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert names_of("*.png") == ["b.png"]


@pytest.mark.parametrize("column", ["image", "name"])
def test_a_csv_in_its_own_order(photos, column):
    table = write_lines(photos / "list.csv", f"id,{column},mask", "1,sub/c.tif,", "2,a.JPG,1 2", "3,sub/c.tif,3 4")
    assert names_of(table) == ["sub/c.tif", "a.JPG"]


def test_a_csv_beside_the_folder_images(tmp_path):
    make(tmp_path / "images", "x.png", "scene.01.tif")
    assert names_of(write_lines(tmp_path / "list.csv", "image", "x.png", "scene.01", "x")) == ["x.png", "scene.01", "x"]


def test_a_tsv_and_a_byte_order_mark(photos):
    table = photos / "list.tsv"
    table.write_text("image\tmask\na.JPG\t1 2\n", encoding="utf-8-sig")
    assert names_of(table) == ["a.JPG"]


def test_run_lengths_in_a_csv_may_be_long(photos):
    table = write_lines(photos / "list.csv", "name,mask", "a.JPG," + "1 1 " * 100_000)
    assert names_of(table) == ["a.JPG"]


def test_images_that_are_not_there_are_left_to_the_reader(photos):
    found = find_images(str(write_lines(photos / "list.csv", "image", "gone.png")))
    assert found == [InputImage("gone.png", photos / "images" / "gone.png")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,mask\na.png,\n", "expected a column image or name in .*list.csv, got path, mask"),
        (b"image\n", "list.csv names no images"),
        (b"", "cannot read .*list.csv"),
        (b"\xff\xfe\x00", "cannot read .*list.csv"),
        (b"id,image\n1,a.png\n2,\n", "expected a path in every row of .*list.csv, column 'image', got an empty one"),
        (b"id,image\n1,a.png\n2\n", "expected a path in every row"),
    ],
)
def test_a_csv_that_names_no_images_is_explained(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        find_images(str(tmp_path / "list.csv"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["nowhere", "nowhere/*.png", "."])
def test_nothing_found_says_what_is_expected(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        find_images(spec)
    assert str(error.value).startswith(f"no images found at '{spec}': expected an image, a folder, a glob such as ")


def test_masks_read_back(tmp_path):
    writer, images = open_writer(tmp_path / "out", "mask", "a.jpg", "sub/b.tif")
    for image in images:
        writer.write(image, MASK)
    assert writer.close() == tmp_path / "out"
    for name in ("a.png", "sub/b.png"):
        assert np.array_equal(read_png(tmp_path / "out" / name), MASK)


def test_multilabel_masks_are_a_file_for_each_class(tmp_path):
    writer, (image,) = open_writer(tmp_path, "mask", "a.jpg")
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


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    path = write_csv(tmp_path / "table.csv", ("name", "mask"), [("a", "1 2")])

    def interrupted():
        yield ("b", "3 4")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(path, ("name", "mask"), interrupted())
    assert path.read_text() == "name,mask\na,1 2\n"


def test_predicting_again_replaces_the_results(tmp_path):
    for value in (MASK, 2 - MASK):
        writer, (image,) = open_writer(tmp_path, "mask", "a.jpg")
        writer.write(image, value)
    assert np.array_equal(read_png(tmp_path / "a.png"), 2 - MASK)
