"""What must hold before a model meets data, or other models: it fits them."""

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


def check_alike(first_uri: str, first: Task, uri: str, task: Task) -> None:
    """Refuses two members that do not predict the same thing; how they do it may differ.

    Raises:
        NetworkError: Names both and the difference.
    """
    for what in ("mode", "class_names", "in_channels"):
        found, expected = getattr(task, what), getattr(first, what)
        if found != expected:
            raise NetworkError(
                f"{first_uri} has {what} {expected}, {uri} has {found}: one ensemble needs members that were trained "
                "for the same task; choose with where or pick"
            )
