"""What does not fit, and what was trained on, is refused before it is scored."""

from __future__ import annotations

import logging

import pytest

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import LeakError, NetworkError
from smp_ensemble.typing import Task
from smp_ensemble.workflows.guards import check_fits, check_leaks

ROOFS = Task("binary", ("background", "roof"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("multilabel", ("background", "roof")), "has mode multilabel, the data has binary"),
        (
            Task("binary", ("background", "road")),
            "class_names .*'road'.* the data has .*'roof'",
        ),
        (Task("binary", ("background", "roof"), 4), "has in_channels 4, the data has 3"),
    ],
)
def test_a_member_for_another_task_is_named_with_the_difference(task, message):
    with pytest.raises(NetworkError, match=f"^models:/m-1 .*{message}"):
        check_fits("models:/m-1", task, ROOFS)
    check_fits("models:/m-1", ROOFS, ROOFS)


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
