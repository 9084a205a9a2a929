"""What every placement of a covariance family has: who owns what, what is observed, and what one innovation says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from kngd_ray.filters import Belief, Covariance, Family, Gate, GateResiduals, Jacobian, Layer, Layered, NoGate
from kngd_ray.sharding.collectives import Group
from kngd_ray.sharding.ownership import Ownership

F = TypeVar("F", bound=Family)


@dataclass(frozen=True)
class Observed:
    """The whitened observations of a global batch, as one rank has them.

    Attributes:
        jacobian: H of the local samples, every layer.
        nu: (M,) innovations of the global batch, in rank order.
        gate_residuals: the global batch as a gate sees it; None where there is no gate.
        samples: number of samples on each rank.
        k: observations per sample.
        noise: their own noise variance, in units of the one that they are weighted by; below 1 where R is tempered.
        seed: of the signs that a family may draw; the same on every rank, and different at each step.
        signs: for each run of :meth:`~kngd_ray.sharding.ShardedFilter.runs`, these signs (draws, M), where many trials
            advance together, each with its own; if empty, they are drawn by the seed.
        held_out: whether it was observed as if settled layers had not seen the sample, see
            :mod:`~kngd_ray.sharding.streamed`.
    """

    jacobian: Jacobian
    nu: Tensor
    gate_residuals: GateResiduals | None
    samples: Sequence[int]
    k: int
    noise: float = 1.0
    seed: int = 0
    signs: Sequence[Tensor] = ()
    held_out: bool = False


@dataclass(frozen=True, kw_only=True)
class StreamedOutcome:
    """What an update says about its batch.

    Attributes:
        log_evidence: log N(nu; 0, H P H^T + noise I) in nats, as if nothing were gated or tempered.
        nis: nu^T S^-1 nu of the same S.
        jitter: the largest that S needed; normally 0.
        predicted: (s, k, k) H P H^T of each sample.
        weight: (M,) what the gate left of each observation: 1 all of it, 0 nothing.
        unlearned: own layers whose covariance stayed as predicted, because their posterior would not factor.
    """

    log_evidence: float
    nis: float
    jitter: float
    predicted: Tensor
    weight: Tensor
    unlearned: tuple[str, ...] = ()


class PartitionedFilter(Generic[F]):
    """A covariance family whose parts are spread over a group of ranks.

    Args:
        family: the covariance family.
        layers: all layers, in the order of theta.
        group: the ranks.
        gate: what is done about outlying observations.
    """

    def __init__(self, family: F, layers: Sequence[Layer], group: Group, gate: Gate | None = None) -> None:
        self.family = family
        self.group = group
        self.gate = gate or NoGate()
        self.ownership = Ownership.balanced(family, layers, group.world_size)
        self._own = self.ownership.slice(group.rank)
        self._reach = family.reach if isinstance(family, Layered) else 1.0

    def init(self, mu: Tensor, p0: float) -> Belief:
        """The prior N(mu, p0 I), of which this rank holds its parts of P."""
        return Belief(mu, self.family.init(self.ownership.parts[self.group.rank], p0, mu))

    def own(self, covariance: Covariance) -> Covariance:
        """The own parts of a covariance of all layers.

        Args:
            covariance: P of all layers, or of one that stands for all.

        Returns:
            The tensors of the own parts, contiguous.
        """
        parts = self.ownership.parts[self.group.rank]
        if self.family.joint:
            return covariance if parts else {}
        return {
            part.layer.name: {
                key: value if part.whole else value[part.flat].contiguous()
                for key, value in covariance[part.layer.name].items()
            }
            for part in parts
        }


def by_sample(predicted: Tensor, k: int) -> Tensor:
    """The blocks of the samples.

    Args:
        predicted: (M, M) H P H^T.
        k: observations per sample.

    Returns:
        (s, k, k) blocks on its diagonal.
    """
    s = len(predicted) // k
    return predicted.view(s, k, s, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
