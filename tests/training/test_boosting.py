"""Boosting: losses by hand, the running ensemble recomputed apart, and images drawn in proportion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from smp_ensemble.data.forms import load_data
from smp_ensemble.data.loading import ordered_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.exceptions import ConfigError, ScheduleError
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.boosting import Boosting, image_losses
from smp_ensemble.training.callback import SnapshotCallback
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.trainers import Boost

OPTIONS = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", lr=0.02)


def test_losses_by_hand():
    probabilities = torch.tensor([0.5, 0.9, 0.2, 0.1]).view(2, 1, 1, 2)
    target = torch.tensor([[[1, 0]], [[255, 1]]])
    expected = [(-math.log(0.5) - math.log(0.1)) / 2, -math.log(0.1)]
    assert image_losses(probabilities, target, "binary").tolist() == pytest.approx(expected, rel=1e-6)


def test_losses_of_several_classes_are_torchs_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=generator)
    target = torch.randint(0, 4, (3, 5, 6), generator=generator)
    target[0, :2] = 255
    expected = [
        torch.nn.functional.cross_entropy(one[None], mask[None], ignore_index=255).item()
        for one, mask in zip(logits, target, strict=True)
    ]
    assert image_losses(logits.softmax(dim=1), target, "multiclass").tolist() == pytest.approx(expected, rel=1e-5)


def test_losses_of_layers_count_each_valid_entry():
    probabilities = torch.full((1, 2, 1, 2), 0.25)
    target = torch.tensor([[[[1, 0]], [[255, 1]]]])
    expected = (-2 * math.log(0.25) - math.log(0.75)) / 3
    assert image_losses(probabilities, target, "multilabel").item() == pytest.approx(expected, rel=1e-6)


def test_an_image_without_valid_pixels_has_no_loss_and_certainty_costs_a_finite_one():
    losses = image_losses(torch.zeros(2, 1, 2, 2), torch.tensor([[[255] * 2] * 2, [[1] * 2] * 2]), "binary")
    assert losses.tolist() == pytest.approx([0.0, -math.log(1e-6)], rel=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_images_weigh_as_their_loss_to_a_power(strength):
    losses = np.array([0.1, 0.4, 1.0])
    weights = Boost(strength=strength).image_weights(losses)
    assert weights.mean() == pytest.approx(1)
    assert weights / weights[0] == pytest.approx((losses / losses[0]) ** strength)


def test_perfect_snapshots_draw_evenly():
    assert Boost().image_weights(np.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("strength", [-1.0, 11.0])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ConfigError, match="strength from 0"):
        Boost(strength=strength)


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_the_running_ensemble_is_the_mean_of_the_snapshots(make_tiny_network, mode):
    splits = load_data("synthetic:count=12,size=64,seed=5", mode=mode)
    networks = [make_tiny_network(seed, splits.task.num_outputs) for seed in (1, 2, 3)]
    crops = TrainTransform(32, fill=imagenet().raw_mean(), augment="none")

    def loader(seed):
        return ordered_loader(splits.train, crops, batch_size=3, seed=seed)

    boosting = Boosting(Boost(), callback_of(splits), normalization=imagenet(), mode=mode, crops=loader, precision="32")
    boosting.load_state_dict({"members": [network.state_dict() for network in networks], "weights": None})
    working = make_tiny_network(9, splits.task.num_outputs).train()
    before = {name: tensor.clone() for name, tensor in working.state_dict().items()}
    found = boosting.measure(working, seed=4)
    assert working.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in working.state_dict().items())

    expected = []
    for batch in loader(4):
        with torch.no_grad():
            logits = torch.stack([network.eval()(imagenet()(batch["image"])) for network in networks])
        mean = (logits.softmax(dim=2) if mode == "multiclass" else logits.sigmoid()).double().mean(dim=0)
        for one, mask in zip(mean.numpy(), batch["mask"].numpy(), strict=True):
            truth = (
                np.take_along_axis(one, mask[None], axis=0)[0]
                if mode == "multiclass"
                else np.where(mask == 1, one[0], 1 - one[0])
            )
            expected.append(-np.log(truth).mean())
    assert found == pytest.approx(expected, rel=1e-4)


def callback_of(splits, **more):
    return SnapshotCallback(
        Boost(cycles=2), mode=splits.task.mode, class_names=splits.task.class_names, normalization=imagenet(),
        store=MemoryStore(), **more,
    )  # fmt: skip


def test_after_a_snapshot_images_are_drawn_by_their_loss(make_tiny_network, tiny_splits, monkeypatch):
    """All weight on one image: the second cycle sees nothing else."""
    seen = []
    read = type(tiny_splits.train).read

    def record(self, index):
        if len(self) == len(tiny_splits.train):
            seen.append(index)
        return read(self, index)

    class Chosen(Boost):
        def image_weights(self, losses):
            self.asked.append(losses)
            weights = np.zeros_like(losses)
            weights[5] = 1.0
            return weights

    Chosen.asked = []
    monkeypatch.setattr(type(tiny_splits.train), "read", record)
    fit(
        make_tiny_network(), tiny_splits.train, tiny_splits.val, trainer=Chosen(cycles=2), epochs=2,
        store=MemoryStore(), options=OPTIONS,
    )  # fmt: skip
    count = len(tiny_splits.train)
    assert len(Chosen.asked) == 1  # after the last snapshot there is nothing to draw
    assert Chosen.asked[0].shape == (count,)
    first, measured, second = seen[:16], seen[16 : 16 + count], seen[16 + count :]
    assert len(set(first)) == 16
    assert measured == list(range(count))
    assert second == [5] * 16


@pytest.mark.parametrize("wrong", [[1.0], [-1.0] * 16, [float("nan")] * 16])
def test_weights_that_cannot_be_drawn_by_are_refused(make_tiny_network, tiny_splits, wrong):
    class Wrong(Boost):
        def image_weights(self, losses):
            return np.array(wrong)

    with pytest.raises(ConfigError, match="Wrong.image_weights must give 16 finite numbers of 0 or more"):
        fit(
            make_tiny_network(), tiny_splits.train, tiny_splits.val, trainer=Wrong(cycles=2), epochs=2,
            store=MemoryStore(), options=OPTIONS,
        )  # fmt: skip


def test_a_callback_alone_cannot_boost(make_tiny_network, tiny_splits):
    callback = callback_of(tiny_splits)
    host = type("Host", (), {"lr_scheduler_configs": [], "optimizers": [None]})()
    with pytest.raises(ScheduleError, match="'boost' draws training images by their loss.*smp_ensemble.fit"):
        callback.on_fit_start(host, torch.nn.Module())
