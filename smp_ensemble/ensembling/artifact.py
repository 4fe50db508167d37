"""The one format on disk, for a snapshot, a soup and an ensemble: `ensemble.json`, and a folder for each member."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from smp_ensemble.data.normalization import Normalization
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import CONFIG_FILE, WEIGHTS_FILE, Member, load_network, save_network
from smp_ensemble.exceptions import ConfigError, IntegrityError
from smp_ensemble.typing import Mode, Task

FORMAT = 1
ENSEMBLE_FILE = "ensemble.json"
TRAINING_IMAGES_FILE = "training_images.txt"


@dataclass(frozen=True)
class MemberEntry:
    """One member as `ensemble.json` lists it.

    Attributes:
        folder: Relative to the artifact, `members/00`.
        source: The tracked snapshot it came from, `models:/m-...`; empty for one that is not tracked yet.
        weight: In the combination; scale-free.
        normalization: As `Normalization.to_dict` gives it.
        sha256: Of each of its files, by name.
    """

    folder: str
    source: str
    weight: float
    normalization: Mapping[str, Any]
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class EnsembleSpec:
    """The content of `ensemble.json`: everything about an ensemble but its weights."""

    mode: Mode
    class_names: tuple[str, ...]
    in_channels: int
    members: tuple[MemberEntry, ...]
    combiner: str = "mean"
    views: tuple[str, ...] = ("none",)
    temperature: float = 1.0
    threshold: float = 0.5
    postprocess: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """Mode, class names and bands."""
        return Task(self.mode, self.class_names, self.in_channels)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_member(
    network: nn.Module,
    normalization: Normalization,
    folder: Path,
    *,
    relative: str = "members/00",
    source: str = "",
    weight: float = 1.0,
    training_images: Sequence[str] | None = None,
) -> MemberEntry:
    """Writes one member below `folder` and describes it for `ensemble.json`.

    Args:
        network: Gives logits for normalised images.
        normalization: The member's own.
        folder: The artifact.
        relative: The member's folder in it, with forward slashes.
        source: `models:/m-...`, if it is tracked.
        weight: In the combination.
        training_images: Digests of the images it was trained on; None: unknown, and no file says so.
    """
    place = folder / relative
    save_network(network, place)
    files = [CONFIG_FILE, WEIGHTS_FILE]
    if training_images is not None:
        lines = "".join(f"{digest}\n" for digest in sorted(training_images))
        (place / TRAINING_IMAGES_FILE).write_text(lines, encoding="utf-8", newline="\n")
        files.append(TRAINING_IMAGES_FILE)
    return MemberEntry(
        relative, source, weight, normalization.to_dict(), {name: file_sha256(place / name) for name in files}
    )


def write_spec(spec: EnsembleSpec, folder: Path) -> None:
    """Writes `ensemble.json`."""
    content = {
        "format": FORMAT,
        "mode": spec.mode,
        "class_names": list(spec.class_names),
        "in_channels": spec.in_channels,
        "combiner": spec.combiner,
        "views": list(spec.views),
        "temperature": spec.temperature,
        "threshold": spec.threshold,
        "postprocess": dict(spec.postprocess),
        "members": [
            {
                "folder": member.folder,
                "source": member.source,
                "weight": member.weight,
                "normalization": dict(member.normalization),
                "sha256": dict(member.sha256),
            }
            for member in spec.members
        ],
    }
    (folder / ENSEMBLE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def save_ensemble(
    ensemble: Ensemble,
    folder: Path,
    *,
    sources: Sequence[str] | None = None,
    training_images: Sequence[Sequence[str] | None] | None = None,
) -> EnsembleSpec:
    """Writes a whole ensemble of `Member`s to a new folder.

    Args:
        ensemble: With `class_names`, and `Member`s as members.
        folder: Created.
        sources: `models:/m-...` for each member, where it is tracked.
        training_images: Digests for each member; None: unknown.

    Raises:
        ConfigError: The ensemble lacks class names, or a member is not a `Member`.
    """
    if not ensemble.class_names:
        raise ConfigError("an ensemble that is saved needs class_names: Ensemble(..., class_names=[...])")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    in_channels = 0
    for index, (member, weight) in enumerate(zip(ensemble.members, ensemble.weights, strict=True)):
        if not isinstance(member, Member):
            raise ConfigError(
                f"member {index} is a {type(member).__name__}: wrap it as Member(network, normalization), "
                "so that its input's normalisation is saved with it"
            )
        in_channels = member.normalization.in_channels
        entries.append(
            write_member(
                member.network,
                member.normalization,
                folder,
                relative=f"members/{index:02d}",
                source=sources[index] if sources else "",
                weight=weight,
                training_images=training_images[index] if training_images else None,
            )
        )
    spec = EnsembleSpec(
        ensemble.mode,
        ensemble.class_names,
        in_channels,
        tuple(entries),
        ensemble.combiner,
        ensemble.views,
        ensemble.temperature,
        ensemble.threshold,
    )
    write_spec(spec, folder)
    return spec


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
        return EnsembleSpec(
            mode=content["mode"],
            class_names=tuple(str(name) for name in content["class_names"]),
            in_channels=int(content["in_channels"]),
            members=tuple(_read_entry(entry) for entry in content["members"]),
            combiner=str(content["combiner"]),
            views=tuple(str(view) for view in content["views"]),
            temperature=float(content["temperature"]),
            threshold=float(content["threshold"]),
            postprocess=dict(content.get("postprocess") or {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path} does not hold what it should: {type(error).__name__} {error}") from error


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
        str(relative), str(entry.get("source", "")), float(entry["weight"]), dict(entry["normalization"]), sha256
    )


def verify(spec: EnsembleSpec, folder: Path) -> None:
    """Compares every member file with its SHA-256.

    Raises:
        IntegrityError: A file is missing or changed; names it, the expected and the found SHA-256.
    """
    for member in spec.members:
        for name, expected in member.sha256.items():
            path = folder / member.folder / name
            if path.is_symlink():
                raise IntegrityError(f"{path} is a symbolic link: refused, an artifact holds plain files")
            if not path.is_file():
                raise IntegrityError(f"{path} is missing: expected a file with SHA-256 {expected}")
            found = file_sha256(path)
            if found != expected:
                raise IntegrityError(f"{path} was changed: expected SHA-256 {expected}, found {found}")


def training_images(spec: EnsembleSpec, folder: Path) -> list[frozenset[str] | None]:
    """For each member the digests of the images that it was trained on, or None where nobody recorded them."""
    return [
        frozenset((folder / member.folder / TRAINING_IMAGES_FILE).read_text(encoding="utf-8").split())
        if TRAINING_IMAGES_FILE in member.sha256
        else None
        for member in spec.members
    ]


def load_member(folder: Path, entry: MemberEntry) -> Member:
    """Reads one member of an artifact; call `verify` first."""
    return Member(load_network(folder / entry.folder), Normalization.from_dict(entry.normalization))


def load_ensemble(folder: Path) -> Ensemble:
    """Reads, verifies and builds an ensemble, in evaluation mode, on the CPU.

    Raises:
        IntegrityError: Something is missing or changed.
    """
    spec = read_spec(folder)
    verify(spec, folder)
    return Ensemble(
        [load_member(folder, entry) for entry in spec.members],
        mode=spec.mode,
        combiner=spec.combiner,
        weights=[entry.weight for entry in spec.members],
        views=spec.views,
        temperature=spec.temperature,
        threshold=spec.threshold,
        class_names=spec.class_names,
    )
