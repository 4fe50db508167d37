"""Environment variables that MLflow reads, set for a while; what somebody set before holds."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def unless_set(wanted: Mapping[str, object]) -> Iterator[None]:
    """While the block runs, in the whole process; what is set here is gone after it."""
    mine = {name: str(value) for name, value in wanted.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
