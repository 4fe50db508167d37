"""`ensemble.json`: everything about an ensemble but its weights, and where those are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from smp_ensemble.ensembling.member import CONFIG_FILE, WEIGHTS_FILE
from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.typing import Mode, Task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = 1
ENSEMBLE_FILE = "ensemble.json"
TRAINING_IMAGES_FILE = "training_images.txt"
COMBINER_FILE = "combiner.safetensors"


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(f"expected {ENSEMBLE_FILE} in {folder}, found none: not an smp_ensemble model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"cannot read {path}: {error}") from error
    try:
        if content["format"] != FORMAT:
            raise IntegrityError(
                f"{path} has format {content['format']!r}, this version reads {FORMAT}: update smp_ensemble"
            )
        digest = content.get("combiner_sha256")
        return EnsembleSpec(
            mode=content["mode"],
            class_names=tuple(str(name) for name in content["class_names"]),
            in_channels=int(content["in_channels"]),
            members=tuple(_read_entry(entry) for entry in content["members"]),
            combiner=str(content["combiner"]),
            views=tuple(str(view) for view in content["views"]),
            temperature=float(content["temperature"]),
            threshold=float(content["threshold"]),
            reject=float(content.get("reject", 0.0)),
            combiner_sha256=None if digest is None else str(digest),
            postprocess=_object(content.get("postprocess", {})),
            adaptive=_object(content["adaptive"]) if "adaptive" in content else None,
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path} does not hold what it should: {type(error).__name__} {error}") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {value!r}")
    return value


def _read_entry(entry: Mapping[str, Any]) -> MemberEntry:
    relative = PurePosixPath(str(entry["folder"]))
    if relative.is_absolute() or ".." in relative.parts or "\\" in str(relative) or ":" in str(relative):
        raise IntegrityError(f"{ENSEMBLE_FILE} names the folder '{relative}', which leaves the artifact: refused")
    sha256 = {str(name): str(digest) for name, digest in entry["sha256"].items()}
    allowed = {CONFIG_FILE, WEIGHTS_FILE, TRAINING_IMAGES_FILE}
    if not {CONFIG_FILE, WEIGHTS_FILE} <= set(sha256) <= allowed:
        raise IntegrityError(
            f"{ENSEMBLE_FILE} lists the files {sorted(sha256)} for '{relative}', expected {sorted(allowed)}"
        )
    return MemberEntry(
        str(relative),
        str(entry.get("source", "")),
        float(entry["weight"]),
        dict(entry["normalization"]),
        sha256,
        float(entry.get("threshold", 0.5)),
        float(entry.get("temperature", 1.0)),
    )
