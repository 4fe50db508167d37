"""A training that cannot go on says why in one line; one that is told to stop does so after its step."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from smp_ensemble.exceptions import DivergedError, Interrupted
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.checkpointing import CHECKPOINT_FILE, completed_epochs
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.module import SegmentationModule
from smp_ensemble.training.stopping import StopRequest, explained

OPTIONS = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", lr=0.02)


def train(network, splits, folder=None, *, store=None):
    fit(
        network, splits.train, splits.val, trainer="single", epochs=3, store=store or MemoryStore(), options=OPTIONS,
        checkpoint_folder=folder,
    )  # fmt: skip


@pytest.fixture
def at_step(monkeypatch):
    """Does something in a step of training, counted from 1; gives a list of the steps that were made."""
    original, steps = SegmentationModule.training_step, []

    def during(wanted, action):
        def step(self, batch, batch_idx):
            steps.append(len(steps) + 1)
            loss = original(self, batch, batch_idx)
            return action(loss) if len(steps) == wanted else loss

        monkeypatch.setattr(SegmentationModule, "training_step", step)
        return steps

    return during


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_its_step(make_tiny_network, tiny_splits, tmp_path, at_step, number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def hit(loss):
        os.kill(os.getpid(), number)
        return loss

    steps, network = at_step(6, hit), make_tiny_network()
    weights = network.state_dict()["segmentation_head.0.weight"].clone()
    with pytest.raises(Interrupted, match=r"^interrupted in epoch 2 of 3, after step 6$") as caught:
        train(network, tiny_splits, tmp_path)
    assert caught.value.signal_number == number
    assert len(steps) == 6
    assert not torch.equal(network.state_dict()["segmentation_head.0.weight"], weights)
    assert completed_epochs(tmp_path / CHECKPOINT_FILE) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_ctrl_c_acts_at_once(make_tiny_network, tiny_splits, at_step):
    def hit_twice(loss):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    at_step(2, hit_twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(make_tiny_network(), tiny_splits)
    assert not isinstance(caught.value, Interrupted)


def test_a_signal_after_the_last_step_is_not_lost():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_have_no_signals():
    found = []

    def work():
        with StopRequest() as request:
            found.append(request.signal_number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_training_before_a_checkpoint(
    make_tiny_network, tiny_splits, tmp_path, at_step, value
):
    at_step(7, lambda loss: loss * value)
    store = MemoryStore()
    with pytest.raises(
        DivergedError, match=r"^the loss in epoch 2, at step 7, is not a finite number: .* a smaller lr"
    ):
        train(make_tiny_network(), tiny_splits, tmp_path, store=store)
    assert completed_epochs(tmp_path / CHECKPOINT_FILE) == 1
    assert store.kept == []
    loaded = torch.load(tmp_path / CHECKPOINT_FILE, weights_only=True)
    assert all(torch.isfinite(tensor.float()).all() for tensor in loaded["state_dict"].values())


def test_a_weight_that_is_no_number_is_found_at_the_epochs_end(make_tiny_network, tiny_splits, tmp_path, at_step):
    network = make_tiny_network()

    def poison(loss):
        with torch.no_grad():
            network.encoder.layer4[0].conv1.weight[0] = float("nan")  # depth 3: no output depends on it
        return loss

    at_step(4, poison)
    with pytest.raises(DivergedError, match="^a weight after epoch 1 is not a finite number"):
        train(network, tiny_splits, tmp_path)
    assert not list(tmp_path.iterdir())


def test_lack_of_memory_is_one_line_with_the_remedy(make_tiny_network, tiny_splits, at_step):
    at_step(5, lambda loss: loss + torch.empty(10**15).sum())
    with pytest.raises(Exception, match=r"^out of memory in epoch 2 of 3, after step 4, with batch-size=4: .* smaller"):
        train(make_tiny_network(), tiny_splits)


class Host:
    current_epoch, max_epochs, global_step = 1, 3, 7


def chained(*errors):
    for inner, outer in itertools.pairwise(errors):
        outer.__context__ = inner
    return errors[-1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full"), "no room is left"),
        (chained(OSError(errno.EDQUOT, "quota"), RuntimeError("unexpected pos 704 vs 598")), "no room is left"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "no room is left"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (OSError(errno.EACCES, "not yours"), None),
        (RuntimeError("a defect"), None),
    ],
)
def test_what_the_machine_is_to_blame_for_is_told_from_defects(error, message):
    found = explained(error, Host, batch_size=8)
    assert found is None if message is None else str(found).startswith(message)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_torch_says_of_a_full_disk_what_is_understood():
    with pytest.raises(OSError, match="No space left") as caught, Path("/dev/full").open("wb", buffering=0) as file:
        torch.save({"weights": torch.zeros(2_000_000)}, file)
    assert str(explained(caught.value, Host, batch_size=8)).startswith("no room is left on the disk, in epoch 2 of 3")
