"""Observation noise: the covariance R of the observations, given or estimated while filtering.

The noise state r is one tensor: a variance for each *channel* of the observations, or the covariance of a
sample's k observations. A channel is an observation model, or a class of one. An observation's noise is ::

    R_i = base_i + r[channel_i]

where ``base`` is what the observation model knows from the likelihood (p (1 - p) for a probability, 0
otherwise). Estimation happens after the update, so that R at a step never depends on that step's
innovation and the evidence stays prequential.

The filter sees observations *whitened* by R, ``L^-1 nu`` and ``L^-1 H`` with R = L L^T, whose noise is I.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

from kngd_ray._deferred import Tensor, functional, torch

_FLOOR = 1e-8  # an R of zero would make S singular for duplicate observations


@dataclass(frozen=True)
class Seen:
    """What a noise model may learn from: the s samples of a batch after its update.

    Attributes:
        nu: (s, k) innovations.
        predicted: (s, k, k) H P H^T, the blocks of one sample each.
        base: (s, k) noise variance known from the likelihood.
        channel: (s, k) int64 channel of each observation.
        counts: (s, k) 1 for an observation to learn from; 0 for one that the gate stopped, or that is no residual.
    """

    nu: Tensor
    predicted: Tensor
    base: Tensor
    channel: Tensor
    counts: Tensor


class ObservationNoise(Protocol):
    """A noise model; its options are the fields of the frozen dataclass that implements it."""

    @property
    def kind(self) -> str:
        """The model's name in configuration files."""
        ...

    @property
    def learns(self) -> bool:
        """Whether :meth:`update` changes anything."""
        ...

    def channels(self, classes: int) -> int:
        """How many channels an observation model has: 1, or one per class."""
        ...

    def init(self, r0: Tensor, likelihood: Tensor, rows: Sequence[int], classes: int) -> Tensor:
        """The noise state before the first step.

        Args:
            r0: (B,) initial variance of each observation model.
            likelihood: (B,) variance that each model's likelihood gives its rows on top of their base; NaN for none.
            rows: observations of each model per sample.
            classes: C.
        """
        ...

    def covariance(self, r: Tensor, base: Tensor, channel: Tensor) -> Tensor:
        """R of each sample, its variances (s, k) or its covariance (s, k, k), from base and channel (s, k)."""
        ...

    def update(self, r: Tensor, seen: Seen) -> Tensor:
        """The noise state after a batch."""
        ...


class _ByChannel:
    """A variance for each channel."""

    learns: ClassVar[bool] = False

    def channels(self, classes: int) -> int:
        """One."""
        return 1

    def init(self, r0: Tensor, likelihood: Tensor, rows: Sequence[int], classes: int) -> Tensor:
        """(B channels,) r0."""
        return r0.repeat_interleave(self.channels(classes))

    def covariance(self, r: Tensor, base: Tensor, channel: Tensor) -> Tensor:
        """(s, k) base + r."""
        return (base + r[channel]).clamp_min(_FLOOR)


@dataclass(frozen=True, kw_only=True)
class Fixed(_ByChannel):
    """R stays at its initial value, one variance per observation model."""

    kind: Literal["fixed"] = "fixed"

    def update(self, r: Tensor, seen: Seen) -> Tensor:
        """The same r."""
        return r


