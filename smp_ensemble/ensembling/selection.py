"""From candidates to members: selectors take candidates, best first, and give those that join, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from smp_ensemble import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.ensembling.pool import CandidatePool
    from smp_ensemble.typing import Snapshot

GROUP = "smp_ensemble.selectors"


class Selector(Protocol):
    """Gives members from `candidates`, which come ranked by score, best first."""

    def __call__(self, candidates: Sequence[Snapshot], max_members: int) -> list[Snapshot]:
        """At most `max_members` of `candidates`."""
        ...


@dataclass(frozen=True)
class Step:
    """One addition: which candidate, and the score of the mean with it."""

    candidate: Snapshot
    score: float


@dataclass(frozen=True)
class Selection:
    """What a selector chose.

    Attributes:
        members: Those that join, each once.
        weights: Of each, above 0; they sum to 1.
        path: The additions in their order, for people; may be empty.
        kept: How many of them, from the first on, made the result.
    """

    members: list[Snapshot]
    weights: list[float]
    path: list[Step]
    kept: int


class PredictionSelector(Protocol):
    """A selector that looks at predictions on validation data; it says so with `needs_predictions = True`.

    A class with this attribute and no argument works as well as a function that carries it.
    """

    needs_predictions: bool

    def __call__(self, pool: CandidatePool, max_members: int) -> Selection:
        """At most `max_members` of `pool.candidates`."""
        ...


def needs_predictions(selector: Selector | PredictionSelector) -> bool:
    """Whether a selector wants a `CandidatePool`."""
    return bool(getattr(selector, "needs_predictions", False))


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


def make_selector(name: str) -> Selector | PredictionSelector:
    """A selector by name.

    Raises:
        ConfigError: Unknown name.
    """
    found = registry.load(GROUP, name)
    selector: Selector | PredictionSelector = found() if isinstance(found, type) else found
    return selector
