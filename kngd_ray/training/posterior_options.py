"""How the posterior enters predictions: plain data, validated where it is read."""

from dataclasses import dataclass
from math import inf, log
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PosteriorOptions:
    """How the posterior enters predictions.

    Attributes:
        predict: ``draws`` averages softmax over theta ~ N(mu, tau P); ``linearised`` integrates the softmax over
            logits of covariance tau H P H^T, by a closed form; ``mean`` uses theta = mu alone.
        draws: number of draws.
        temperature: tau; None chooses it by cross-validation over the training shots.
        tau_median: median of a log-normal prior of the tau to choose, which a handful of held-out shots moves less than
            many do; None leaves the choice to the shots alone.
        tau_spread: standard deviation of log tau under that prior.
        sharpening_spread: standard deviation of log(sharpening) under its prior, a normal's upper half. Sharpening is
            the factor, 1 or more, by which logits are multiplied if held-out shots find the fit too uncertain at any
            tau; a spread of 0 leaves it at 1.
        folds: parts of that cross-validation, which also fits sharpening and temperature scaling; 0 turns all off.
    """

    predict: Literal["draws", "linearised", "mean"] = "draws"
    draws: int = 32
    temperature: float | None = None
    tau_median: float | None = None
    tau_spread: float = 0.5
    sharpening_spread: float = 0.0
    folds: int = 4

    def log_prior(self, tau: float) -> float:
        """Log-density of tau under its prior, up to a constant; nats."""
        if self.tau_median is None:
            return 0.0
        return -0.5 * (log(tau / self.tau_median) / self.tau_spread) ** 2 if tau > 0 else -inf

    @property
    def unasked(self) -> float:
        """Tau where there are no held-out shots to ask: the given one, or the median of its prior, or 1."""
        return next((tau for tau in (self.temperature, self.tau_median) if tau is not None), 1.0)

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; an average needs at least 1 draw")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; tau must be 0 or more")
        if self.tau_median is not None and not self.tau_median > 0:
            raise ValueError(f"tau_median is {self.tau_median}; it must be above 0")
        if not self.tau_spread > 0:
            raise ValueError(f"tau_spread is {self.tau_spread}; it must be above 0")
        if not 0 <= self.sharpening_spread < inf:
            raise ValueError(f"sharpening_spread is {self.sharpening_spread}; it must be 0 or more")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds is {self.folds}; give 2 or more, or 0 for none")
