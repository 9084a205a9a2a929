"""The sharded update layer by layer and in place, for models whose Jacobian is far larger than they are.

The same filter as :class:`~kngd_ray.sharding.ShardedFilter`, for families whose layers are independent given S. It
goes over the layers twice, and holds H of one large layer, or of a few small ones, at a time ::

    pass 1   each layer     exchange H, S += H P H^T         all_to_all
             S + I          its Cholesky factor, the gate    one all_reduce of (M, M)
    pass 2   each layer     exchange H again                 all_to_all
                            mu += P H^T S^-1 nu, P = posterior, in the tensors of the belief
             mu             the slices of the other ranks    one broadcast each, in place

What is predicted is predicted on the fly, in both passes. So nothing is written until S has been factored, and a step
refused there leaves the belief as it was.

Layers may be *settled*: their belief N(mu_h, P_h) has been conditioned on these very shots, by a fit before the others
were free to move. To observe the shots again would count them twice. So the batch's own evidence is taken out of the
settled layers' belief before it is put in again, together with the others. Let K = H P_h H^T be of the settled layers,
G the same of the others, and the observations whitened. Then the belief without the batch predicts them with covariance
(I - K)^-1 - I and innovation (I - K)^-1 nu, from which follows ::

    S = G + (I - K)^-1      w = S^-1 (I - K)^-1 nu = (I + (I - K) G)^-1 nu
    others     mu += P H^T w               P = P - P H^T S^-1 H P
    settled    mu -= P_h H^T G w           they give way to what the others explain, G w; P_h stays

Where the others may not move, G = 0, the settled layers do not either: all stays as that fit left it. Where it is known
what the settled layers would predict without having seen the sample, it is observed there, and nu is already that
innovation.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kngd_ray.filters import Belief, Factors, Gate, Innovation, Layer, Layered, Part, Rows, Transition
from kngd_ray.filters.functional_mode import eager
from kngd_ray.sharding.collectives import Group
from kngd_ray.sharding.exchange import exchange
from kngd_ray.sharding.partitioned import Observed, PartitionedFilter, StreamedOutcome, by_sample
from kngd_ray.sharding.sharded_filter import factored

# Numbers of rows, of all M observations: layers below are brought together, and kept from the first pass to the second.
_TOGETHER = 1 << 22
_KEPT = 1 << 22
# Of a settled belief, the largest variance of an observation, in units of its noise, that is taken for what is left
# after its own evidence. It is below 1 where the belief has seen the observation as it is here; of crops it need not
# be, and a settled layer that gave way by more than the others explain would swing.
_OWN = 0.5

_Own = dict[str, Factors | Rows]


class StreamedFilter(PartitionedFilter[Layered]):
    """A covariance family placed on a group of ranks, updated in place and layer by layer.

    H is requested once for each layer in each pass, in the order of the layers, and not kept. By then it must not
    depend on the weights, which move during the second pass.

    Args:
        family: the covariance family.
        layers: all layers, in the order of theta.
        group: the ranks.
        gate: what is done about outlying observations.
        units: for some layers, their prior variance and process noise in units of the others'; at 0 they do not move.
        settled: names of layers whose belief has been conditioned on these shots before.

    Raises:
        ValueError: the family's layers need one another.
    """

    def __init__(
        self,
        family: object,
        layers: Sequence[Layer],
        group: Group,
        gate: Gate | None = None,
        units: Mapping[str, float] = MappingProxyType({}),
        settled: Collection[str] = (),
    ) -> None:
        if not isinstance(family, Layered):
            raise ValueError(
                f"filter.covariance is {getattr(family, 'kind', family)}, whose layers need one another: a model that "
                "is trained layer by layer takes diagonal, kronecker or block_diagonal; or set tune.parameters=adapter"
            )
        super().__init__(family, layers, group, gate)
        self._places = _places(self.ownership.parts[group.rank], self._own.start)
        self._given = dict(units)
        self._units = dict(units)
        self._settled = frozenset(settled)

    def init(self, mu: Tensor, p0: float) -> Belief:
        """The prior N(mu, p0 I), in the units of each layer, of which this rank holds its parts of P."""
        parts = self.ownership.parts[self.group.rank]
        return Belief(mu, {part.layer.name: self._prior(part, p0, mu) for part in parts})

    @property
    def settled(self) -> frozenset[str]:
        """Names of the layers whose belief has been conditioned on the shots before."""
        return self._settled

    def unsettle(self) -> None:
        """Condition every layer on what is observed."""
        self._settled = frozenset()

    def rescale(self, belief: Belief, names: Collection[str], factor: float, p0: float) -> None:
        """Give some layers a prior that is wider or narrower by one factor, before the first step.

        Args:
            belief: of which this rank's parts of these layers start anew.
            names: of the layers.
            factor: of their prior variance as the units have it; one that was given before counts no more.
            p0: as of :meth:`init`.
        """
        self._units |= {name: factor * self._given.get(name, 1.0) for name in names}
        for part in self.ownership.parts[self.group.rank]:
            name = part.layer.name
            if name in names:
                fresh = self._prior(part, p0, belief.mu)
                for key, value in belief.covariance[name].items():
                    value.copy_(fresh[key])

    @torch.no_grad()
    def variances(self, belief: Belief, observed: Observed, names: Collection[str]) -> Tensor:
        """The variance of each observation that some layers account for.

        Args:
            belief: covariance of the own parts.
            observed: rows of the local samples; only the number of its innovations matters.
            names: of the layers.

        Returns:
            (M,) diagonal of H P H^T in float64, of all samples in rank order, alike on every rank.
        """
        found = observed.nu.new_zeros(len(observed.nu), dtype=torch.float64)
        for name, H in self._pieces(observed, _Kept()):
            if name in names:
                share, _ = self._gram(name, belief.covariance[name], H)
                found = found + torch.as_tensor(share).diagonal().double()
            del H
        return self.group.sum(found)

    def predict_mean(self, belief: Belief, transition: Transition, anchor: Tensor) -> None:
        """The mean's part of the time update, in place; the batch is then observed at the mean that this leaves.

        Args:
            belief: mean of all weights, written into.
            transition: of the process model.
            anchor: (n,) mu_0, where the mean is pulled to.
        """
        if transition.decay != 1.0:
            with torch.no_grad():
                belief.mu.lerp_(anchor, 1.0 - transition.decay)

    @torch.no_grad()
    def update(self, belief: Belief, transition: Transition, observed: Observed) -> StreamedOutcome:
        """The covariance's time update, then condition on the observations of all ranks.

        Args:
            belief: predicted mean of all weights, covariance of the own parts as the last step left it; both are
                written into.
            transition: of the process model; its pull on the mean is left to :meth:`predict_mean`.
            observed: what was observed at the predicted mean.

        Returns:
            What the innovation said.

        Raises:
            FilterError: non-finite innovations or an indefinite S, on every rank alike; the belief is left as it was.
        """
        nu, kept = observed.nu, _Kept()
        # of layers that learn, and of settled ones
        dtype = torch.promote_types(nu.dtype, torch.float32)
        grams = nu.new_zeros(1 + bool(self._settled), len(nu), len(nu), dtype=dtype)
        for name, H in self._pieces(observed, kept):
            share, work = self._gram(name, self._predicted(belief, name, transition), H)
            which = int(name in self._settled)
            grams[which] = grams[which] + share
            kept.works[name] = work if name in kept.pieces else None
            del H, share, work  # before the next layer is asked for
        grams = self.group.sum(grams)
        held = _without_own(grams, nu, held_out=observed.held_out)
        predicted, expected = held.predicted, held.nu
        innovation, first = factored(predicted, expected, observed.noise)
        residuals = observed.gate_residuals
        if residuals is not None and self._settled:
            residuals = residuals.shifted(nu - expected)
        weight = None if residuals is None else self.gate.weights(predicted, residuals, observed.k)
        if weight is not None:
            kept.works.clear()
            d = weight.to(predicted.dtype)
            held = _without_own(grams * d * d.unsqueeze(1), nu * weight.to(nu.dtype), held_out=observed.held_out)
            innovation, _ = factored(held.predicted, held.nu)
        innovation = replace(innovation, seed=observed.seed)
        given_way = held.given_way(innovation.weights)
        unlearned = []
        for name, H in self._pieces(observed, kept):
            seen = H if weight is None else H.scaled(weight)
            if name in self._settled:
                P, work, family = belief.covariance[name], kept.works.get(name), self.family.of(name)
                work = family.work_layer(P, seen) if work is None else work
                step = family.gain_layer(P, seen, work, given_way)
                belief.mu[self._places[name]].add_(step.to(belief.mu.dtype))
            elif not self._condition(belief, name, transition, seen, kept.works.get(name), innovation):
                unlearned.append(name)
            del H, seen
        self.group.spread_slices(belief.mu, self.ownership.bounds)
        return StreamedOutcome(
            log_evidence=first.log_evidence,
            nis=first.nis,
            jitter=first.jitter,
            predicted=by_sample(grams.sum(0), observed.k),
            weight=torch.ones_like(nu) if weight is None else weight,
            unlearned=tuple(unlearned),
        )

    def _prior(self, part: Part, p0: float, like: Tensor) -> Mapping[str, Tensor]:
        """The prior covariance of a part, in the units of its layer."""
        name = part.layer.name
        return self.family.of(name).init_layer(part, self._units.get(name, 1.0) * p0, like)

    def _gram(self, name: str, P: Mapping[str, Tensor], H: Factors | Rows) -> tuple[Tensor | float, Any]:
        """A layer's share of H P H^T, and what the family keeps of it; NaN where it cannot be computed.

        Other ranks go on to the next exchange, so this one must too. All of them then refuse S.
        """
        try:
            return self.family.of(name).gram_layer(P, H)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return nan, None

    def _condition(
        self,
        belief: Belief,
        name: str,
        transition: Transition,
        H: Factors | Rows,
        work: Any,
        innovation: Innovation,
    ) -> bool:
        """Move the own part of a layer, mean and covariance; whether the covariance has learned."""
        P, family = self._predicted(belief, name, transition), self.family.of(name)
        work = family.work_layer(P, H) if work is None else work
        learned = True
        try:
            step, posterior = family.condition_layer(P, H, work, innovation)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # Other layers have moved, and other ranks wait. The predicted covariance is too wide, which does no harm.
            step, posterior, learned = family.gain_layer(P, H, work, innovation.weights), P, False
        belief.mu[self._places[name]].add_(step.to(belief.mu.dtype))
        for key, value in belief.covariance[name].items():
            value.copy_(posterior[key])
        return learned

    def _predicted(self, belief: Belief, name: str, transition: Transition) -> Mapping[str, Tensor]:
        """The own part of a layer's P after the time update."""
        P = belief.covariance[name]
        if name in self._settled:
            return P  # time passes for what is still to be learned
        if eager() and transition.scale == 1.0 and transition.q == 0.0:
            return P
        return self.family.of(name).predict_layer(P, transition.scale, transition.q * self._units.get(name, 1.0))

    def _pieces(self, observed: Observed, kept: "_Kept") -> Iterator[tuple[str, Factors | Rows]]:
        """H of each own part, of the samples of all ranks; every rank exchanges the same layers at the same time."""
        budget, M = _KEPT, len(observed.nu)
        layers_that_move = [layer for layer in self.ownership.layers if self._units.get(layer.name) != 0.0]
        for layers in _rounds(layers_that_move, M):
            names = [layer.name for layer in layers]
            numbers = M * sum(layer.size for layer in layers)
            keep = numbers <= budget
            if keep and kept.full:
                own = {name: kept.pieces[name] for name in reversed(names) if name in kept.pieces}
            else:
                own = self._brought(names, observed)
            if keep:
                budget -= numbers
                kept.pieces.update(own)
            while own:
                yield own.popitem()
        kept.full = True

    def _brought(self, names: Sequence[str], observed: Observed) -> _Own:
        """H of the own parts of some layers, in reverse order: the last is taken first."""
        with torch.enable_grad():  # which building H may need
            H = {name: observed.jacobian[name] for name in names}
        arrived = exchange(self.group, self.ownership, H, observed.samples, observed.k, self._reach)
        return {name: arrived[name] for name in reversed(names) if name in self._places}


