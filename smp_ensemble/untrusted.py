"""Files that others may have written: read with limits of size and depth, and names that stay in their folder."""

from __future__ import annotations

import json
import re
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

MEBI = 1 << 20

MOST_DEPTH = 32
"""Of lists and objects in a JSON file."""

MOST_TEXT = 4096
"""Characters of one string in a JSON file."""

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # devices of Windows, anywhere


def is_inside(name: str) -> bool:
    r"""Whether a relative name is one that means a place in its folder on every system.

    Forward slashes, plain letters, digits and `_.+-`; no `..`, no hidden file, no drive, no device of Windows, no end
    that Windows drops.

    Example:
        >>> [is_inside(name) for name in ("members/00", "a/../b", "/etc", "C:/a", "a\\b", "nul.txt", "a/", "", "a.")]
        [True, False, False, False, False, False, False, False, False]
    """
    parts = name.split("/")
    return len(parts) <= 16 and all(
        _SEGMENT.fullmatch(part) and not part.endswith(".") and not _RESERVED.fullmatch(part) for part in parts
    )


def read_limited(path: Path, most_bytes: int, *, links: bool = False) -> bytes:
    """A regular file's bytes.

    Args:
        path: The file.
        most_bytes: It may hold.
        links: Whether it may be a symbolic link to such a file.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is no regular file (a folder, a pipe, a device), or is larger.
    """
    if not links and path.is_symlink():
        raise ValueError("expected a regular file, found a symbolic link")
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("expected a regular file, found something else")
    with path.open("rb") as file:  # it may have grown since
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"expected at most {most_bytes} bytes, found {max(found.st_size, len(content))}")
    return content


def read_json(path: Path, most_bytes: int, *, links: bool = False) -> Any:
    """What a JSON file holds; its arguments are those of `read_limited`.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is too large, too deep, no JSON in UTF-8, or holds a string beyond what we write.
    """
    try:
        content = json.loads(read_limited(path, most_bytes, links=links).decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"expected at most {MOST_DEPTH} levels of lists and objects, found more") from error
    _check_values(content)
    return content


def _check_values(content: Any) -> None:
    """Refuses what would overflow or flood later: depth, long or broken strings."""
    pending = [(content, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, dict | list):
            if depth > MOST_DEPTH:
                raise ValueError(f"expected at most {MOST_DEPTH} levels of lists and objects, found more")
            pending.extend((inner, depth + 1) for inner in value)
            if isinstance(value, dict):
                pending.extend((inner, depth + 1) for inner in value.values())
        elif isinstance(value, str):
            if len(value) > MOST_TEXT:
                raise ValueError(f"expected strings of at most {MOST_TEXT} characters, found one of {len(value)}")
            value.encode()  # half of a surrogate pair cannot be written anywhere


def shorten(error: object, most: int = 300) -> str:
    """An error about a stranger's values as one line that does not flood the screen.

    Example:
        >>> shorten("a" * 10, most=8)
        'aaaaa...'
    """
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
