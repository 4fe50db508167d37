"""`ensemble.json`: everything about an ensemble but its weights, and where those are."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smp_ensemble.ensembling.member import CONFIG_FILE, WEIGHTS_FILE
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.typing import Mode, Task
from smp_ensemble.untrusted import MEBI, is_inside, read_json, shorten

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = 1
ENSEMBLE_FILE = "ensemble.json"
TRAINING_IMAGES_FILE = "training_images.txt"
COMBINER_FILE = "combiner.safetensors"

SPEC_BYTES = 4 * MEBI
MOST_MEMBERS = 1000
MOST_CLASSES = 1000
MOST_BANDS = 4096

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class MemberEntry:
    """One member as `ensemble.json` lists it.

    Attributes:
        folder: Relative to the artifact, `members/00`.
        source: The tracked snapshot it came from, `models:/m-...`; empty for one that is not tracked yet.
        weight: In the combination; scale-free.
        normalization: As `Normalization.to_dict` gives it.
        sha256: Of each of its files, by name.
        threshold: What it would use alone, for comparison.
        temperature: The same.
    """

    folder: str
    source: str
    weight: float
    normalization: Mapping[str, Any]
    sha256: Mapping[str, str]
    threshold: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True)
class EnsembleSpec:
    """The content of `ensemble.json`: everything about an ensemble but its weights.

    `combiner_sha256` is that of the combiner's fitted state, beside `ensemble.json`; None: it has none. `adaptive` is
    the rule as `AdaptiveRule.to_dict` gives it; without one the file does not name it.
    """

    mode: Mode
    class_names: tuple[str, ...]
    in_channels: int
    members: tuple[MemberEntry, ...]
    combiner: str = "mean"
    views: tuple[str, ...] = ("none",)
    temperature: float = 1.0
    threshold: float = 0.5
    reject: float = 0.0
    combiner_sha256: str | None = None
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    adaptive: Mapping[str, Any] | None = None

    @property
    def task(self) -> Task:
        """Mode, class names and bands."""
        return Task(self.mode, self.class_names, self.in_channels)


def write_spec(spec: EnsembleSpec, folder: Path) -> None:
    """Writes `ensemble.json`."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "mode": spec.mode,
        "class_names": list(spec.class_names),
        "in_channels": spec.in_channels,
        "combiner": spec.combiner,
        "views": list(spec.views),
        "temperature": spec.temperature,
        "threshold": spec.threshold,
        "reject": spec.reject,
        "combiner_sha256": spec.combiner_sha256,
        "postprocess": dict(spec.postprocess),
        "members": [
            {
                "folder": member.folder,
                "source": member.source,
                "weight": member.weight,
                "threshold": member.threshold,
                "temperature": member.temperature,
                "normalization": dict(member.normalization),
                "sha256": dict(member.sha256),
            }
            for member in spec.members
        ],
    }
    if spec.adaptive is not None:
        content["adaptive"] = dict(spec.adaptive)
    (folder / ENSEMBLE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_spec(folder: Path) -> EnsembleSpec:
    """Reads `ensemble.json`; nothing in it is executed, and no path in it leaves the folder.

    Raises:
        IntegrityError: The file is missing, is not JSON, or does not hold what this version writes.
    """
    path = folder / ENSEMBLE_FILE
    try:
        content = read_json(path, SPEC_BYTES)
    except FileNotFoundError as error:
        raise IntegrityError(f"expected {ENSEMBLE_FILE} in {folder}, found none: not an smp_ensemble model") from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot read {path}: {shorten(error)}") from error
    try:
        if content["format"] != FORMAT:
            raise IntegrityError(
                f"{path} has format {shorten(repr(content['format']))}, this version reads {FORMAT}: "
                "update smp_ensemble"
            )
        digest = content.get("combiner_sha256")
        return EnsembleSpec(
            mode=content["mode"],
            class_names=tuple(str(name) for name in _few(content["class_names"], "class names", MOST_CLASSES)),
            in_channels=_bands(content["in_channels"]),
            members=_read_entries(content["members"]),
            combiner=str(content["combiner"]),
            views=tuple(str(view) for view in content["views"]),
            temperature=float(content["temperature"]),
            threshold=float(content["threshold"]),
            reject=float(content.get("reject", 0.0)),
            combiner_sha256=None if digest is None else _digest(digest),
            postprocess=_object(content.get("postprocess", {})),
            adaptive=_object(content["adaptive"]) if "adaptive" in content else None,
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path} does not hold what it should: {type(error).__name__} {shorten(error)}") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {value!r}")
    return value


def _few(value: Any, what: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list of {what}, got {value!r}")
    if not 1 <= len(value) <= most:
        raise ValueError(f"expected 1 to {most} {what}, got {len(value)}")
    return value


def _bands(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_BANDS:
        raise ValueError(f"expected 1 to {MOST_BANDS} bands, got {value!r}")
    return value


def _digest(value: Any) -> str:
    """A word that is no SHA-256 must never equal what is said of a file that is missing or a link."""
    if not (isinstance(value, str) and DIGEST.fullmatch(value)):
        raise ValueError(f"expected a SHA-256 in hexadecimal, got {value!r}")
    return value


def _read_entries(value: Any) -> tuple[MemberEntry, ...]:
    entries = tuple(_read_entry(entry) for entry in _few(value, "members", MOST_MEMBERS))
    folders = [entry.folder for entry in entries]
    if len(set(folders)) < len(folders):
        raise ValueError("expected a folder for each member, got one for several")
    return entries


def _read_entry(entry: Mapping[str, Any]) -> MemberEntry:
    relative = str(entry["folder"])
    if not is_inside(relative):
        raise IntegrityError(
            f"{ENSEMBLE_FILE} names the folder '{shorten(relative)}', which leaves the artifact: refused"
        )
    files = entry["sha256"]
    allowed = {CONFIG_FILE, WEIGHTS_FILE, TRAINING_IMAGES_FILE}
    if not {CONFIG_FILE, WEIGHTS_FILE} <= set(files) <= allowed:
        raise IntegrityError(
            f"{ENSEMBLE_FILE} lists the files {shorten(sorted(files))} for '{relative}', expected {sorted(allowed)}"
        )
    temperature = float(entry.get("temperature", 1.0))
    if not 0 < temperature < math.inf:
        raise ValueError(f"a member's temperature must be a finite number above 0, got {temperature}")
    threshold = float(entry.get("threshold", 0.5))
    if not 0 <= threshold <= 1:
        raise ValueError(f"a member's threshold must lie between 0 and 1, got {threshold}")
    return MemberEntry(
        relative,
        str(entry.get("source", "")),
        float(entry["weight"]),
        dict(entry["normalization"]),
        {name: _digest(digest) for name, digest in files.items()},
        threshold,
        temperature,
    )
