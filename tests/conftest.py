"""Fixtures that many tests share: an MLflow store of their own; networks and data small enough to train in a blink."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch
from hypothesis import settings

from smp_ensemble.architectures import create_network
from smp_ensemble.data.forms import DataSplits, load_data

REPOSITORY = Path(__file__).parents[1]
AERIAL = REPOSITORY.parent / "shared" / "data" / "aerial"

settings.register_profile("smp_ensemble", deadline=None, max_examples=50)  # machines may be busy
settings.load_profile("smp_ensemble")

TINY_OPTIONS = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    """A fresh sqlite store in `tmp_path`, which is the working folder too."""
    uri = f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}"
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("smp_ensemble.tracking.store.DELIVERY_SECONDS", 30.0)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def tiny_splits() -> DataSplits:
    """24 synthetic binary scenes of 32x32."""
    return load_data("synthetic:count=24,size=32")


@pytest.fixture
def make_tiny_network():
    """Makes small Unets, stride 8, from a seed."""

    def make(seed: int = 0, num_outputs: int = 1, **options):
        torch.manual_seed(seed)
        return create_network("unet", num_outputs=num_outputs, model_options={**TINY_OPTIONS, **options})

    return make