@dataclass(frozen=True, kw_only=True)
class Ema(_ByChannel):
    """R <- beta R + (1 - beta) (nu nu^T + H P H^T), LoKO's moving average (arXiv 2410.11551).

    From prior innovations this estimate is too large, since E[nu nu^T] = H P H^T + R already: it tends to
    R + 2 H P H^T, and to R as P contracts. Models without residuals keep their r0.

    Attributes:
        kind: the model's name.
        beta: memory of the moving average, in [0, 1).
        form: ``scalar`` keeps one variance per observation model, ``diagonal`` one per class of each,
            ``full`` the (k, k) covariance of the k observations of a sample.
    """

    learns: ClassVar[bool] = True

    kind: Literal["ema"] = "ema"
    beta: float = 0.9
    form: Literal["scalar", "diagonal", "full"] = "scalar"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta is {self.beta}; the memory of the moving average must lie in [0, 1)")

    def channels(self, classes: int) -> int:
        """One, or one per class in the ``diagonal`` form."""
        return classes if self.form == "diagonal" else 1

    def init(self, r0: Tensor, likelihood: Tensor, rows: Sequence[int], classes: int) -> Tensor:
        """(B channels,) r0; in the ``full`` form (k, k), r0 on its diagonal."""
        if self.form == "full":
            return torch.diag(r0.repeat_interleave(torch.tensor(rows, device=r0.device)))
        return super().init(r0, likelihood, rows, classes)

    def covariance(self, r: Tensor, base: Tensor, channel: Tensor) -> Tensor:
        """(s, k) base + r; in the ``full`` form (s, k, k)."""
        return r + torch.diag_embed(base) if self.form == "full" else super().covariance(r, base, channel)

    def update(self, r: Tensor, seen: Seen) -> Tensor:
        """Moving average; a channel without observations in this batch keeps its value."""
        if self.form == "full":
            return self._update_full(r, seen)
        variance = seen.predicted.diagonal(dim1=1, dim2=2)
        energy = (seen.nu.square() + variance - seen.base).flatten()
        # sums by a product, not by scattered additions, whose order a GPU does not fix: ranks must agree bitwise
        members = functional.one_hot(seen.channel.flatten(), len(r)).to(energy) * seen.counts.flatten().unsqueeze(1)
        count, total = members.sum(0), energy @ members
        average = self.beta * r + (1 - self.beta) * total / count.clamp_min(1)
        return torch.where(count > 0, average.clamp_min(_FLOOR), r)

    def _update_full(self, r: Tensor, seen: Seen) -> Tensor:
        outer = seen.nu.unsqueeze(2) * seen.nu.unsqueeze(1) + seen.predicted - torch.diag_embed(seen.base)
        both = seen.counts.unsqueeze(2) * seen.counts.unsqueeze(1)
        count, total = both.sum(0), (outer * both).sum(0)
        average = torch.where(count > 0, self.beta * r + (1 - self.beta) * total / count.clamp_min(1), r)
        # the mean of outer products less the base may dip below 0: keep it a covariance
        variances, axes = torch.linalg.eigh((average + average.mT) / 2)
        return (axes * variances.clamp_min(_FLOOR)) @ axes.mT


@dataclass(frozen=True, kw_only=True)
class Categorical(_ByChannel):
    """R is the likelihood's own, whatever r0 says: nothing is set, and nothing is estimated.

    p (1 - p) for ``probability``, the scalar form of diag(p) - p p^T; 1 for the rows of ``categorical``, which are
    whitened by diag(p) - p p^T already, and for ``log_likelihood``. ``cosine`` has no likelihood, and keeps its r0.
    """

    kind: Literal["categorical"] = "categorical"

    def init(self, r0: Tensor, likelihood: Tensor, rows: Sequence[int], classes: int) -> Tensor:
        """(B,) what the likelihood gives."""
        return torch.where(likelihood.isnan(), r0, likelihood)

    def update(self, r: Tensor, seen: Seen) -> Tensor:
        """The same r."""
        return r


@dataclass(frozen=True)
class Whitening:
    """L^-1 of each sample's R = L L^T.

    Attributes:
        R: (s, k) variances, or (s, k, k) covariances.
    """

    R: Tensor

    def innovations(self, nu: Tensor) -> Tensor:
        """L^-1 nu, (s, k)."""
        return self.rows(nu.unsqueeze(2)).squeeze(2)

    def rows(self, V: Tensor) -> Tensor:
        """L^-1 V, (s, k, C)."""
        if self.R.dim() == 2:
            return V * self.R.rsqrt().unsqueeze(2).to(V.dtype)
        return torch.linalg.solve_triangular(self._root.to(V.dtype), V, upper=False)

    def restored(self, gram: Tensor) -> Tensor:
        """L G L^T of blocks G (s, k, k) of whitened rows."""
        if self.R.dim() == 2:
            deviation = self.R.sqrt()
            return gram * deviation.unsqueeze(2) * deviation.unsqueeze(1)
        return self._root @ gram @ self._root.mT

    @property
    def log_volume(self) -> Tensor:
        """Scalar sum of log |L|, by which the log-density of whitened innovations exceeds their own."""
        if self.R.dim() == 2:
            return 0.5 * self.R.log().sum()
        return self._root.diagonal(dim1=1, dim2=2).log().sum()

    @cached_property
    def _root(self) -> Tensor:
        return torch.linalg.cholesky(self.R)
