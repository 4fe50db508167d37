"""The engine: the one predictor behind every way to use an ensemble. It alone pads and crops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from smp_ensemble.architectures import output_stride
from smp_ensemble.ensembling.mc_dropout import check_passes, seeded, stochastic_copy
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.views import OWN, average_views, check_views, parse_views
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.adaptive import rule_of, run_adaptively
from smp_ensemble.inference.fast import Compiled, fast_form
from smp_ensemble.metrics.uncertainty import UncertaintyMaps
from smp_ensemble.precision import autocast_dtype, choose_device, resolve_precision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from smp_ensemble.ensembling.ensemble import Ensemble

MAX_BATCH_PIXELS = 16 * 512 * 512
"""Pixels that run through a member at once; larger batches are cut, which changes fp32 results by rounding at most."""

CPU_BATCH_PIXELS = 512 * 512
"""The same on a CPU, whose caches hold no more: there larger batches take longer, and eight times the memory."""

Watch: TypeAlias = Callable[[int, Tensor], None]
"""Is shown a member's number and the probabilities `(N, K, H, W)` of each of its passes."""


class Engine:
    """Runs an ensemble on images of any height and width, in the fastest form of its members.

    Images are padded at the bottom and right with their edge pixels to a multiple of the members' output stride, and
    the probabilities are cropped back. Members run one after the other, so device memory holds one member's
    activations and one running sum. Each view of an image is predicted with padding of its own, several as one batch
    where they are small enough. `fast.fast_form` says what is done to a member, `exactness.compare` how far that is
    from the member itself.

    On a CPU in float32 each image runs by itself, so that it gets the same probabilities, bit for bit, in every batch.

    Args:
        ensemble: It is put into evaluation mode, and otherwise left alone: its weights are copied as they are now.
        device: None: an accelerator if there is one, else the CPU.
        precision: Lightning's words, or `auto`: bf16 or fp16 where the hardware multiplies them.
        passes: T, passes of each member with dropout on, whose mean is what the member gives; 1: dropout is off. They
            are drawn from the same seeds in every call, so that the same call gives the same answer. Each pass sees
            all views.
        views: Test-time views in place of the ensemble's own, such as `none` or `d4`; None or `own`: the ensemble's.
        adaptive: Images stop at the member from which on, by the ensemble's rule, its mask will not change: then
            probabilities are those of the members so far. Uncertainty always asks all members.
        compile: Whether `torch.compile` makes kernels, at the first image of a size: seconds to minutes, once. Passes
            with dropout run without.

    Raises:
        ConfigError: More than one pass of a member that holds no dropout, or not a whole number above 0; unknown views;
            `adaptive` for an ensemble without a rule, or with other views or passes than it was fitted with.

    Example:
        >>> import torch
        >>> from smp_ensemble.ensembling.ensemble import Ensemble
        >>> engine = Engine(Ensemble([torch.nn.Conv2d(3, 1, 1)], mode="binary"), precision="32")
        >>> engine(torch.zeros(2, 3, 45, 70)).shape
        torch.Size([2, 1, 45, 70])
    """

    def __init__(
        self,
        ensemble: Ensemble,
        device: torch.device | str | None = None,
        precision: str = "auto",
        passes: int = 1,
        views: str | Sequence[str] | None = None,
        adaptive: bool = False,
        compile: bool = False,  # noqa: A002 (torch's own word)
    ) -> None:
        self.device = choose_device("auto") if device is None else torch.device(device)
        self.precision = resolve_precision(precision, self.device)
        self.compile = compile
        self._dtype = autocast_dtype(self.precision)
        self._fast: dict[nn.Module, nn.Module] = {}
        chosen = ensemble.views if views is None or views == OWN else check_views(views)
        self._set(ensemble, passes, chosen, adaptive)

    def _set(self, ensemble: Ensemble, passes: int, views: tuple[str, ...], adaptive: bool) -> None:
        """Takes over what may differ between engines that share the fast forms of their members."""
        self.passes = check_passes(ensemble.members, passes)
        self.ensemble = ensemble.eval()
        self.stride = output_stride(
            member.network if isinstance(member, Member) else member for member in ensemble.members
        )
        self.adaptive = adaptive
        if adaptive:
            rule_of(ensemble, views, passes)
        self._images_seen = self._members_run = 0
        self.views, self._views = views, parse_views(views)
        known, self._fast = self._fast, {}
        for member in ensemble.members:
            if member not in self._fast:
                fast = known.get(member)
                self._fast[member] = self._make_fast(member) if fast is None else fast
        plain = [self._fast[member] for member in ensemble.members]
        self._runs = [_stochastic(run) for run in plain] if passes > 1 else plain

    def _make_fast(self, member: nn.Module) -> nn.Module:
        return fast_form(member, self.device, self._dtype, compiled=self.compile)

    def with_options(
        self, passes: int | None = None, views: str | Sequence[str] | None = None, adaptive: bool | None = None
    ) -> Engine:
        """An engine like this one, on the same weights, with other options; this one stays as it is.

        Args:
            passes: As for the class; None: this engine's.
            views: As for the class; None: this engine's. `own`: the ensemble's.
            adaptive: As for the class; None: this engine's.

        Raises:
            ConfigError: As for the class.
        """
        passes = self.passes if passes is None else passes
        if views == OWN:
            views = self.ensemble.views
        views = self.views if views is None else check_views(views)
        adaptive = self.adaptive if adaptive is None else adaptive
        if (passes, views, adaptive) == (self.passes, self.views, self.adaptive):
            return self
        return self._like(self.ensemble, passes, views, adaptive)

    def with_ensemble(self, ensemble: Ensemble) -> Engine:
        """An engine like this one for another ensemble; members that are in both are not prepared again.

        It asks all members: an adaptive rule belongs to its ensemble.

        Raises:
            ConfigError: As for the class.
        """
        return self._like(ensemble, self.passes, self.views, False)

    def _like(self, ensemble: Ensemble, passes: int, views: tuple[str, ...], adaptive: bool) -> Engine:
        other = copy.copy(self)
        other._set(ensemble, passes, views, adaptive)  # noqa: SLF001 (an engine too)
        return other

    @property
    def in_channels(self) -> int | None:
        """Bands that images must have; None where the members do not say."""
        bands = {member.normalization.in_channels for member in self.ensemble.members if isinstance(member, Member)}
        return bands.pop() if len(bands) == 1 else None

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities `(N, K, H, W)`, float32 on the engine's device, of raw images `(N, C, H, W)`.

        Raises:
            ConfigError: Not four dimensions, no pixels, or another number of bands than the members'.
        """
        return torch.cat([self._combined(part) for part in self.parts(images)])

    def _combined(self, images: Tensor) -> Tensor:
        if not self.adaptive:
            return self.ensemble.combine(self.member_probabilities(images))
        found, used = run_adaptively(self.ensemble, self._raw(images), partial(self._mean_of_passes, watch=None))
        self._images_seen += len(used)
        self._members_run += sum(used)
        return found

    @property
    def mean_members(self) -> float | None:
        """How many members an image saw on average, so far; None where all always run, or before the first image."""
        return self._members_run / self._images_seen if self._images_seen else None

    def parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """The batch cut so that each part has at most `MAX_BATCH_PIXELS` pixels (or is one image)."""
        if images.ndim != 4 or not images.numel():
            raise ConfigError(f"expected a batch of images of shape (N, C, H, W), got {tuple(images.shape)}")
        size = max(1, MAX_BATCH_PIXELS // (images.shape[2] * images.shape[3]))
        return torch.split(images, size)

    def member_probabilities(self, images: Tensor) -> Iterator[Tensor]:
        """Each member's probabilities `(N, K, H, W)` in turn: the mean of its passes, each the mean of its views."""
        return self._stream(images, None)

    def _stream(self, images: Tensor, watch: Watch | None) -> Iterator[Tensor]:
        raw = self._raw(images)
        for index in range(len(self._runs)):
            # No name here: one would keep these probabilities alive while the next member runs.
            yield self._mean_of_passes(index, raw, watch)

    @torch.inference_mode()
    def _raw(self, images: Tensor) -> Tensor:
        pinned = images.pin_memory() if self.device.type == "cuda" and images.device.type == "cpu" else images
        return pinned.to(self.device, non_blocking=True).float()

    @torch.inference_mode()
    def _mean_of_passes(self, index: int, raw: Tensor, watch: Watch | None) -> Tensor:
        if self.passes == 1:
            return self._mean_of_views(index, raw, watch)
        with seeded(index, self.device):
            total = self._mean_of_views(index, raw, watch)
            for _ in range(self.passes - 1):
                total += self._mean_of_views(index, raw, watch)
            return total / self.passes

    def _mean_of_views(self, index: int, raw: Tensor, watch: Watch | None) -> Tensor:
        on_cpu = self.device.type == "cpu"
        predict = partial(self._probabilities_of, self._runs[index])
        pixels = min(MAX_BATCH_PIXELS, CPU_BATCH_PIXELS) if on_cpu else MAX_BATCH_PIXELS
        # Which kernel computes a sum may follow from the size of the batch. (Draws of dropout do so anyway.)
        each = torch.split(raw, 1) if on_cpu and self._dtype is None and self.passes == 1 else (raw,)
        found = [average_views(self._views, images, predict, pixels) for images in each]
        mean = found[0] if len(found) == 1 else torch.cat(found)
        if watch is not None:
            watch(index, mean)
        return mean

    def _probabilities_of(self, member: nn.Module, images: Tensor) -> Tensor:
        """Pads, predicts and crops; the shape of `images` is one view's."""
        height, width = images.shape[2:]
        padding = (0, -width % self.stride, 0, -height % self.stride)
        padded = F.pad(images, padding, mode="replicate") if any(padding) else images
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            found = self.ensemble.probabilities_of(member, padded.contiguous(memory_format=torch.channels_last))
        return found[..., :height, :width]

    def predict(self, images: Sequence[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.float32]]:
        """Probabilities `(K, H, W)` for each of `images` `(H, W, C)`; images of one size run together.

        Raises:
            ConfigError: An image without three dimensions.
        """
        return _for_each_size(images, self)

    def uncertainty(self, images: Sequence[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.float32]]:
        """How sure the ensemble is of each pixel of `images` `(H, W, C)`, and how far its members agree.

        Each pass counts as a member of its own, so that several passes of one network tell as much as several networks.

        Returns:
            For each image `(3, H, W)`: predictive entropy, mutual information (both in nats), variation ratio.

        Raises:
            ConfigError: An image without three dimensions.
        """
        return _for_each_size(images, self._uncertainty_of)

    @torch.inference_mode()
    def _uncertainty_of(self, images: Tensor) -> Tensor:
        """Shape `(N, 3, H, W)`."""
        return torch.cat([self._uncertainty_of_part(part) for part in self.parts(images)])

    def _uncertainty_of_part(self, images: Tensor) -> Tensor:
        maps = UncertaintyMaps(self.ensemble.mode, self.ensemble.threshold)
        largest = max(self.ensemble.weights) * self.passes

        def watch(index: int, probabilities: Tensor) -> None:
            maps.update(probabilities, self.ensemble.weights[index] / largest)

        combined = self.ensemble.combine(self._stream(images, watch))
        return torch.stack(maps.compute(combined), dim=1)


