"""`export`: a model becomes one file, its output is JSON alone, and the documented ways to run the file work."""

from __future__ import annotations

import hashlib
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.tracking.flavor import load_model, save_model

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def snippet(containing: str) -> str:
    """The page's one Python block that holds a text."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if containing in block]
    return found


@pytest.fixture
def model(make_tiny_network, tmp_path) -> Ensemble:
    """A saved model, and what it is."""
    members = [Member(make_tiny_network(seed, 3), imagenet()) for seed in (1, 2)]
    ensemble = Ensemble(
        members, mode="multiclass", class_names=("land", "roof", "road"), temperature=0.7, views="flips"
    )
    save_model(ensemble, tmp_path / "model")
    return load_model(str(tmp_path / "model"))


@pytest.mark.slow
def test_an_onnx_file_runs_with_onnxruntime_and_numpy_alone_as_the_page_says(command, model, tmp_path):
    code, values, _ = command("export", "--model", "model", "--output", "buildings.onnx", "--views", "none")
    assert code == 0
    assert values["output"] == "buildings.onnx"
    assert values["difference"] <= 1e-5
    assert values["images"] == 10
    assert values["bytes"] == (tmp_path / "buildings.onnx").stat().st_size
    assert values["metadata"]["views"] == ["none"]
    digest = hashlib.sha256((tmp_path / "model" / "ensemble.json").read_bytes()).hexdigest()
    assert values["metadata"]["ensemble_sha256"] == digest
    (tmp_path / "page.py").write_text(snippet("onnxruntime"), encoding="utf-8")
    page = runpy.run_path(str(tmp_path / "page.py"))
    engine = Engine(model, "cpu", "32", views="none")
    for height, width in ((45, 70), (16, 24), (5, 31)):  # the last is smaller than what the graph takes
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = page["probabilities"](image)
        if height >= 16:  # below, more is padded than the engine does
            (expected,) = engine.predict([image])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert found.shape == (3, height, width)
        assert np.array_equal(page["mask"](image), model.decide(torch.from_numpy(found)[None])[0].numpy())


def test_a_torch_export_file_runs_as_the_page_says(command, model, tmp_path):
    code, text, _ = command(
        "export", "--model", "model", "--format", "torch-export", "--output", "buildings.pt2", "--check-images", "1",
        values=False,
    )  # fmt: skip
    assert code == 0
    assert text.startswith("buildings.pt2: 2 members, views flips, combiner mean; ")
    assert "largest difference from the engine: " in text
    (tmp_path / "page.py").write_text(snippet("torch.export.load"), encoding="utf-8")
    page = runpy.run_path(str(tmp_path / "page.py"))
    assert page["about"]["views"] == ["flips"]
    expected = Engine(model, "cpu", "32")(torch.zeros(2, 3, 32, 48))
    assert torch.allclose(page["found"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--format", "onxx"), "unknown format 'onxx'"),
        (("--opset", "7"), "expected an opset from 18 to 23, got 7"),
        (("--output", "there.onnx"), "there.onnx exists already"),
        (("--views", "d5"), "unknown views 'd5'"),
        ((), "cannot find the model 'nowhere'"),
        (("--check-images", "0"), "--check-images: expected a whole number above 0, got 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(command, tmp_path, arguments, reason):
    (tmp_path / "there.onnx").write_bytes(b"mine")
    code, _, errors = command("export", "--model", "nowhere", *arguments)
    assert code == 2
    assert len(errors) == 1
    assert reason in errors[0]
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"


def test_scales_are_refused(command, model, tmp_path):
    code, _, errors = command("export", "--model", "model", "--views", "scales:0.5,1")
    assert code == 2
    assert "choose --views none, flips or d4" in errors[0]
    assert not (tmp_path / "ensemble.onnx").exists()
