"""Image files of every kind, mutated: pixels or a `DataError`, and never a crash or a hang."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from faults.fuzzing import fuzz, mutate, mutate_png
from faults.pictures import GREY, SEEDS, encoded

from smp_ensemble.data.images import decode_image, decode_mask
from smp_ensemble.exceptions import DataError

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("form", SEEDS)
def test_images_and_masks(form):
    def make(rng):
        whole = SEEDS[form][rng.integers(len(SEEDS[form]))]
        return mutate_png(whole, rng) if form == "PNG" and rng.integers(4) else mutate(whole, rng)

    def read(data):
        pixels = decode_image(data, "it")
        assert pixels.ndim == 3
        assert pixels.dtype in (np.uint8, np.uint16, np.int16, np.float32)

    tally = fuzz(f"images, {form}", make, read, DataError)
    assert tally.accepted

    def read_mask(data):
        ids = decode_mask(data, "it")
        assert ids.ndim == 2
        assert ids.dtype == np.uint8

    fuzz(f"masks, {form}", make, read_mask, DataError)


@pytest.mark.parametrize("decode", [decode_image, decode_mask])
def test_an_image_of_a_thousand_million_pixels_is_refused_before_memory_is_asked_for(decode):
    content = bytearray(encoded(GREY, "PNG"))
    content[16:24] = (40_000).to_bytes(4, "big") + (25_000).to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    with pytest.raises(DataError, match="cannot read image it: .*pixels"):
        decode(bytes(content), "it")
