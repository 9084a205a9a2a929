"""The belief of a Kalman optimiser and its update by one batch, wherever the covariance is stored."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from kngd_ray.clip import Head
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Transition
from kngd_ray.observations import Linearisation, flatten, trainable, unflatten
from kngd_ray.sharding import PartitionedFilter, ShardedFilter, StreamedOutcome
from kngd_ray.training.batches import Batch
from kngd_ray.training.observing import BatchSeen, Observer
from kngd_ray.training.options import FitOptions
from kngd_ray.training.predict import TAU_GRID, centring, moderated


@dataclass(frozen=True)
class Update:
    """The update of a belief by one batch, and the batch's prediction before it.

    Attributes:
        belief: the posterior.
        noise: the noise state after it.
        logits: (m, C) of the local samples at the predicted mean.
        innovation_rms: root mean square of nu there, a scalar.
        nis: nu^T S^-1 nu.
        observations: M of the global batch.
        log_evidence: log N(nu; 0, S) of the innovations as they were before whitening, nats, a scalar.
        jitter: what S needed on its diagonal to factor.
        gated: observations that the gate gave less weight or left out, a scalar.
        log_predictive: of a batch that is scored, the log-probability of its labels at each of the posterior's taus.
        settled: whether it ended at the mode, where that is what it is for.
        unlearned: parts of layers, on all ranks, whose covariance stayed as predicted: their posterior did not factor.
    """

    belief: Belief
    noise: Tensor
    logits: Tensor
    innovation_rms: Tensor
    nis: float
    observations: int
    log_evidence: Tensor | float
    jitter: float = 0.0
    gated: Tensor | int = 0
    log_predictive: tuple[float, ...] | None = None
    settled: bool = True
    unlearned: Tensor | int = 0

    @classmethod
    def of(cls, belief: Belief, noise: Tensor, seen: BatchSeen, outcome: StreamedOutcome) -> "Update":
        """From a batch that was linearised: as seen at the predicted mean, and the update there."""
        return cls(
            belief,
            noise,
            seen.logits,
            seen.nu.square().mean().sqrt(),
            outcome.nis,
            seen.nu.numel(),
            outcome.log_evidence - seen.whitening.log_volume.double(),
            outcome.jitter,
            (outcome.weight < 1).sum(),
        )


NOISE = "noise"  # of what a checkpoint has of a posterior beside weights and covariance
ANCHOR = "prior/mean"


class Posterior(ABC):
    """A belief over the trainable weights of a head, its covariance spread over ranks.

    Args:
        head: its weights are the prior mean, and follow the belief's.
        options: prior, noise and covariance family.
        observer: of the batches.
        filter: the covariance family, placed on the ranks.

    Attributes:
        belief: mean of all weights, covariance of the own parts.
        noise: the noise state.
        taus: posterior temperatures at which labels are predicted before they are learned from.
    """

    def __init__(self, head: Head, options: FitOptions, observer: Observer, filter: PartitionedFilter[Any]) -> None:
        self.head = head
        self.parameters = trainable(head)
        self.options = options
        self.observer = observer
        self.filter = filter
        self.group = filter.group
        self.belief = self._prior()
        self.noise = observer.initial_noise(self.belief.mu)
        self.taus: Sequence[float] = TAU_GRID

    @abstractmethod
    def _prior(self) -> Belief:
        """The belief before the first step, at the head's weights."""

    @abstractmethod
    def keep(self, transition: Transition) -> Tensor | None:
        """What is needed to undo a step that is refused."""

    @abstractmethod
    def undo(self, kept: Tensor | None) -> None:
        """Put the weights back to where a step began."""

    @abstractmethod
    def advance(self, batch: Batch, transition: Transition) -> Update:
        """Predict, condition on a batch, and go on from there.

        Args:
            batch: this rank's part of the global batch.
            transition: of the process model.

        Returns:
            What the batch made of the belief.

        Raises:
            FilterError: the step is refused; the belief is as before, once :meth:`undo` was called.
            LinAlgError: likewise.
        """

    @property
    def keeps_prior(self) -> bool:
        """Whether the covariance holds the prior apart from what was learned, for a process that returns to it."""
        return False

    def keep_prior(self) -> None:  # noqa: B027, nothing to do for most
        """Hold the prior apart from now on, where steps end at a mode; others have one number for it."""

    def unsettle(self) -> None:  # noqa: B027, likewise
        """Let all layers learn alike: what is to be observed is not what some of them were fitted on."""

    def kept(self, transition: Transition) -> dict[str, Tensor]:
        """What a checkpoint has beside weights and covariance.

        Args:
            transition: of the process model between steps.

        Returns:
            Tensors by name.
        """
        return {NOISE: self.noise}

    def load(
        self,
        weights: Mapping[str, Tensor],
        covariance: Mapping[str, Mapping[str, Tensor]],
        kept: Mapping[str, Tensor],
    ) -> None:
        """Continue from weights by name, the covariance of all layers, and what :meth:`kept` gave, or a part of it."""
        self._restore(kept)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])
        self.belief = Belief(self._mean(), self.filter.own(covariance))

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        """Take what :meth:`kept` gave, or a part of it."""
        self.noise = kept[NOISE].to(self.noise)

    @abstractmethod
    def _mean(self) -> Tensor:
        """(n,) the head's weights as the belief holds them."""


