"""Checkpoints made to do harm are refused, and nothing that they hold has run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import pytest
import torch
from tiny import OPTIONS

from smp_ensemble.exceptions import NetworkError
from smp_ensemble.workflows.checkpoints import load_checkpoint, read_tensors

SMALL = {"arch": "unet", "encoder_name": "resnet18", "model_options": OPTIONS}


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (exec, (f"import pathlib; pathlib.Path({self.path!r}).write_text('harm')",))


def test_the_trap_is_one(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "harm")))
    assert (tmp_path / "harm").read_text() == "harm"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "beside-tensors", "rezipped"])
def test_a_pickle_is_never_run(tmp_path, tiny_splits, form, suffix):
    harm, path = tmp_path / "harm", tmp_path / f"weights{suffix}"
    trap = Trap(harm)
    match form:
        case "zip":
            torch.save(trap, path)
        case "legacy":
            torch.save(trap, path, _use_new_zipfile_serialization=False)
        case "plain":
            path.write_bytes(pickle.dumps(trap))
        case "beside-tensors":
            torch.save({"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": trap}, path)
        case "rezipped":  # a true file of torch's, with another pickle in it
            buffer = io.BytesIO()
            torch.save({"weight": torch.ones(2)}, buffer)
            with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
                for name in old.namelist():
                    new.writestr(name, pickle.dumps(trap, 2) if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(NetworkError, match="cannot read") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(NetworkError, match="cannot read"):
        load_checkpoint(path, tiny_splits.task, **SMALL)
    assert not harm.exists()


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b"not json", b"\xff", b"[1]", b"null", b"{}", b'{"_model_class": "os.system"}'],
)
def test_a_folder_whose_configuration_is_none_is_refused(tmp_path, make_tiny_network, tiny_splits, data):
    make_tiny_network().save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_bytes(data)
    with pytest.raises(NetworkError):
        load_checkpoint(tmp_path / "folder", tiny_splits.task, **SMALL)


def test_a_folder_that_would_fetch_is_refused(tmp_path, make_tiny_network, tiny_splits):
    make_tiny_network().save_pretrained(tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_name": "tu-hf-hub:somebody/something"}))
    with pytest.raises(NetworkError, match="names a place at 'encoder_name'"):
        load_checkpoint(tmp_path / "folder", tiny_splits.task, **SMALL)
    (tmp_path / "folder" / "model.safetensors").unlink()
    with pytest.raises(NetworkError, match="expected a file of weights, found none"):
        load_checkpoint(tmp_path / "folder", tiny_splits.task, **SMALL)
