"""`fit`: the same training inside and outside, with any number of workers, and after a resume."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from smp_ensemble import registry
from smp_ensemble.data.forms import load_data
from smp_ensemble.data.loading import evaluation_loader, training_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.testing import MemoryStore, check_trainer
from smp_ensemble.training.callback import SnapshotCallback
from smp_ensemble.training.choosing import validation_loss
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.losses import make_loss
from smp_ensemble.training.optimizers import make_optimizer
from smp_ensemble.training.refreshing import refresh_on_crops, refresh_on_images
from smp_ensemble.training.trainers import EMA, FGE, GROUP, SSE, SWA, Boost, Checkpoints, Single, make_trainer

OPTIONS = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", lr=0.02, encoder_lr_scale=0.5)
METHOD = SSE(cycles=2)


def trained(network, splits, *, trainer=METHOD, options=OPTIONS, epochs=4, **more):
    store = MemoryStore()
    fit(network, splits.train, splits.val, trainer=trainer, epochs=epochs, store=store, options=options, **more)
    return store


def with_options(**changed):
    return replace(OPTIONS, **changed)


def steps_of(store):
    return [kept.record.step for kept in store.kept]


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
    with_workers = with_options(workers=2)
    assert_same_weights(
        trained(make_tiny_network(), tiny_splits, epochs=2),
        trained(make_tiny_network(), tiny_splits, epochs=2, options=with_workers),
    )


class Cut(Exception):  # noqa: N818 (not an error: a pulled plug)
    pass


class CutStore(MemoryStore):
    """Pulls the plug after the third epoch of four."""

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        if step == 12:
            raise Cut


@pytest.mark.parametrize(
    ("trainer", "changed"),
    [
        (METHOD, {}),
        (SWA(start=0.5), {}),
        (EMA(decay=0.9), {}),
        (Boost(cycles=4), {}),
        (METHOD, {"optimizer": "lookahead_sgd"}),
        (METHOD, {"batch_norm": "crops"}),
        (SWA(start=0.5), {"batch_norm": "crops"}),
        (METHOD, {"optimizer": "lookahead_adamw", "lr": 0.001}),
        pytest.param(METHOD, {"workers": 2}, marks=pytest.mark.slow),
        pytest.param(Boost(cycles=4), {"workers": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(map(str, value.values())) or "plain",
)
def test_a_resume_at_an_epoch_end_changes_nothing(make_tiny_network, tiny_splits, tmp_path, trainer, changed):
    options = with_options(**changed)
    whole = trained(make_tiny_network(), tiny_splits, trainer=trainer, options=options)
    store = CutStore()
    with pytest.raises(Cut):
        fit(
            make_tiny_network(), tiny_splits.train, tiny_splits.val, trainer=trainer, epochs=4, store=store,
            options=options, checkpoint_folder=tmp_path,
        )  # fmt: skip
    resumed = trained(
        make_tiny_network(seed=99), tiny_splits, trainer=trainer, options=options, resume_from=tmp_path / "last.ckpt",
        checkpoint_folder=tmp_path,
    )  # fmt: skip
    assert steps_of(store) + steps_of(resumed) == steps_of(whole)
    resumed.kept[:0] = store.kept
    assert [kept.record.index for kept in resumed.kept] == list(range(1, len(whole.kept) + 1))
    assert_same_weights(whole, resumed)


METHODS = {
    "single": (Single(), [16]),
    "snapshot": (SSE(cycles=2), [8, 16]),
    "fge": (FGE(start=0.5), [12]),
    "swa": (SWA(start=0.5), [16]),
    "ema": (EMA(), [16]),
    "checkpoints": (Checkpoints(every_epochs=2), [8, 16]),
    "boost": (Boost(cycles=2), [8, 16]),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_its_snapshots_with_their_own_scores(make_tiny_network, tiny_splits, name):
    assert set(METHODS) <= set(registry.names(GROUP))
    method, steps = METHODS[name]
    store = trained(make_tiny_network(), tiny_splits, trainer=method)
    assert steps_of(store) == (steps if name != "fge" else list(method.schedule(4, 4).snapshot_steps))
    for kept in store.kept:
        assert kept.record.params["trainer"] == name
        assert rescored(make_tiny_network, tiny_splits, kept.weights) == pytest.approx(
            kept.record.metrics["val_iou"], abs=1e-6
        )


def test_every_registered_method_keeps_its_promises():
    for name in METHODS:
        check_trainer(make_trainer(name))


def rescored(make_tiny_network, splits, weights):
    """Validation IoU of these weights, computed apart."""
    network = make_tiny_network(seed=7)
    network.load_state_dict(weights)
    network.eval()
    scores = SegmentationScores(splits.task)
    for index in range(len(splits.val)):
        image, mask = splits.val.read(index)
        with torch.no_grad():
            logits = network(imagenet()(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]))
        scores.update(logits.sigmoid(), torch.from_numpy(mask.astype("int64"))[None])
    return float(scores.compute()["iou"])


class RecordingStore(MemoryStore):
    """Keeps the network's own weights at each epoch end, beside the snapshots."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.raw = {}

    def log_metrics(self, metrics, step):
        super().log_metrics(metrics, step)
        self.raw[step] = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}


