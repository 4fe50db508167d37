"""Memory of a prediction, as torch's own allocator counts it: 20 members need what 2 need, weights aside."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine


@pytest.fixture
def peak_bytes(tmp_path):
    """Measures the most bytes that are held at once while a function runs, above those held before it."""

    def measure(run) -> int:
        run()  # what is kept from the first call on does not count
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        held = peak = 0
        for event in sorted((one for one in events if one.get("name") == "[memory]"), key=lambda one: one["ts"]):
            held += event["args"]["Bytes"]
            peak = max(peak, held)
        assert peak > 0
        return peak

    return measure


@pytest.fixture(scope="module")
def member() -> Member:
    torch.manual_seed(0)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    return Member(create_network("unet", num_outputs=3, model_options=options), imagenet())


def make_engine(member: Member, count: int, views: str) -> Engine:
    return Engine(Ensemble([member] * count, mode="multiclass", combiner="mean", views=views), "cpu", "32")


@pytest.mark.parametrize("views", ["none", "d4"])
@pytest.mark.parametrize("what", ["probabilities", "uncertainty"])
def test_twenty_members_need_the_memory_of_two(member, peak_bytes, views, what):
    images = [np.zeros((64, 48, 3), np.uint8)] * 4
    peaks = {}
    for count in (2, 20):
        engine = make_engine(member, count, views)
        peaks[count] = peak_bytes(partial(engine.predict if what == "probabilities" else engine.uncertainty, images))
    print(f"{what}, views {views}: {peaks[2] / 1e6:.2f} MB with 2 members, {peaks[20] / 1e6:.2f} MB with 20")
    assert peaks[20] <= 1.1 * peaks[2]


def test_the_measure_sees_what_is_kept(member, peak_bytes):
    """Without streaming the same measure grows by each member's probabilities."""
    images = torch.zeros(4, 3, 64, 48, dtype=torch.uint8)
    engines = [make_engine(member, count, "none") for count in (2, 20)]
    two, twenty = (peak_bytes(lambda engine=engine: list(engine.member_probabilities(images))) for engine in engines)
    of_one = 4 * 4 * 3 * 64 * 48
    assert 17.5 * of_one < twenty - two < 18.5 * of_one


def test_more_views_than_a_batch_holds_need_no_more_memory(member, peak_bytes, monkeypatch):
    monkeypatch.setattr("smp_ensemble.inference.engine.MAX_BATCH_PIXELS", 64 * 64)
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    peaks = {}
    for views in ("flips", "d4"):
        engine = make_engine(member, 2, views)
        peaks[views] = peak_bytes(partial(engine, images))
    assert peaks["d4"] == peaks["flips"]
