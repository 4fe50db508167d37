"""Where a training starts: new weights, a tracked snapshot's, or those of a file; with what they were trained on."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import DATA, NETWORK, OPTIONS, SHORT

from smp_ensemble import load_data, load_model
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.workflows.options import TrainOptions
from smp_ensemble.workflows.starting import describe_network, find_start, new_network

ONCE = (*DATA, *SHORT, "--crop-size", "32", "--trainer", "single", "--epochs", "1")


@pytest.fixture
def snapshot(command):
    """A tracked snapshot, normalised by the statistics of its training data."""
    code, values, _ = command("train", *ONCE, *NETWORK, "--normalization", "dataset")
    assert code == 0
    return f"models:/{values['snapshots'][0]['snapshot']}"


@pytest.fixture
def checkpoint(tmp_path, make_tiny_network):
    network = make_tiny_network(seed=3)
    torch.save(network.state_dict(), tmp_path / "old.pt")
    return network


def weights_of(uri):
    return dict(load_model(uri).members[0].network.named_parameters())


def same(one, other):
    return all(torch.allclose(tensor, other[name], atol=1e-5) for name, tensor in one.items())


def test_a_snapshot_goes_on_with_its_weights_network_and_normalisation(command, tracking, snapshot, caplog):
    with caplog.at_level(logging.INFO, logger="smp_ensemble"):
        code, values, _ = command("train", *ONCE, "--init", snapshot, "--lr", "1e-9", "--seed", "7")
    assert code == 0
    assert f"starts from the weights of {snapshot}; the optimizer has no momentum" in caplog.text
    (row,) = values["snapshots"]
    new, old = load_model(f"models:/{row['snapshot']}"), load_model(snapshot)
    assert same(weights_of(f"models:/{row['snapshot']}"), dict(old.members[0].network.named_parameters()))
    assert new.members[0].normalization.to_dict() == old.members[0].normalization.to_dict()
    assert new.members[0].training_images == old.members[0].training_images
    params = tracking.get_run(values["run_id"]).data.params
    assert (params["init"], params["arch"], params["encoder_name"]) == (snapshot, "unet", "resnet18")
    assert params["normalization"] == "dataset"
    assert "'encoder_depth': 3" in params["model_options"]


def test_what_was_seen_before_counts_too(command, snapshot):
    code, values, _ = command("train", *ONCE, "--init", snapshot, "--folds", "4", "--fold", "0")
    assert code == 0
    splits = load_data(DATA[1], folds=4, fold=0)
    (member,) = load_model(f"models:/{values['snapshots'][0]['snapshot']}").members
    assert member.training_images == set(splits.train.image_digests) | set(splits.left_out.image_digests)
    assert "cv" not in values  # the first training has seen the left-out images
    assert values["snapshots"][0]["cv IoU"] is None


def test_a_snapshot_that_was_trained_on_validation_images_is_refused(command, snapshot, tracking):
    before = len(tracking.search_runs(["0"]))
    code, _, errors = command("train", *ONCE, "--init", snapshot, "--split-seed", "1")
    assert code == 2
    assert f"{snapshot} was trained on" in errors[0]
    assert "Use the split-seed" in errors[0]
    assert len(tracking.search_runs(["0"])) == before


def test_options_that_contradict_the_snapshot_are_refused(command, snapshot):
    for more, message in (
        (["--arch", "fpn"], "arch=fpn, but init=models:/m-"),
        (["--encoder-name", "resnet34"], "has resnet18: leave it out"),
        (["--normalization", "min-max"], "normalization=min-max, but init=models:/m-"),
        (["--model-options", '{"encoder_depth": 4}'], "model-options has encoder_depth=4, but init=models:/m-"),
        (["--mode", "multiclass"], "has mode binary, the data has multiclass"),
    ):
        code, _, errors = command("train", *ONCE, "--init", snapshot, *more)
        assert code == 2
        assert message in errors[0]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_file_brings_weights_and_nobody_knows_what_they_saw(command, tmp_path, tiny_splits, checkpoint, caplog, form):
    if form == "folder":
        checkpoint.save_pretrained(tmp_path / "old")
    path = tmp_path / ("old" if form == "folder" else "old.pt")
    network = () if form == "folder" else NETWORK
    code, values, _ = command("train", *ONCE, *network, "--init", str(path), "--lr", "1e-9")
    assert code == 0
    assert f"{path} does not say which images it was trained on: its validation scores may be too good" in caplog.text
    uri = f"models:/{values['snapshots'][0]['snapshot']}"
    assert load_model(uri).members[0].training_images is None
    assert same(weights_of(uri), dict(checkpoint.named_parameters()))


def test_each_training_changes_its_own_copy(tiny_splits, checkpoint, tmp_path):
    options = TrainOptions(data=DATA[1], init=str(tmp_path / "old.pt"), model_options=OPTIONS)
    start = find_start(options, tiny_splits)
    network = new_network(options, tiny_splits.task, start)
    assert network.training
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert same(dict(start.network.named_parameters()), dict(checkpoint.named_parameters()))
    assert same(
        dict(new_network(options, tiny_splits.task, start).named_parameters()), dict(checkpoint.named_parameters())
    )


def test_new_weights_follow_the_seed(tiny_splits):
    made = [
        dict(new_network(TrainOptions(seed=seed, model_options=OPTIONS), tiny_splits.task, None).named_parameters())
        for seed in (0, 0, 1)
    ]
    assert same(made[0], made[1])
    assert not same(made[0], made[2])
    assert find_start(TrainOptions(), tiny_splits) is None


def test_starts_that_are_none_are_refused(tiny_splits, tmp_path, make_tiny_network):
    for name in ("a.pt", "b.pt"):
        torch.save(make_tiny_network(num_outputs=4).state_dict(), tmp_path / name)
    with pytest.raises(ConfigError, match="names 2 checkpoints, expected one: name it alone"):
        find_start(TrainOptions(init=str(tmp_path / "*.pt")), tiny_splits)
    with pytest.raises(NetworkError, match=r"has shape \(4, 8, 3, 3\), the network expects \(1, 8, 3, 3\)"):
        find_start(TrainOptions(init=str(tmp_path / "a.pt"), model_options=OPTIONS), tiny_splits)


def test_a_network_says_how_to_build_it(make_tiny_network):
    found = describe_network(make_tiny_network(dropout=0.2))
    assert (found["arch"], found["encoder_name"]) == ("unet", "resnet18")
    assert found["model_options"]["decoder_channels"] == [8, 8, 8]
    assert found["model_options"]["dropout"] == 0.2
    assert not {"classes", "in_channels", "activation", "encoder_name"} & set(found["model_options"])
