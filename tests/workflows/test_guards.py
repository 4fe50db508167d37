"""What does not fit, and what was trained on, is refused before it is scored."""

from __future__ import annotations

import logging

import pytest

from smp_ensemble.exceptions import LeakError, NetworkError
from smp_ensemble.typing import Snapshot, Task
from smp_ensemble.workflows.guards import check_fits, check_leak, check_leaks

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


def test_one_shared_image_is_enough(tiny_splits):
    digests = tiny_splits.val.image_digests
    members = [Snapshot("models:/m-1", "", 1), Snapshot("models:/m-2", "", 2)]
    check_leaks(members, [frozenset({"other"}), frozenset(tiny_splits.train.image_digests)], tiny_splits.val, "test")
    with pytest.raises(LeakError, match=f"^models:/m-2 was trained on 1 of the {len(digests)} test images"):
        check_leaks(members, [frozenset(), frozenset(digests[:1])], tiny_splits.val, "test")


def test_unknown_training_images_warn(caplog):
    with caplog.at_level(logging.WARNING):
        check_leak("models:/m-1", None, frozenset({"a"}), "validation")
    assert "does not say which images it was trained on: its validation scores may be too good" in caplog.text
