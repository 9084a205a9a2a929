"""The Kalman filter as an optimiser of a head's trainable weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kngd_ray.clip import CLIPHead, Head
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Covariance, Family, Kronecker, ProcessModel, Transition
from kngd_ray.observations import trainable
from kngd_ray.sharding import Group, ShardedFilter, SingleProcess, covariance_bytes
from kngd_ray.training.at_mode import ModePosterior
from kngd_ray.training.batches import Batch
from kngd_ray.training.ekf import IteratedEKF
from kngd_ray.training.method import MethodState, StepStats, batch_scores, head_state, load_head
from kngd_ray.training.observing import Observer
from kngd_ray.training.options import FitOptions
from kngd_ray.training.posterior import Posterior, Update
from kngd_ray.training.streamed import StreamedPosterior, check_activations

P0 = "prior/p0"
LOGIT_VARIANCE = "prior/logit_variance"
FORESEEN = "stream/foreseen"
_KEY = "|"  # between a layer's name and the name of a tensor of its covariance, in checkpoints


class KalmanNGD:
    """Extended Kalman filter over the trainable weights of a head.

    Each :meth:`step` takes one minibatch as an observation of the weights and writes the posterior
    mean into the head. The covariance is sharded over the ranks of `group`.

    Args:
        head: maps inputs of m samples to (m, C) logits, or to these and more; its weights are the prior mean.
        options: observation models, covariance family, prior and noise.
        seed: of the random numbers that sampling observation models use.
        group: the ranks that advance together.
        streamed: update layer by layer and in place, which towers need, as no second copy of them fits.

    Raises:
        FilterError: towers whose activations are not finite.
        ValueError: layers that are to be streamed need one another.
    """

    def __init__(
        self, head: Head, options: FitOptions, seed: int = 0, group: Group | None = None, *, streamed: bool = False
    ) -> None:
        if streamed:
            check_activations(head, options)
        self.head = head
        self.seed = seed
        self.group = group or SingleProcess()
        self.parameters = trainable(head)
        self.observer = Observer(head, options, seed, self.group)
        self.p0 = options.filter.weight_variance
        self.logit_variance: float | None = None  # as shots chose it
        self.foreseen: Tensor | None = None  # of a stream, what each tau has made of labels to come; see fit
        self.taken: int | None = None  # steps of earlier fits of the same stream; None where there is no stream
        self._options = options
        self.posterior = self._place(streamed=streamed)

    def _place(self, *, streamed: bool) -> Posterior:
        """The prior belief, spread over the ranks."""
        if streamed:
            return StreamedPosterior.of(self.head, self._options, self.observer, self.group)
        prior = self._options.filter
        sharded = ShardedFilter(prior.covariance, self.observer.layers, self.group, prior.gate, prior.serial)
        at_mode = self._options.at_mode and isinstance(self.head, CLIPHead)
        kind = ModePosterior if at_mode else IteratedEKF
        return kind(self.head, self._options, self.observer, sharded)

    @property
    def family(self) -> Family:
        """The covariance family."""
        return self.posterior.filter.family

    @property
    def belief(self) -> Belief:
        """Mean of all weights, covariance of the own parts."""
        return self.posterior.belief

    @property
    def noise(self) -> Tensor:
        """The noise state."""
        return self.posterior.noise

    def begin_at(self, covariance: Covariance, *, gamma: float, p0: float, logit_variance: float | None = None) -> None:
        """Start from a prior that shots have informed, before the first step.

        Args:
            covariance: P of the own parts.
            gamma: how much of the zero-shot logits is believed.
            p0: prior variance of a weight, as far as one number can say it; what a process relaxes to.
            logit_variance: prior variance of a logit that the shots chose, nats^2.
        """
        assert isinstance(self.head, CLIPHead)
        self.posterior.belief = Belief(self.belief.mu, covariance)
        self.head.gamma, self.p0, self.logit_variance = gamma, p0, logit_variance
        measured = isinstance(self.family, Kronecker) and self.family.columns != "identity"
        if measured and self._process.share:
            self.posterior.keep_prior()

    @property
    def _process(self) -> ProcessModel:
        return self._options.noise.process

    def _transition(self, step: int) -> Transition:
        """The transition before a step; of P_0 where it is kept. Before the first batch of a stream no time passes."""
        if self.taken == step == 0:
            return Transition(1.0, 1.0, 0.0)
        return self._process.transition((self.taken or 0) + step, None if self.posterior.keeps_prior else self.p0)

    def step(self, batch: Batch) -> StepStats:
        """Predict, then condition on one batch, relinearised at its own result as often as is asked for.

        Args:
            batch: this rank's part of the global batch.

        Returns:
            Figures of the global batch, before the update.

        Raises:
            FilterError: the step was refused; belief, noise and head are as before.
        """
        moved = self.group.bytes_moved
        transition = self._transition(batch.step)
        kept = self.posterior.keep(transition)
        try:
            update = self.posterior.advance(batch, transition)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            self.posterior.undo(kept)
            reason = str(error).splitlines()[0].rstrip(".")
            raise FilterError(
                f"a matrix of the filter could not be factored ({reason}): the step was refused and the belief kept; "
                "look for non-finite features, or lower filter.p0."
            ) from error
        except BaseException:
            self.posterior.undo(kept)
            raise
        return self._stats(batch, update, moved)

    def _stats(self, batch: Batch, update: Update, moved: int) -> StepStats:
        """Figures of a step that was taken; `moved` is what had been received from other ranks before it."""
        figures = (update.innovation_rms, update.log_evidence, update.gated, update.unlearned)
        # in one read, which a GPU waits for
        rms, log_evidence, gated, unlearned = torch.stack([
            torch.as_tensor(figure, dtype=torch.float64, device=update.logits.device) for figure in figures
        ]).tolist()
        return StepStats(
            **batch_scores(update.logits, batch, self.group),
            innovation_rms=rms,
            nis=update.nis,
            nis_per_observation=update.nis / max(update.observations, 1),
            log_evidence=log_evidence,
            jitter=update.jitter,
            gated=int(gated),
            bytes_moved=self.group.bytes_moved - moved,
            covariance_bytes=covariance_bytes(self.belief.covariance),
            log_predictive=update.log_predictive,
            unsettled=None if update.settled else 1,
            unlearned=int(unlearned) or None,
        )

    def state(self) -> MethodState:
        """Mean, noise and the own parts of the covariance, under global parameter names."""
        numbers = {P0: self.p0, LOGIT_VARIANCE: self.logit_variance}
        of_stream = {} if self.foreseen is None else {FORESEEN: self.foreseen}
        owned = self.posterior.filter.ownership.parts
        return MethodState(
            weights={name: p.detach().clone() for name, p in self.parameters.items()},
            replicated={
                **{key: torch.tensor(n, dtype=torch.float64) for key, n in numbers.items() if n is not None},
                **head_state(self.head),
                **of_stream,
                **self.posterior.kept(self._transition(1)),
            },
            covariance=flat(self.belief.covariance),
            pieces=[{part.layer.name: (part.flat.start, part.flat.stop) for part in parts} for parts in owned],
        )

    def load(self, state: MethodState) -> None:
        """Continue from a state; its covariance is of all parameters, whatever ranks wrote it."""
        if P0 in state.replicated and self._options.filter.logit_variance is not None:
            self.p0 = float(state.replicated[P0])
        self.logit_variance = chosen_variance(state)
        self.foreseen = state.replicated.get(FORESEEN)
        load_head(self.head, state)
        self.posterior.load(state.weights, nested(state.covariance, self.belief.mu), state.replicated)


def chosen_variance(state: MethodState) -> float | None:
    """The prior variance of a logit that a fit's shots chose.

    Args:
        state: of the fit.

    Returns:
        Nats^2; None where it was given, or the state is from a version that did not say.
    """
    found = state.replicated.get(LOGIT_VARIANCE)
    return None if found is None else float(found)


def flat(covariance: Covariance) -> dict[str, Tensor]:
    """A covariance under the names that it has in a checkpoint.

    Args:
        covariance: tensors by layer, then by key.

    Returns:
        Tensors by layer and key.
    """
    return {f"{name}{_KEY}{key}": tensor for name, state in covariance.items() for key, tensor in state.items()}


def nested(covariance: Mapping[str, Tensor], like: Tensor) -> dict[str, dict[str, Tensor]]:
    """A covariance as families have it from its flat names in a checkpoint.

    Args:
        covariance: tensors by layer and key.
        like: of the device that they are to be on.

    Returns:
        Tensors by layer, then by key.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in covariance.items():
        layer, _, key = name.rpartition(_KEY)
        found.setdefault(layer, {})[key] = tensor.to(like.device)
    return found
