"""A spool says where it belongs, to any process that reads it; nothing secret is written."""

from __future__ import annotations

import numpy as np
import pytest

from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.tracking.addresses import ADDRESS_FILE, Address, read_address, read_previews, without_secrets


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (8, size, 3), np.uint8) for size in (8, 16)]
    masks = [rng.integers(0, 2, (8, size), np.uint8) for size in (8, 16)]
    address = Address("run", "http://127.0.0.1:5000", keep=2, resumable=True)
    address.write(tmp_path, list(zip(images, masks, strict=True)))
    assert read_address(tmp_path) == address
    for (image, mask), expected_image, expected_mask in zip(read_previews(tmp_path), images, masks, strict=True):
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(mask, expected_mask)
        assert image.dtype == np.uint8


def test_without_images_there_are_no_previews(tmp_path):
    Address("run", None).write(tmp_path, [])
    assert read_previews(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"format": 1}', '{"format": 2, "run_id": "a", '
                                     '"tracking_uri": null}', '{"format": 1, "run_id": "a", "other": 1}'])  # fmt: skip
def test_what_is_no_address_is_said(tmp_path, content):
    (tmp_path / ADDRESS_FILE).write_text(content)
    with pytest.raises(IntegrityError, match=ADDRESS_FILE):
        read_address(tmp_path)


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        ("http://127.0.0.1:5000", True),
        ("sqlite:///mlflow.db", True),
        ("databricks", True),
        ("https://me:secret@mlflow.example", False),
        ("postgresql://me:secret@db/mlflow", False),
    ],
)
def test_a_password_is_not_written(uri, kept):
    assert without_secrets(uri) == (uri if kept else None)
