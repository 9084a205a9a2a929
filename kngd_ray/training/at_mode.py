"""A Kalman step that ends at the mode: of a class residual, whose logits are linear in its weights.

Nothing of the size of H is formed. What a step needs of a batch, inputs of the layer, logits and labels, is gathered.
The rank that owns the layer's covariance conditions it (:mod:`kngd_ray.filters.softmax`), and every rank takes over its
mean and its figures ::

    rank r    x (m, i), logits (m, C), labels (m,)      of its own samples                      all_gather
    owner     mode, B' (x) A'                           of all N samples, in its own memory
    all       mu (n,), figures                                                                  all_gather, all_reduce
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kngd_ray.clip import CLIPHead
from kngd_ray.clip.adapters import ClassResidualAdapter
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Classified, condition_softmax
from kngd_ray.sharding import ShardedFilter
from kngd_ray.training.batches import Batch
from kngd_ray.training.options import FilterOptions

_FIGURES = 4


@dataclass(frozen=True)
class AtMode:
    """What one batch made of a predicted belief; names as those of a step that linearises rows.

    Attributes:
        belief: the posterior.
        logits: (m, C) of the local samples at the predicted mean.
        innovation_rms: root mean square of the Pearson residuals there, a scalar.
        nis: squared Mahalanobis distance of step and residuals at the mode.
        observations: M, classes times samples.
        log_evidence: Laplace's approximation of the labels' log-probability, nats.
        jitter: 0.
        gated: 0.
    """

    belief: Belief
    logits: Tensor
    innovation_rms: Tensor
    nis: float
    observations: int
    log_evidence: float
    jitter: float = 0.0
    gated: int = 0


class ModeStep:
    """Conditions the belief over a class residual on batches of labelled features.

    Args:
        head: with a class residual as its only adapter.
        sharded: the filter that the belief is placed by, whose family is Kronecker.
        options: tolerance and linearisations.
    """

    def __init__(self, head: CLIPHead, sharded: ShardedFilter, options: FilterOptions) -> None:
        residual = head.residual
        assert residual is not None
        self.residual: ClassResidualAdapter = residual
        self._head = head
        self._sharded = sharded
        self._options = options

    def condition(self, predicted: Belief, batch: Batch, noise: float) -> AtMode:
        """Condition on a batch; the head's weights are those of the predicted mean.

        Args:
            predicted: the belief before.
            batch: this rank's part of the global batch.
            noise: r; above 1 a sample counts less than once.

        Returns:
            The belief after it, and figures of the batch before it.

        Raises:
            FilterError: the step is refused, on every rank alike.
        """
        group, ownership = self._sharded.group, self._sharded.ownership
        with torch.no_grad():
            logits: Tensor = self._head(batch.inputs)
        seen = Classified(
            group.gather_rows(self.residual.inputs(batch.inputs), batch.sizes),
            group.gather_rows(logits, batch.sizes),
            group.gather_rows(batch.labels, batch.sizes),
            self._head.logit_scale,
            noise,
        )
        own = predicted.mu[ownership.slice(group.rank)]
        figures = torch.zeros(_FIGURES, dtype=torch.float64, device=own.device)
        covariance = predicted.covariance
        refused: Exception | None = None
        for name, P in predicted.covariance.items():  # of its only layer, on the rank that owns it
            try:
                found = condition_softmax(
                    P["B"],
                    P["A"],
                    seen,
                    tolerance=self._options.tolerance,
                    linearisations=self._options.iterations,
                )
            except (FilterError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                refused = error
                figures[0] = 1.0
                continue
            own = own + found.step.flatten().to(own.dtype)
            covariance = {name: {**P, "B": found.B, "A": found.A}}
            figures = figures.new_tensor([0.0, found.nis, found.log_evidence, float(found.settled)])
        failed, nis, log_evidence, _ = group.sum(figures).tolist()
        if failed:
            if refused is not None:
                raise refused
            raise FilterError("the rank that owns the covariance refused the step, and the belief was kept.")
        p = seen.logits.double().softmax(1).gather(1, seen.labels.unsqueeze(1)).clamp_min(1e-12)
        classes = logits.shape[1]
        return AtMode(
            Belief(group.gather_rows(own, ownership.sizes), covariance),
            logits,
            ((1 / p - 1).mean() / classes).sqrt(),
            nis,
            len(seen.labels) * classes,
            log_evidence,
        )
