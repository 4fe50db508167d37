"""A teacher's stored predictions are those of its engine, to the precision of their two bytes."""

from __future__ import annotations

import shutil
from collections import namedtuple

import numpy as np
import pytest
from evaluation.noisy import SIZES, make_data, make_engine

from smp_ensemble.evaluation.codes import LARGEST_ERROR
from smp_ensemble.evaluation.teaching import teach
from smp_ensemble.exceptions import ConfigError


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
@pytest.mark.parametrize("views", ["none", "flips+scales:0.5,1"])
def test_each_image_has_its_own_whole_and_calibrated(tmp_path, mode, views):
    data = make_data(tmp_path / "set", mode)
    engine = make_engine(data).with_options(views=views)
    engine.ensemble.temperature = 1.7
    folder = tmp_path / "predictions"
    folder.mkdir()
    found = teach(engine, data, folder, batch_size=2)
    assert len(list(folder.iterdir())) == len(data)
    for index in range(len(data)):
        (expected,) = engine.predict([data.read(index)[0]])
        planes = found(index)
        assert (planes.dtype, planes.shape) == (np.float32, (*SIZES[index + 2], data.task.num_outputs))
        np.testing.assert_allclose(planes, expected.transpose(1, 2, 0), rtol=0, atol=LARGEST_ERROR + 1e-6)
        assert found.path(index).stat().st_size == 128 + 2 * planes.size


def test_too_little_room_is_said_before_anything_is_predicted(tmp_path, monkeypatch):
    data = make_data(tmp_path / "set", "binary")
    pixels = sum(height * width for height, width in SIZES[2:])
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(4 * pixels - 1))
    with pytest.raises(ConfigError, match="make room there, or let TMPDIR name a larger disk"):
        teach(make_engine(data), data, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(4 * pixels))
    teach(make_engine(data), data, tmp_path)
