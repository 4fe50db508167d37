"""What must hold before a model is scored: it was not trained on these images."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import LeakError
from smp_ensemble.typing import Task

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.ensembling.ensemble import Ensemble

logger = logging.getLogger(__name__)


def task_of(ensemble: Ensemble) -> Task:
    """What a loaded model predicts, from what it carries."""
    first = ensemble.members[0]
    assert isinstance(first, Member)  # all that is stored is made of members
    return Task(ensemble.mode, ensemble.class_names, first.normalization.in_channels)


class Trained(Protocol):
    """What knows where it came from and which images it was trained on: a `Member`, or its files alone."""

    @property
    def source(self) -> str:
        """Its address; may be empty."""
        ...

    @property
    def training_images(self) -> frozenset[str] | None:
        """Digests; None: unknown."""
        ...


def check_leaks(members: Iterable[Trained], data: SegmentationDataset, what: str) -> None:
    """Refuses to score members on images that they were trained on; warns where nobody knows.

    Args:
        members: With the digests of their training images, where they are known.
        data: What they would be scored on.
        what: The data's part, for the message: `validation`, `test`.

    Raises:
        LeakError: Names the member and how many images.
    """
    digests = frozenset(data.image_digests)
    for index, member in enumerate(members):
        name = member.source or f"member {index}"
        if member.training_images is None:
            logger.warning("%s does not say which images it was trained on: its %s scores may be too good", name, what)
            continue
        shared = len(member.training_images & digests)
        if shared:
            raise LeakError(
                f"{name} was trained on {shared} of the {len(digests)} {what} images: its score would mean nothing. "
                "Use the split-seed (for left-out images the fold too) that it was trained with, or leave it out"
            )
