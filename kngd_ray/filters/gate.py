r"""The gate: how observations that surprise the belief too much are treated.

A gate tests residuals of unit noise, each against all others of its batch ::

    S = H P H^T + I      z_i^2 = (S^-1 nu)_i^2 / (S^-1)_ii      chi^2 with one degree of freedom

``inflate`` raises the noise of those whose z^2 lies beyond the quantile c, from I to I + D, until none does::

    z_i^2 = c  where D_i > 0,      z_i^2 <= c  elsewhere

One outlier alone needs ``1 + D_i (S^-1)_ii = z_i^2 / c``. Outliers hide one another, and make others look like
outliers, so the condition is solved for all of them. It describes a maximum of ``log N(nu; 0, c (S + D))`` over D >= 0,
which is climbed one coordinate at a time, the farthest first, each to its own maximum. ``skip`` leaves out the
observations with D_i > 0.

A gate need not test what the filter conditions on. The innovation of ``log_likelihood`` is 1 by definition,
so the probability of the label is tested in its place. Tempered noise is not tested with either: it makes a shot count
once over all passes, and says nothing about how far a residual may lie. A label that is wrong is wrong for all
observations of its sample, so they share the smallest factor among them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

from kngd_ray._deferred import Tensor, torch
from kngd_ray.filters._innovation import Innovation, solve_innovation

_TOLERANCE = 1e-6  # relative, on z^2 = c
_VISITS = 20  # to each observation at most, on average; a batch of few-shot data needs less than one


@dataclass(frozen=True)
class GateResiduals:
    """The observations of a batch as residuals of unit noise.

    Attributes:
        nu: (M,) residuals, the k of a sample together.
        scale: (M,) factor from each whitened row of H to the row of its residual; 0 for an observation that is not
            tested by itself.
    """

    nu: Tensor
    scale: Tensor

    def take(self, rows: slice) -> "GateResiduals":
        """Some of the observations."""
        return GateResiduals(self.nu[rows], self.scale[rows])

    def shifted(self, by: Tensor) -> "GateResiduals":
        """The residuals at a mean where the whitened innovations are smaller by this much."""
        return GateResiduals(self.nu - self.scale * by, self.scale)


class Gate(Protocol):
    """A gate; its options are the fields of the frozen dataclass that implements it."""

    @property
    def kind(self) -> str:
        """The gate's name in configuration files."""
        ...

    def weights(self, predicted: Tensor, residuals: GateResiduals, k: int) -> Tensor | None:
        """What is left of each observation.

        Args:
            predicted: (M, M) H P H^T of the whitened observations.
            residuals: the observations as residuals of unit noise.
            k: observations per sample.

        Returns:
            (M,) factor on each whitened observation, (1 + D_i)^-1/2; None if all are left as they are.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class NoGate:
    """Every observation counts in full.

    Attributes:
        kind: the gate's name.
    """

    kind: Literal["none"] = "none"

    def weights(self, predicted: Tensor, residuals: GateResiduals, k: int) -> Tensor | None:
        """None."""
        return None


@dataclass(frozen=True, kw_only=True)
class _AtQuantile(ABC):
    """A gate that opens at a quantile of chi^2 with one degree of freedom."""

    quantile: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile is {self.quantile}; the share of good observations kept must lie in (0, 1)")

    @property
    def threshold(self) -> float:
        """The quantile c: chi^2 with one degree of freedom is the square of a standard normal."""
        return 2.0 * float(torch.erfinv(torch.tensor(self.quantile, dtype=torch.float64))) ** 2

    @abstractmethod
    def _factors(self, inflation: Tensor) -> Tensor:
        """Factor on each observation whose noise would have to rise from 1 to 1 + inflation."""

    def weights(self, predicted: Tensor, residuals: GateResiduals, k: int) -> Tensor | None:
        """The smallest factor of each sample, (M,); None where all are 1."""
        rows = residuals.scale.nonzero().squeeze(1)
        # Few numbers and many small steps, all alike on every rank: float64 on the CPU.
        scale = residuals.scale[rows].double().cpu()
        S = predicted[rows][:, rows].double().cpu() * scale * scale.unsqueeze(1)
        S.diagonal().add_(1.0)
        inflation = _inflation(solve_innovation(S, residuals.nu[rows].double().cpu()), self.threshold)
        if not bool(inflation.any()):
            return None
        factor = torch.ones(residuals.nu.shape, dtype=torch.float64)
        factor[rows.cpu()] = self._factors(inflation)
        return factor.view(-1, k).amin(1).repeat_interleave(k).to(predicted)


@dataclass(frozen=True, kw_only=True)
class Inflate(_AtQuantile):
    """The noise of an outlier grows until its z^2 is at the quantile.

    Attributes:
        kind: the gate's name.
        quantile: share of good observations that are left as they are.
    """

    kind: Literal["inflate"] = "inflate"

    def _factors(self, inflation: Tensor) -> Tensor:
        return (1.0 + inflation).rsqrt()


@dataclass(frozen=True, kw_only=True)
class Skip(_AtQuantile):
    """Outliers are left out.

    Attributes:
        kind: the gate's name.
        quantile: share of good observations that are kept.
    """

    kind: Literal["skip"] = "skip"

    def _factors(self, inflation: Tensor) -> Tensor:
        return (inflation == 0).to(inflation)


def _inflation(innovation: Innovation, c: float) -> Tensor:
    """D of the module's condition, (M,)."""
    inverse, weights = innovation.inverse.clone(), innovation.weights.clone()
    D = torch.zeros_like(weights)
    for _ in range(_VISITS * len(D)):
        precision = inverse.diagonal()
        excess = weights.square() / (c * precision) - 1.0
        step = (excess / precision).maximum(-D)  # to z_i^2 = c, or back to D_i = 0
        gain = (step * precision).abs()
        i = int(gain.argmax())
        if float(gain[i]) <= _TOLERANCE:
            break
        # (S + D)^-1 and (S + D)^-1 nu after the step in D_i
        column, rise = inverse[:, i].clone(), float(step[i])
        share = rise / (1.0 + rise * float(column[i]))
        weights.sub_(column, alpha=share * float(weights[i]))
        inverse.addr_(column, column, alpha=-share)
        D[i] += rise
    return D
