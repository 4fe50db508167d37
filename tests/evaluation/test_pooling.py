"""A pool holds the valid pixels of what was predicted, whatever the blocks; memory does not grow with candidates."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from evaluation.noisy import make_data

from smp_ensemble.ensembling.greedy import select_greedily
from smp_ensemble.evaluation import pooling
from smp_ensemble.evaluation.cache import PredictionCache
from smp_ensemble.evaluation.pooling import make_pool
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX, Snapshot, Task


def fill(cache, data, candidates):
    """Predictions that follow the truth with noise, and their probabilities as they are read."""
    rng = np.random.default_rng(0)
    outputs = data.task.num_outputs

    def images():
        for index in range(len(data)):
            mask = np.minimum(data.read(index)[1], outputs - 1 if outputs > 1 else 1)
            signal = np.moveaxis(np.eye(outputs)[mask], -1, 0) if outputs > 1 else mask[None].astype(float)
            logits = 2 * signal - 1 + rng.normal(0, 1.5, signal.shape)
            p = np.exp(logits) / np.exp(logits).sum(axis=0) if outputs > 1 else 1 / (1 + np.exp(-logits))
            yield index, p.astype(np.float32)

    return [cache.write(f"{number:064d}", data, images) for number in range(candidates)]


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
@pytest.mark.parametrize("block", [50, 2**19])
def test_codes_are_those_of_valid_pixels_sorted_by_truth(tmp_path, monkeypatch, mode, block):
    monkeypatch.setattr(pooling, "BLOCK_PIXELS", block)
    data = make_data(tmp_path / "set", mode)
    predicted = fill(PredictionCache(tmp_path / "cache"), data, 3)
    snapshots = [Snapshot(f"models:/m-{index}", "", index) for index in range(3)]
    pool = make_pool(predicted, snapshots, data, "val_iou", tmp_path)
    found = {}
    for part in pool.blocks:
        assert part.codes.shape[2] == sum(part.counts) <= block
        ends = np.cumsum(part.counts)
        for truth, (end, count) in enumerate(zip(ends, part.counts, strict=True)):
            found.setdefault(truth, []).append(part.codes[:, :, end - count : end])
    masks = [data.read(index)[1].ravel() for index in range(len(data))]
    truths = np.concatenate(masks)
    codes = np.stack(
        [
            np.concatenate([one.read(index).reshape(data.task.num_outputs, -1) for index in range(len(data))], axis=1)
            for one in predicted
        ]
    )
    codes = np.minimum(np.floor(codes * np.float32(256)), 255)
    assert (truths == IGNORE_INDEX).any()
    for truth, parts in found.items():
        np.testing.assert_array_equal(np.concatenate(parts, axis=2), codes[:, :, truths == truth])
    assert sum(part.shape[2] for parts in found.values() for part in parts) == (truths != IGNORE_INDEX).sum()


@pytest.mark.parametrize(("groups", "parts", "expected"), [(3, 3, 3), (2, 3, 2), (1, 3, 1), (None, 3, 3), (3, 0, 1)])
def test_parts_share_no_group_and_hold_every_pixel_once(tmp_path, monkeypatch, groups, parts, expected):
    monkeypatch.setattr(pooling, "BLOCK_PIXELS", 300)
    data = make_data(tmp_path / "set", "binary")
    names = None if groups is None else [f"g{index % groups}" for index in range(len(data))]
    if names is not None:
        monkeypatch.setattr(type(data), "groups", property(lambda _: tuple(names)))
    divided = pooling._divide(data, parts)
    assert sorted(index for images in divided for index in images) == list(range(len(data)))
    assert len(divided) == expected
    if names is not None:
        members = [{names[index] for index in images} for images in divided]
        assert sum(map(len, members)) == groups
    predicted = fill(PredictionCache(tmp_path / "cache"), data, 2)
    snapshots = [Snapshot(f"models:/m-{index}", "", index) for index in range(2)]
    (tmp_path / "whole").mkdir()
    whole = make_pool(predicted, snapshots, data, "val_iou", tmp_path / "whole")
    pool = make_pool(predicted, snapshots, data, "val_iou", tmp_path, parts)
    assert whole.parts == ()
    assert len(pool.parts) == (expected if expected > 1 else 0)
    np.testing.assert_array_equal(
        pool.counted([0, 0], [0, 1], pool.blocks), whole.counted([0, 0], [0, 1], whole.blocks)
    )
    for part, images in zip(pool.parts, divided, strict=False):
        valid = sum(int((data.read(index)[1] != IGNORE_INDEX).sum()) for index in images)
        assert sum(sum(block.counts) for block in part) == valid
        assert sum(sum(block.counts) for block in pool.without(pool.parts.index(part)).blocks) == (
            whole.counted([0, 0], [0], whole.blocks).sum() - valid
        )


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    data = make_data(tmp_path / "set", "binary")
    monkeypatch.setattr(pooling.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match="selecting among 2 candidates takes .* lower max-candidates"):
        make_pool([None, None], [], data, "val_iou", tmp_path)


def huge(images: int, size: int) -> SimpleNamespace:
    """A data set of noise that takes no memory."""

    def mask(seed):
        return (np.random.default_rng(seed).random((size, size)) < 0.3).astype(np.uint8)

    def read(index):
        return None, mask(index)

    class Data(SimpleNamespace):
        def __len__(self):
            return images

    return Data(
        task=Task("binary", ("ground", "roof")),
        scans=[SimpleNamespace(size=(size, size), pixels=size * size)] * images,
        records=[
            SimpleNamespace(mask=SimpleNamespace(read=lambda index=index: mask(index))) for index in range(images)
        ],
        read=read,
    )


def test_memory_is_that_of_one_block_of_one_candidate(tmp_path, monkeypatch):
    monkeypatch.setattr(pooling, "BLOCK_PIXELS", 2**14)
    data, peaks = huge(16, 128), {}
    for candidates in (2, 12):
        predicted = fill(PredictionCache(tmp_path / "cache"), data, candidates)
        folder = tmp_path / str(candidates)
        folder.mkdir()
        snapshots = [Snapshot(f"models:/m-{index}", "", index) for index in range(candidates)]
        tracemalloc.start()
        pool = make_pool(predicted, snapshots, data, "val_iou", folder)
        select_greedily(pool, 3)
        peaks[candidates] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    everything = 12 * 16 * 128**2 * 4
    assert peaks[12] < 40 * 2**14 + 1_000_000 < everything / 6  # float32 of all candidates
    assert peaks[12] - peaks[2] < 10 * 2 * 256 * 8 * 4 + 50_000  # histograms
