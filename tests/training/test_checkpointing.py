"""Checkpoints are whole or not there, hold all that matters, and load without executing anything."""

from __future__ import annotations

import errno

import pytest
import torch

from smp_ensemble.exceptions import IntegrityError, TrainingError
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.checkpointing import CHECKPOINT_FILE, DurableCheckpointIO, completed_epochs
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions

OPTIONS = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", lr=0.02)


def trained(network, splits, *, epochs=3, options=OPTIONS, store=None, **more):
    store = store or MemoryStore()
    fit(network, splits.train, splits.val, trainer="single", epochs=epochs, store=store, options=options, **more)
    return store


class Cut(Exception):  # noqa: N818 (not an error: a pulled plug)
    pass


class CutStore(MemoryStore):
    """Pulls the plug after some epoch."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        if step == self.step:
            raise Cut


def test_networks_with_dropout_go_on_with_the_same_random_numbers(make_tiny_network, tiny_splits, tmp_path):
    whole = trained(make_tiny_network(dropout=0.5), tiny_splits)
    with pytest.raises(Cut):
        trained(make_tiny_network(dropout=0.5), tiny_splits, store=CutStore(8), checkpoint_folder=tmp_path)
    checkpoint = tmp_path / CHECKPOINT_FILE
    assert completed_epochs(checkpoint) == 1
    torch.manual_seed(99)
    resumed = trained(
        make_tiny_network(seed=9, dropout=0.5), tiny_splits, resume_from=checkpoint, checkpoint_folder=tmp_path
    )
    for name, tensor in whole.kept[0].weights.items():
        assert torch.equal(tensor, resumed.kept[0].weights[name]), name


def test_a_training_that_had_stopped_early_does_not_go_on(make_tiny_network, tiny_splits, tmp_path):
    options = FitOptions(**{**vars(OPTIONS), "lr": 1e-12, "patience": 1})  # the score never gets better than the first
    store = trained(make_tiny_network(), tiny_splits, epochs=8, options=options, checkpoint_folder=tmp_path)
    assert [kept.record.step for kept in store.kept] == [8]
    again = trained(
        make_tiny_network(), tiny_splits, epochs=8, options=options, resume_from=tmp_path / CHECKPOINT_FILE,
        checkpoint_folder=tmp_path,
    )  # fmt: skip
    assert (again.kept, again.history) == ([], [])


def test_a_checkpoint_for_which_there_is_no_room_leaves_the_last_one(
    make_tiny_network, tiny_splits, tmp_path, monkeypatch
):
    """With one line that says what happened, and what to do."""
    save = torch.save

    def full(values, file, *arguments, **more):
        if values.get("epoch") == 1:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(values, file, *arguments, **more)

    monkeypatch.setattr("smp_ensemble.training.checkpointing.torch.save", full)
    with pytest.raises(
        TrainingError, match=r"^no room is left on the disk, in epoch 2 of 3, after step 8: .* Free some"
    ):
        trained(make_tiny_network(), tiny_splits, checkpoint_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]
    assert completed_epochs(tmp_path / CHECKPOINT_FILE) == 1


def test_a_checkpoint_replaces_the_last_one_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / CHECKPOINT_FILE
    for value in (1, 2):
        DurableCheckpointIO().save_checkpoint({"value": torch.tensor(value)}, path)
        assert torch.load(path, weights_only=True) == {"value": torch.tensor(value)}
        assert [one.name for one in path.parent.iterdir()] == [CHECKPOINT_FILE]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"x" * 1000])
def test_a_broken_checkpoint_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"last.ckpt is not a whole checkpoint: .*: delete its folder"):
        completed_epochs(path)
