"""The Kalman update with its covariance sharded over ranks: the same filter, placed.

:func:`kngd_ray.filters.update` with the communications of the picture in
:mod:`~kngd_ray.sharding.ownership` in between. What is replicated (S, its Cholesky factor, the
weights w, theta) is bitwise the same on every rank, because every rank computes it from the same
gathered numbers.

A matrix may fail to factor in the parts of one rank alone. The others would wait for it in the next collective, so that
rank brings NaN there, which every rank refuses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from kngd_ray.errors import FilterError
from kngd_ray.filters import (
    Belief,
    Covariance,
    Family,
    Gate,
    GateResiduals,
    Innovation,
    Jacobian,
    Layer,
    Transition,
    innovation_covariance,
    scaled,
    solve_innovation,
    variances,
)
from kngd_ray.sharding.collectives import Group
from kngd_ray.sharding.exchange import exchange
from kngd_ray.sharding.partitioned import Observed, PartitionedFilter, StreamedOutcome, by_sample


@dataclass(frozen=True, kw_only=True)
class ShardedUpdate(StreamedOutcome):
    """Outcome of one sharded update: what it says about its batch, and the posterior.

    Attributes:
        belief: mean (n,) of all weights, covariance of the own parts.
        weights: (M,) S^-1 nu; None where the batch was conditioned on in runs.
    """

    belief: Belief
    weights: Tensor | None = None


@dataclass(frozen=True)
class _Conditioned:
    """The own parts after some of the batch."""

    covariance: Covariance
    step: Mapping[str, Tensor]
    innovation: Innovation
    predicted: Tensor
    weight: Tensor
    innovation_weights: Tensor
    failed: Exception | None = None


class ShardedFilter(PartitionedFilter[Family]):
    """A covariance family placed on a group of ranks.

    Args:
        family: the covariance family.
        layers: all layers, in the order of theta.
        group: the ranks.
        gate: what is done about outlying observations.
        serial: samples conditioned on at once; 0 is the whole batch.
    """

    def __init__(
        self, family: Family, layers: Sequence[Layer], group: Group, gate: Gate | None = None, serial: int = 0
    ) -> None:
        super().__init__(family, layers, group, gate)
        self.serial = serial
        self._parts = self.ownership.parts[group.rank]

    def predict(self, belief: Belief, transition: Transition, anchor: Tensor) -> Belief:
        """Time update.

        Args:
            belief: mean of all weights, covariance of the own parts.
            transition: of the process model.
            anchor: (n,) mu_0, where the mean is pulled to.

        Returns:
            The predicted belief.
        """
        mu = belief.mu if transition.decay == 1.0 else anchor.lerp(belief.mu, transition.decay)

        def total(share: Tensor) -> Tensor:
            return self.group.sum(share.to(mu.device))  # a rank without parts has none to tell the device by

        return Belief(mu, self.family.predict(belief.covariance, transition.scale, transition.q, total))

    def runs(self, samples: int) -> list[tuple[int, int]]:
        """The runs of samples that a batch is conditioned on, one after another.

        Args:
            samples: of the global batch.

        Returns:
            First sample of each, and the one after its last.
        """
        length = self.serial or samples
        return [(start, min(start + length, samples)) for start in range(0, samples, length)] if samples else []

    def update(self, belief: Belief, observed: Observed) -> ShardedUpdate:
        """Condition on the observations of all ranks, `serial` samples at a time.

        By the chain rule of probability this is conditioning on all at once, up to what the family loses each time that
        it returns to its form.

        Args:
            belief: predicted belief.
            observed: what was observed.

        Returns:
            The posterior and the innovation.

        Raises:
            FilterError: non-finite innovations, an indefinite S or an update that is not finite. Every rank refuses
                together, and the arguments are left as they were.
            LinAlgError: instead, on the rank whose part of the update could not be computed.
        """
        k, total = observed.k, sum(observed.samples)
        H = exchange(self.group, self.ownership, observed.jacobian, observed.samples, k, self._reach)
        done: list[_Conditioned] = []
        covariance, moved = belief.covariance, None
        for start, stop in self.runs(total):
            some = H if stop - start == total else {name: piece.take(start, stop, k) for name, piece in H.items()}
            rows = slice(start * k, stop * k)
            nu, residuals = observed.nu[rows], observed.gate_residuals and observed.gate_residuals.take(rows)
            if moved is not None:
                shift = self._shift(some, moved, nu)
                nu, residuals = nu - shift, residuals and residuals.shifted(shift)
            run = len(done)
            of_run = replace(observed, seed=observed.seed + run, signs=observed.signs[run : run + 1])
            done.append(self._condition(covariance, some, nu, residuals, of_run))
            covariance, step = done[-1].covariance, done[-1].step
            moved = step if moved is None else {name: moved[name] + step[name] for name in step}
        return ShardedUpdate(
            belief=Belief(self._moved(belief.mu, moved or {}, done), covariance),
            log_evidence=sum(part.innovation.log_evidence for part in done),
            nis=sum(part.innovation.nis for part in done),
            jitter=max(part.innovation.jitter for part in done),
            predicted=torch.cat([part.predicted for part in done]),
            weight=torch.cat([part.weight for part in done]),
            weights=done[0].innovation_weights if len(done) == 1 else None,
        )

    def variances(self, belief: Belief, H: Jacobian, samples: Sequence[int], like: Tensor) -> Tensor:
        """diag(H P H^T) of the rows of all ranks.

        Args:
            belief: mean of all weights, covariance of the own parts.
            H: of the local samples, every layer.
            samples: number of samples on each rank.
            like: (m, k) local, of the dtype and device of the result.

        Returns:
            (s, k) variances of all samples, in rank order.
        """
        s, k = sum(samples), like.shape[1]
        own = exchange(self.group, self.ownership, H, samples, k, self._reach)
        return variances(self.family, belief.covariance, own, like.new_empty(s, k), self.group.sum)

    def _condition(
        self, P: Covariance, H: Jacobian, nu: Tensor, residuals: GateResiduals | None, of: Observed
    ) -> _Conditioned:
        """Condition the own parts on some observations of a batch, all at once.

        Raises:
            LinAlgError: a matrix did not factor, in one process; with several ranks see :meth:`_moved`.
        """
        family, M, k = self.family, len(nu), of.k
        gram, work = self._gram(P, H, nu)
        predicted = family.spread(gram, M)
        innovation, first = factored(predicted, nu, of.noise)
        failed: Exception | None = None
        weight = None if residuals is None else self.gate.weights(predicted, residuals, k)
        if weight is not None:
            H, nu = scaled(H, weight), nu * weight.to(nu.dtype)
            gram, work = self._gram(P, H, nu)
            innovation, _ = factored(family.spread(gram, M), nu)
        innovation = replace(innovation, seed=of.seed, drawn=of.signs[0] if of.signs else None)
        weight = torch.ones_like(nu) if weight is None else weight
        try:
            step = family.gain(P, H, gram, work, innovation.weights)
            posterior = family.update(P, H, gram, work, innovation)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            if self.group.world_size == 1:
                raise
            failed, posterior = error, P
            step = {part.layer.name: nu.new_full((part.size,), nan) for part in self._parts}
        return _Conditioned(posterior, step, first, by_sample(predicted, k), weight, innovation.weights, failed)

    def _gram(self, P: Covariance, H: Jacobian, nu: Tensor) -> tuple[Tensor, Any]:
        """The family's sums for H P H^T of all ranks, and what it keeps of its own; NaN if one rank has none.

        Raises:
            LinAlgError: a matrix did not factor, in one process.
        """
        try:
            share, work = self.family.gram(P, H, nu)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if self.group.world_size == 1:
                raise
            share, work = self.family.gram({}, {}, nu)  # what a rank without parts brings
            share = torch.full_like(share, nan)
        return self.group.sum(share), work

    def _shift(self, H: Jacobian, moved: Mapping[str, Tensor], nu: Tensor) -> Tensor:
        """H (mu - mu-) (M,) of a mean that earlier observations have moved."""
        own = [H[name].times(step).to(nu.dtype) for name, step in moved.items()]
        return self.group.sum(torch.stack(own).sum(0) if own else torch.zeros_like(nu))

    def _moved(self, mu: Tensor, step: Mapping[str, Tensor], done: Sequence[_Conditioned]) -> Tensor:
        """The mean after the own parts of all ranks have moved.

        Raises:
            FilterError: with several ranks, a part is not finite; on all of them.
            LinAlgError: instead, on the rank that could not compute its part.
        """
        flat = torch.cat([part.to(mu.dtype) for part in step.values()]) if step else mu.new_zeros(0)
        if self.group.world_size == 1:
            return mu + flat
        mu = self.group.gather_rows(mu[self._own] + flat, self.ownership.sizes)
        if not isfinite(float(mu.sum())):
            for failed in (part.failed for part in done if part.failed is not None):
                raise failed
            raise FilterError(
                "the update moved a weight to NaN or infinity, or a rank could not compute its part: the step was "
                "refused and the belief kept; lower filter.p0 or raise observation.r0."
            )
        return mu


def factored(predicted: Tensor, nu: Tensor, noise: float = 1.0) -> tuple[Innovation, Innovation]:
    """The innovation that an update uses, and the one whose evidence is reported.

    Args:
        predicted: (M, M) H P H^T of the whitened observations.
        nu: (M,) innovations.
        noise: their own noise variance, in units of the one that they are weighted by.

    Returns:
        Both, from S = H P H^T + I and from H P H^T + noise I.
    """
    innovation = solve_innovation(innovation_covariance(predicted), nu)
    own = innovation if noise == 1.0 else solve_innovation(innovation_covariance(predicted, noise), nu)
    return innovation, own


def covariance_bytes(covariance: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Memory that a covariance takes.

    Args:
        covariance: P by layer.

    Returns:
        Bytes.
    """
    return sum(tensor.nbytes for state in covariance.values() for tensor in state.values())
