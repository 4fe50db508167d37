"""The cache of predictions: whole or not at all, one key for one prediction, room made by age."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from evaluation.noisy import make_data

from smp_ensemble.evaluation import cache as cache_module
from smp_ensemble.evaluation.cache import (
    FOLDER_VARIABLE,
    SIZE_VARIABLE,
    PredictionCache,
    cache_from_environment,
    default_folder,
    prediction_key,
)
from smp_ensemble.evaluation.codes import LARGEST_ERROR
from smp_ensemble.exceptions import ConfigError

KEY = "a" * 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("cache") / "set", "multiclass")


def predictions(data, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {index: rng.random((data.task.num_outputs, *scan.size)) for index, scan in enumerate(data.scans)}
    return {index: (one / one.sum(axis=0)).astype(np.float32) for index, one in found.items()}


def test_predictions_come_back_in_any_order_from_any_cache_object(data, tmp_path):
    expected = predictions(data)
    written = PredictionCache(tmp_path).write(KEY, data, lambda: reversed(expected.items()))
    read = PredictionCache(tmp_path).read(KEY, data)
    for kept in (written, read):
        for index in (3, 0, 2, 1):
            found = kept.read(index)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected[index], rtol=0, atol=LARGEST_ERROR)
    (path,) = tmp_path.iterdir()
    pixels = sum(scan.pixels for scan in data.scans)
    assert pixels * 3 * 2 < path.stat().st_size < pixels * 3 * 2 + 512
    assert PredictionCache(tmp_path).read("b" * 64, data) is None


@pytest.mark.parametrize("damage", ["shorter", "longer", "header", "other data"])
def test_a_file_that_is_not_as_it_should_be_is_not_read(data, tmp_path, damage):
    cache = PredictionCache(tmp_path)
    cache.write(KEY, data, predictions(data).items)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "other data":
        assert cache.read(KEY, data.subset([1, 0, 2, 3])) is None
        return
    path.unlink()
    path.write_bytes({"shorter": content[:-1], "longer": content + b"x", "header": b"S" + content[1:]}[damage])
    assert cache.read(KEY, data) is None
    kept = cache.write(KEY, data, predictions(data).items)
    assert np.array_equal(cache.read(KEY, data).read(1), kept.read(1))


def test_a_failure_leaves_nothing(data, tmp_path):
    def fails():
        yield 0, predictions(data)[0]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        PredictionCache(tmp_path).write(KEY, data, fails)
    assert not list(tmp_path.iterdir())


def test_two_writers_do_no_harm(data, tmp_path):
    barrier = threading.Barrier(2)

    def images():
        barrier.wait()
        yield from predictions(data).items()

    def write():
        PredictionCache(tmp_path).write(KEY, data, images)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_allclose(
        PredictionCache(tmp_path).read(KEY, data).read(2), predictions(data)[2], rtol=0, atol=LARGEST_ERROR
    )


def test_what_was_not_read_for_longest_makes_room(data, tmp_path):
    size = sum(scan.pixels for scan in data.scans) * 3 * 2 + 512
    cache = PredictionCache(tmp_path, 2 * size)
    for second, key in enumerate("abc"):
        if key == "c":
            assert cache.read("a", data) is not None  # b is now the oldest
        cache.write(key, data, predictions(data).items)
        if key != "c":
            os.utime(tmp_path / f"{key}.predictions", (second + 1, second + 1))
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c"}
    open_before = PredictionCache(tmp_path).read("a", data)
    PredictionCache(tmp_path, 0).write("d", data, predictions(data).items)
    assert {path.stem for path in tmp_path.iterdir()} >= {"d"}  # the newest always stays
    assert open_before.read(0).shape == (3, *data.scans[0].size)  # and what is open can be read on


def test_what_dead_processes_left_goes(data, tmp_path):
    old, fresh, foreign = (tmp_path / name for name in ("x.partial", "y.partial", "notes.txt"))
    for path in (old, fresh, foreign):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    PredictionCache(tmp_path, 0).write(KEY, data, predictions(data).items)
    assert {path.name for path in tmp_path.iterdir()} == {"y.partial", "notes.txt", f"{KEY}.predictions"}


def test_a_folder_that_cannot_be_written_is_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot keep predictions in .*SMP_ENSEMBLE_CACHE=off"):
        PredictionCache(tmp_path / "file" / "cache").write(KEY, data, predictions(data).items)


def test_the_key_is_of_everything_that_predictions_follow_from(data):
    base = {"files": {"config.json": "1", "model.safetensors": "2"}, "normalization": {"kind": "none"}, "data": data}
    changes = [
        {},
        {"files": {"config.json": "1", "model.safetensors": "3"}},
        {"normalization": {"kind": "imagenet"}},
        {"data": data.subset([1, 0, 2, 3])},
        {"views": ("flips",)},
        {"passes": 2},
        {"precision": "bf16-mixed"},
        {"device": "cuda"},
    ]
    keys = [prediction_key(**{**base, **change}) for change in changes]
    assert len(set(keys)) == len(changes)
    assert keys[0] == prediction_key(**base)
    assert len(keys[0]) == 64


def test_the_environment_says_where_and_how_much(tmp_path, monkeypatch):
    assert cache_from_environment() is None  # as all tests have it
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.delenv(SIZE_VARIABLE, raising=False)
    assert (cache_from_environment().folder, cache_from_environment().limit_bytes) == (tmp_path, 20e9)
    monkeypatch.setenv(SIZE_VARIABLE, "0.5")
    assert cache_from_environment().limit_bytes == 0.5e9
    for text in ("much", "-1", "nan"):
        monkeypatch.setenv(SIZE_VARIABLE, text)
        with pytest.raises(ConfigError, match=f"expected SMP_ENSEMBLE_CACHE_GB as a number of gigabytes, got '{text}'"):
            cache_from_environment()
    monkeypatch.delenv(SIZE_VARIABLE)
    monkeypatch.delenv(FOLDER_VARIABLE)
    assert cache_from_environment().folder == default_folder()


def test_each_system_has_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    places = {"linux": ".cache", "darwin": "Library/Caches", "win32": "AppData/Local"}
    for system, place in places.items():
        monkeypatch.setattr(cache_module.sys, "platform", system)
        assert default_folder() == tmp_path / place / "smp_ensemble"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "smp_ensemble"
