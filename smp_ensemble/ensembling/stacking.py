"""Stacking: a linear head over members' probabilities, fitted on pixels that no member was trained on.

References:
    Wolpert, "Stacked generalization", Neural Networks 1992; Ting & Witten, "Issues in stacked generalization", JAIR
    1999: class probabilities, not decisions, into a linear model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX, Combiner

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.typing import CombinerContext, PixelSample

L2 = 1e-4
"""Weight of `|W|**2 / 2` beside the mean log-loss: members are alike, so without it W is hardly determined."""

MAX_ITERATIONS = 500


class Stacking(Combiner):
    """`softmax(sum over members of W_m p_m + b)`; sigmoid, channel by channel, in binary and multilabel mode.

    It streams like a mean: each member adds its own term. Weights of members take no part: W has them. What it needs
    in `CombinerContext.state`: `weight`, shape `(M, K, K)` (member, output, input), and `bias`, shape `(K,)`.

    Raises:
        ConfigError: It was not fitted, or its state has other shapes.
    """

    def __init__(self, context: CombinerContext) -> None:
        if not {"weight", "bias"} <= set(context.state):
            raise ConfigError(
                "stacking needs a head that was fitted on validation data: `smp-ensemble ensemble --combiner stacking` "
                f"fits one, state={{'weight': ..., 'bias': ...}} brings one; got {sorted(context.state) or 'none'}"
            )
        weight, bias = context.state["weight"], context.state["bias"]
        if weight.ndim != 3 or weight.shape[1:] != bias.shape * 2:
            raise ConfigError(
                "expected stacking's weight of shape (M, K, K) and bias (K,), "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}: fit it again"
            )
        self.context = context
        self._index = 0
        self._logits: Tensor | None = None

    def update(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Adds the next member's term, in the order of the members it was fitted for."""
        heads = self.context.state["weight"]
        if self._index >= len(heads):
            raise ConfigError(f"the stacker was fitted for {len(heads)} members, got more")
        head = heads[self._index].to(probabilities.device, torch.float32)
        if head.shape[1] != probabilities.shape[1]:
            raise ConfigError(f"the stacker was fitted for {head.shape[1]} classes, got {probabilities.shape[1]}")
        term = F.conv2d(probabilities.float(), head[:, :, None, None])
        self._logits = term if self._logits is None else self._logits.add_(term)
        self._index += 1

    def compute(self) -> Tensor:
        """Probabilities, shape `(N, K, H, W)`, float32.

        Raises:
            ConfigError: Other members than it was fitted for.
        """
        heads = self.context.state["weight"]
        if self._logits is None or self._index != len(heads):
            raise ConfigError(f"the stacker was fitted for {len(heads)} members, got {self._index}")
        bias = self.context.state["bias"].to(self._logits.device, torch.float32)
        logits = self._logits + bias[None, :, None, None]
        return logits.softmax(dim=1) if self.context.mode == "multiclass" else logits.sigmoid()

    @staticmethod
    def fit(sample: PixelSample) -> dict[str, Tensor]:
        """The head with the least log-loss on `sample`, with a small L2 penalty: a convex problem, by L-BFGS.

        Raises:
            ConfigError: No pixels.
        """
        pixels, members, outputs = sample.probabilities.shape
        if not (sample.truth != IGNORE_INDEX).any():
            raise ConfigError("expected pixels to fit a stacker on, got none: are all of them ignored?")
        features = sample.probabilities.reshape(pixels, members * outputs).double()
        weight = torch.zeros(members * outputs, outputs, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(outputs, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=1e-7,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _log_loss(torch.addmm(bias, features, weight), sample) + 0.5 * L2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        heads = weight.detach().reshape(members, outputs, outputs).transpose(1, 2).contiguous()
        return {"weight": heads.float(), "bias": bias.detach().float()}


def _log_loss(logits: Tensor, sample: PixelSample) -> Tensor:
    if sample.mode == "multiclass":
        return F.cross_entropy(logits, sample.truth)
    truth = sample.truth.reshape(logits.shape)
    counts = truth != IGNORE_INDEX
    losses = F.binary_cross_entropy_with_logits(logits, torch.where(counts, truth, 0).double(), reduction="none")
    return (losses * counts).sum() / counts.sum()
