"""A Kalman step that ends at the mode: of a class residual, whose logits are linear in its weights.

Nothing of the size of H is formed. A step gathers what it needs of a batch: inputs of the layer, logits and labels. The
rank that owns the layer's covariance conditions it (:mod:`kngd_ray.filters.softmax`), and every rank takes over its
mean and its figures ::

    rank r    x (m, i), logits (m, C), labels (m,)      of its own samples                      all_gather
    owner     mode, B' (x) A'                           of all N samples, in its own memory
    all       mu (n,), figures                                                                  all_gather, all_reduce
"""

import torch
from torch import Tensor

from kngd_ray.clip import CLIPHead
from kngd_ray.clip.adapters import ClassResidualAdapter
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Classified, Kronecker, Transition, condition_softmax
from kngd_ray.training.batches import Batch
from kngd_ray.training.posterior import InMemoryPosterior, Update
from kngd_ray.training.predict import centred_variances

_FIGURES = 4


class ModePosterior(InMemoryPosterior):
    """A belief over a class residual, the only adapter of its head, whose family is Kronecker.

    Args:
        head: as of :class:`~kngd_ray.training.posterior.Posterior`.
        options: likewise.
        observer: likewise.
        filter: likewise.
    """

    @property
    def residual(self) -> ClassResidualAdapter:
        """The adapter."""
        assert isinstance(self.head, CLIPHead)
        assert self.head.residual is not None
        return self.head.residual

    @property
    def keeps_prior(self) -> bool:
        """Whether the prior's covariance is kept beside the belief's; a rank without covariance cannot know."""
        return any(self._family.keeps_prior(P) for P in self.belief.covariance.values())

    def keep_prior(self) -> None:
        """Make the present covariance the P_0 that a process adds a share of."""
        kept = {name: self._family.with_prior(P) for name, P in self.belief.covariance.items()}
        self.belief = Belief(self.belief.mu, kept)

    @property
    def _family(self) -> Kronecker:
        family = self.options.filter.covariance
        assert isinstance(family, Kronecker)
        return family

    def predicted(self, transition: Transition) -> Belief:
        """The belief before the next batch, its share of the prior added in the prior's own coordinates."""
        found = super().predicted(transition)
        if not transition.share:
            return found
        drifted = {name: self._family.drifted_layer(P, transition.share) for name, P in found.covariance.items()}
        return Belief(found.mu, drifted)

    def scores(self, predicted: Belief, batch: Batch) -> Tensor:
        """As of every posterior; a sample's logits have the covariance s^2 (x^T A x) B, and no row of H is formed."""
        self.write(predicted.mu)
        with torch.no_grad():
            logits: Tensor = self.head(batch.inputs)
        x = self.group.gather_rows(self.residual.inputs(batch.inputs), batch.sizes).double()
        told = torch.zeros(len(x) + logits.shape[1], dtype=x.dtype, device=x.device)
        for P in predicted.covariance.values():  # of its only layer, on the rank that owns it
            along = self.head.logit_scale**2 * ((x @ P["A"].double()) * x).sum(1).clamp_min(0)
            told = torch.cat([along, centred_variances(P["B"].double())])
        along, across = self.group.sum(told).split([len(x), logits.shape[1]])
        return self.of_labels(logits, torch.outer(along[batch.own], across).to(logits), batch)

    def conditioned(self, predicted: Belief, batch: Batch) -> Update:
        """Condition on a batch, at the mode.

        Args:
            predicted: the belief before.
            batch: this rank's part of the global batch.

        Returns:
            The belief after it, and figures of the batch before it: ``innovation_rms`` is of the Pearson residuals, and
            ``nis`` of step and residuals at the mode.

        Raises:
            FilterError: the step is refused, on every rank alike.
        """
        if predicted.mu is not self.belief.mu:
            self.write(predicted.mu)
        group, ownership = self.group, self.filter.ownership
        with torch.no_grad():
            logits: Tensor = self.head(batch.inputs)
        seen = Classified(
            group.gather_rows(self.residual.inputs(batch.inputs), batch.sizes),
            group.gather_rows(logits, batch.sizes),
            group.gather_rows(batch.labels, batch.sizes),
            self.head.logit_scale,
            self.observer.r0,
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
                    tolerance=self.options.filter.tolerance,
                    linearisations=self.options.filter.iterations,
                )
            except (FilterError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                refused = error
                figures[0] = 1.0
                continue
            own = own + found.step.flatten().to(own.dtype)
            covariance = {name: {**P, "B": found.B, "A": found.A}}
            figures = figures.new_tensor([0.0, found.nis, found.log_evidence, float(found.settled)])
        failed, nis, log_evidence, settled = group.sum(figures).tolist()
        if failed:
            if refused is not None:
                raise refused
            raise FilterError("the rank that owns the covariance refused the step, and the belief was kept.")
        p = seen.logits.double().softmax(1).gather(1, seen.labels.unsqueeze(1)).clamp_min(1e-12)
        classes = logits.shape[1]
        return Update(
            Belief(group.gather_rows(own, ownership.sizes), covariance),
            self.noise,
            logits,
            ((1 / p - 1).mean() / classes).sqrt(),
            nis,
            len(seen.labels) * classes,
            log_evidence,
            settled=bool(settled),
        )
