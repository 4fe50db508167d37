"""How members are to be combined, as the user asked for it: checked before anything is trained or loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from smp_ensemble.ensembling.adaptive import check_adaptive, check_tolerance
from smp_ensemble.ensembling.combiners import combiner_class, fits_weights
from smp_ensemble.ensembling.postprocessing import PostProcessing, parse_postprocess
from smp_ensemble.ensembling.views import check_views
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.postprocess import check
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.typing import Mode
    from smp_ensemble.workflows.options import EnsembleOptions

FIT: Literal["fit"] = "fit"
AUTO: Literal["auto"] = "auto"
CALIBRATIONS = ("temperature", "none")
POOLS_WITH_WEIGHTS = ("mean", "weighted")


@dataclass(frozen=True)
class Combination:
    """What is done with the members' probabilities.

    Attributes:
        combiner: Name in the entry-point group `smp_ensemble.combiners`.
        weights: One for each member; `fit`: on validation data; None: equal ones, or fitted where the combiner asks.
        reject: As for `Ensemble`.
        views: Test-time views.
        calibrate: `temperature` or `none`.
        postprocess: Settings; `auto`: chosen on validation data.
        adaptive: Share of mask values that may change where images stop early; None: no rule is fitted.

    Raises:
        ConfigError: An unknown word, or what does not go together.
    """

    combiner: str = "mean"
    weights: Sequence[float] | Literal["fit"] | None = None
    reject: float | None = None
    views: str | Sequence[str] = "none"
    calibrate: str = "temperature"
    postprocess: PostProcessing | Literal["auto"] = field(default_factory=PostProcessing)
    adaptive: float | None = None

    def __post_init__(self) -> None:
        combiner_class(self.combiner)  # refuses an unknown name
        check_views(self.views)
        if self.calibrate not in CALIBRATIONS:
            raise ConfigError(f"unknown calibration '{self.calibrate}': {nearest(self.calibrate, CALIBRATIONS)}")
        if self.weights == FIT and self.combiner not in POOLS_WITH_WEIGHTS:
            raise ConfigError(
                f"weights are fitted for the mean of probabilities, got combiner '{self.combiner}': "
                "use combiner=weighted, or give the weights"
            )
        if self.reject is not None and not 0 <= self.reject < 1:
            raise ConfigError(f"expected reject as 0 (no pixel) or a number below 1, got {self.reject}")
        if self.adaptive is not None:
            check_tolerance(self.adaptive)
            check_adaptive(combiner_class(self.combiner), self.combiner)

    @property
    def wants_fitted_weights(self) -> bool:
        """Whether weights are to be fitted."""
        return self.weights == FIT or (self.weights is None and fits_weights(combiner_class(self.combiner)))

    def weighted_by(self, weights: Sequence[float] | None) -> Combination:
        """The same with a selector's weights, where the mean is taken and nothing else was asked for."""
        if weights is None or self.weights is not None or self.combiner != "mean":
            return self
        return replace(self, weights=list(weights))

    def check_mode(self, mode: Mode) -> None:
        """Refuses what means nothing in a mode.

        Raises:
            ConfigError: Opening or closing in multiclass mode.
        """
        if isinstance(self.postprocess, PostProcessing):
            check(self.postprocess, mode)


def combination_of(options: EnsembleOptions) -> Combination:
    """The combination that options ask for.

    Raises:
        ConfigError: As for `Combination`, or a text that cannot be read.
    """
    return Combination(
        combiner=options.combiner,
        weights=_parse_weights(options.weights),
        reject=options.reject,
        views=options.views,
        calibrate=options.calibrate,
        adaptive=options.adaptive,
        postprocess=AUTO if options.postprocess.strip().lower() == AUTO else parse_postprocess(options.postprocess),
    )


def _parse_weights(text: str | None) -> list[float] | Literal["fit"] | None:
    if not text:
        return None
    if text.strip().lower() == FIT:
        return FIT
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"expected weights as numbers separated by commas, or '{FIT}', got '{text}'") from error
