"""Checkpoints are found, read without executing anything, and fitted into a network."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny import OPTIONS

from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.workflows.checkpoints import find_checkpoints, load_checkpoint, read_tensors

SMALL = {"arch": "unet", "encoder_name": "resnet18", "model_options": OPTIONS}


def test_paths_globs_and_folders_are_found_in_order(tmp_path, make_tiny_network):
    for name in ("b.pt", "a.ckpt", "notes.txt"):
        (tmp_path / name).touch()
    make_tiny_network().save_pretrained(tmp_path / "folder")
    found = find_checkpoints(f"{tmp_path / '*.pt'}, {tmp_path / 'a.ckpt'},{tmp_path / 'folder'}")
    assert [path.name for path in found] == ["b.pt", "a.ckpt", "folder"]
    with pytest.raises(ConfigError, match="notes.txt' is no checkpoint: expected .pt, .pth"):
        find_checkpoints(str(tmp_path / "notes.txt"))
    with pytest.raises(ConfigError, match="no checkpoint found at"):
        find_checkpoints(str(tmp_path / "*.safetensors"))


@pytest.mark.parametrize("wrap", ["none", "state_dict", "model", "prefix", "safetensors", "folder"])
def test_weights_come_back_whatever_wraps_them(tmp_path, make_tiny_network, tiny_splits, wrap):
    network = make_tiny_network(seed=5)
    tensors = network.state_dict()
    path = tmp_path / {"safetensors": "a.safetensors", "folder": "a"}.get(wrap, "a.pt")
    if wrap == "folder":
        network.save_pretrained(path)
    elif wrap == "safetensors":
        save_file(tensors, path)
    elif wrap == "prefix":
        torch.save({"loss.weight": torch.ones(1), **{f"net.{name}": one for name, one in tensors.items()}}, path)
    else:
        torch.save(tensors if wrap == "none" else {wrap: tensors, "epoch": 3}, path)
    loaded = load_checkpoint(path, tiny_splits.task, **SMALL)
    assert not loaded.training
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())


def test_what_does_not_fit_or_would_run_code_is_refused(tmp_path, make_tiny_network, tiny_splits):
    make_tiny_network(num_outputs=4).save_pretrained(tmp_path / "four")
    with pytest.raises(NetworkError, match="four has 4 outputs and 3 bands, the data needs 1 and 3"):
        load_checkpoint(tmp_path / "four", tiny_splits.task, **SMALL)
    torch.save(make_tiny_network(), tmp_path / "whole.pt")
    with pytest.raises(NetworkError, match="without executing code that it holds"):
        read_tensors(tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(NetworkError, match="expected a state dict in .*list.pt, got list"):
        read_tensors(tmp_path / "list.pt")
