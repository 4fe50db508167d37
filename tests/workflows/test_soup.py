"""`soup` against averages, refreshes and scores that are worked out one by one; and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import DATA, SHORT

from smp_ensemble import average_weights, load_data, load_model, refresh_batch_norm
from smp_ensemble.architectures import create_network
from smp_ensemble.data.loading import evaluation_loader
from smp_ensemble.data.normalization import Normalization, imagenet
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.tracking import names
from smp_ensemble.tracking.store import MlflowStore
from smp_ensemble.training.choosing import validation_loss
from smp_ensemble.typing import SnapshotRecord
from smp_ensemble.workflows import soup as workflow


@pytest.fixture
def splits():
    return load_data(DATA[1])


@pytest.fixture
def track(tracking, splits):
    """Tracks networks as snapshots of one training, the first with the best score; gives their addresses."""

    def run(*networks, normalizations=None, **more) -> list[str]:
        with MlflowStore() as store:
            for index, network in enumerate(networks, 1):
                store.save_snapshot(
                    SnapshotRecord(
                        **{
                            "network": network,
                            "normalization": normalizations[index - 1] if normalizations else imagenet(),
                            "task": splits.task,
                            "step": 10 * index,
                            "epoch": index,
                            "index": index,
                            "metrics": {"val_iou": 0.9 - index / 10, "val_ece": index / 10, "val_loss": 1.0},
                            "params": {"trainer": "snapshot", "arch": "unet"},
                            "dataset": splits.val.reference(),
                            "training_images": splits.train.image_digests,
                            **more,
                        }
                    )
                )
            return [one.uri for one in store.snapshots()]

    return run


@pytest.fixture
def make_network():
    """Makes networks of 0.4 million weights: each is written, hashed and read several times."""

    def make(seed: int = 0, width: int = 8):
        torch.manual_seed(seed)
        return create_network(
            "unet", encoder_name="tu-test_resnet", model_options={"encoder_depth": 3, "decoder_channels": [width, 8, 8]}
        )

    return make


def relatives(make_network, count: int, step: float = 0.02):
    """Networks near one another, with scores of their own."""
    networks = [make_network(seed=1) for _ in range(count)]
    for index, network in enumerate(networks):
        generator = torch.Generator().manual_seed(index)
        for parameter in network.parameters():
            parameter.data += step * torch.randn(parameter.shape, generator=generator)
    return networks


def iou_of(network, data) -> float:
    """IoU at 0.5 over a data set, image by image."""
    scores = SegmentationScores(data.task, 0.5)
    network.eval()
    for index in range(len(data)):
        image, mask = data.read(index)
        with torch.no_grad():
            logits = network(imagenet()(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]))
        scores.update(logits.sigmoid(), torch.from_numpy(mask.astype("int64"))[None])
    return float(scores.compute()["iou"])


def averaged(networks, data):
    """The average with its batch norm refreshed, by the public functions."""
    network = copy.deepcopy(networks[0])
    network.load_state_dict(average_weights(networks))
    loader = evaluation_loader(data, batch_size=4, workers=0)
    refresh_batch_norm(torch.nn.Sequential(imagenet(), network), loader)
    return network


def test_a_greedy_soup_is_what_trying_by_hand_gives(command, track, tracking, splits, make_network):
    networks = relatives(make_network, 4)
    uris = track(*networks)
    code, values, _ = command("soup", *DATA, *SHORT, "--batch-norm", "images")
    assert code == 0
    assert [one["uri"] for one in values["candidates"]] == uris

    kept, best = [networks[0]], iou_of(networks[0], splits.val)
    expected = [(best, True)]
    for network in networks[1:]:
        found = iou_of(averaged([*kept, network], splits.train), splits.val)
        expected.append((found, found >= best))
        if found >= best:
            kept, best = [*kept, network], found
    assert [one["soup"] for one in values["candidates"]] == pytest.approx([one for one, _ in expected], abs=1e-3)
    assert [one["kept"] for one in values["candidates"]] == [one for _, one in expected]
    assert values["ingredients"] == [uris[networks.index(one)] for one in kept]
    assert values["val"]["val_iou"] == pytest.approx(best, abs=1e-3)

    run = tracking.get_run(values["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["selector"] == "greedy"


def test_a_uniform_soup_is_tracked_as_it_was_scored(command, track, tracking, splits, make_network):
    networks = relatives(make_network, 3)
    uris = track(*networks)
    options = ("--selector", "uniform", "--run-name", "broth", "--batch-norm", "images")
    code, values, _ = command("soup", *DATA, *SHORT, *options)
    assert code == 0
    assert values["ingredients"] == uris
    assert [one["soup"] for one in values["candidates"]] == [None] * 3
    (member,) = load_model(values["uri"]).members

    expected = averaged(networks, splits.train)
    for name, tensor in member.network.state_dict().items():
        assert torch.allclose(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5), name
    assert values["val"]["val_iou"] == pytest.approx(iou_of(member.network, splits.val), abs=1e-6)
    assert values["val"]["val_iou"] != pytest.approx(iou_of(_unrefreshed(networks), splits.val), abs=1e-6)

    assert member.training_images == frozenset(splits.train.image_digests)
    model = tracking.get_logged_model(values["uri"].removeprefix("models:/"))
    assert model.tags[names.KIND] == names.SNAPSHOT
    assert model.params["trainer"] == "soup"
    assert model.params["selector"] == "uniform"
    assert model.params["ingredients"] == ",".join(uri.removeprefix("models:/") for uri in uris)
    assert model.params["arch"] == "unet"
    assert model.params["encoder_name"] == "tu-test_resnet"
    assert ("val_iou", splits.val.digest) in {(one.key, one.dataset_digest) for one in model.metrics}
    assert {one.step for one in model.metrics} == {30}
    assert tracking.get_run(values["run_id"]).info.run_name == "broth"
    code, scored, _ = command("evaluate", *DATA, *SHORT, "--model", values["uri"], "--split", "val")
    assert scored["metrics"]["iou"] == pytest.approx(values["val"]["val_iou"])
    code, built, _ = command("ensemble", *DATA, *SHORT, "--pick", values["uri"])
    assert (code, built["members"]) == (0, [values["uri"]])


def _unrefreshed(networks):
    network = copy.deepcopy(networks[0])
    network.load_state_dict(average_weights(networks))
    return network


def test_the_table_shows_each_trial_and_last_the_soup(command, track, make_network):
    uris = track(*relatives(make_network, 2))
    code, text, _ = command("soup", *DATA, *SHORT, values=False)
    assert code == 0
    lines = text.splitlines()
    assert lines[0].split() == ["ingredient", "val_iou", "soup", "with", "it", "kept"]
    assert lines[2].startswith(uris[0].removeprefix("models:/"))
    assert lines[2].endswith("yes")
    assert lines[4].startswith("soup of ")


def test_less_is_better_for_errors(command, track, splits, make_network):
    track(*relatives(make_network, 3))
    code, values, _ = command("soup", *DATA, *SHORT, "--metric", "val_ece")
    assert code == 0
    best = float("inf")
    for one in values["candidates"]:
        assert one["soup"] > 0
        assert one["kept"] == (one["soup"] <= best)
        best = min(best, one["soup"])
    assert values["val"]["val_ece"] == pytest.approx(best)


def test_an_encoder_that_all_share_keeps_its_statistics(command, track, make_network):
    networks = relatives(make_network, 2)
    networks[1].encoder.load_state_dict(copy.deepcopy(networks[0].encoder.state_dict()))
    track(*networks)
    _, values, _ = command("soup", *DATA, *SHORT, "--selector", "uniform")
    (member,) = load_model(values["uri"]).members
    for name, tensor in member.network.encoder.state_dict().items():
        assert torch.equal(tensor, networks[0].encoder.state_dict()[name])
    decoder = member.network.decoder.state_dict()
    assert not any(
        torch.equal(tensor, networks[0].decoder.state_dict()[name])
        for name, tensor in decoder.items()
        if name.endswith(("running_mean", "running_var"))
    )


def test_copies_of_one_snapshot_and_unknown_training_images(command, track, make_network):
    network = make_network()
    track(network, network, training_images=None)
    code, values, _ = command("soup", *DATA, *SHORT, "--selector", "uniform")
    assert code == 0
    (member,) = load_model(values["uri"]).members
    assert member.training_images is None
    assert all(
        torch.equal(one, other) for one, other in zip(member.network.parameters(), network.parameters(), strict=True)
    )


def test_soups_are_no_candidates_unless_asked_for(command, track, make_network):
    uris = track(*relatives(make_network, 3))
    _, first, _ = command("soup", *DATA, *SHORT, "--selector", "uniform")
    assert first["ingredients"] == uris
    _, again, _ = command("soup", *DATA, *SHORT, "--selector", "uniform", "--max-members", "2")
    assert again["ingredients"] == uris[:2]
    ids = ",".join(uri.removeprefix("models:/") for uri in (first["uri"], uris[0]))
    _, asked, _ = command("soup", *DATA, *SHORT, "--selector", "uniform", "--pick", ids)
    assert sorted(asked["ingredients"]) == sorted([first["uri"], uris[0]])


def test_what_does_not_average_is_refused_before_anything_is_tracked(command, track, tracking, make_network):
    track(make_network(), make_network(width=16))
    before = len(tracking.search_runs(["0"]))
    code, _, errors = command("soup", *DATA, *SHORT)
    assert code == 2
    assert "only snapshots of one architecture average: models:/m-" in errors[0]
    assert "has decoder_channels=[8, 8, 8], models:/m-" in errors[0]
    assert "has [16, 8, 8]: choose with where" in errors[0]
    assert len(tracking.search_runs(["0"])) == before


def test_another_normalization_is_refused(command, track, make_network):
    plain = Normalization("none", [0.0] * 3, [1.0] * 3)
    track(make_network(), make_network(), normalizations=[imagenet(), plain])
    code, _, errors = command("soup", *DATA, *SHORT)
    assert code == 2
    assert "only snapshots of one normalization average" in errors[0]
    assert "has kind=imagenet" in errors[0]


@pytest.mark.parametrize(("part", "what"), [("val", "validation"), ("test", "test")])
def test_an_ingredient_that_saw_held_out_images_is_refused(command, track, tracking, splits, make_network, part, what):
    track(make_network(), make_network(), training_images=splits.split(part).image_digests[:1])
    before = len(tracking.search_runs(["0"]))
    code, _, errors = command("soup", *DATA, *SHORT)
    assert code == 2
    assert (
        f"was trained on 1 of the {len(splits.split(part))} {'validation' if part == 'val' else 'test'} images"
        in errors[0]
    )
    assert len(tracking.search_runs(["0"])) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selector", "gredy"], "unknown selector 'gredy' of soups: did you mean 'greedy'? Known: greedy, uniform"),
        (["--batch-norm", "crop"], "unknown batch-norm 'crop': did you mean 'crops'? Known: best, crops, images"),
        (["--metric", "val_loss"], "soups are not scored by the metric 'val_loss'"),
        (["--max-members", "1"], "expected at least two snapshots to average, found 1 (models:/m-"),
        (["--where", "params.step = '7'"], "no snapshot found"),
    ],
)
def test_options_that_make_no_soup_are_refused(command, track, make_network, arguments, message):
    track(make_network(), make_network())
    code, _, errors = command("soup", *DATA, *SHORT, *arguments)
    assert code == 2
    assert message in errors[0]


def test_a_soup_with_the_statistics_of_crops_has_the_same_weights_and_other_scores(
    command, track, tracking, splits, make_network
):
    track(*relatives(make_network, 2, step=0.001))
    found = {}
    losses = {}
    for source in ("images", "crops", "best"):
        arguments = ("--selector", "uniform", "--batch-norm", source, "--crop-size", "32")
        code, values, _ = command("soup", *DATA, *SHORT, *arguments)
        assert code == 0
        network = load_model(values["uri"]).members[0].network
        found[source] = network.state_dict()
        losses[source] = validation_loss(
            network, data=splits.val, normalization=imagenet(), batch_size=4, precision="32"
        )
    one, other, best = found.values()
    assert losses["best"] == min(losses.values())
    said = tracking.get_logged_model(values["uri"].removeprefix("models:/")).params["batch_norm"]
    assert losses[said] == losses["best"]
    assert any(all(torch.equal(best[name], each[name]) for name in best) for each in (one, other))
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}
    assert changed == {name for name in one if "running" in name}


def test_a_soup_that_fails_says_so_in_its_run(command, track, tracking, monkeypatch, make_network):
    track(make_network(), make_network())

    def fail(*arguments, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(workflow, "make_measure", fail)
    code, _, errors = command("soup", *DATA, *SHORT)
    assert code == 1
    assert "out of memory" in errors[0]
    runs = tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'training' AND params.trainer = 'soup'")
    assert [run.info.status for run in runs] == ["FAILED"]
    assert "out of memory" in runs[0].data.tags[names.ERROR]
