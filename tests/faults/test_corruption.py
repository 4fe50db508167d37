"""The corruption matrix: each kind of damage to each file of a model is found, named, and nothing is built."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from faults import damage

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.tracking.flavor import _load_pyfunc, load_model, save_model

pytestmark = pytest.mark.faults

EVERY = 1 if os.environ.get("SMP_ENSEMBLE_FAULT_SECONDS") or os.environ.get("SMP_ENSEMBLE_FUZZ") else 12
"""Of the files of our own code: all in a full run, every twelfth in the gate, others for each kind of damage."""

EXPECTED = {
    "MLmodel", "requirements.txt", "python_env.yaml", "files.sha256", "ensemble.json", "combiner.safetensors",
    *(f"members/0{i}/{name}" for i in (0, 1) for name in ("config.json", "model.safetensors", "training_images.txt")),
    "code/smp_ensemble/__init__.py", "code/smp_ensemble/tracking/flavor.py",
}  # fmt: skip


def make_member(seed: int) -> Member:
    torch.manual_seed(seed)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    network = create_network("unet", encoder_name="tu-test_resnet", model_options=options)
    return Member(network, imagenet(), training_images=[f"{seed:032x}", "f" * 32])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With every file that a model can have."""
    state = {"weight": torch.ones(2, 1, 1), "bias": torch.zeros(1)}
    ensemble = Ensemble(
        [make_member(1), make_member(2)], mode="binary", combiner="stacking", state=state, class_names=("land", "roof")
    )
    folder = tmp_path_factory.mktemp("corruption") / "model"
    save_model(ensemble, folder)
    return folder


@pytest.fixture(scope="module")
def contents(model) -> dict[str, bytes]:
    files = sorted(path for path in model.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(model).as_posix(): path.read_bytes() for path in files}


def restore(model, contents, *names):
    for name in names:
        path = model / name
        if path.is_symlink():
            path.unlink()
        path.write_bytes(contents[name])


def check_named(message: str, name: str, other: str) -> None:
    assert name in message or other in message, (name, message)
    for part in ("expected", "found"):
        assert part in message, (name, message)
    assert "\n" not in message


@pytest.mark.parametrize("kind", damage.KINDS, ids=lambda kind: kind.__name__)
def test_every_damage_of_every_file_is_found_and_nothing_is_built(model, contents, monkeypatch, kind):
    assert set(contents) >= EXPECTED
    assert {"METADATA", "entry_points.txt"} <= {name.rpartition("/")[2] for name in contents if ".dist-info/" in name}
    built = []
    monkeypatch.setattr("smp_ensemble.ensembling.artifact.load_network", built.append)
    first = damage.KINDS.index(kind)
    code = [name for name in contents if name.startswith("code/")]
    names = [name for name in contents if name not in code] + code[first % EVERY :: EVERY]
    rng = np.random.default_rng(first)
    found = spared = 0
    for name in names:
        others = [other for other in contents if contents[other] != contents[name]]
        other = others[rng.integers(len(others))]
        kind(model / name, rng, model / other)
        path = model / name
        if path.is_file() and not path.is_symlink() and path.read_bytes() == contents[name] == b"":
            spared += 1  # an empty file cannot be cut
            continue
        try:
            for load in (load_model, _load_pyfunc) if found % 5 == 0 else (load_model,):
                with pytest.raises(IntegrityError) as caught:
                    load(str(model))
                check_named(str(caught.value), name, other if kind is damage.swapped else name)
            found += 1
        finally:
            restore(model, contents, name, other)
    assert built == []
    assert found + spared == len(names)
    print(f"{kind.__name__}: {found} of {found} found, {spared} files have nothing to lose")


def test_afterwards_the_model_is_whole(model):
    assert len(load_model(str(model)).members) == 2


@pytest.mark.parametrize("place", ["code/torch.py", "code/smp_ensemble/extra.py", "code/new/__init__.py"])
def test_a_file_more_in_the_code_is_found(model, place):
    path = model / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise SystemExit('this must never run')\n")
    with pytest.raises(IntegrityError, match=f"{place} was added: expected only files that files.sha256 lists"):
        load_model(str(model))
    path.unlink()


def test_a_linked_folder_more_in_the_code_is_found(model, tmp_path):
    link = model / "code" / "linked"
    link.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(IntegrityError, match="code/linked was added"):
        load_model(str(model))
    link.unlink()


def test_what_python_and_mlflow_leave_behind_is_no_damage(model):
    left = [model / "code" / "smp_ensemble" / "__pycache__" / "cli.cpython-311.pyc", model / "registered_model_meta"]
    left[0].parent.mkdir(exist_ok=True)
    left[0].write_bytes(b"")
    left[1].write_text("model_name: roofs\n")
    try:
        load_model(str(model))
    finally:  # the matrix damages every file that it finds, in whatever order the tests run
        for path in left:
            path.unlink()


def test_a_model_of_the_first_version_loads_with_its_lesser_protection(model, contents, tmp_path):
    """It has no list of files: MLmodel holds the SHA-256 of `ensemble.json`, and nothing holds that of the rest."""
    description = (model / "MLmodel").read_text()
    try:
        (model / "files.sha256").unlink()
        (model / "MLmodel").write_text(description.replace("    manifest: files.sha256\n", ""))
        assert "manifest" not in (model / "MLmodel").read_text()
        (model / "requirements.txt").write_text("other\n")
        load_model(str(model))
        spec = json.loads(contents["ensemble.json"])
        (model / "ensemble.json").write_text(json.dumps({**spec, "threshold": 0.4}))
        with pytest.raises(IntegrityError, match="ensemble.json was changed: expected SHA-256"):
            load_model(str(model))
    finally:
        restore(model, contents, "files.sha256", "MLmodel", "requirements.txt", "ensemble.json")