def test_swa_keeps_the_mean_of_epoch_ends_with_its_own_statistics_and_score(make_tiny_network, tiny_splits):
    network = make_tiny_network()
    store = RecordingStore(network)
    options = with_options()
    fit(network, tiny_splits.train, tiny_splits.val, trainer=SWA(start=0.5), epochs=4, store=store, options=options)
    (kept,) = store.kept
    parameters = {name for name, _ in network.named_parameters()}
    for name, tensor in kept.weights.items():
        stored = torch.stack([store.raw[step][name].double() for step in (8, 12, 16)])
        if name in parameters:
            torch.testing.assert_close(tensor.double(), stored.mean(dim=0), rtol=0, atol=1e-6)
        elif "running" in name and name.startswith("decoder"):  # the encoder's last stages are not used here
            assert not torch.allclose(tensor.double(), stored.mean(dim=0))
    step, last = store.history[-1]
    assert step == 16
    assert last["average/val_iou"] == kept.record.metrics["val_iou"]
    assert "val_iou" not in last
    assert "val_iou" in store.history[-2][1]


def test_an_averages_statistics_may_be_those_of_whole_training_images(make_tiny_network, tiny_splits):
    options = with_options(batch_norm="images")
    (kept,) = trained(make_tiny_network(), tiny_splits, trainer=SWA(start=0.5), epochs=2, options=options).kept
    images = np.stack([tiny_splits.train.read(index)[0] for index in range(len(tiny_splits.train))])
    normalized = imagenet()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    weight = kept.weights["encoder.conv1.weight"]
    inputs = torch.nn.functional.conv2d(normalized, weight, stride=2, padding=3).double().numpy()
    assert kept.weights["encoder.bn1.running_mean"].numpy() == pytest.approx(inputs.mean(axis=(0, 2, 3)), abs=1e-4)
    assert kept.weights["encoder.bn1.running_var"].numpy() == pytest.approx(inputs.var(axis=(0, 2, 3)), rel=1e-4)


def test_ema_keeps_its_own_weights_and_its_own_score(make_tiny_network, tiny_splits):
    network = make_tiny_network()
    store = RecordingStore(network)
    method = EMA(decay=0.9)
    fit(network, tiny_splits.train, tiny_splits.val, trainer=method, epochs=2, store=store, options=OPTIONS)
    (kept,) = store.kept
    raw = rescored(make_tiny_network, tiny_splits, store.raw[8])
    own = rescored(make_tiny_network, tiny_splits, kept.weights)
    assert kept.record.metrics["val_iou"] == pytest.approx(own, abs=1e-6)
    assert raw != pytest.approx(own, abs=1e-6)
    name = "segmentation_head.0.weight"
    assert not torch.equal(kept.weights[name], store.raw[8][name])


@pytest.mark.parametrize("averaging", [SWA(start=0.5, swa_lr=1.0), EMA()])
def test_an_average_changes_nothing_in_the_training_itself(make_tiny_network, tiny_splits, averaging):
    """The same rates without an averager give the same weights and statistics at every epoch end, bit for bit."""

    class Alike(type(averaging)):
        def averager(self):
            return None

    stores = []
    for method in (averaging, Alike(**vars(averaging))):
        network = make_tiny_network()
        stores.append(RecordingStore(network))
        fit(network, tiny_splits.train, tiny_splits.val, trainer=method, epochs=3, store=stores[-1], options=OPTIONS)
        assert network.training
    for step, weights in stores[0].raw.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, stores[1].raw[step][name]), (step, name)


def test_an_average_leaves_a_frozen_encoder_alone(make_tiny_network, tiny_splits):
    network = make_tiny_network()
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    store = trained(network, tiny_splits, trainer=SWA(start=0.5), epochs=2, options=with_options(freeze_encoder=True))
    for name, tensor in before.items():
        assert torch.equal(tensor, store.kept[0].weights[f"encoder.{name}"]), name