class InMemoryPosterior(Posterior):
    """A belief that is replaced as a whole, so that a step may be tried at several points.

    Args:
        head: as of :class:`Posterior`.
        options: likewise.
        observer: likewise.
        filter: likewise.
    """

    filter: ShardedFilter

    def _prior(self) -> Belief:
        self.anchor = flatten(self.parameters)  # mu_0
        return self.filter.init(self.anchor, self.options.filter.weight_variance)

    def kept(self, transition: Transition) -> dict[str, Tensor]:
        """Noise, and the mean that a process returns to."""
        return super().kept(transition) | ({ANCHOR: self.anchor} if transition.decay != 1.0 else {})

    def _restore(self, kept: Mapping[str, Tensor]) -> None:
        super()._restore(kept)
        if ANCHOR in kept:
            self.anchor = kept[ANCHOR].to(self.anchor)

    def keep(self, transition: Transition) -> Tensor | None:
        """The mean."""
        return self.belief.mu

    def undo(self, kept: Tensor | None) -> None:
        """Write it."""
        assert kept is not None
        self.write(kept)

    def advance(self, batch: Batch, transition: Transition) -> Update:
        """Predict, score the labels where they are to be scored, condition, and go on from there.

        Args:
            batch: as of :meth:`Posterior.advance`.
            transition: likewise.

        Returns:
            What the batch made of the belief.

        Raises:
            FilterError: the step is refused.
        """
        predicted = self.predicted(transition)
        scores = tuple(self.scores(predicted, batch).tolist()) if batch.scored else None
        update = self.conditioned(predicted, batch)
        if not isfinite(float(update.belief.mu.sum())):
            raise FilterError(
                "the update moved a weight to NaN or infinity: the step was refused and the belief kept; "
                "lower filter.p0 or raise observation.r0."
            )
        self.go_on(update.belief, update.noise)
        return replace(update, log_predictive=scores)

    def predicted(self, transition: Transition) -> Belief:
        """The belief before the next batch."""
        return self.filter.predict(self.belief, transition, self.anchor)

    def scores(self, predicted: Belief, batch: Batch) -> Tensor:
        """Log-probability of a batch's labels under a belief.

        Args:
            predicted: the belief before the batch.
            batch: this rank's part of the global batch.

        Returns:
            (T,) sums over the global batch in nats, float64, at each of the taus.
        """
        self.write(predicted.mu)
        return self.log_predictive(predicted, self.observer.linearizer.run(batch.inputs), batch)

    @abstractmethod
    def conditioned(self, predicted: Belief, batch: Batch) -> Update:
        """What a batch makes of a predicted belief; the head's weights may end anywhere."""

    def log_predictive(self, predicted: Belief, passed: Linearisation, batch: Batch) -> Tensor:
        """Log-probability of a batch's labels under a belief, softened by its variance: a function of tensors.

        Args:
            predicted: the belief before the batch.
            passed: the forward pass of the local samples at its mean.
            batch: this rank's part of the global batch.

        Returns:
            (T,) sums over the global batch in nats, float64, at each of the taus.
        """
        logits = passed.logits.detach()
        C = logits.shape[1]
        H = passed.jacobian(centring(C, logits).expand(len(logits), C, C))
        variance = self.filter.variances(predicted, H, batch.sizes, logits)[batch.own]
        return self.of_labels(logits, variance, batch)

    def of_labels(self, logits: Tensor, variance: Tensor, batch: Batch) -> Tensor:
        """Log-probability of labels under uncertain logits.

        Args:
            logits: (m, C) means, of the local samples.
            variance: (m, C) variances of the logits less their mean over classes.
            batch: this rank's part of the global batch.

        Returns:
            (T,) sums over the global batch, as of :meth:`log_predictive`.
        """
        label = batch.labels.unsqueeze(1)
        found = [moderated(logits, tau * variance).log_softmax(1).gather(1, label).double().sum() for tau in self.taus]
        return self.group.sum(torch.stack(found))

    def go_on(self, belief: Belief, noise: Tensor) -> None:
        """Continue from a belief and a noise state, as this rank holds them."""
        self.belief, self.noise = belief, noise
        self.write(belief.mu)

    def write(self, mu: Tensor) -> None:
        """Let the head have weights (n,)."""
        with torch.no_grad():
            for name, value in unflatten(mu, self.parameters).items():
                self.parameters[name].copy_(value)

    def _mean(self) -> Tensor:
        return flatten(self.parameters)
