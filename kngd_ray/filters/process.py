"""Process models: how the belief moves between two observations (the predict step).

A model gives the three numbers of DESIGN's predict equations for a step::

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
