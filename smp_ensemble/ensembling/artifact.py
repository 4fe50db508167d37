"""The one format on disk, for a snapshot, a soup and an ensemble: `ensemble.json`, and a folder for each member."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from smp_ensemble.data.normalization import Normalization
from smp_ensemble.ensembling.adaptive import AdaptiveRule
from smp_ensemble.ensembling.combiners import combiner_class
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import CONFIG_FILE, WEIGHTS_FILE, Member, load_network, read_weights, save_network
from smp_ensemble.ensembling.postprocessing import PostProcessing
from smp_ensemble.ensembling.spec import (
    COMBINER_FILE,
    ENSEMBLE_FILE,
    TRAINING_IMAGES_FILE,
    EnsembleSpec,
    MemberEntry,
    read_spec,
    write_spec,
)
from smp_ensemble.exceptions import ConfigError, IntegrityError, NetworkError
from smp_ensemble.untrusted import MEBI, read_limited, shorten

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

__all__ = [
    "ENSEMBLE_FILE",
    "TRAINING_IMAGES_FILE",
    "EnsembleSpec",
    "MemberEntry",
    "file_sha256",
    "load_ensemble",
    "load_member",
    "read_spec",
    "read_training_images",
    "save_ensemble",
    "verify",
    "verify_file",
    "write_member",
    "write_spec",
]


IMAGES_BYTES = 1024 * MEBI
"""Of the digests of a member's training images: 33 bytes each."""


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_member(member: Member, folder: Path, *, relative: str = "members/00", weight: float = 1.0) -> MemberEntry:
    """Writes one member below `folder` and describes it for `ensemble.json`.

    Args:
        member: With the digests of its training images, where they are known.
        folder: The artifact.
        relative: The member's folder in it, with forward slashes.
        weight: In the combination.
    """
    place = folder / relative
    save_network(member.network, place)
    files = [CONFIG_FILE, WEIGHTS_FILE]
    if member.training_images is not None:
        lines = "".join(f"{digest}\n" for digest in sorted(member.training_images))
        (place / TRAINING_IMAGES_FILE).write_text(lines, encoding="utf-8", newline="\n")
        files.append(TRAINING_IMAGES_FILE)
    sha256 = {name: file_sha256(place / name) for name in files}
    return MemberEntry(
        relative,
        member.source,
        weight,
        member.normalization.to_dict(),
        sha256,
        member.threshold,
        member.temperature,
    )


def save_ensemble(ensemble: Ensemble, folder: Path) -> EnsembleSpec:
    """Writes a whole ensemble of `Member`s to a new folder.

    Args:
        ensemble: With `class_names`, and `Member`s as members.
        folder: Created.

    Raises:
        ConfigError: The ensemble lacks class names, or a member is not a `Member`.
        NetworkError: A member cannot be built again from a configuration, or members take different bands.
    """
    if not ensemble.class_names:
        raise ConfigError("an ensemble that is saved needs class_names: Ensemble(..., class_names=[...])")
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    in_channels: int | None = None
    for index, (member, weight) in enumerate(zip(ensemble.members, ensemble.weights, strict=True)):
        if not isinstance(member, Member):
            raise ConfigError(
                f"member {index} is a {type(member).__name__}: wrap it as Member(network, normalization), "
                "so that its input's normalisation is saved with it"
            )
        if in_channels not in {None, member.normalization.in_channels}:
            raise NetworkError(
                f"members must agree in bands: member 0 takes {in_channels}, "
                f"member {index} {member.normalization.in_channels}"
            )
        in_channels = member.normalization.in_channels
        entries.append(write_member(member, folder, relative=f"members/{index:02d}", weight=weight))
    assert in_channels is not None  # an ensemble has a member
    digest = None
    if ensemble.state:
        # Copies, because safetensors refuses tensors that share memory.
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in ensemble.state.items()}
        save_file(state, folder / COMBINER_FILE)
        digest = file_sha256(folder / COMBINER_FILE)
    spec = EnsembleSpec(
        ensemble.mode,
        ensemble.class_names,
        in_channels,
        tuple(entries),
        ensemble.combiner,
        ensemble.views,
        ensemble.temperature,
        ensemble.threshold,
        ensemble.reject,
        digest,
        ensemble.postprocess.to_dict(),
        ensemble.adaptive.to_dict() if ensemble.adaptive is not None else None,
    )
    write_spec(spec, folder)
    return spec


