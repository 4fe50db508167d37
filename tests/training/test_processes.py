"""Several processes make the model of one; which process this is, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import OPTIONS
from trained_together import DATA, GENTLE, METHODS, trained

from smp_ensemble.architectures import create_network
from smp_ensemble.data.forms import load_data
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.processes import ALONE, Place, part_of_batch, place_of
from smp_ensemble.training.refreshing import make_refresh

PROGRAM = Path(__file__).parents[1] / "trained_together.py"
CPU = torch.device("cpu")
EPOCHS = 2
BEST = json.dumps({"batch_norm": "best"})


def run(out, *more):
    command = [sys.executable, "-W", "error::RuntimeWarning", str(PROGRAM), "--devices", "2", "--out", str(out), *more]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_make_the_model_of_one(tmp_path):
    """All methods with the default loss and synchronised batch norm, within 1e-5; EMA's and SWA's averages too."""
    done = run(tmp_path / "two", "--epochs", str(EPOCHS))
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        alone = trained(method, GENTLE, EPOCHS)
        together = json.loads((tmp_path / "two" / f"{method}.json").read_text())
        assert [kept.record.step for kept in alone.kept] == [record["step"] for record in together["records"]]
        for index, (kept, record) in enumerate(zip(alone.kept, together["records"], strict=True)):
            weights = load_file(tmp_path / "two" / f"{method}-{index}.safetensors")
            assert set(weights) == set(kept.weights)
            for name, tensor in kept.weights.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=f"{method} {index} {name}")
            assert record["metrics"] == pytest.approx(dict(kept.record.metrics), abs=1e-4)
        for (step, metrics), (other_step, others) in zip(alone.history, together["curves"], strict=True):
            assert step == other_step
            assert others["lr"] == metrics["lr"]
            assert others["train_loss"] == pytest.approx(metrics["train_loss"], abs=1e-5)


@pytest.mark.slow
def test_two_processes_choose_the_statistics_that_one_measures_for_the_same_weights(tmp_path):
    """Roundings in the weights grow in the variances: so the statistics are measured again, for these very weights."""
    done = run(tmp_path / "two", "--epochs", str(EPOCHS), "--methods", "snapshot,swa", "--options", BEST)
    assert done.returncode == 0, done.stderr
    data = load_data(DATA).train
    for method in ("snapshot", "swa"):
        alone = trained(method, replace(GENTLE, **json.loads(BEST)), EPOCHS)
        records = json.loads((tmp_path / "two" / f"{method}.json").read_text())["records"]
        for index, (kept, record) in enumerate(zip(alone.kept, records, strict=True)):
            source = record["batch_norm"]
            assert source == kept.record.params["batch_norm"]
            assert source in {"images", "crops"}, "a training this short has no useful running statistics"
            network = create_network("unet", num_outputs=1, model_options=OPTIONS).eval()
            weights = load_file(tmp_path / "two" / f"{method}-{index}.safetensors")
            network.load_state_dict(weights)
            transform = TrainTransform(GENTLE.crop_size, fill=imagenet().raw_mean())
            shared = {"normalization": imagenet(), "data": data, "batch_size": GENTLE.batch_size, "precision": "32"}
            make_refresh(source, transform=transform, **shared)(network)
            for name, tensor in network.state_dict().items():
                torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{method} {index} {name}")


@pytest.mark.slow
def test_when_one_process_fails_all_end_and_the_first_knows_why(tmp_path):
    done = run(tmp_path / "two", "--methods", "single", "--break-rank", "1")
    assert done.returncode == 1
    assert "TrainingError: process 1 of 0 to 1 failed: DataError: images/010.png: expected a PNG" in done.stderr
    assert not (tmp_path / "two").exists()


def test_the_place_is_what_the_environment_says():
    assert place_of(1, 1, CPU, {"LOCAL_RANK": "3", "SLURM_PROCID": "2"}) == ALONE
    assert place_of("auto", 1, CPU, {}) == ALONE
    assert place_of(2, 1, CPU, {}) == Place(0, 2, 2)
    assert place_of(2, 1, CPU, {"LOCAL_RANK": "1"}) == Place(1, 2, 2, launched=True)
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert place_of(2, 2, CPU, torchrun) == Place(3, 4, 2, launched=True, external=True)
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
    assert place_of(2, 2, CPU, slurm) == Place(2, 4, 2, launched=True, external=True)


@pytest.mark.parametrize(
    ("devices", "nodes", "environment", "message"),
    [
        (1, 1, {"RANK": "0", "WORLD_SIZE": "2"}, "2 processes were started, but devices=1 and num-nodes=1 make 1"),
        (2, 2, {}, "num-nodes=2 needs .* torchrun or srun"),
        (0, 1, {}, "devices and num-nodes of 1 or more, got 0 and 1"),
    ],
)
def test_what_does_not_agree_is_refused(devices, nodes, environment, message):
    with pytest.raises(ConfigError, match=message):
        place_of(devices, nodes, CPU, environment)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_parts_make_up_the_whole_batch_or_the_remedy_does(batch_size, images, count):
    place = Place(count=count)
    try:
        assert part_of_batch(batch_size, images, place) * count == min(batch_size, images)
    except ConfigError as error:
        remedy = str(error).rpartition("use ")[2] if "use " in str(error) else ""
        for number in filter(None, remedy.split(" or ")):
            assert part_of_batch(int(number), images, place) * count == int(number)