@pytest.mark.parametrize("source", ["images", "crops"])
def test_refreshed_snapshots_have_their_own_statistics_and_scores_and_training_goes_on_as_before(
    make_tiny_network, tiny_splits, source
):
    stores = {}
    for batch_norm in ("auto", source):
        network = make_tiny_network()
        stores[batch_norm] = store = RecordingStore(network)
        options = with_options(batch_norm=batch_norm)
        fit(network, tiny_splits.train, tiny_splits.val, trainer=METHOD, epochs=4, store=store, options=options)
    plain, refreshed = stores["auto"], stores[source]
    for step, weights in plain.raw.items():
        for name, tensor in weights.items():
            assert torch.equal(tensor, refreshed.raw[step][name]), (step, name)
    assert steps_of(refreshed) == steps_of(plain) == [8, 16]
    normalization = imagenet()
    for one, other in zip(plain.kept, refreshed.kept, strict=True):
        twin = make_tiny_network(seed=7).eval()
        twin.load_state_dict(one.weights)
        shared = {"normalization": normalization, "data": tiny_splits.train, "batch_size": 4, "precision": "32"}
        if source == "crops":
            refresh_on_crops(twin, transform=TrainTransform(32, fill=normalization.raw_mean()), seed=0, **shared)
        else:
            refresh_on_images(twin, **shared)
        for name, tensor in twin.state_dict().items():
            assert torch.equal(tensor, other.weights[name]), name
        own = rescored(make_tiny_network, tiny_splits, other.weights)
        assert other.record.metrics["val_iou"] == pytest.approx(own, abs=1e-6)
    curves = dict(refreshed.history)
    assert curves[8]["refreshed/val_iou"] == refreshed.kept[0].record.metrics["val_iou"]
    assert "val_iou" not in curves[8]
    assert "refreshed/val_iou" not in curves[4]


@pytest.mark.parametrize("method", [METHOD, SWA(start=0.5)], ids=["snapshot", "swa"])
def test_the_best_statistics_are_those_of_the_training_with_the_least_loss_and_the_snapshot_says_which(
    make_tiny_network, tiny_splits, method
):
    found = {}
    for source in ("auto", "images", "crops", "best"):
        options = with_options(batch_norm=source)
        found[source] = trained(make_tiny_network(), tiny_splits, trainer=method, options=options).kept
    for place, best in enumerate(found["best"]):
        sources = {"images": found["images"][place], "crops": found["crops"][place]}
        if method is METHOD:
            sources["running"] = found["auto"][place]
        else:  # an average has no running statistics
            assert found["auto"][place].record.params["batch_norm"] == best.record.params["batch_norm"]
            assert found["auto"][place].record.metrics == best.record.metrics
        losses = {}
        for name, kept in sources.items():
            network = make_tiny_network(seed=3)
            network.load_state_dict(kept.weights)
            shared = {"normalization": imagenet(), "batch_size": 4, "precision": "32"}
            losses[name] = validation_loss(network, data=tiny_splits.val, **shared)
        expected = min(losses, key=losses.get)
        assert best.record.params["batch_norm"] == expected
        for name, tensor in sources[expected].weights.items():
            assert torch.equal(tensor, best.weights[name]), name
        assert best.record.metrics == sources[expected].record.metrics


def test_an_averages_statistics_may_come_from_crops(make_tiny_network, tiny_splits):
    (images,), (crops,) = (
        trained(make_tiny_network(), tiny_splits, trainer=SWA(start=0.5), options=with_options(batch_norm=source)).kept
        for source in ("images", "crops")
    )
    changed = {name for name, tensor in images.weights.items() if not torch.equal(tensor, crops.weights[name])}
    assert changed
    assert all("running" in name for name in changed)


@pytest.mark.parametrize(
    ("trainer", "changed", "message"),
    [
        ("snapshot", {"patience": 2}, "patience ends a training anywhere: use patience=0"),
        ("boost", {}, "'boost' draws images by the losses of its snapshots"),
    ],
)
def test_statistics_that_would_not_be_those_of_the_snapshot_are_refused(
    make_tiny_network, tiny_splits, trainer, changed, message
):
    with pytest.raises(ConfigError, match=message):
        trained(make_tiny_network(), tiny_splits, trainer=trainer, options=with_options(batch_norm="images", **changed))


def test_lookahead_is_kept_at_its_slow_weights(make_tiny_network, tiny_splits):
    """Four steps, then a sync: half way between the first weights and those of plain SGD; six more make no sync."""
    options = with_options(optimizer="lookahead_sgd", lr=0.02)
    start = make_tiny_network().state_dict()
    slow = trained(make_tiny_network(), tiny_splits, trainer="single", epochs=1, options=options).kept[0].weights
    fast = (
        trained(make_tiny_network(), tiny_splits, trainer="single", epochs=1, options=with_options(lr=0.02))
        .kept[0]
        .weights
    )
    for name, _ in make_tiny_network().named_parameters():
        torch.testing.assert_close(slow[name], (start[name] + fast[name]) / 2, rtol=1e-5, atol=1e-6)


