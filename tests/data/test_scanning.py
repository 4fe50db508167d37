from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.data.datasets import Record
from smp_ensemble.data.scanning import check_ids, scan
from smp_ensemble.data.sources import ImageFile, MaskFile
from smp_ensemble.exceptions import DataError
from smp_ensemble.typing import Task


@pytest.fixture
def record(tmp_path):
    def make(name: str, image: object, mask: object) -> Record:
        for kind, pixels in (("image", image), ("mask", mask)):
            Image.fromarray(np.asarray(pixels)).save(tmp_path / f"{name}_{kind}.tif")
        return Record(name, ImageFile(tmp_path / f"{name}_image.tif"), MaskFile(tmp_path / f"{name}_mask.tif"))

    return make


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


def test_a_mask_of_another_size_names_both_sizes(record):
    with pytest.raises(DataError, match=r"a_image\.tif is 4x6 \(height x width\), but .*a_mask\.tif is 6x4"):
        scan([record("a", zeros(4, 6, 3), zeros(6, 4))])


def test_differing_bands_name_both_images(record):
    records = [record("a", zeros(4, 4, 3), zeros(4, 4)), record("b", zeros(4, 4), zeros(4, 4))]
    with pytest.raises(DataError, match=r"b_image\.tif has 1 bands of uint8, but .*a_image\.tif has 3 of uint8"):
        scan(records)


def test_differing_types_name_both_images(record):
    records = [record("a", zeros(4, 4), zeros(4, 4)), record("b", zeros(4, 4).astype(np.uint16), zeros(4, 4))]
    with pytest.raises(DataError, match=r"b_image\.tif has 1 bands of uint16, but .* 1 of uint8"):
        scan(records)


def test_values_that_are_not_finite_are_refused(record):
    image = np.zeros((4, 4), np.float32)
    image[1, 2] = np.nan
    with pytest.raises(DataError, match=r"a_image\.tif holds values that are not finite"):
        scan([record("a", image, zeros(4, 4))])


def test_the_first_error_in_order_is_reported(record, tmp_path):
    records = [record(f"r{index:02}", zeros(4, 4, 3), zeros(4, 4)) for index in range(30)]
    for broken in (7, 8, 20):
        (tmp_path / f"r{broken:02}_image.tif").write_bytes(b"no image")
    for _ in range(3):
        with pytest.raises(DataError, match=r"cannot read image .*r07_image\.tif"):
            scan(records)


def test_ids_beyond_the_classes_name_file_id_and_what_is_allowed(record):
    mask = zeros(4, 4)
    mask[0] = 255
    records = [record("a", zeros(4, 4, 3), mask), record("b", zeros(4, 4, 3), mask | 3)]
    message = r"b_mask\.tif holds id 3: expected 0\.\.2 \(land, road, roof\), or 255 for ignored pixels"
    with pytest.raises(DataError, match=message):
        check_ids(records, scan(records), Task("multiclass", ("land", "road", "roof")))
    check_ids(records, scan(records), Task("multiclass", ("land", "road", "roof", "water")))
