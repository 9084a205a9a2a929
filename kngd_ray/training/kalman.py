"""The Kalman filter as an optimiser of a head's trainable weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kngd_ray.clip import CLIPHead, Head
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Covariance, NoGate, Transition
from kngd_ray.filters.functional_mode import eager
from kngd_ray.observations import Linearisation, flatten, trainable, unflatten
from kngd_ray.sharding import (
    Group,
    PartitionedFilter,
    ShardedFilter,
    ShardedUpdate,
    SingleProcess,
    StreamedOutcome,
    covariance_bytes,
)
from kngd_ray.training.at_mode import AtMode, ModeStep
from kngd_ray.training.batches import Batch
from kngd_ray.training.method import MethodState, StepStats, batch_scores, head_state, load_head
from kngd_ray.training.observing import BatchSeen, Observer
from kngd_ray.training.options import FilterOptions, FitOptions
from kngd_ray.training.predict import TAU_GRID, centring, moderated

_ROUNDED = 1e-9  # of the objective, within which a step counts as one that does not raise it
P0 = "prior/p0"
LOGIT_VARIANCE = "prior/logit_variance"
_KEY = "|"  # between a layer's name and that of a tensor of its covariance, in checkpoints


@dataclass(frozen=True)
class Conditioned:
    """What one batch made of a predicted belief.

    Attributes:
        belief: the posterior.
        seen: the batch as observed at the predicted mean.
        outcome: the update there; the posterior's own, unless the batch was linearised more than once.
    """

    belief: Belief
    seen: BatchSeen
    outcome: StreamedOutcome

    @property
    def logits(self) -> Tensor:
        """(m, C) of the local samples at the predicted mean."""
        return self.seen.logits

    @property
    def nis(self) -> float:
        """Nu^T S^-1 nu."""
        return self.outcome.nis

    @property
    def observations(self) -> int:
        """M."""
        return self.seen.nu.numel()

    @property
    def jitter(self) -> float:
        """What S needed on its diagonal to factor."""
        return self.outcome.jitter

    @property
    def gated(self) -> int:
        """Observations that the gate weighed down or left out."""
        return int((self.outcome.weight < 1).sum())

    @property
    def innovation_rms(self) -> Tensor:
        """Root mean square of nu, a scalar."""
        return self.seen.nu.square().mean().sqrt()

    @property
    def log_evidence(self) -> Tensor:
        """Log N(nu; 0, S) of the innovations as they were before whitening, a scalar."""
        return self.outcome.log_evidence - self.seen.whitening.log_volume.double()


class _Aim(NamedTuple):
    """Where an update goes from the point of its linearisation, in the norm of P-^-1 around the predicted mean."""

    whole: Tensor  # squared distance of the updated mean
    across: Tensor  # its product with the point that it was linearised at

    @classmethod
    def of(cls, update: ShardedUpdate, seen: BatchSeen) -> "_Aim":
        """From w = S^-1 nu: mu - mu- = P- H^T w, and H P- H^T w = nu - w, nu those of the linear model at mu-."""
        assert update.weights is not None
        w, nu = update.weights.double(), seen.observed.nu.double()
        return cls(w @ (nu - w), w @ (nu - seen.plain.double()))

    def distance(self, here: Tensor, size: Tensor) -> Tensor:
        """Squared distance after a part of the step, begun at a squared distance."""
        return (1 - size) ** 2 * here + 2 * size * (1 - size) * self.across + size**2 * self.whole


class KalmanNGD:
    """Extended Kalman filter over the trainable weights of a head.

    Each :meth:`step` takes one minibatch as an observation of the weights and writes the posterior
    mean into the head. The covariance is sharded over the ranks of `group`.

    Args:
        head: maps inputs of m samples to (m, C) logits, or to these and more; its weights are the prior mean.
        options: observation models, covariance family, prior and noise.
        seed: of the random numbers that sampling observation models use.
        group: the ranks that advance together.
    """

    def __init__(self, head: Head, options: FitOptions, seed: int = 0, group: Group | None = None) -> None:
        self.head = head
        self._options = options
        self.seed = seed
        self.group = group or SingleProcess()
        self.parameters = trainable(head)
        self.observer = Observer(head, options, seed, self.group)
        prior = options.filter
        self.family = prior.covariance
        self.p0 = prior.weight_variance
        self.logit_variance: float | None = None  # as shots chose it
        self._place(prior)
        self.to_mode: ModeStep | None = None
        if options.at_mode and isinstance(head, CLIPHead):
            self.to_mode = ModeStep(head, self.filter, prior)
        self.noise = self.observer.initial_noise(self.belief.mu)

    def _place(self, prior: FilterOptions) -> None:
        """Spread the prior belief over the ranks."""
        self._anchor = flatten(self.parameters)
        self.filter = ShardedFilter(self.family, self.observer.layers, self.group, prior.gate, prior.serial)
        self.placed: PartitionedFilter[Any] = self.filter
        self.belief = self.filter.init(self._anchor, prior.weight_variance)

    def begin_at(self, covariance: Covariance, *, gamma: float, p0: float, logit_variance: float | None = None) -> None:
        """Start from a prior that shots have informed, before the first step.

        Args:
            covariance: P of the own parts.
            gamma: how much of the zero-shot logits is believed.
            p0: prior variance of a weight, as far as one number says it; what a process relaxes to.
            logit_variance: prior variance of a logit that the shots chose, nats^2.
        """
        assert isinstance(self.head, CLIPHead)
        self.belief = Belief(self.belief.mu, covariance)
        self.head.gamma, self.p0, self.logit_variance = gamma, p0, logit_variance

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
        transition = self._options.noise.process.transition(batch.step, self.p0)
        kept = self._keep(transition)
        try:
            done, scores = self._advance(batch, transition)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            self._undo(kept)
            reason = str(error).splitlines()[0].rstrip(".")
            raise FilterError(
                f"a matrix of the filter could not be factored ({reason}): the step was refused and the belief kept; "
                "look for non-finite features, or lower filter.p0."
            ) from error
        except BaseException:
            self._undo(kept)
            raise
        return self._stats(batch, done, moved, scores)

    def _keep(self, transition: Transition) -> Tensor | None:
        """What a refused step is undone with."""
        return self.belief.mu

    def _undo(self, kept: Tensor | None) -> None:
        """Put the head back to where a step began."""
        assert kept is not None
        self._write(kept)

    def _advance(self, batch: Batch, transition: Transition) -> tuple[Conditioned | AtMode, tuple[float, ...] | None]:
        """Take a step: what the batch made of the belief, and its labels' log-probability where it is scored.

        Raises:
            FilterError: the step is refused.
        """
        predicted = self.filter.predict(self.belief, transition, self._anchor)
        scores: tuple[float, ...] | None = None
        if batch.scored:
            self._write(predicted.mu)
            passed = self.observer.linearizer.run(batch.inputs)
            scores = tuple(self.log_predictive(predicted, passed, batch).tolist())
        done: Conditioned | AtMode
        if self.to_mode is not None:
            if predicted.mu is not self.belief.mu:
                self._write(predicted.mu)
            done = self.to_mode.condition(predicted, batch, self.observer.r0)
        else:
            done = self.condition(predicted, lambda mu, displaced: self._observe(batch, mu, displaced))
        if not isfinite(float(done.belief.mu.sum())):
            raise FilterError(
                "the update moved a weight to NaN or infinity: the step was refused and the belief kept; "
                "lower filter.p0 or raise observation.r0."
            )
        noise = self.noise if isinstance(done, AtMode) else self.observer.learned(self.noise, done.seen, done.outcome)
        self.go_on(done.belief, noise)
        return done, scores

    def _stats(
        self, batch: Batch, done: Conditioned | AtMode, moved: int, scores: tuple[float, ...] | None
    ) -> StepStats:
        """Figures of a step that was taken; `moved` is what had been received from other ranks before it."""
        return StepStats(
            **batch_scores(done.logits, batch, self.group),
            innovation_rms=float(done.innovation_rms),
            nis=done.nis,
            nis_per_observation=done.nis / max(done.observations, 1),
            log_evidence=float(done.log_evidence),
            jitter=done.jitter,
            gated=done.gated,
            bytes_moved=self.group.bytes_moved - moved,
            covariance_bytes=covariance_bytes(self.belief.covariance),
            log_predictive=scores,
        )

    def log_predictive(self, predicted: Belief, passed: Linearisation, batch: Batch) -> Tensor:
        """Log-probability of a batch's labels under a belief, softened by its variance: a function of tensors.

        Args:
            predicted: the belief before the batch.
            passed: the forward pass of the local samples at its mean.
            batch: this rank's part of the global batch.

        Returns:
            (T,) sums over the global batch in nats, float64, at each tau of ``TAU_GRID``.
        """
        logits = passed.logits.detach()
        C = logits.shape[1]
        H = passed.jacobian(centring(C, logits).expand(len(logits), C, C))
        variance = self.filter.variances(predicted, H, batch.sizes, logits)[batch.own]
        label = batch.labels.unsqueeze(1)
        found = [moderated(logits, tau * variance).log_softmax(1).gather(1, label).double().sum() for tau in TAU_GRID]
        return self.group.sum(torch.stack(found))

    def condition(self, predicted: Belief, observe: Callable[[Tensor, Tensor | None], BatchSeen]) -> Conditioned:
        """Condition on a batch, relinearised at its own result as often as is asked for: a function of tensors.

        An iterated EKF whose steps are halved until the objective, ``|mu - mu-|^2 / 2`` in the norm of P-^-1 plus what
        the data cost, does not rise. Every point is a mixture of updates P- H^T w, so that its norm takes products of
        M numbers alone.

        Args:
            predicted: the belief before.
            observe: the batch at weights (n,), and what the predicted mean has more; None where they are it.

        Returns:
            The belief after it, and what was seen.
        """
        first = observe(predicted.mu, None)
        outcome = first_outcome = self.filter.update(predicted, first.observed)
        options = self._options.filter
        if options.iterations == 1:
            return Conditioned(outcome.belief, first, first_outcome)
        if outcome.weights is None or not isinstance(options.gate, NoGate):
            # in runs, or gated, there is no objective to compare points by
            for _ in range(options.iterations - 1):
                seen = observe(outcome.belief.mu, predicted.mu - outcome.belief.mu)
                outcome = self.filter.update(predicted, seen.observed)
            return Conditioned(outcome.belief, first, first_outcome)
        mu, distance, cost = predicted.mu, first.energy.new_zeros(()), self.group.sum(first.energy)
        aim = _Aim.of(outcome, first)
        size, logits = torch.ones_like(distance), first.logits
        going = torch.ones_like(distance, dtype=torch.bool)
        for _ in range(options.iterations):
            there, far = mu.lerp(outcome.belief.mu, size.to(mu)), aim.distance(distance, size)
            seen = observe(there, predicted.mu - there)
            total = far / 2 + self.group.sum(seen.energy)
            falls = total <= cost + _ROUNDED * cost.abs()
            if eager() and not bool(falls) and bool(total.isfinite()):
                size = size / 2
                continue
            # what is not finite is refused here
            new = self.filter.update(predicted, seen.observed)
            moved = ((seen.logits - logits).abs() > options.tolerance).any()
            if eager():
                mu, distance, cost, outcome, aim, logits = there, far, total, new, _Aim.of(new, seen), seen.logits
                if not bool(self.group.sum(moved.double())) and bool(size == 1.0):
                    break
                size = torch.ones_like(size)
            else:  # of many trials each goes its own way, and as far as it would alone
                falls = falls & going
                going = going & ~(falls & ~moved & (size == 1.0))
                keep = partial(_either, falls)
                logits = keep(seen.logits, logits)
                mu, distance, cost = keep(there, mu), keep(far, distance), keep(total, cost)
                aim = _Aim(*map(keep, _Aim.of(new, seen), aim))
                belief = Belief(keep(new.belief.mu, outcome.belief.mu), _either_of(falls, new, outcome))
                outcome = replace(new, belief=belief)
                size = torch.where(falls, torch.ones_like(size), size / 2)
        return Conditioned(Belief(mu, outcome.belief.covariance), first, first_outcome)

    def go_on(self, belief: Belief, noise: Tensor) -> None:
        """Continue from a belief and a noise state, as this rank holds them."""
        self.belief, self.noise = belief, noise
        self._write(belief.mu)

    def state(self) -> MethodState:
        """Mean, noise and the own parts of the covariance, under global parameter names."""
        owned = self.placed.ownership.parts
        return MethodState(
            weights={name: p.detach().clone() for name, p in self.parameters.items()},
            replicated={
                "noise": self.noise,
                P0: torch.tensor(self.p0, dtype=torch.float64),
                **self._chosen(),
                **head_state(self.head),
            },
            covariance={
                f"{name}{_KEY}{key}": tensor
                for name, state in self.belief.covariance.items()
                for key, tensor in state.items()
            },
            pieces=[{part.layer.name: (part.flat.start, part.flat.stop) for part in parts} for parts in owned],
        )

    def _chosen(self) -> dict[str, Tensor]:
        if self.logit_variance is None:
            return {}
        return {LOGIT_VARIANCE: torch.tensor(self.logit_variance, dtype=torch.float64)}

    def load(self, state: MethodState) -> None:
        """Continue from a state; its covariance is that of all parameters, on whatever ranks it was written."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state.weights[name])
        self.noise = state.replicated["noise"].to(self.noise)
        if P0 in state.replicated and self._options.filter.logit_variance is not None:
            self.p0 = float(state.replicated[P0])
        self.logit_variance = chosen_variance(state)
        load_head(self.head, state)
        self.belief = Belief(flatten(self.parameters), self.placed.own(nested(state.covariance, self._anchor)))

    def _observe(self, batch: Batch, mu: Tensor, displaced: Tensor | None) -> BatchSeen:
        if mu is not self.belief.mu:
            self._write(mu)
        return self.observer.observe(batch, self.noise, displaced)

    def _write(self, mu: Tensor) -> None:
        with torch.no_grad():
            for name, value in unflatten(mu, self.parameters).items():
                self.parameters[name].copy_(value)


def chosen_variance(state: MethodState) -> float | None:
    """The prior variance of a logit that a fit's shots chose.

    Args:
        state: of the fit.

    Returns:
        Nats^2; None where it was given, or the state is of a version that did not tell.
    """
    found = state.replicated.get(LOGIT_VARIANCE)
    return None if found is None else float(found)


def _either(first: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new tensor where a condition holds, else the old one."""
    return torch.where(first, new, old)


def _either_of(first: Tensor, new: ShardedUpdate, old: ShardedUpdate) -> Covariance:
    """The covariance of the new update where a condition holds, else of the old one."""
    before = old.belief.covariance
    return {
        name: {key: torch.where(first, value, before[name][key]) for key, value in state.items()}
        for name, state in new.belief.covariance.items()
    }


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
