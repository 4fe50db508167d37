"""What people send to a model: an answer or an `InputError`, whatever the shape, the type and the params."""

from __future__ import annotations

import base64

import numpy as np
import pandas as pd
import pytest
import torch
from faults.fuzzing import NASTY, fuzz, mutate
from faults.pictures import COLOURS, SEEDS, encoded
from torch import nn

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import InputError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.payload import answer
from smp_ensemble.typing import KINDS

pytestmark = pytest.mark.faults

DTYPES = ("u1", "u2", "i2", "i8", "f2", "f4", "f8", "bool", "c8", "U3", "S2", "O", "M8[s]")
VALUES = (*KINDS, *NASTY, "own", "d4", "flips", "scales:0.5,2", "scales:nan", "d4+scales:8", 2, np.int64(1), b"mask")
PARAMS = ("kind", "views", "passes", "kid", 0, None)
WHOLE = encoded(COLOURS, "PNG")


def an_array(rng: np.random.Generator) -> np.ndarray:
    shape = tuple(rng.choice([0, 1, 2, 3, 3, 4, 16], rng.choice([0, 1, 2, 3, 3, 4, 4, 4, 5])))
    if len(shape) >= 3 and rng.integers(2):
        shape = (*shape[:-1], 3)
    values = rng.integers(0, 256, shape)
    if rng.integers(4) == 0:
        values = np.where(rng.random(shape) < 0.1, rng.choice([np.nan, np.inf, -1e300, 1e300]), values)
    kind = "u1" if rng.integers(2) else DTYPES[rng.integers(len(DTYPES))]
    with np.errstate(all="ignore"):
        try:
            return values.astype(kind)
        except (TypeError, ValueError):
            return values.astype("O")


def a_cell(rng: np.random.Generator):
    match rng.integers(10):
        case 0:
            return NASTY[rng.integers(len(NASTY))]
        case 1:
            return base64.b64encode(WHOLE).decode()
        case 2:
            return mutate(base64.b64encode(WHOLE), rng).decode("latin-1")
        case 3:
            forms = sorted(SEEDS)
            return mutate(SEEDS[forms[rng.integers(len(forms))]][0], rng)
        case _:
            return WHOLE


def a_request(rng: np.random.Generator) -> tuple:
    params = {
        PARAMS[rng.integers(len(PARAMS))]: VALUES[rng.integers(len(VALUES))] for _ in range(rng.choice([0, 0, 0, 1, 2]))
    }
    match rng.integers(6):
        case 0:
            data = an_array(rng)
        case 1:
            data = [an_array(rng) for _ in range(rng.integers(3))]
        case 2:
            data = NASTY[rng.integers(len(NASTY))]
        case _:
            cells = [a_cell(rng) for _ in range(rng.integers(4))]
            column = rng.choice(["image", "image", "image", "picture"])
            data = pd.DataFrame({column: pd.Series(cells, dtype=object), "other": range(len(cells))})
    return data, params


@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_requests(mode):
    torch.manual_seed(0)
    names = ("background", "roof") if mode == "binary" else ("land", "roof", "road")
    member = Member(nn.Conv2d(3, 1 if mode == "binary" else 3, 1), imagenet())
    engine = Engine(Ensemble([member], mode=mode, class_names=names), device="cpu", precision="32")
    # Errors repeat what was sent, which is up to 6000 characters here.
    tally = fuzz(f"payload, {mode}", a_request, lambda request: answer(engine, *request), InputError, longest=8000)
    assert tally.accepted > tally.inputs // 20
