"""The ensemble: members and how they combine; raw images in, probabilities out, never logits."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smp_ensemble.architectures import check_network
from smp_ensemble.ensembling.adaptive import AdaptiveRule, check_adaptive, check_order
from smp_ensemble.ensembling.combiners import TIE, casts_votes, combiner_class, default_reject
from smp_ensemble.ensembling.postprocessing import PostProcessing
from smp_ensemble.ensembling.temperature import apply_temperature
from smp_ensemble.ensembling.views import average_views, check_views, parse_views
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.metrics.decision import certainty, decide
from smp_ensemble.registry import nearest
from smp_ensemble.typing import IGNORE_INDEX, MODES, CombinerContext

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from smp_ensemble.typing import Combiner, Mode


class Ensemble(nn.Module):
    """Raw images `(N, C, H, W)` -> probabilities `(N, K, H, W)`.

    Members run one after the other and their probabilities stream into the combiner: the peak holds one member's
    activations and one running sum, however many members there are.

    Args:
        members: Modules that give logits `(N, K, H, W)` for raw images; `Member` wraps an smp network.
        mode: `binary`, `multiclass` or `multilabel`.
        combiner: Name in the entry-point group `smp_ensemble.combiners`.
        weights: One for each member, not negative; scale-free. None: equal.
        views: Test-time views, such as `d4` or `flips+scales:0.75,1,1.25`; None: the image as it is.
        temperature: Of the combined probabilities; 1 leaves them. Shares of votes have none.
        threshold: Foreground from this probability on, in binary and multilabel mode. Where members vote, each votes
            with it.
        reject: Pixels whose decision does not get more probability (or share of votes) than this are 255 in masks; 0:
            none. None: what the combiner says, 0.5 for `majority`.
        state: What the combiner was fitted to, by name (`stacking`).
        postprocess: What happens to a mask afterwards: `inference.masks.make_mask` applies it.
        class_names: As in `Task.class_names`; may stay empty for an ensemble that is never saved.
        adaptive: When members that are still to come need not run: only `Engine(..., adaptive=True)` looks at it.

    Raises:
        ConfigError: No members, unknown mode or combiner, or options that do not fit.
        NetworkError: A member has an activation or an auxiliary head.

    Example:
        >>> ensemble = Ensemble([nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)], mode="multiclass")
        >>> ensemble(torch.zeros(1, 3, 4, 4)).sum(dim=1).shape
        torch.Size([1, 4, 4])
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        mode: Mode,
        combiner: str = "mean",
        weights: Sequence[float] | None = None,
        views: str | Sequence[str] | None = None,
        temperature: float = 1.0,
        threshold: float = 0.5,
        reject: float | None = None,
        state: Mapping[str, Tensor] | None = None,
        postprocess: PostProcessing | None = None,
        class_names: Sequence[str] = (),
        adaptive: AdaptiveRule | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise ConfigError("an ensemble needs at least one member, got none")
        if mode not in MODES:
            raise ConfigError(f"unknown mode '{mode}': {nearest(str(mode), MODES)}")
        for member in members:
            check_network(member)
        weights = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(members):
            raise ConfigError(f"expected one weight for each of {len(members)} members, got {len(weights)}")
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ConfigError(f"weights must be finite and not negative, and one above 0, got {weights}")
        if not 0 < temperature < math.inf:
            raise ConfigError(f"temperature must be a finite number above 0, got {temperature}")
        if not 0 < threshold < 1:
            raise ConfigError(f"threshold must lie between 0 and 1, got {threshold}")
        self.members = nn.ModuleList(members)
        self.mode = mode
        self.combiner = combiner
        self._combiner = combiner_class(combiner)
        self.state = dict(state or {})
        self.weights = tuple(weights)
        self.views = check_views(views)
        self.temperature = float(temperature)
        self.threshold = float(threshold)
        self.class_names = tuple(class_names)
        self.postprocess = postprocess or PostProcessing()
        self.reject = _check_reject(default_reject(self._combiner) if reject is None else reject)
        if self.votes and self.temperature != 1:
            raise ConfigError(f"shares of votes have no temperature, got {temperature} with combiner '{combiner}'")
        self._adaptive: AdaptiveRule | None = None
        self.adaptive = adaptive
        self.new_combiner()  # refuses a state that does not fit now, and not at the first image
        self.eval()

    @property
    def votes(self) -> bool:
        """Whether it combines votes: what it gives are shares, cut at 0.5."""
        return casts_votes(self._combiner)

    @property
    def adaptive(self) -> AdaptiveRule | None:
        """When members that are still to come need not run; None: all always run."""
        return self._adaptive

    @adaptive.setter
    def adaptive(self, rule: AdaptiveRule | None) -> None:
        if rule is not None:
            check_adaptive(self._combiner, self.combiner)
            check_order(self.weights)
            if rule.members != len(self.weights):
                raise ConfigError(
                    f"expected an adaptive rule for {len(self.weights)} members, got one for {rule.members}"
                )
        self._adaptive = rule

    def new_combiner(self) -> Combiner:
        """A fresh combiner, for one batch."""
        return self._combiner(CombinerContext(self.mode, self.threshold, self.state))

    @property
    def scaled_weights(self) -> list[float]:
        """As combiners get them, the largest 1: weights are scale-free, float32 sums are not."""
        largest = max(self.weights)
        return [weight / largest for weight in self.weights]

    def probabilities_of(self, member: nn.Module, images: Tensor) -> Tensor:
        """Probabilities `(N, K, H, W)`, float32, that one member gives for raw images `(N, C, H, W)`.

        Raises:
            NetworkError: It gives anything but logits of that shape.
        """
        logits = member(images)
        if not isinstance(logits, Tensor):
            raise NetworkError(f"a member must give one tensor of logits, got {type(logits).__name__}")
        outputs = 1 if self.mode == "binary" else len(self.class_names) or logits.shape[1]
        expected = (images.shape[0], outputs, *images.shape[2:])
        if logits.shape != expected:
            raise NetworkError(
                f"a member must give logits of shape {expected} for images {tuple(images.shape)} in {self.mode} mode, "
                f"got {tuple(logits.shape)}: other number of classes, or a decoder that scales its output?"
            )
        logits = logits.float()
        return logits.softmax(dim=1) if self.mode == "multiclass" else logits.sigmoid()

    def member_probabilities(self, images: Tensor) -> Iterator[Tensor]:
        """Each member's probabilities `(N, K, H, W)` in turn, averaged over the views.

        Hold on to one at a time to keep memory constant.
        """
        views = parse_views(self.views)
        for member in self.members:
            yield average_views(views, images, partial(self.probabilities_of, member))

    def combine(self, probabilities: Iterator[Tensor]) -> Tensor:
        """Combined probabilities `(N, K, H, W)` from a stream of the members', in the order of the members."""
        return apply_temperature(self.pool(probabilities), self.temperature, self.mode)

    def pool(self, probabilities: Iterator[Tensor]) -> Tensor:
        """The same as `combine` before the temperature."""
        combiner = self.new_combiner()
        shape: torch.Size | None = None
        # Neither zip nor a name may keep one member's probabilities while the next member runs.
        for index, weight in enumerate(self.scaled_weights):
            one = next(probabilities, None)
            if one is None:
                raise ConfigError(f"expected probabilities of {len(self.weights)} members, got {index}")
            if shape is not None and one.shape != shape:
                raise NetworkError(
                    f"members must agree in shape: member 0 gives {tuple(shape)}, member {index} {tuple(one.shape)}"
                )
            shape = one.shape
            combiner.update(one, weight)
            del one
        if next(probabilities, None) is not None:
            raise ConfigError(f"expected probabilities of {len(self.weights)} members, got more")
        return combiner.compute()

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities `(N, K, H, W)`, float32, of raw images `(N, C, H, W)`; `Engine` takes any H and W."""
        return self.combine(self.member_probabilities(images))

    def decide(self, probabilities: Tensor, *, reject: float | None = None) -> Tensor:
        """Masks before post-processing, uint8: class ids `(N, H, W)`; in multilabel mode 0 or 1 in `(N, K, H, W)`.

        Args:
            probabilities: Combined ones, shape `(N, K, H, W)`.
            reject: In place of the ensemble's own.

        Returns:
            255 where a pixel is rejected.

        Raises:
            ConfigError: `reject` is out of range.
        """
        reject = self.reject if reject is None else _check_reject(reject)
        cut = 0.5 if self.votes else self.threshold
        decision = decide(probabilities, self.mode, cut)
        mask = decision.to(torch.uint8)
        if not reject:
            return mask
        sure = certainty(probabilities, decision, self.mode)
        # A share of exactly `reject` may have been moved up by a tie's rule, and is rounded.
        limit = reject + TIE * (1 - reject) + 1e-6 if self.votes else reject
        return mask.masked_fill(sure <= limit, IGNORE_INDEX)


def _check_reject(reject: float) -> float:
    if not 0 <= reject < 1:
        raise ConfigError(f"reject must be 0 (no pixel) or below 1, got {reject}")
    return float(reject)
