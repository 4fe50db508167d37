"""What does not fit is refused before it is scored."""

from __future__ import annotations

import pytest

from smp_ensemble.exceptions import NetworkError
from smp_ensemble.typing import Task
from smp_ensemble.workflows.guards import check_fits

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
