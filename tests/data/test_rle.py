from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smp_ensemble.data.rle import decode, encode
from smp_ensemble.exceptions import DataError

masks = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 1))


@given(masks)
def test_decoding_what_was_encoded_gives_the_mask(mask):
    decoded = decode(encode(mask), *mask.shape)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, mask)


@given(masks)
def test_run_lengths_are_those_of_a_plain_loop(mask):
    runs: list[list[int]] = []
    pixels = [int(mask[row, column]) for column in range(mask.shape[1]) for row in range(mask.shape[0])]
    for place, pixel in enumerate(pixels, start=1):
        if pixel and runs and sum(runs[-1]) == place:
            runs[-1][1] += 1
        elif pixel:
            runs.append([place, 1])
    assert encode(mask) == " ".join(f"{start} {length}" for start, length in runs)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        ([[0, 0], [0, 0]], ""),
        ([[1, 1], [1, 1]], "1 4"),
        ([[1, 0], [0, 0]], "1 1"),
        ([[0, 1], [0, 0]], "3 1"),
        ([[0, 0, 1], [1, 0, 1]], "2 1 5 2"),
    ],
)
def test_written_out_examples(mask, runs):
    assert encode(np.array(mask, dtype=bool)) == runs
    np.testing.assert_array_equal(decode(runs, *np.shape(mask)), mask)


def test_touching_runs_and_other_whitespace_are_read():
    assert decode(" 1 2\t3 1\n", 2, 2).tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("1 2 3", "expected pairs of start and length, found 3 numbers"),
        ("1 x", "expected positive whole numbers, found 'x'"),
        ("1.5 2", "expected positive whole numbers, found '1.5'"),
        ("-1 2", "expected positive whole numbers, found '-1'"),
        ("0 2", "expected positive whole numbers, found '0'"),
        ("1 0", "expected positive whole numbers, found '0'"),
        ("1 ²", "expected positive whole numbers, found '²'"),
        ("1 3 3 1", "runs that do not overlap, found run 3..3 after run 1..3"),
        ("4 1 1 1", "ascending runs .* found run 1..1 after run 4..4"),
        ("3 3", r"expected pixels 1\.\.4, found run 3\.\.5"),
        ("5 1", r"expected pixels 1\.\.4, found run 5\.\.5"),
        ("999999999999999 999999999999999", r"expected pixels 1\.\.4, found run"),
        (f"1 {'9' * 5000}", r"expected pixels 1\.\.4, found 99999999999999999\.\.\.$"),
    ],
)
def test_malformed_run_lengths_say_what_is_wrong(runs, message):
    with pytest.raises(DataError, match=message) as caught:
        decode(runs, 2, 2)
    assert "\n" not in str(caught.value)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(DataError, match="at least 1x1 pixels, found 0x5"):
        decode("", 0, 5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((2, 2), 255, np.uint8), "expected a mask of 0 and 1, found 255; pass `mask == 1`"),
        (np.zeros((2, 2, 1)), r"expected a mask of shape \(H, W\), found shape \(2, 2, 1\)"),
    ],
)
def test_only_binary_masks_are_encoded(mask, message):
    with pytest.raises(DataError, match=message):
        encode(mask)
