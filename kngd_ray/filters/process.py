"""Process models: how the belief moves between two observations (the predict step).

A model gives the three numbers of the predict equations for a step::

    mu- = F mu + (1-F) mu_0          P- = F^2 P / lambda + Q

Q is a variance of every weight, q I, or a share of the prior's covariance P_0. The latter is a drift of functions: what
the weights may become after many steps is as likely as it was a priori, in whatever coordinates. Where P_0 = p0 I, the
two are the same.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, NamedTuple, Protocol


class Transition(NamedTuple):
    """One step of the process model.

    Attributes:
        decay: F, the pull of the mean towards the prior mean; 1 is none.
        scale: F^2 / lambda, the factor on the covariance.
        q: process noise variance added to every weight.
        share: of P_0, added to the covariance.
    """

    decay: float
    scale: float
    q: float
    share: float = 0.0

    @classmethod
    def towards(cls, decay: float, scale: float, share: float, p0: float | None) -> "Transition":
        """A transition that adds a share of P_0.

        Args:
            decay: F.
            scale: F^2 / lambda.
            share: of P_0.
            p0: where P_0 is p0 I; None where it is kept as it is.

        Returns:
            The transition.
        """
        return cls(decay, scale, 0.0, share) if p0 is None else cls(decay, scale, share * p0)


class Process(Protocol):
    """A process model; its options are the fields of the frozen dataclass that implements it."""

    @property
    def kind(self) -> str:
        """The model's name in configuration files."""
        ...

    @property
    def share(self) -> float:
        """What a step adds of the prior's covariance P_0; 0 where P_0 has no part in the process."""
        ...

    def transition(self, step: int, p0: float | None) -> Transition:
        """The transition before the update of step `step` (from 0); the prior is p0 I, or kept where p0 is None."""
        ...


@dataclass(frozen=True, kw_only=True)
class RandomWalk:
    """Weights drift freely: F = 1, Q = q I or drift P_0.

    Attributes:
        kind: the model's name.
        q: variance that each weight gains per step; 0 keeps the weights constant.
        drift: share of the prior's covariance that the belief gains per step, instead of `q`. It means the same on any
            CLIP, and where the prior was measured (``filter.covariance.columns``), functions drift as they may vary.
    """

    kind: Literal["random_walk"] = "random_walk"
    q: float = 0.0
    drift: float = 0.0

    def __post_init__(self) -> None:
        if not (isfinite(self.q) and self.q >= 0):
            raise ValueError(f"q is {self.q}; a variance per step must be finite, and 0 or more")
        if not (isfinite(self.drift) and self.drift >= 0):
            raise ValueError(f"drift is {self.drift}; a share of the prior per step must be finite, and 0 or more")
        if self.q and self.drift:
            raise ValueError(
                f"q is {self.q} and drift {self.drift}: process noise is given twice; leave out q, of weights, or "
                "drift, of the prior"
            )

    @property
    def share(self) -> float:
        """The drift."""
        return self.drift

    def transition(self, step: int, p0: float | None) -> Transition:
        """Same at every step."""
        return Transition(1.0, 1.0, self.q) if self.q else Transition.towards(1.0, 1.0, self.drift, p0)


@dataclass(frozen=True, kw_only=True)
class OrnsteinUhlenbeck:
    """Weights relax to where they started: F = gamma, Q = (1 - gamma^2) P_0.

    Without observations the belief returns to the prior N(mu_0, P_0), around the pretrained weights: the
    Bayesian form of weight ensembling (Chang et al., arXiv 2305.19535).

    Attributes:
        kind: the model's name.
        gamma: share of the distance to the prior that is kept per step; 1 keeps the weights constant.
    """

    kind: Literal["ornstein_uhlenbeck"] = "ornstein_uhlenbeck"
    gamma: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}; the share kept per step must lie in (0, 1]")

    @property
    def share(self) -> float:
        """What relaxing adds of the prior: 1 - gamma^2."""
        return 1 - self.gamma**2

    def transition(self, step: int, p0: float | None) -> Transition:
        """Same at every step."""
        return Transition.towards(self.gamma, self.gamma**2, self.share, p0)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Old observations fade: P- = P / lambda_t, with RLEKF's schedule (arXiv 2212.06989).

    ::

        lambda_{t+1} = rate lambda_t + (1 - rate)      1 - lambda_t = (1 - lambda_0) rate^t

    The memory grows towards the Kalman filter's as the weights settle.

    Attributes:
        kind: the model's name.
        factor: lambda_0, the memory factor of the first step.
        rate: how fast lambda tends to 1; 1 keeps it at lambda_0.
    """

    kind: Literal["forgetting"] = "forgetting"
    factor: float = 0.98
    rate: float = 0.9987

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor is {self.factor}; the memory factor lambda_0 must lie in (0, 1]")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; it must lie in [0, 1]")

    @property
    def share(self) -> float:
        """Nothing."""
        return 0.0

    def transition(self, step: int, p0: float | None) -> Transition:
        """1 / lambda_t on the covariance."""
        return Transition(1.0, 1.0 / (1.0 - (1.0 - self.factor) * self.rate**step), 0.0)
