"""What each candidate predicts for a data set, kept on disk from one command to the next.

One file for each key, written beside its place and renamed: it is there whole or not at all, and of two processes that
write the same one, either may win. What is not as it should be is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.evaluation.codes import decode, encode
from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.typing import Mode

VERSION = 2
"""Raised where the same weights may give other numbers than before, in the last digits at least."""
FOLDER_VARIABLE, SIZE_VARIABLE = "SMP_ENSEMBLE_CACHE", "SMP_ENSEMBLE_CACHE_GB"
DEFAULT_GB = 20.0
MAGIC = b"smp_ensemble predictions\n"
SUFFIX, PARTIAL = ".predictions", ".partial"
STALE_SECONDS = 24 * 3600.0
"""After so long a file that was never renamed belongs to a process that died."""

logger = logging.getLogger(__name__)


def prediction_key(
    files: Mapping[str, str],
    normalization: Mapping[str, object],
    data: SegmentationDataset,
    *,
    views: Sequence[str] = ("none",),
    passes: int = 1,
    precision: str = "32-true",
    device: str = "cpu",
) -> str:
    """SHA-256 over everything that predictions follow from.

    Args:
        files: SHA-256 of the member's files, by name.
        normalization: What its input goes through, as `Normalization.to_dict` gives it.
        data: Its images count, in their order; its masks do not.
        views: Test-time views.
        passes: With dropout on.
        precision: The resolved word.
        device: Its type.
    """
    parts = {
        "version": VERSION,
        "files": dict(files),
        "normalization": dict(normalization),
        "mode": data.task.mode,
        "outputs": data.task.num_outputs,
        "images": list(data.image_digests),
        "views": list(views),
        "passes": passes,
        "precision": precision,
        "device": device,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class CachedPredictions:
    """One member's codes for all images of a data set, read from disk where they are asked for.

    Args:
        codes: All images one after another, each `(K, H, W)`.
        data: Whose sizes say where each image begins.
    """

    def __init__(self, codes: npt.NDArray[np.uint16], data: SegmentationDataset) -> None:
        self._codes = codes
        self._mode: Mode = data.task.mode
        self._outputs = data.task.num_outputs
        self._sizes = [scan.size for scan in data.scans]
        self._starts = _starts(data)

    def codes(self, index: int) -> npt.NDArray[np.uint16]:
        """One image's codes `(K, H, W)`."""
        start, end = self._starts[index : index + 2]
        return self._codes[start:end].reshape(self._outputs, *self._sizes[index])

    def read(self, index: int) -> npt.NDArray[np.float32]:
        """One image's probabilities `(K, H, W)`, to `codes.LARGEST_ERROR`."""
        return decode(self.codes(index), self._mode)


class PredictionCache:
    """Predictions in a folder.

    Args:
        folder: Made when it is first written to.
        limit_bytes: Beyond it, those go first that were not read for longest.
    """

    def __init__(self, folder: Path, limit_bytes: float = math.inf) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def read(self, key: str, data: SegmentationDataset) -> CachedPredictions | None:
        """What is kept under a key; None: nothing, or a file that is not as it should be."""
        path, header = self._path(key), _header(key, data)
        values = _starts(data)[-1]
        try:
            if path.stat().st_size != len(header) + 2 * values:
                return None
            with path.open("rb") as file:
                if file.read(len(header)) != header:
                    return None
            codes = np.memmap(path, np.dtype("<u2"), "r", len(header), (values,))
        except OSError:
            return None
        try:
            os.utime(path)  # times of reading are not kept everywhere
        except OSError:
            logger.debug("cannot say that %s was read", path)
        return CachedPredictions(codes, data)

    def write(
        self,
        key: str,
        data: SegmentationDataset,
        images: Callable[[], Iterable[tuple[int, npt.NDArray[np.float32]]]],
    ) -> CachedPredictions:
        """Keeps what a member predicts, and gives it back as it will be read.

        Args:
            key: Of `prediction_key`.
            data: The data set.
            images: Gives each image's index and probabilities `(K, H, W)` once, in any order.

        Raises:
            ConfigError: The folder cannot be written to.
        """
        path, header, starts = self._path(key), _header(key, data), _starts(data)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(header)
                for index, probabilities in images():
                    file.seek(len(header) + 2 * starts[index])
                    file.write(encode(probabilities).astype("<u2").tobytes())
                file.truncate(len(header) + 2 * starts[-1])
                file.flush()
                os.fsync(file.fileno())
            _rename(partial, path)
            kept = self.read(key, data)  # open from now on, whoever makes room
        except OSError as error:
            raise ConfigError(
                f"cannot keep predictions in {self.folder}: {error.strerror or error}; name another folder with "
                f"{FOLDER_VARIABLE}, or {FOLDER_VARIABLE}=off"
            ) from error
        finally:
            _remove(partial)
        if kept is None:
            raise ConfigError(f"predictions in {self.folder} vanished while they were written: try again")
        self._make_room(path)
        return kept

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self, newest: Path) -> None:
        """Removes what was not read for longest until the rest fits, and what dead processes left."""
        found = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except OSError:
                continue  # somebody else removed it
            if path.name.endswith(SUFFIX):
                found.append((status.st_mtime, status.st_size, path))
            elif path.name.endswith(PARTIAL) and time.time() - status.st_mtime > STALE_SECONDS:
                _remove(path)
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                return
            if path != newest and _remove(path):
                total -= size


def cache_from_environment() -> PredictionCache | None:
    """The user's cache; None where `SMP_ENSEMBLE_CACHE` is `off`.

    Raises:
        ConfigError: `SMP_ENSEMBLE_CACHE_GB` is no number of 0 or more.
    """
    chosen = os.environ.get(FOLDER_VARIABLE, "").strip()
    if chosen.lower() == "off":
        return None
    text = os.environ.get(SIZE_VARIABLE, "").strip() or str(DEFAULT_GB)
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not size >= 0:
        raise ConfigError(f"expected {SIZE_VARIABLE} as a number of gigabytes, got '{text}'")
    return PredictionCache(Path(chosen).expanduser() if chosen else default_folder(), size * 1e9)


def default_folder() -> Path:
    """Where this system keeps a user's caches."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "smp_ensemble"


def _starts(data: SegmentationDataset) -> list[int]:
    """Where each image begins, in values, and where the last one ends."""
    sizes = [data.task.num_outputs * scan.pixels for scan in data.scans]
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


def _header(key: str, data: SegmentationDataset) -> bytes:
    """The magic, one line of JSON with sizes and key, and blanks up to a multiple of 64 bytes."""
    sizes = hashlib.sha256(json.dumps([scan.size for scan in data.scans]).encode()).hexdigest()
    line = {"version": VERSION, "key": key, "outputs": data.task.num_outputs, "images": len(data), "sizes": sizes}
    text = MAGIC + json.dumps(line).encode() + b"\n"
    return text.ljust(-(-len(text) // 64) * 64)


def _rename(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except PermissionError:  # Windows: another process reads the one that is there, which holds the same
        if not path.is_file():
            raise


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False  # Windows: in use
    return True
