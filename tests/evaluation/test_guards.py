"""No member is scored on images that it was trained on."""

from __future__ import annotations

import logging

import pytest

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.guards import check_leaks, task_of
from smp_ensemble.exceptions import LeakError
from smp_ensemble.typing import Task


@pytest.fixture
def member(make_tiny_network):
    """Makes members that were trained on the given images."""
    return lambda images, source="models:/m-1": Member(
        make_tiny_network(), imagenet(), source=source, training_images=images
    )


def test_one_shared_image_is_enough(tiny_splits, member):
    digests = tiny_splits.val.image_digests
    check_leaks([member({"other"}), member(tiny_splits.train.image_digests)], tiny_splits.val, "test")
    with pytest.raises(LeakError, match=f"^models:/m-2 was trained on 1 of the {len(digests)} test images"):
        check_leaks([member(set()), member(digests[:1], "models:/m-2")], tiny_splits.val, "test")


def test_unknown_training_images_warn(tiny_splits, member, caplog):
    with caplog.at_level(logging.WARNING):
        check_leaks([member(None, "")], tiny_splits.val, "validation")
    assert "member 0 does not say which images it was trained on: its validation scores may be too good" in caplog.text


def test_the_task_is_what_the_model_carries(member):
    ensemble = Ensemble([member(None)], mode="binary", class_names=("background", "roof"))
    assert task_of(ensemble) == Task("binary", ("background", "roof"), 3)
