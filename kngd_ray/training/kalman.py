"""The Kalman filter as an optimiser of a head's trainable weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from kngd_ray.clip import Head
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Factors, Kronecker, Transition
from kngd_ray.observations import Linearisation, flatten, trainable, unflatten
from kngd_ray.sharding import Group, Placed, ShardedFilter, SingleProcess, StreamedOutcome, covariance_bytes
from kngd_ray.training.batches import Batch, Support
from kngd_ray.training.method import MethodState, StepStats, batch_scores
from kngd_ray.training.observing import BatchSeen, Observer
from kngd_ray.training.options import FilterOptions, FitOptions
from kngd_ray.training.predict import TAU_GRID, moderated

_AT_ONCE = 1024  # shots
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
    def innovation_rms(self) -> Tensor:
        """Root mean square of nu, a scalar."""
        return self.seen.nu.square().mean().sqrt()

    @property
    def log_evidence(self) -> Tensor:
        """Log N(nu; 0, S) of the innovations as they were before whitening, a scalar."""
        return self.outcome.log_evidence - self.seen.whitening.log_volume.double()


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
        self._place(prior)
        self.noise = self.observer.initial_noise(self.belief.mu)

    def _place(self, prior: FilterOptions) -> None:
        """Spread the prior belief over the ranks."""
        self._anchor = flatten(self.parameters)
        self.filter = ShardedFilter(self.family, self.observer.layers, self.group, prior.gate, prior.serial)
        self.placed: Placed[Any] = self.filter
        self.belief = self.filter.init(self._anchor, prior.p0)

    def inform(self, shots: Support) -> None:
        """Let the prior know how the inputs of each layer vary within classes, if the family asks for it.

        Args:
            shots: all of the fit, on every rank.
        """
        family = self.family
        if not isinstance(family, Kronecker) or family.columns == "identity":
            return
        inputs: dict[str, list[Tensor]] = {}
        for features in shots.features.split(_AT_ONCE):
            passed = self.observer.linearizer.run(features)
            H = passed.jacobian(torch.ones_like(passed.logits).unsqueeze(1))
            for layer in self.observer.layers:
                found = H[layer.name] if layer.factored else None
                if isinstance(found, Factors) and found.own_x:
                    inputs.setdefault(layer.name, []).append(found.x.mean(1))
        informed = {
            name: family.informed_layer(state, torch.cat(inputs[name]), shots.labels) if name in inputs else state
            for name, state in self.belief.covariance.items()
        }
        self.belief = Belief(self.belief.mu, informed)

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
        transition = self._options.noise.process.transition(batch.step, self._options.filter.p0)
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

    def _advance(self, batch: Batch, transition: Transition) -> tuple[Conditioned, tuple[float, ...] | None]:
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
        done = self.condition(predicted, lambda mu, displaced: self._observe(batch, mu, displaced))
        if not isfinite(float(done.belief.mu.sum())):
            raise FilterError(
                "the update moved a weight to NaN or infinity: the step was refused and the belief kept; "
                "lower filter.p0 or raise observation.r0."
            )
        self.go_on(done.belief, self.observer.learned(self.noise, done.seen, done.outcome))
        return done, scores

    def _stats(self, batch: Batch, done: Conditioned, moved: int, scores: tuple[float, ...] | None) -> StepStats:
        """Figures of a step that was taken; `moved` is what had been received from other ranks before it."""
        rms, gated = torch.stack([done.innovation_rms, (done.outcome.weight < 1).sum()]).tolist()
        return StepStats(
            **batch_scores(done.seen.logits, batch, self.group),
            innovation_rms=rms,
            nis=done.outcome.nis,
            nis_per_observation=done.outcome.nis / done.seen.nu.numel(),
            log_evidence=float(done.log_evidence),
            jitter=done.outcome.jitter,
            gated=int(gated),
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
        H = passed.jacobian(torch.eye(C, dtype=logits.dtype, device=logits.device).expand(len(logits), C, C))
        variance = self.filter.variances(predicted, H, batch.sizes, logits)[batch.own]
        label = batch.labels.unsqueeze(1)
        found = [moderated(logits, tau * variance).log_softmax(1).gather(1, label).double().sum() for tau in TAU_GRID]
        return self.group.sum(torch.stack(found))

    def condition(self, predicted: Belief, observe: Callable[[Tensor, Tensor | None], BatchSeen]) -> Conditioned:
        """Condition on a batch, relinearised at its own result as often as is asked for: a function of tensors.

        Args:
            predicted: the belief before.
            observe: the batch at weights (n,), and what the predicted mean has more; None where they are it.

        Returns:
            The belief after it, and what was seen.
        """
        first = observe(predicted.mu, None)
        outcome = first_outcome = self.filter.update(predicted, first.observed)
        for _ in range(self._options.filter.iterations - 1):
            seen = observe(outcome.belief.mu, predicted.mu - outcome.belief.mu)
            outcome = self.filter.update(predicted, seen.observed)
        return Conditioned(outcome.belief, first, first_outcome)

    def go_on(self, belief: Belief, noise: Tensor) -> None:
        """Continue from a belief and a noise state, as this rank holds them."""
        self.belief, self.noise = belief, noise
        self._write(belief.mu)

    def state(self) -> MethodState:
        """Mean, noise and the own parts of the covariance, under global parameter names."""
        owned = self.placed.ownership.parts
        return MethodState(
            weights={name: p.detach().clone() for name, p in self.parameters.items()},
            replicated={"noise": self.noise},
            covariance={
                f"{name}{_KEY}{key}": tensor
                for name, state in self.belief.covariance.items()
                for key, tensor in state.items()
            },
            pieces=[{part.layer.name: (part.flat.start, part.flat.stop) for part in parts} for parts in owned],
        )

    def load(self, state: MethodState) -> None:
        """Continue from a state; its covariance is that of all parameters, on whatever ranks it was written."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state.weights[name])
        self.noise = state.replicated["noise"].to(self.noise)
        self.belief = Belief(flatten(self.parameters), self.placed.own(nested(state.covariance, self._anchor)))

    def _observe(self, batch: Batch, mu: Tensor, displaced: Tensor | None) -> BatchSeen:
        if mu is not self.belief.mu:
            self._write(mu)
        return self.observer.observe(batch, self.noise, displaced)

    def _write(self, mu: Tensor) -> None:
        with torch.no_grad():
            for name, value in unflatten(mu, self.parameters).items():
                self.parameters[name].copy_(value)


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