def verify(spec: EnsembleSpec, folder: Path) -> None:
    """Compares every file that `ensemble.json` lists with its SHA-256.

    Raises:
        IntegrityError: A file is missing or changed; names it, the expected and the found SHA-256.
    """
    for member in spec.members:
        for name, expected in member.sha256.items():
            verify_file(folder.resolve() / member.folder / name, expected)
    if spec.combiner_sha256 is not None:
        verify_file(folder.resolve() / COMBINER_FILE, spec.combiner_sha256)


def verify_file(path: Path, expected: str) -> None:
    """Compares one file with its SHA-256.

    Args:
        path: Absolute, in a folder that is resolved.
        expected: In hexadecimal.

    Raises:
        IntegrityError: It is missing, changed, or lies behind a symbolic link.
    """
    whole = False
    if (target := path.resolve()) != path:
        found = f"a symbolic link to {target}"
    elif not path.is_file():
        found = "no file"
    else:
        found = file_sha256(path)
        whole = found == expected
    if not whole:
        raise IntegrityError(f"{path} was changed: expected SHA-256 {expected}, found {found}")


def load_member(folder: Path, entry: MemberEntry) -> Member:
    """Reads one member of an artifact; call `verify` first."""
    return _member_of(load_network(folder / entry.folder), folder, entry)


def _member_of(network: nn.Module, folder: Path, entry: MemberEntry) -> Member:
    member = Member(
        network,
        Normalization.from_dict(entry.normalization),
        source=entry.source,
        training_images=read_training_images(folder, entry),
    )
    member.threshold, member.temperature = entry.threshold, entry.temperature
    return member


def read_training_images(folder: Path, entry: MemberEntry) -> frozenset[str] | None:
    """Digests of the images that a member was trained on; None: unknown. Call `verify` first.

    Raises:
        IntegrityError: The file is not one digest a line.
    """
    if TRAINING_IMAGES_FILE not in entry.sha256:
        return None
    path = folder / entry.folder / TRAINING_IMAGES_FILE
    try:
        return frozenset(read_limited(path, IMAGES_BYTES).decode("ascii").split())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot read {path}: {shorten(error)}") from error


def load_ensemble(folder: Path) -> Ensemble:
    """Reads, verifies and builds an ensemble, in evaluation mode, on the CPU.

    Raises:
        IntegrityError: Something is missing or changed, or `ensemble.json` holds what this version would not write.
        ConfigError: The combiner or an architecture is a plugin's that is not installed.
    """
    spec = read_spec(folder)
    verify(spec, folder)
    combiner_class(spec.combiner)
    for entry in spec.members:  # before anything is built
        _check_bands(folder, entry, spec.in_channels)
    networks = [load_network(folder / entry.folder) for entry in spec.members]
    try:
        return Ensemble(
            [_member_of(network, folder, entry) for network, entry in zip(networks, spec.members, strict=True)],
            mode=spec.mode,
            combiner=spec.combiner,
            weights=[entry.weight for entry in spec.members],
            views=spec.views,
            temperature=spec.temperature,
            threshold=spec.threshold,
            reject=spec.reject,
            state=_load_state(folder) if spec.combiner_sha256 is not None else None,
            postprocess=PostProcessing.from_dict(spec.postprocess),
            class_names=spec.class_names,
            adaptive=AdaptiveRule.from_dict(spec.adaptive) if spec.adaptive is not None else None,
        )
    except (ConfigError, OverflowError) as error:  # a number of hundreds of digits is no float
        raise IntegrityError(f"{folder / ENSEMBLE_FILE} does not hold what it should: {shorten(error)}") from error


def _check_bands(folder: Path, entry: MemberEntry, in_channels: int) -> None:
    mean = entry.normalization.get("mean")
    if isinstance(mean, list) and len(mean) != in_channels:
        raise IntegrityError(
            f"{folder / ENSEMBLE_FILE} does not hold what it should: {in_channels} bands, and {len(mean)} in the "
            f"normalization of '{entry.folder}'"
        )


def _load_state(folder: Path) -> dict[str, Tensor]:
    try:
        return read_weights(folder / COMBINER_FILE)
    except NetworkError as error:
        raise IntegrityError(str(error)) from error