def _stochastic(run: nn.Module) -> nn.Module:
    """With dropout on, and never compiled: kernels have draws of their own."""
    return stochastic_copy(run.network if isinstance(run, Compiled) else run)


def _for_each_size(
    images: Sequence[npt.NDArray[np.generic]], run: Callable[[Tensor], Tensor]
) -> list[npt.NDArray[np.float32]]:
    """What `run` gives for each of `images` `(H, W, C)`; those of one size are one batch `(N, C, H, W)`."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        if image.ndim != 3:
            raise ConfigError(f"expected images of shape (H, W, C), image {index} has {image.shape}")
        by_shape.setdefault(image.shape, []).append(index)
    results: dict[int, npt.NDArray[np.float32]] = {}
    for indices in by_shape.values():
        batch = torch.stack([to_tensor(images[index]) for index in indices])
        for index, one in zip(indices, run(batch).cpu(), strict=True):
            results[index] = one.numpy()
    return [results[index] for index in range(len(images))]


def to_tensor(image: npt.NDArray[np.generic]) -> Tensor:
    """An image `(H, W, C)` of any numeric type as a tensor `(C, H, W)`, uint8 or float32."""
    kept = image if image.dtype == "uint8" else image.astype("float32")
    return torch.from_numpy(kept.transpose(2, 0, 1).copy())
