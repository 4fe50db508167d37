"""What must hold before a model meets data: it fits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble.exceptions import NetworkError

if TYPE_CHECKING:
    from smp_ensemble.typing import Task


def check_fits(uri: str, task: Task, wanted: Task) -> None:
    """Refuses a member for another mode, other classes or other bands than the data's.

    Raises:
        NetworkError: Names the member and the difference.
    """
    for what in ("mode", "class_names", "in_channels"):
        found, expected = getattr(task, what), getattr(wanted, what)
        if found != expected:
            raise NetworkError(
                f"{uri} has {what} {found}, the data has {expected}: choose members that were trained for this data"
            )