@dataclass(frozen=True)
class _Held:
    """A batch whose own evidence was taken out of settled layers.

    Attributes:
        predicted: (M, M) S - I.
        nu: (M,) innovations of the belief without the batch.
        moving: (M, M) G, H P H^T of layers that learn.
        shrinkage: (M, M) that turns K = H P_h H^T into what is believed of it; None where nothing is settled.
    """

    predicted: Tensor
    nu: Tensor
    moving: Tensor
    shrinkage: Tensor | None

    def given_way(self, weights: Tensor) -> Tensor:
        """(M,) by which settled layers move, instead of w."""
        return weights if self.shrinkage is None else -(self.shrinkage @ (self.moving @ weights))


def _without_own(grams: Tensor, nu: Tensor, *, held_out: bool) -> _Held:
    """Take a batch's own evidence out of settled layers.

    Args:
        grams: H P H^T (M, M) of layers that learn, and of settled ones if there are any.
        nu: (M,) innovations.
        held_out: whether these are already the innovations of the belief without the batch.

    Returns:
        What is left of the batch.
    """
    if len(grams) == 1:
        return _Held(grams[0], nu, grams[0], None)
    moving, K = grams
    if not bool(torch.isfinite(K).all()):
        return _Held(grams.sum(0), nu, moving, torch.zeros_like(K))  # S is refused
    values, axes = torch.linalg.eigh(K.double())
    believed = values.clamp(0, _OWN)
    grown = 1 / (1 - believed)  # eigenvalues of (I - K)^-1
    predicted = moving + ((axes * (grown - 1)) @ axes.mT).to(moving)
    kept = torch.where(values > 0, believed / values, 0.0)
    expected = nu if held_out else (axes @ (grown * (axes.mT @ nu.double()))).to(nu)
    return _Held(predicted, expected, moving, ((axes * kept) @ axes.mT).to(moving))


class _Kept:
    """H of layers small enough to be kept from the first pass to the second, and what the first made of it.

    Attributes:
        pieces: H of own parts by layer.
        works: what the family computed from them.
        full: whether the first pass is over.
    """

    def __init__(self) -> None:
        self.pieces: _Own = {}
        self.works: dict[str, Any] = {}
        self.full = False


def _rounds(layers: Sequence[Layer], M: int) -> Iterator[list[Layer]]:
    """Layers to bring at once: one of any size, and others whose sum fits the budget."""
    found: list[Layer] = []
    total = largest = 0
    for layer in layers:
        total, largest = total + M * layer.size, max(largest, M * layer.size)
        if found and total - largest > _TOGETHER:
            yield found
            found, total, largest = [], M * layer.size, M * layer.size
        found.append(layer)
    if found:
        yield found


def _places(parts: Sequence[Any], start: int) -> dict[str, slice]:
    """Where each of consecutive parts lies in the flat vector, the first at `start`."""
    found = {}
    for part in parts:
        found[part.layer.name] = slice(start, start + part.size)
        start += part.size
    return found
