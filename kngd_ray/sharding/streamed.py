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
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import nan
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kngd_ray.filters import Belief, Factors, Gate, Innovation, Layer, Layerwise, Rows, Transition
from kngd_ray.filters.functional_mode import eager
from kngd_ray.sharding.collectives import Group
from kngd_ray.sharding.exchange import exchange
from kngd_ray.sharding.partitioned import Observed, PartitionedFilter, StreamedOutcome, by_sample
from kngd_ray.sharding.sharded_filter import factored

# Numbers of rows, of all M observations: layers below are brought together, and kept from the first pass to the second.
_TOGETHER = 1 << 22
_KEPT = 1 << 22

_Own = dict[str, Factors | Rows]


class StreamedFilter(PartitionedFilter[Layerwise]):
    """A covariance family placed on a group of ranks, updated in place and layer by layer.

    H is asked for each layer once in each pass, in the order of the layers, and not kept. It must not depend on the
    weights by then: they move while the second pass goes on.

    Args:
        family: the covariance family.
        layers: all layers, in the order of theta.
        group: the ranks.
        gate: what is done about outlying observations.
        units: of some layers, their prior variance and process noise in units of the others'.

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
    ) -> None:
        if not isinstance(family, Layerwise):
            raise ValueError(
                f"filter.covariance is {getattr(family, 'kind', family)}, whose layers need one another: a model that "
                "is trained layer by layer takes diagonal, kronecker or block_diagonal; or set tune.parameters=adapter"
            )
        super().__init__(family, layers, group, gate)
        self._places = _places(self.ownership.parts[group.rank], self._own.start)
        self._units = units

    def init(self, mu: Tensor, p0: float) -> Belief:
        """The prior N(mu, p0 I), in the units of each layer, of which this rank holds its parts of P."""
        parts = self.ownership.parts[self.group.rank]
        found = {part.layer.name: self._units.get(part.layer.name, 1.0) * p0 for part in parts}
        return Belief(mu, {part.layer.name: self.family.init_layer(part, found[part.layer.name], mu) for part in parts})

    def predict_mean(self, belief: Belief, transition: Transition, anchor: Tensor) -> None:
        """The mean's part of the time update, in place: before the batch is observed, at the mean that this leaves.

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
            transition: of the process model; its pull on the mean is that of :meth:`predict_mean`.
            observed: what was observed at the predicted mean.

        Returns:
            What the innovation said.

        Raises:
            FilterError: non-finite innovations or an indefinite S, on every rank alike; the belief is left as it was.
        """
        nu, kept = observed.nu, _Kept()
        gram = nu.new_zeros(len(nu), len(nu), dtype=torch.promote_types(nu.dtype, torch.float32))
        for name, H in self._pieces(observed, kept):
            share, work = self._gram(self._predicted(belief, name, transition), H)
            gram = gram + share
            kept.works[name] = work if name in kept.pieces else None
            del H, share, work  # before the next layer is asked for
        predicted = self.group.sum(gram)
        innovation, first = factored(predicted, nu, observed.noise)
        weight = None if observed.judged is None else self.gate.weights(predicted, observed.judged, observed.k)
        if weight is not None:
            kept.works.clear()
            d = weight.to(predicted.dtype)
            innovation, _ = factored(predicted * d * d.unsqueeze(1), nu * weight.to(nu.dtype))
        innovation = replace(innovation, seed=observed.seed)
        unlearned = []
        for name, H in self._pieces(observed, kept):
            seen = H if weight is None else H.scaled(weight)
            if not self._condition(belief, name, transition, seen, kept.works.get(name), innovation):
                unlearned.append(name)
            del H, seen
        self.group.spread_slices(belief.mu, self.ownership.bounds)
        return StreamedOutcome(
            log_evidence=first.log_evidence,
            nis=first.nis,
            jitter=first.jitter,
            predicted=by_sample(predicted, observed.k),
            weight=torch.ones_like(nu) if weight is None else weight,
            unlearned=tuple(unlearned),
        )

    def _gram(self, P: Mapping[str, Tensor], H: Factors | Rows) -> tuple[Tensor | float, Any]:
        """A layer's share of H P H^T, and what the family keeps of it; NaN where it cannot be computed.

        Other ranks go on to the next exchange, so that this one must too. S is then refused by all.
        """
        try:
            return self.family.gram_layer(P, H)
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
        P = self._predicted(belief, name, transition)
        work = self.family.work_layer(P, H) if work is None else work
        learned = True
        try:
            step, posterior = self.family.condition_layer(P, H, work, innovation)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # Other layers have moved, and other ranks wait. The predicted covariance is too wide, which does no harm.
            step, posterior, learned = self.family.gain_layer(P, H, work, innovation.weights), P, False
        belief.mu[self._places[name]].add_(step.to(belief.mu.dtype))
        for key, value in belief.covariance[name].items():
            value.copy_(posterior[key])
        return learned

    def _predicted(self, belief: Belief, name: str, transition: Transition) -> Mapping[str, Tensor]:
        """The own part of a layer's P after the time update."""
        P = belief.covariance[name]
        if eager() and transition.scale == 1.0 and transition.q == 0.0:
            return P
        return self.family.predict_layer(P, transition.scale, transition.q * self._units.get(name, 1.0))

    def _pieces(self, observed: Observed, kept: "_Kept") -> Iterator[tuple[str, Factors | Rows]]:
        """H of each own part, of the samples of all ranks; every rank exchanges the same layers at the same time."""
        budget, M = _KEPT, len(observed.nu)
        for layers in _rounds(self.ownership.layers, M):
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
    """Layers to bring at once: any one, and beside the largest no more than the budget."""
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
