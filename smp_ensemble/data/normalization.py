"""Input normalisation as a part of the member: raw pixel values in, what the network was trained on out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KINDS = ("imagenet", "dataset", "min-max", "per-image", "none")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EPSILON = 1e-6
"""Least standard deviation or range that is divided by: a constant band stays finite."""


class Normalization(nn.Module):
    """`(x / maximum - mean) / std` per band; `per-image` takes mean and std from each image instead.

    Statistics are buffers, so they move with the network to its device and into exports. In `per-image` mode the
    statistics are of what comes in: padding that was added before belongs to the image.

    Attributes:
        kind: One of `KINDS`; says where the numbers came from.
        mean: Shape `(C,)`, in units of `maximum`.
        std: Shape `(C,)`, in units of `maximum`.
        maximum: Scalar, in the image's units (255 for uint8).
    """

    mean: Tensor
    std: Tensor
    maximum: Tensor

    def __init__(self, kind: str, mean: Sequence[float], std: Sequence[float], maximum: float = 255.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"unknown normalization '{kind}': {nearest(kind, KINDS)}")
        if len(mean) != len(std) or not mean:
            raise ConfigError(f"normalization needs one mean and one std for each band, got {len(mean)} and {len(std)}")
        numbers = torch.tensor([*mean, *std, maximum], dtype=torch.float32)  # as they will be computed with
        if not numbers.isfinite().all() or numbers[len(mean) :].min() <= 0:
            raise ConfigError(
                "normalization needs finite numbers, std and maximum above 0, "
                f"got mean={list(mean)}, std={list(std)}, maximum={maximum}"
            )
        self.kind = kind
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.register_buffer("maximum", torch.tensor(maximum, dtype=torch.float32), persistent=False)

    @property
    def in_channels(self) -> int:
        """Number of bands that images must have."""
        return int(self.mean.numel())

    def forward(self, images: Tensor) -> Tensor:
        """Normalises raw images of any dtype, shape `(N, C, H, W)`, to float32 of the same shape."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ConfigError(
                f"expected images of shape (N, {self.in_channels}, H, W), got {tuple(images.shape)}: "
                "channels come first, and their number is the model's"
            )
        scaled = images.float() / self.maximum
        if self.kind == "per-image":
            std, mean = torch.std_mean(scaled, dim=(2, 3), keepdim=True, correction=0)
            return (scaled - mean) / std.clamp_min(EPSILON)
        return (scaled - self.mean[:, None, None]) / self.std[:, None, None]

    def raw_mean(self) -> list[float]:
        """The mean pixel in the image's units: what padding is filled with, so that it is neutral to the network."""
        return (self.mean * self.maximum).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for `ensemble.json`; `from_dict` reads them back exactly (float32 fits into JSON's double)."""
        return {
            "kind": self.kind,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "maximum": float(self.maximum),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalization:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: A key is missing or is not a number.
        """
        try:
            kind, maximum = str(values["kind"]), float(values["maximum"])
            mean = [float(value) for value in values["mean"]]
            std = [float(value) for value in values["std"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"expected a normalization with kind, mean, std and maximum, got {dict(values)!r}"
            ) from error
        return cls(kind, mean, std, maximum)


def imagenet(in_channels: int = 3, maximum: float = 255.0) -> Normalization:
    """ImageNet's statistics, which most encoder weights expect.

    Raises:
        ConfigError: The images do not have three bands.
    """
    if in_channels != 3:
        raise ConfigError(
            f"normalization 'imagenet' is for 3 bands, the images have {in_channels}: use normalization=dataset"
        )
    return Normalization("imagenet", IMAGENET_MEAN, IMAGENET_STD, maximum)


def make_normalization(
    kind: str,
    in_channels: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    minimum: Sequence[float],
    maximum: Sequence[float],
) -> Normalization:
    """A normalisation by name from a data set's statistics per band, all in the image's units.

    Args:
        kind: `imagenet`, `dataset` (zero mean, unit variance over the data set), `min-max` (the data set's range to
            0..1), `per-image` (zero mean, unit variance of each image) or `none` (0..1 by the sensor's maximum).
        in_channels: Number of bands.
        mean: Mean over all pixels of the data set.
        std: Standard deviation over all pixels.
        minimum: Least value.
        maximum: Greatest value.

    Raises:
        ConfigError: Unknown kind, or `imagenet` for a number of bands other than 3.
    """
    peak = 255.0 if max(maximum) <= 255 else float(max(maximum))
    zeros, ones = [0.0] * in_channels, [1.0] * in_channels
    match kind:
        case "imagenet":
            return imagenet(in_channels, peak)
        case "dataset":
            return Normalization(kind, [m / peak for m in mean], [max(s / peak, EPSILON) for s in std], peak)
        case "min-max":
            spread = [max((high - low) / peak, EPSILON) for low, high in zip(minimum, maximum, strict=True)]
            return Normalization(kind, [low / peak for low in minimum], spread, peak)
        case "per-image" | "none":
            return Normalization(kind, zeros, ones, peak)
    raise ConfigError(f"unknown normalization '{kind}': {nearest(kind, KINDS)}")
