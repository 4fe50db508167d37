"""`fit`: the same training inside and outside, with any number of workers, and after a resume."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from smp_ensemble.data.forms import load_data
from smp_ensemble.data.loading import evaluation_loader, training_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.callback import SnapshotCallback
from smp_ensemble.training.fit import FitOptions, fit
from smp_ensemble.training.losses import make_loss
from smp_ensemble.training.optimizers import make_optimizer
from smp_ensemble.training.trainers import SSE

OPTIONS = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", lr=0.02, encoder_lr_scale=0.5)
METHOD = SSE(cycles=2)


def trained(network, splits, *, options=OPTIONS, epochs=4, **more):
    store = MemoryStore()
    fit(network, splits.train, splits.val, trainer=METHOD, epochs=epochs, store=store, options=options, **more)
    return store


def assert_same_weights(one, other):
    assert len(one.kept) == len(other.kept) > 0
    for left, right in zip(one.kept, other.kept, strict=True):
        assert left.record.step == right.record.step
        for name, tensor in left.weights.items():
            assert torch.equal(tensor, right.weights[name]), name


class PlainModule(pl.LightningModule):
    """A user's own module for the same training, written apart."""

    def __init__(self, network):
        super().__init__()
        self.network, self.normalization = network, imagenet()
        self.loss = make_loss("auto", "binary", 1)
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])
        images = self.normalization(batch["image"]).contiguous(memory_format=torch.channels_last)
        return self.loss(self.network(images), batch["mask"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.network(self.normalization(batch["image"])), batch["mask"]))

    def configure_optimizers(self):
        return make_optimizer(self.network, "sgd", lr=0.02, weight_decay=1e-4, encoder_lr_scale=0.5)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
def test_rates_steps_and_weights_are_those_of_a_users_own_trainer(make_tiny_network, tiny_splits):
    ours = trained(make_tiny_network(), tiny_splits)

    store = MemoryStore()
    module = PlainModule(make_tiny_network().to(memory_format=torch.channels_last))
    callback = SnapshotCallback(METHOD, mode="binary", class_names=("a", "b"), normalization=imagenet(), store=store)
    host = pl.Trainer(
        max_epochs=4, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    batches = training_loader(
        tiny_splits.train, TrainTransform(32, fill=imagenet().raw_mean()), batch_size=4, seed=0, workers=0,
        epoch_of=lambda: host.global_step // 4,
    )  # fmt: skip
    assert len(batches) == 4
    host.fit(module, batches, evaluation_loader(tiny_splits.val, batch_size=4, workers=0, divisor=8))

    assert_same_weights(ours, store)
    schedule = METHOD.schedule(4, 4)
    scales = [group["initial_lr"] for group in host.optimizers[0].param_groups]
    assert sorted(set(scales)) == [0.01, 0.02]
    assert module.rates == [
        pytest.approx([scale * schedule.factor(step) for scale in scales], abs=1e-15) for step in range(16)
    ]


@pytest.mark.slow
def test_workers_change_nothing(make_tiny_network, tiny_splits):
    with_workers = FitOptions(**{**vars(OPTIONS), "workers": 2})
    assert_same_weights(
        trained(make_tiny_network(), tiny_splits, epochs=2),
        trained(make_tiny_network(), tiny_splits, epochs=2, options=with_workers),
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resume_at_an_epoch_end_changes_nothing(make_tiny_network, tiny_splits, tmp_path, workers):
    options = FitOptions(**{**vars(OPTIONS), "workers": workers})
    whole = trained(make_tiny_network(), tiny_splits, options=options)

    class Cut(Exception):  # noqa: N818 (not an error: a pulled plug)
        pass

    class CutStore(MemoryStore):
        def log_metrics(self, metrics, step):
            super().log_metrics(metrics, step)
            if step == 12:
                raise Cut

    store = CutStore()
    with pytest.raises(Cut):
        fit(
            make_tiny_network(), tiny_splits.train, tiny_splits.val, trainer=METHOD, epochs=4, store=store,
            options=options, checkpoint_folder=tmp_path,
        )  # fmt: skip
    resumed = trained(
        make_tiny_network(seed=99), tiny_splits, options=options, resume_from=tmp_path / "last.ckpt",
        checkpoint_folder=tmp_path,
    )  # fmt: skip
    assert [kept.record.step for kept in (*store.kept, *resumed.kept)] == [8, 16]
    assert [kept.record.index for kept in (*store.kept, *resumed.kept)] == [1, 2]
    resumed.kept.insert(0, store.kept[0])
    assert_same_weights(whole, resumed)


def test_scores_belong_to_exactly_the_snapshots_weights(make_tiny_network, tiny_splits):
    store = trained(make_tiny_network(), tiny_splits, epochs=2)
    for kept in store.kept:
        network = make_tiny_network(seed=7)
        network.load_state_dict(kept.weights)
        network.eval()
        scores = SegmentationScores(tiny_splits.task)
        for index in range(len(tiny_splits.val)):
            image, mask = tiny_splits.val.read(index)
            with torch.no_grad():
                logits = network(imagenet()(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]))
            scores.update(logits.sigmoid(), torch.from_numpy(mask.astype("int64"))[None])
        assert kept.record.metrics["val_iou"] == pytest.approx(float(scores.compute()["iou"]), abs=1e-6)
        assert kept.record.training_images == tiny_splits.train.image_digests
        assert kept.record.dataset == tiny_splits.val.reference()
        assert [preview.shape for preview in kept.record.previews] == [(64, 64)] * len(kept.record.previews)


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_other_modes_train_and_score_each_class(make_tiny_network, mode):
    splits = load_data("synthetic:count=16,size=64,seed=5", mode=mode)
    network = make_tiny_network(num_outputs=splits.task.num_outputs)
    before = [parameter.clone() for parameter in network.parameters()]
    store = MemoryStore()
    fit(network, splits.train, splits.val, trainer="single", epochs=1, store=store, options=OPTIONS)
    (kept,) = store.kept
    named = {name.partition("/")[2] for name in kept.record.metrics if name.startswith("val_iou/")}
    assert named <= set(splits.task.class_names)
    assert named
    assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_a_frozen_encoder_stays_bit_for_bit(make_tiny_network, tiny_splits):
    network = make_tiny_network()
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    trained(network, tiny_splits, epochs=2, options=FitOptions(**{**vars(OPTIONS), "freeze_encoder": True}))
    assert all(torch.equal(tensor, network.encoder.state_dict()[name]) for name, tensor in before.items())


def test_mixed_precision_trains_to_finite_weights(make_tiny_network, tiny_splits):
    store = trained(
        make_tiny_network(), tiny_splits, epochs=2, options=FitOptions(**{**vars(OPTIONS), "precision": "bf16-mixed"})
    )
    for tensor in store.kept[-1].weights.values():
        assert tensor.dtype in {torch.float32, torch.int64}
        assert torch.isfinite(tensor.float()).all()


def test_a_crop_that_does_not_fit_the_stride_is_refused(make_tiny_network, tiny_splits):
    with pytest.raises(ConfigError, match="multiple of the network's stride 8, got 30"):
        trained(make_tiny_network(), tiny_splits, options=FitOptions(**{**vars(OPTIONS), "crop_size": 30}))


def test_data_of_two_tasks_is_refused(make_tiny_network, tiny_splits):
    other = load_data("synthetic:count=16,size=64,seed=5", mode="multiclass")
    with pytest.raises(ConfigError, match="must have one task"):
        fit(make_tiny_network(), tiny_splits.train, other.val, store=MemoryStore(), options=OPTIONS)
