"""Cells of a DataFrame and arrays, refused before anything is decoded."""

from __future__ import annotations

import base64
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import FORMATS, bomb, picture

from smp_ensemble.data.limits import SERVED, Limits
from smp_ensemble.exceptions import InputError
from smp_ensemble.inference.inputs import image_bytes, read_arrays, to_bytes


@given(st.binary(max_size=40), st.integers(1, 50))
def test_bytes_and_base64_of_them_are_measured_alike(content, limit):
    limits = Limits(image_bytes=limit)
    for value in (content, bytearray(content), memoryview(content), base64.b64encode(content).decode()):
        if len(content) <= limit:
            assert to_bytes(value, "row 0", limits=limits) == content
        else:
            with pytest.raises(InputError, match=rf"at most {limit} encoded bytes in row 0, got {len(content)}"):
                to_bytes(value, "row 0", limits=limits)


def test_long_base64_is_refused_unread():
    with pytest.raises(InputError, match="at most 10 encoded bytes in row 3, got 300"):
        to_bytes("!" * 400, "row 3", limits=Limits(image_bytes=10))  # no base64 at all


@pytest.mark.parametrize("form", FORMATS)
def test_headers_say_the_size(form):
    content, size = image_bytes(base64.b64encode(picture(0, form)).decode(), "row 0", SERVED)
    assert (content, size) == (picture(0, form), (33, 40))
    with pytest.raises(InputError, match="row 1: 5000 x 5000 pixels are more than the 16777216 allowed"):
        image_bytes(bomb(form, 5000), "row 1", SERVED)


@pytest.mark.parametrize("value", [1e39, -1e300, np.nan, np.inf])
def test_values_that_float32_cannot_hold_are_refused(value):
    images = np.zeros((1, 2, 2, 3))
    images[0, 1, 1, 2] = value
    with warnings.catch_warnings(), pytest.raises(InputError, match="expected image 0 to hold finite values"):
        warnings.simplefilter("error")
        read_arrays(images)
