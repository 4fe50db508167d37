"""The callback in anybody's own Lightning trainer."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.exceptions import NetworkError, ScheduleError
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.callback import SnapshotCallback
from smp_ensemble.training.networks import find_network
from smp_ensemble.training.trainers import EMA, SSE, SWA, Single

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*have no `val_dataloader`",
)


class OwnModule(pl.LightningModule):
    """A user's module: knows nothing of this package."""

    def __init__(self, network, *, scheduler=False, logs="val_iou"):
        super().__init__()
        self.net, self.scheduler, self.logs = network, scheduler, logs
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])
        return self.net(batch["image"]).mean()

    def validation_step(self, batch, batch_idx):
        if self.logs:
            self.log(self.logs, self.net(batch["image"]).float().mean().abs())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            [
                {"params": list(self.net.encoder.parameters()), "lr": 0.01},
                {"params": [*self.net.decoder.parameters(), *self.net.segmentation_head.parameters()], "lr": 0.1},
            ],
            momentum=0.9,
        )
        if not self.scheduler:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def loader(batches=3):
    generator = torch.Generator().manual_seed(batches)
    samples = [{"image": torch.rand(3, 16, 16, generator=generator)} for _ in range(2 * batches)]
    return torch.utils.data.DataLoader(samples, batch_size=2)


def run(module, trainer=None, *, validate=True, store=None, epochs=4, callbacks=(), refresh_all=False, **options):
    store = store or MemoryStore()
    callback = SnapshotCallback(
        trainer or SSE(cycles=2),
        mode="binary",
        class_names=("background", "building"),
        normalization=imagenet(),
        store=store,
        refresh_all=refresh_all,
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    host = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    host.fit(module, loader(), loader(1) if validate else None)
    return store


def test_every_rate_and_both_groups_follow_the_schedule(make_tiny_network):
    module = OwnModule(make_tiny_network())
    run(module)
    schedule = SSE(cycles=2).schedule(4, 3)
    expected = [[0.01 * schedule.factor(step), 0.1 * schedule.factor(step)] for step in range(12)]
    assert module.rates == [pytest.approx(pair, abs=1e-15) for pair in expected]
    assert all(low / high == pytest.approx(0.1) for low, high in module.rates)


def test_snapshots_fall_on_cycle_ends_with_their_own_scores(make_tiny_network):
    store = run(OwnModule(make_tiny_network()))
    assert [kept.record.step for kept in store.kept] == [6, 12]
    assert [kept.record.epoch for kept in store.kept] == [2, 4]
    for kept in store.kept:
        network = make_tiny_network(seed=5)
        network.load_state_dict(kept.weights)
        (batch,) = loader(1)
        with torch.no_grad():
            expected = network.eval()(batch["image"]).mean().abs().item()
        assert kept.record.metrics == {"val_iou": pytest.approx(expected, abs=1e-6)}


def test_weights_differ_between_snapshots(make_tiny_network):
    first, second = run(OwnModule(make_tiny_network())).kept
    assert any(not torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_accumulated_batches_count_as_one_step(make_tiny_network):
    module = OwnModule(make_tiny_network())
    store = run(module, accumulate_grad_batches=3)
    assert [kept.record.step for kept in store.kept] == [2, 4]
    assert module.rates[0] == module.rates[1] == module.rates[2] != module.rates[3]


def test_a_second_scheduler_is_refused(make_tiny_network):
    with pytest.raises(ScheduleError, match="StepLR is configured too: return only the optimizer"):
        run(OwnModule(make_tiny_network(), scheduler=True))


@pytest.mark.parametrize("options", [{"validate": False}, {"check_val_every_n_epoch": 3}, {"limit_val_batches": 0}])
def test_a_snapshot_point_without_validation_is_refused_at_the_start(make_tiny_network, options):
    store = MemoryStore()
    with pytest.raises(ScheduleError, match="no validation runs there"):
        run(OwnModule(make_tiny_network()), store=store, **options)
    assert not store.kept
    assert not store.history


def test_validation_every_second_epoch_is_enough_where_snapshots_are(make_tiny_network):
    store = run(OwnModule(make_tiny_network()), check_val_every_n_epoch=2)
    assert [kept.record.epoch for kept in store.kept] == [2, 4]


def test_validation_that_logs_no_score_is_refused(make_tiny_network):
    with pytest.raises(ScheduleError, match="logged nothing named val_"):
        run(OwnModule(make_tiny_network(), logs=None))


def test_a_network_with_activation_is_refused():
    network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8))
    network.segmentation_head[-1].activation = nn.Sigmoid()
    with pytest.raises(NetworkError, match="this network has 'activation'"):
        run(OwnModule(network))


