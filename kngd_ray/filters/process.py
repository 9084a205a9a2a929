"""Process models: how the belief moves between two observations (the predict step).

A model gives the three numbers of the predict equations for a step::

    mu- = F mu + (1-F) mu_0          P- = F^2 P / lambda + Q
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol


class Transition(NamedTuple):
    """One step of the process model.

    Attributes:
        decay: F, the pull of the mean towards the prior mean; 1 is none.
        scale: F^2 / lambda, the factor on the covariance.
        q: process noise variance added to every weight.
    """

    decay: float
    scale: float
    q: float


class Process(Protocol):
    """A process model; its options are the fields of the frozen dataclass that implements it."""

    @property
    def kind(self) -> str:
        """The model's name in configuration files."""
        ...

    def transition(self, step: int, p0: float) -> Transition:
        """The transition before the update of step `step` (from 0) under prior variance p0."""
        ...


@dataclass(frozen=True, kw_only=True)
class RandomWalk:
    """Weights drift freely: F = 1, Q = q I.

    Attributes:
        kind: the model's name.
        q: variance that each weight gains per step; 0 keeps the weights constant.
    """

    kind: Literal["random_walk"] = "random_walk"
    q: float = 0.0

    def __post_init__(self) -> None:
        if not self.q >= 0:
            raise ValueError(f"q is {self.q}; a variance per step must be 0 or more")

    def transition(self, step: int, p0: float) -> Transition:
        """Same at every step."""
        return Transition(1.0, 1.0, self.q)


@dataclass(frozen=True, kw_only=True)
class OrnsteinUhlenbeck:
    """Weights relax to where they started: F = gamma, Q = (1 - gamma^2) p0 I.

    Without observations the belief returns to the prior N(mu_0, p0 I), around the pretrained weights: the
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

    def transition(self, step: int, p0: float) -> Transition:
        """Same at every step."""
        return Transition(self.gamma, self.gamma**2, (1 - self.gamma**2) * p0)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Old observations fade: P- = P / lambda_t, with RLEKF's schedule (arXiv 2212.06989).

    ::

        lambda_{t+1} = rate lambda_t + (1 - rate)      1 - lambda_t = (1 - lambda_0) rate^t

    The memory grows towards that of the Kalman filter as the weights settle.

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

    def transition(self, step: int, p0: float) -> Transition:
        """1 / lambda_t on the covariance."""
        return Transition(1.0, 1.0 / (1.0 - (1.0 - self.factor) * self.rate**step), 0.0)
