"""Exported files: the engine's numbers from onnxruntime and torch.export, metadata read back, nothing left over."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from halving import COMBINERS, VOTES, make_ensemble

from smp_ensemble.data.normalization import Normalization, imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.postprocessing import PostProcessing
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.inference import export
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.export import SUFFIXES, export_ensemble

every_format = pytest.mark.parametrize("format_name", SUFFIXES)


def open_alone(path):
    """What the file answers to images, opened by what runs it and not by the package."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])
    module = torch.export.load(path).module()
    return lambda images: module(images).detach()


def run_alone(path, images: torch.Tensor) -> torch.Tensor:
    """The file's answer to these images."""
    return open_alone(path)(images)


@every_format
def test_the_file_gives_what_the_engine_gives_and_says_what_it_is(tmp_path, format_name):
    ensemble = make_ensemble("multiclass")
    ensemble.postprocess = PostProcessing(min_area=9)
    path = tmp_path / "new" / f"model{SUFFIXES[format_name]}"
    found = export_ensemble(ensemble, path, format_name=format_name, check_images=3, sha256="ab" * 32)
    assert found.path == path
    assert found.comparison.difference <= 1e-5
    assert (found.comparison.images, found.comparison.undecided) == (3, 0)
    images = torch.randint(0, 256, (5, 3, 6, 10)).float()
    assert torch.allclose(run_alone(path, images), Engine(ensemble, "cpu", "32")(images), rtol=0, atol=1e-5)
    if format_name == "onnx":
        told = {entry.key: entry.value for entry in onnx.load(path).metadata_props}["smp_ensemble"]
    else:
        extra = {"smp_ensemble.json": ""}
        torch.export.load(path, extra_files=extra)
        told = extra["smp_ensemble.json"]
    metadata = json.loads(told)
    assert metadata == found.metadata
    expected = {
        "mode": "multiclass", "class_names": ["a", "b", "c"], "in_channels": 3, "stride": 2, "smallest_side": 4,
        "members": 2, "combiner": "mean", "weights": [1, 2], "views": ["none"], "temperature": 0.6, "threshold": 0.4,
        "reject": 0, "ensemble_sha256": "ab" * 32,
    }  # fmt: skip
    assert expected.items() <= metadata.items()
    assert PostProcessing.from_dict(metadata["postprocess"]) == PostProcessing(min_area=9)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert str(tmp_path.home()).encode() not in path.read_bytes()
    assert b"ensembling/ensemble.py" not in path.read_bytes()  # where each operation came from stays here


@pytest.mark.slow
@pytest.mark.parametrize("combiner", COMBINERS)
@pytest.mark.parametrize(
    ("format_name", "mode"),
    [("onnx", "multiclass"), ("onnx", "multilabel"), ("torch-export", "binary")],
)
def test_every_combiner_and_mode(tmp_path, format_name, mode, combiner):
    ensemble = make_ensemble(mode, combiner)
    path = tmp_path / f"model{SUFFIXES[format_name]}"
    found = export_ensemble(ensemble, path, format_name=format_name, check_images=15)
    assert found.comparison.difference <= 1e-5
    assert (found.comparison.undecided > 0) <= (combiner in VOTES)
    assert found.comparison.undecided <= 0.02
    if combiner in VOTES:
        assert found.metadata["threshold"] == 0.5  # of shares of votes; the members' own is in the graph


@pytest.mark.slow
@every_format
def test_unets_with_all_views_in_every_batch_and_size(tmp_path, make_tiny_network, format_name):
    normalizations = (imagenet(), Normalization("per-image", [0.0] * 3, [1.0] * 3))
    members = [Member(make_tiny_network(seed), norm) for seed, norm in enumerate(normalizations)]
    ensemble = Ensemble(members, mode="binary", combiner="geometric", temperature=0.8, views="d4")
    engine = Engine(ensemble, "cpu", "32")
    path = tmp_path / f"model{SUFFIXES[format_name]}"
    export_ensemble(ensemble, path, format_name=format_name, check_images=1)
    run = open_alone(path)
    for batch in range(1, 9):
        for height, width in ((16, 16), (24, 80), (64, 16)):
            images = torch.randint(0, 256, (batch, 3, height, width)).float()
            assert torch.allclose(run(images), engine(images), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_the_opset_is_the_one_that_was_asked_for(tmp_path, opset):
    export_ensemble(make_ensemble("binary"), tmp_path / "model.onnx", opset=opset, check_images=1)
    imports = {one.domain: one.version for one in onnx.load(tmp_path / "model.onnx").opset_import}
    assert imports[""] == opset


def test_a_pt2_file_of_ours_holds_no_pickle_and_needs_none(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    ensemble = make_ensemble("binary", "stacking")
    export_ensemble(ensemble, path, format_name="torch-export", check_images=1)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        configs = [archive.read(name) for name in names if name.endswith("_config.json")]
        assert len(configs) == 2
        assert not any(b'"use_pickle": true' in config for config in configs)
        for name in names:
            if not name.endswith(".json") and "/data/weights/" not in name and "/data/constants/" not in name:
                assert len(archive.read(name)) <= 64, name  # versions, byte order, and no example inputs

    def refuse(*_, **__):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    images = torch.randint(0, 256, (1, 3, 8, 4)).float()
    assert torch.allclose(run_alone(path, images), Engine(ensemble, "cpu", "32")(images), rtol=0, atol=1e-5)


def test_a_file_that_gives_something_else_is_not_put_in_place(tmp_path, monkeypatch):
    genuine = export.open_program

    def off(path):
        run = genuine(path)
        return lambda images: run(images) + 0.25

    monkeypatch.setattr(export, "open_program", off)
    with pytest.raises(NetworkError, match="differs from the engine by 0.25"):
        export_ensemble(make_ensemble("binary"), tmp_path / "model.pt2", format_name="torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("model.onnx", {"format_name": "onxx"}, "unknown format 'onxx': did you mean 'onnx'"),
        ("model.onnx", {"opset": 9}, "expected an opset from 18 to 23, got 9"),
        ("model.onnx", {"format_name": "torch-export"}, "expected an output that ends in .pt2 for torch-export"),
        ("there.onnx", {}, "there.onnx exists already: choose another output, or delete it"),
        ("model.onnx", {"views": "scales:0.5,1"}, "views 'scales:0.5,1' cannot be exported"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, name, options, reason):
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=reason):
        export_ensemble(make_ensemble("binary"), tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"


def test_missing_packages_are_named_with_what_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ConfigError, match=r"format onnx needs onnxscript: pip install 'smp-ensemble\[export\]'"):
        export_ensemble(make_ensemble("binary"), tmp_path / "model.onnx")


def test_more_weights_than_one_onnx_file_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONNX_LIMIT_BYTES", 100)
    with pytest.raises(ConfigError, match="use format torch-export, or fewer members"):
        export_ensemble(make_ensemble("binary"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_16_bit_values_and_other_numbers_of_bands(tmp_path, make_tiny_network):
    member = Member(make_tiny_network(0, 2, in_channels=5), Normalization("none", [0] * 5, [1] * 5, 65535))
    ensemble = Ensemble([member], mode="multilabel")
    path = tmp_path / "model.pt2"
    found = export_ensemble(ensemble, path, format_name="torch-export", check_images=1)
    assert found.metadata["in_channels"] == 5
    values = np.random.default_rng(0).integers(0, 65536, (2, 5, 16, 24)).astype(np.float32)
    images = torch.from_numpy(values)
    assert torch.allclose(run_alone(path, images), Engine(ensemble, "cpu", "32")(images), rtol=0, atol=1e-5)
