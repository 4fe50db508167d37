"""To whom a spool is to be delivered: written beside its entries, so that any process can do it later."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from smp_ensemble.durable import write_json, write_whole
from smp_ensemble.exceptions import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

ADDRESS_FILE, FORMAT = "address.json", 1
PREVIEWS_FILE = "previews.npz"
"""The raw images of the overlays, and their masks."""


@dataclass(frozen=True)
class Address:
    """Where a spool goes.

    Attributes:
        run_id: The training's run.
        tracking_uri: Its server, without a user's name and password; None: it had some, the environment says where.
        keep: Keep the weights of the best `keep` snapshots only; None: all.
        resumable: Whether another process may go on with the training.
    """

    run_id: str
    tracking_uri: str | None
    keep: int | None = None
    resumable: bool = False

    def write(self, folder: Path, previews: Sequence[tuple[npt.NDArray[np.generic], npt.NDArray[np.uint8]]]) -> None:
        """Writes it beside the entries, with the images of the overlays."""
        if previews:
            arrays: dict[str, Any] = {}
            for index, (image, mask) in enumerate(previews):
                arrays |= {f"image-{index:03d}": image, f"mask-{index:03d}": mask}
            write_whole(folder / PREVIEWS_FILE, lambda file: np.savez_compressed(file, **arrays))
        write_json(folder / ADDRESS_FILE, {"format": FORMAT, **asdict(self)})


def without_secrets(tracking_uri: str) -> str | None:
    """A server's address if nothing in it is secret, else None."""
    return None if urlsplit(tracking_uri).password else tracking_uri


def read_address(folder: Path) -> Address:
    """What a training's process wrote.

    Raises:
        IntegrityError: It cannot be read.
    """
    path = folder / ADDRESS_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        written_in, address = values.pop("format"), Address(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FileNotFoundError) as error:
        raise IntegrityError(f"{path} does not say where its spool belongs: {type(error).__name__}: {error}") from error
    if written_in != FORMAT:
        raise IntegrityError(f"{path} has format {written_in!r}, expected {FORMAT}: deliver it with a newer version")
    return address


def read_previews(folder: Path) -> list[tuple[npt.NDArray[np.generic], npt.NDArray[np.uint8]]]:
    """The images of the overlays, and their masks."""
    path = folder / PREVIEWS_FILE
    if not path.exists():
        return []
    with np.load(path, allow_pickle=False) as stored:
        count = len(stored.files) // 2
        return [(stored[f"image-{index:03d}"], stored[f"mask-{index:03d}"]) for index in range(count)]