def test_training_that_stops_early_keeps_its_last_weights(make_tiny_network, tiny_splits):
    # a rate of next to nothing: the score never gets better than the first
    options = with_options(lr=1e-12, patience=1)
    store = trained(make_tiny_network(), tiny_splits, trainer="single", epochs=8, options=options)
    assert steps_of(store) == [8]
    assert len(store.history) == 2
    assert rescored(make_tiny_network, tiny_splits, store.kept[0].weights) == pytest.approx(
        store.kept[0].record.metrics["val_iou"], abs=1e-6
    )


def test_early_stopping_of_an_average_is_refused(make_tiny_network, tiny_splits):
    with pytest.raises(ConfigError, match="'swa' keeps an average"):
        trained(make_tiny_network(), tiny_splits, trainer="swa", options=with_options(patience=2))


def test_accumulated_batches_make_one_step(make_tiny_network, tiny_splits):
    store = trained(make_tiny_network(), tiny_splits, options=with_options(accumulate=3))
    assert steps_of(store) == [4, 8]  # four batches in an epoch: two steps
    assert [step for step, _ in store.history] == [2, 4, 6, 8]


def test_clipped_gradients_move_the_weights_no_further_than_the_rate(make_tiny_network, tiny_splits):
    network = make_tiny_network()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    options = with_options(lr=0.5, clip_norm=1e-3, optimizer="momentum", weight_decay=0.0)
    trained(network, tiny_splits, trainer="single", epochs=1, options=options)
    squares = [(parameter.detach() - before[name]).square().sum() for name, parameter in network.named_parameters()]
    moved = torch.stack(squares).sum().sqrt()
    assert 0 < moved < 4 * 10 * 0.5 * 1e-3  # four steps, momentum 0.9 adds up to ten gradients


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"warmup_epochs": -1.0}, "warmup-epochs of 0 or more, got -1.0"),
        ({"clip_norm": float("nan")}, "clip-norm of 0 or more, got nan"),
        ({"accumulate": 0}, "accumulate of 1 or more, got 0"),
        ({"patience": -2}, "patience of 0 or more, got -2"),
        ({"batch_norm": "image"}, "unknown batch-norm 'image': did you mean 'images'"),
    ],
)
def test_options_out_of_range_are_refused(changed, message):
    with pytest.raises(ConfigError, match=message):
        with_options(**changed)


def test_what_the_model_was_trained_on_before_is_remembered(make_tiny_network, tiny_splits):
    store = trained(make_tiny_network(), tiny_splits, trainer="single", epochs=1, trained_on=["a", "b"])
    assert set(store.kept[0].record.training_images) == {"a", "b", *tiny_splits.train.image_digests}
    store = trained(make_tiny_network(), tiny_splits, trainer="single", epochs=1, trained_on=None)
    assert store.kept[0].record.training_images is None


def test_a_snapshot_says_what_it_was_trained_and_scored_on(make_tiny_network, tiny_splits):
    store = trained(make_tiny_network(), tiny_splits, epochs=2)
    for kept in store.kept:
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
    trained(network, tiny_splits, epochs=2, options=with_options(freeze_encoder=True))
    assert all(torch.equal(tensor, network.encoder.state_dict()[name]) for name, tensor in before.items())


def test_mixed_precision_trains_to_finite_weights(make_tiny_network, tiny_splits):
    store = trained(make_tiny_network(), tiny_splits, epochs=2, options=with_options(precision="bf16-mixed"))
    for tensor in store.kept[-1].weights.values():
        assert tensor.dtype in {torch.float32, torch.int64}
        assert torch.isfinite(tensor.float()).all()


def test_a_crop_that_does_not_fit_the_stride_is_refused(make_tiny_network, tiny_splits):
    with pytest.raises(ConfigError, match="multiple of the network's stride 8, got 30"):
        trained(make_tiny_network(), tiny_splits, options=with_options(crop_size=30))


def test_data_of_two_tasks_is_refused(make_tiny_network, tiny_splits):
    other = load_data("synthetic:count=16,size=64,seed=5", mode="multiclass")
    with pytest.raises(ConfigError, match="must have one task"):
        fit(make_tiny_network(), tiny_splits.train, other.val, store=MemoryStore(), options=OPTIONS)
