"""All global random generators go on where they were."""

from __future__ import annotations

import io
import random

import numpy as np
import torch

from smp_ensemble.training.random_states import random_states, restore_random_states


def draws():
    legacy = np.random.rand(3).tolist(), np.random.randn()  # noqa: NPY002
    return torch.rand(3).tolist(), legacy, random.random(), random.gauss(0, 1)


def test_restored_generators_draw_the_same_numbers_through_a_checkpoint():
    np.random.randn()  # noqa: NPY002 (an odd number of normal ones: NumPy keeps the other of the pair)
    random.gauss(0, 1)
    file = io.BytesIO()
    torch.save(random_states(), file)
    expected = draws()
    assert draws() != expected
    file.seek(0)
    restore_random_states(torch.load(file, weights_only=True))
    assert draws() == expected
