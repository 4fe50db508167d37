"""`files.sha256`: the SHA-256 of every file of a stored model, in the form of `sha256sum`, and of the list itself."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from smp_ensemble.ensembling.artifact import file_sha256, verify_file
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.untrusted import MEBI, is_inside, read_limited, shorten

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

MANIFEST_FILE = "files.sha256"
MANIFEST_BYTES = 4 * MEBI

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LAST = "# SHA-256 of the lines above: "
_CACHE = "__pycache__"


def write_manifest(folder: Path) -> str:
    """Lists every file of a model but the list itself, and returns the SHA-256 that its last line holds.

    Args:
        folder: With all that belongs to the model; what is written later is not covered.
    """
    files = {path: file_sha256(folder / path) for path in sorted(_files(folder)) if path != MANIFEST_FILE}
    content = _render(files)
    (folder / MANIFEST_FILE).write_bytes(content)
    return _own_digest(content)


def read_manifest(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file by its name in the folder, with forward slashes.

    Raises:
        IntegrityError: The list is missing or damaged, or names a place outside the folder.
    """
    path = folder / MANIFEST_FILE
    try:
        content = read_limited(path, MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} was changed: expected the SHA-256 of all files, found no file") from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot read {path}: {shorten(error)}") from error
    lines = content.decode("ascii", "replace").splitlines()
    found = _own_digest(content)
    expected = lines[-1].removeprefix(_LAST) if lines and lines[-1].startswith(_LAST) else "in its last line"
    if found != expected:
        raise IntegrityError(f"{path} was changed: expected SHA-256 {shorten(expected)}, found {found}")
    files: dict[str, str] = {}
    for line in lines[:-1]:
        match = _LINE.fullmatch(line)
        if match is None or not is_inside(match[2]) or match[2] in files:
            raise IntegrityError(f"{path} does not hold what it should: the line '{shorten(line)}'")
        files[match[2]] = match[1]
    if _render(files) != content:
        raise IntegrityError(f"{path} does not hold what it should: expected lines as we write them, in order")
    return files


def manifest_digest(folder: Path) -> str:
    """The SHA-256 in the last line of the list; read it with `read_manifest` first."""
    return _own_digest((folder / MANIFEST_FILE).read_bytes())


def verify_files(folder: Path, files: Mapping[str, str], *, but: Collection[str] = (), closed: str) -> None:
    """Compares the files of a model with their list.

    Args:
        folder: The model.
        files: As `read_manifest` gives them.
        but: Names that are verified elsewhere.
        closed: A folder in it that may hold no other files than those listed, beside Python's caches.

    Raises:
        IntegrityError: A file is missing, changed, behind a link, or should not be there; names it.
    """
    root = folder.resolve()
    for name, expected in files.items():
        if name not in but:
            verify_file(root / name, expected)
    for name in _files(root / closed):
        inside = f"{closed}/{name}"
        if inside not in files:
            raise IntegrityError(f"{root / inside} was added: expected only files that {MANIFEST_FILE} lists, found it")


def _render(files: Mapping[str, str]) -> bytes:
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return f"{lines}{_LAST}{hashlib.sha256(lines.encode()).hexdigest()}\n".encode()


def _own_digest(content: bytes) -> str:
    """Of all lines but the last."""
    return hashlib.sha256(content[: content.rfind(b"\n", 0, -1) + 1]).hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, and of links to folders, which are not followed."""
    for place, folders, files in os.walk(folder):
        at = Path(place)
        links = [name for name in folders if (at / name).is_symlink()]
        folders[:] = [name for name in folders if name != _CACHE]
        yield from ((at / name).relative_to(folder).as_posix() for name in (*files, *links))
