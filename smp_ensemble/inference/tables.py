"""Tables as CSV: whole or not at all, or row by row into a partial file that a later attempt goes on with."""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import BinaryIO

Row: TypeAlias = tuple[str, ...]

_ESCAPE = "surrogateescape"  # names of files need not be UTF-8
_FIRST_FIELD = re.compile(rb'("(?:[^"]|"")*"|[^",\r\n]*),')


def write_csv(path: Path, header: Row, rows: Iterable[Row]) -> Path:
    """Writes a CSV whole or not at all."""
    partial = _partial(path)
    with partial.open("w", encoding="utf-8", errors=_ESCAPE, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    partial.replace(path)
    return path


class Table:
    """A CSV that grows row by row in a partial file beside it, and takes its name when it is whole.

    The partial file stays where the work is interrupted. Memory holds where rows are, and no row.

    Args:
        path: The CSV.
        header: Its columns; the first is a name, unique in the table.
        resume: Begin with the rows of the partial file, or else of the CSV itself, if their header is this one.
            False: begin anew.

    Attributes:
        time: When the rows that were there were written, in nanoseconds; 0: there are none.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Table(Path(folder) / "masks.csv", ("name", "mask"))
        ...     table.add(("b.png", "1 2"))
        ...     table.add(("a.png", "3 4"))
        ...     table.close(["a.png", "b.png"]).read_text().splitlines()
        ['name,mask', 'a.png,3 4', 'b.png,1 2']
    """

    def __init__(self, path: Path, header: Row, *, resume: bool = False) -> None:
        self._path = path
        self._header = _line(header)
        self._partial = _partial(path)
        self._places: dict[bytes, tuple[int, int]] = {}  # a name as it is written, and where its row is
        self._source: Path | None = None  # holds those rows, until the partial file does
        self._file: BinaryIO | None = None
        self.time = 0
        if resume:
            self._find_rows()

    def __contains__(self, name: str) -> bool:
        """Whether the table has a row of this name."""
        return _field(name) in self._places

    def drop(self, name: str) -> None:
        """Forgets the row of this name, if there is one, for this attempt and all later ones."""
        self._places.pop(_field(name), None)

    def add(self, row: Row) -> None:
        """Appends a row; an earlier one of its name gives way to it."""
        file = self._open()
        line = _line(row)
        self._places[_field(row[0])] = (file.tell(), len(line))
        file.write(line)

    def close(self, names: Iterable[str]) -> Path:
        """Gives the CSV its name, with the rows of `names` that there are, in this order."""
        self._open()
        self.stop()
        keys = [key for key in map(_field, names) if key in self._places]
        if keys != list(self._places):
            self._copy(self._partial, keys)
        return self._partial.replace(self._path)

    def stop(self) -> None:
        """Closes the partial file, and leaves it for a later attempt."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _find_rows(self) -> None:
        """Where each row is that an earlier attempt has left; what was cut off is not one."""
        found = next((path for path in (self._partial, self._path) if path.is_file()), None)
        if found is None:
            return
        with found.open("rb") as file:
            place = len(header) if (header := file.readline()) == self._header else 0
            for line in file if place else ():
                if (name := _FIRST_FIELD.match(line)) and line.endswith(b"\r\n"):
                    self._places[name[1]] = (place, len(line))
                place += len(line)
        if self._places:
            self._source = found
            self.time = found.stat().st_mtime_ns

    def _open(self) -> BinaryIO:
        """The partial file, ready for more; rows of an earlier attempt are in it."""
        if self._file is None:
            if self._source is not None:
                self._copy(self._source, list(self._places))
                self._file = self._partial.open("ab")
            else:
                self._file = self._partial.open("wb")
                self._file.write(self._header)
        return self._file

    def _copy(self, source: Path, keys: Iterable[bytes]) -> None:
        """Makes the partial file of these rows of another, in this order."""
        places = {}
        copy = self._partial.with_suffix(".copy")
        with source.open("rb") as rows, copy.open("wb") as file:
            file.write(self._header)
            for key in keys:
                rows.seek(self._places[key][0])
                line = rows.read(self._places[key][1])
                places[key] = (file.tell(), len(line))
                file.write(line)
        copy.replace(self._partial)
        self._places, self._source = places, None


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _line(row: Row) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(row)
    return text.getvalue().encode(errors=_ESCAPE)


def _field(name: str) -> bytes:
    return _line((name,))[:-2]