def test_the_network_is_found_or_asked_for(make_tiny_network):
    module = OwnModule(make_tiny_network())
    assert find_network(module) is module.net
    module.second = make_tiny_network()
    with pytest.raises(NetworkError, match="found 'net', 'second'"):
        find_network(module)
    with pytest.raises(NetworkError, match="found none"):
        find_network(nn.Linear(1, 1))


@pytest.mark.parametrize("method", [SWA(start=0.5), EMA(decay=0.9)])
def test_a_foreign_module_validates_the_average_and_trains_on_as_before(make_tiny_network, method):
    module = OwnModule(make_tiny_network())
    (kept,) = run(module, method).kept
    network = make_tiny_network(seed=5)
    network.load_state_dict(kept.weights)
    (batch,) = loader(1)
    with torch.no_grad():
        expected = network.eval()(batch["image"]).mean().abs().item()
        raw = module.net.eval()(batch["image"]).mean().abs().item()
    assert kept.record.metrics == {"val_iou": pytest.approx(expected, abs=1e-6)}
    assert raw != pytest.approx(expected, abs=1e-9)


def test_the_averages_statistics_come_from_the_trainers_own_batches(make_tiny_network):
    module = OwnModule(make_tiny_network())
    (kept,) = run(module, SWA(start=0.5)).kept
    first = "encoder.bn1"
    weight = kept.weights["encoder.conv1.weight"]
    images = torch.cat([batch["image"] for batch in loader()])
    inputs = torch.nn.functional.conv2d(images, weight, stride=2, padding=3).numpy()
    assert kept.weights[f"{first}.running_mean"].numpy() == pytest.approx(inputs.mean(axis=(0, 2, 3)), abs=1e-5)
    assert kept.weights[f"{first}.running_var"].numpy() == pytest.approx(inputs.var(axis=(0, 2, 3)), rel=1e-4)


def test_in_a_foreign_trainer_every_snapshot_may_have_its_statistics_from_the_trainers_batches(make_tiny_network):
    one, other = (run(OwnModule(make_tiny_network()), Single(), refresh_all=each).kept[0] for each in (True, False))
    assert one.record.metrics != other.record.metrics
    changed = {name for name, tensor in one.weights.items() if not torch.equal(tensor, other.weights[name])}
    assert changed
    assert all("running" in name for name in changed)


class Stop(pl.Callback):
    """Stops after the first epoch, as early stopping does."""

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            trainer.should_stop = True


def test_training_that_stops_early_keeps_its_last_weights(make_tiny_network):
    (kept,) = run(OwnModule(make_tiny_network()), Single(), callbacks=[Stop()]).kept
    assert (kept.record.step, kept.record.epoch) == (3, 1)


def test_an_average_that_is_not_due_yet_leaves_no_snapshot(make_tiny_network, caplog):
    store = run(OwnModule(make_tiny_network()), SWA(start=0.5), callbacks=[Stop()])
    assert not store.kept
    assert "training stops after step 3, before the average was due" in caplog.text


def test_an_error_in_the_averages_validation_leaves_the_trainings_own_weights(make_tiny_network):
    class Failing(OwnModule):
        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking and self.trainer.current_epoch == 3:
                raise RuntimeError("out of luck")

    module = Failing(make_tiny_network())
    own = {}

    class Remember(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            own.update({name: tensor.clone() for name, tensor in module.net.state_dict().items()})

    with pytest.raises(RuntimeError, match="out of luck"):
        run(module, SWA(start=0.25), callbacks=[Remember()])
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.net.state_dict().items())
    assert torch.is_grad_enabled()


def test_warm_up_scales_the_first_rates(make_tiny_network):
    module = OwnModule(make_tiny_network())
    store = MemoryStore()
    callback = SnapshotCallback(
        Single(), mode="binary", class_names=("a", "b"), normalization=imagenet(), store=store, warmup_epochs=1.5
    )
    host = pl.Trainer(
        max_epochs=4, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    host.fit(module, loader(), loader(1))
    plain = Single().schedule(4, 3)
    expected = [0.1 * plain.factor(step) * min(1, (step + 1) / 4) for step in range(12)]  # round(1.5 * 3) steps
    assert [rates[1] for rates in module.rates] == pytest.approx(expected)
