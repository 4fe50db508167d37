"""What a command reports: a table for people, plain values for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Report:
    """The outcome of a command.

    Attributes:
        values: Plain values, for `--json`.
        rows: Of the table, each with the same keys; numbers are rounded for display.
        notes: Lines below the table.
    """

    values: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    def text(self) -> str:
        """The table and the lines below it."""
        return "\n".join([*format_table(self.rows), *self.notes])

    def json(self) -> str:
        """`values` as JSON that every parser takes: a score that is not a number becomes null."""
        return json.dumps(_plain(self.values), indent=2, allow_nan=False, default=str)


def format_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    r"""Lines of a plain table: text to the left, numbers to the right.

    Example:
        >>> print("\n".join(format_table([{"name": "a", "iou": 0.51234}, {"name": "bb", "iou": None}])))
        name     iou
        ----  ------
        a     0.5123
        bb         -
    """
    if not rows:
        return []
    headings = list(rows[0])
    numeric = [any(isinstance(row[heading], int | float) for row in rows) for heading in headings]
    cells = [[_cell(row[heading]) for heading in headings] for row in rows]
    widths = [max(len(heading), *(len(line[at]) for line in cells)) for at, heading in enumerate(headings)]
    lines = [headings, ["-" * width for width in widths], *cells]
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
