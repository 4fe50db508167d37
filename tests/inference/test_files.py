"""Images found: what a folder, a glob, a file or a CSV names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.exceptions import DataError
from smp_ensemble.inference.files import InputImage, find_images


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


def test_results_below_the_images_are_not_images(photos, caplog):
    make(photos, "sub/out/a.png", "sub/outer/a.png")
    before = names_of(photos)
    with caplog.at_level("INFO", logger="smp_ensemble"):
        found = [image.name for image in find_images(str(photos), photos / "sub" / ".." / "sub" / "out")]
    assert found == [name for name in before if name != "sub/out/a.png"]
    assert "1 images in the output folder" in caplog.text
    for output in (photos, photos.parent, photos / "nowhere", photos.parent / "photos2"):
        assert [image.name for image in find_images(str(photos), output)] == before


def test_a_folder_that_holds_nothing_but_results(tmp_path):
    make(tmp_path, "out/a.png")
    with pytest.raises(DataError, match="no images found at"):
        find_images(str(tmp_path), tmp_path / "out")
