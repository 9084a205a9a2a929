"""Observation noise: the variances R of the observations, fixed or estimated while filtering.

Each observation belongs to a *channel*: its observation model, or its observation model and class.
The noise state is a vector of variances, one per channel; an observation's noise is::

    R_i = base_i + r[channel_i]

where ``base`` is what the observation model knows from the likelihood (p (1 - p) for a probability,
0 otherwise). Estimation happens after the update, so that R at a step never depends on that step's
innovation and the evidence stays prequential.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_FLOOR = 1e-8  # an R of zero would make S singular for duplicate observations


class ObservationNoise(Protocol):
    """A noise model; its options are the fields of the frozen dataclass that implements it."""

    @property
    def kind(self) -> str:
        """The model's name in configuration files."""
        ...

    def channels(self, classes: int) -> int:
        """How many variances are kept per observation model: 1, or one per class."""
        ...

    def update(self, r: Tensor, nu: Tensor, predicted: Tensor, base: Tensor, channel: Tensor) -> Tensor:
        """(channels,) new variances, from nu (M,), predicted = diag(H P H^T) (M,), base (M,), channel (M,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """R stays at its initial value, one variance per observation model."""

    kind: Literal["fixed"] = "fixed"

    def channels(self, classes: int) -> int:
        """One."""
        return 1

    def update(self, r: Tensor, nu: Tensor, predicted: Tensor, base: Tensor, channel: Tensor) -> Tensor:
        """The same r."""
        return r


@dataclass(frozen=True, kw_only=True)
class Ema:
    """R <- beta R + (1 - beta) (nu nu^T + H P H^T), of which the diagonal is kept (LoKO, arXiv 2410.11551).

    Of prior innovations this is an estimate from above, since E[nu nu^T] = H P H^T + R already: it tends
    to R + 2 H P H^T, and to R as P contracts. Models without residuals keep their r0.

    Attributes:
        kind: the model's name.
        beta: memory of the moving average, in [0, 1).
        form: ``scalar`` keeps one variance per observation model, ``diagonal`` one per class of each.
    """

    kind: Literal["ema"] = "ema"
    beta: float = 0.9
    form: Literal["scalar", "diagonal"] = "scalar"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta is {self.beta}; the memory of the moving average must lie in [0, 1)")

    def channels(self, classes: int) -> int:
        """One, or one per class in the ``diagonal`` form."""
        return classes if self.form == "diagonal" else 1

    def update(self, r: Tensor, nu: Tensor, predicted: Tensor, base: Tensor, channel: Tensor) -> Tensor:
        """Moving average per channel; a channel without observations in this batch keeps its value."""
        energy = nu.square() + predicted - base
        # sums by a product, not by scattered additions, whose order a GPU does not fix: ranks must agree bitwise
        members = one_hot(channel, len(r)).to(energy)
        count, total = members.sum(0), energy @ members
        average = self.beta * r + (1 - self.beta) * total / count.clamp_min(1)
        return torch.where(count > 0, average, r).clamp_min(_FLOOR)
