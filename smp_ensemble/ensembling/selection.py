"""From candidates to members: each selector takes candidates, best first, and gives those that join."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from smp_ensemble import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.typing import Snapshot

GROUP = "smp_ensemble.selectors"


class Selector(Protocol):
    """Gives members from `candidates`, which come ranked by score, best first."""

    def __call__(self, candidates: Sequence[Snapshot], max_members: int) -> list[Snapshot]:
        """At most `max_members` of `candidates`."""
        ...


def select_top_k(candidates: Sequence[Snapshot], max_members: int) -> list[Snapshot]:
    """The `max_members` best by score."""
    return list(candidates[:max_members])


def select_last(candidates: Sequence[Snapshot], max_members: int) -> list[Snapshot]:
    """The `max_members` snapshots with most completed steps, latest first: the choice of Snapshot Ensembles.

    Ties (several trainings of one length) go to the better score.

    References:
        Huang et al., ICLR 2017, arXiv:1704.00109: "the last m models tend to have the lowest test error".
    """
    return sorted(candidates, key=lambda candidate: -candidate.step)[:max_members]


def select_all(candidates: Sequence[Snapshot], max_members: int) -> list[Snapshot]:  # noqa: ARG001 (a selector's shape)
    """Every candidate, whatever `max_members` says."""
    return list(candidates)


def make_selector(name: str) -> Selector:
    """A selector by name.

    Raises:
        ConfigError: Unknown name.
    """
    selector: Selector = registry.load(GROUP, name)
    return selector
