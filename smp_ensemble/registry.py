"""Names to factories through entry points: built-ins register exactly as third parties do."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, distributions
from typing import TYPE_CHECKING, Any

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.untrusted import shorten

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUPS = (
    "smp_ensemble.trainers",
    "smp_ensemble.combiners",
    "smp_ensemble.selectors",
    "smp_ensemble.architectures",
    "smp_ensemble.stores",
)


def _found(group: str) -> dict[str, list[EntryPoint]]:
    """Entry points by name, one for each distribution that claims the name.

    A model's artifact brings our own entry points along, and MLflow puts it first on the path: of several copies of one
    distribution the last, the installed one, counts, and a name that only one copy has is known all the same.
    """
    by_name: dict[str, dict[str, EntryPoint]] = {}
    for distribution in distributions():
        for point in distribution.entry_points:
            if point.group == group:
                by_name.setdefault(point.name, {})[distribution.name] = point
    return {name: list(points.values()) for name, points in by_name.items()}


def names(group: str) -> list[str]:
    """Names that are installed in `group`, sorted. Loads nothing."""
    return sorted(_found(group))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest match, then everything that is known.

    Example:
        >>> nearest("snapshto", ["single", "snapshot"])
        "did you mean 'snapshot'? Known: single, snapshot"
    """
    known = sorted(known)
    lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f"did you mean '{lower[close[0]]}'? " if close else ""
    shown = ", ".join(known) if len(known) <= 40 else f"{', '.join(known[:40])}, ... ({len(known)} in all)"
    return f"{hint}Known: {shown or 'none'}"


def load(group: str, name: str) -> Any:
    """The object that `name` stands for in an entry-point group, imported now and not before.

    Args:
        group: One of `GROUPS`.
        name: What the user typed.

    Raises:
        ConfigError: Nothing of that name is installed, two distributions claim it, or its import fails.
    """
    points = _found(group).get(name)
    word = group.rpartition(".")[2].removesuffix("s")
    if not points:
        raise ConfigError(f"unknown {word} '{shorten(name, 80)}': {nearest(name, names(group))}")
    if len({point.value for point in points}) > 1:
        claims = " and ".join(
            f"{point.dist.name if point.dist else 'an unnamed distribution'} ({point.value})" for point in points
        )
        raise ConfigError(f"{word} '{name}' is claimed by {claims}: uninstall one of them, or rename its entry point")
    try:
        return points[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{word} '{name}' ({points[0].value}) cannot be imported: {error}") from error
