"""Averages of weights: uniform or weighted, two models in memory however many there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smp_ensemble.exceptions import ConfigError, NetworkError

if TYPE_CHECKING:
    from collections.abc import Sequence

StateDict = Mapping[str, Any]


@torch.no_grad()
def average_weights(
    models: Iterable[nn.Module | StateDict], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The average of several models of one architecture, as a state dict.

    A running mean: memory holds the average and the model that comes, so a generator that loads one model at a time
    averages any number of them. k copies of one model give it back bit for bit. Batch-norm statistics are averaged like
    all floating tensors, and mean nothing before `refresh_batch_norm`.

    Args:
        models: Modules or state dicts; any iterable.
        weights: One for each model, not negative; scale-free. None: equal.

    Returns:
        A new state dict on the first model's device, in its types; float16 and bfloat16 are averaged in float32. Whole
        numbers (`num_batches_tracked`) and truth values are the first model's.

    Raises:
        ConfigError: No models, or weights that do not fit.
        NetworkError: Models of different architectures; names the first tensor that differs.

    References:
        Wortsman et al., ICML 2022, arXiv:2203.05482 (uniform soups).

    Example:
        >>> average_weights([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[1, 3])["w"]
        tensor([0.7500, 0.7500])
    """
    if isinstance(models, nn.Module | Mapping):
        raise ConfigError(f"expected several models to average, got one {type(models).__name__}: pass a list of them")
    shares = None if weights is None else _shares(weights)
    items = iter(models)
    average = _Average()
    # next() and no loop: neither a loop nor a name may keep a model alive while the next one is made.
    while average.take(items, shares):
        pass
    if not average.count:
        raise ConfigError("expected at least one model to average, got none")
    if shares is not None and average.count != len(shares):
        raise ConfigError(_wrong_number(len(shares), str(average.count)))
    return average.result()


def state_of(model: Any) -> StateDict:
    """The state dict of a module or, if it is one, the state dict itself; tensors are not copied.

    Raises:
        ConfigError: Something else.
    """
    if isinstance(model, nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping):
        return model
    raise ConfigError(f"expected modules or state dicts to average, got {type(model).__name__}")


def check_same_tensors(first: StateDict, other: StateDict, name: str, first_name: str = "model 0") -> None:
    """Refuses two models whose tensors differ in name or shape.

    Raises:
        NetworkError: Names the first tensor that differs, and both shapes.
    """
    for key, tensor in first.items():
        if key not in other:
            raise NetworkError(
                f"only models of one architecture average: {first_name} has the tensor '{key}' {_shape(tensor)}, "
                f"{name} lacks it"
            )
        if _shape(other[key]) != _shape(tensor):
            raise NetworkError(
                f"only models of one architecture average: tensor '{key}' has shape {_shape(tensor)} in {first_name}, "
                f"{_shape(other[key])} in {name}"
            )
    unknown = next((key for key in other if key not in first), None)
    if unknown is not None:
        raise NetworkError(
            f"only models of one architecture average: {name} has the tensor '{unknown}' {_shape(other[unknown])}, "
            f"{first_name} lacks it"
        )


def is_averaged(value: Any) -> bool:
    """Whether a value of a state dict is averaged; all others are the first model's.

    Example:
        >>> is_averaged(torch.ones(1)), is_averaged(torch.ones(1, dtype=torch.int64))
        (True, False)
    """
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class _Average:
    """The running mean of the models so far."""

    def __init__(self) -> None:
        self.count = 0
        self._total = 0.0
        self._mean: dict[str, Any] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def take(self, items: Iterator[Any], shares: Sequence[float] | None) -> bool:
        """Takes the next model in, and lets it go; False: there is none."""
        try:
            state = state_of(next(items))
        except StopIteration:
            return False
        if shares is not None and self.count >= len(shares):
            raise ConfigError(_wrong_number(len(shares), "more"))
        share = 1.0 if shares is None else shares[self.count]
        if not self.count:
            self._begin(state)
        else:
            check_same_tensors(self._mean, state, f"model {self.count}")
            if share:
                self._add(state, share / (self._total + share))
        self._total += share
        self.count += 1
        return True

    def _begin(self, state: StateDict) -> None:
        for name, value in state.items():
            if is_averaged(value):
                self._dtypes[name] = value.dtype
                self._mean[name] = value.detach().to(_accumulated_in(value.dtype), copy=True)
            else:
                self._mean[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def _add(self, state: StateDict, share: float) -> None:
        for name in self._dtypes:
            mean = self._mean[name]
            incoming = state[name].detach().to(mean)
            if share == 1:
                mean.copy_(incoming)  # those before it have no weight
            else:
                mean.lerp_(incoming, share)

    def result(self) -> dict[str, Tensor]:
        for name, dtype in self._dtypes.items():
            self._mean[name] = self._mean[name].to(dtype)
        return self._mean


def _accumulated_in(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


def _shares(weights: Sequence[float]) -> list[float]:
    """Weights as parts of the largest, so that no sum overflows.

    Raises:
        ConfigError: Negative, not finite, or none above 0.
    """
    found = [float(weight) for weight in weights]
    if not all(0 <= weight < math.inf for weight in found) or not any(found):
        raise ConfigError(f"weights must be finite and not negative, and one above 0, got {found}")
    return [weight / max(found) for weight in found]


def _wrong_number(weights: int, models: str) -> str:
    return f"expected one weight for each model, got {weights} weights for {models} models"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
