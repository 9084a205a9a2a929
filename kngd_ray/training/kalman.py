"""The Kalman filter as an optimiser of a head's trainable weights."""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor, nn

from kngd_ray.clip import CLIPHead
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief
from kngd_ray.observations import flatten, trainable, unflatten
from kngd_ray.sharding import Group, ShardedFilter, SingleProcess, covariance_bytes
from kngd_ray.training.batches import Batch
from kngd_ray.training.method import MethodState, StepStats, batch_scores
from kngd_ray.training.observing import Observer
from kngd_ray.training.options import FitOptions

_KEY = "|"  # between a layer's name and that of a tensor of its covariance, in checkpoints


class KalmanNGD:
    """Extended Kalman filter over the trainable weights of a head.

    Each :meth:`step` takes one minibatch as an observation of the weights and writes the posterior
    mean into the head. The covariance is sharded over the ranks of `group`.

    Args:
        head: maps (m, d) features to (m, C) logits; its weights are the prior mean.
        options: observation models, covariance family, prior and noise.
        seed: of the random numbers that sampling observation models use.
        group: the ranks that advance together.
    """

    def __init__(self, head: CLIPHead, options: FitOptions, seed: int = 0, group: Group | None = None) -> None:
        self.head: nn.Module = head
        self._options = options
        self.seed = seed
        self.group = group or SingleProcess()
        self._parameters = trainable(head)
        self._observer = Observer(head, options, seed, self.group)
        prior = options.filter
        self.family = prior.covariance
        self._anchor = flatten(self._parameters)
        self.filter = ShardedFilter(self.family, self._observer.layers, self.group, prior.gate, prior.serial)
        self.belief = self.filter.init(self._anchor, prior.p0)
        self.noise = self._observer.initial_noise(self._anchor)

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
        options = self._options
        transition = options.noise.process.transition(batch.step, options.filter.p0)
        before = self.belief.mu
        try:
            predicted = self.filter.predict(self.belief, transition, self._anchor)
            if predicted.mu is not before:
                self._write(predicted.mu)
            first = seen = self._observer.observe(batch, self.noise)
            outcome = first_outcome = self.filter.update(predicted, seen.observed)
            for _ in range(options.filter.iterations - 1):
                self._write(outcome.belief.mu)
                seen = self._observer.observe(batch, self.noise, displaced=predicted.mu - outcome.belief.mu)
                outcome = self.filter.update(predicted, seen.observed)
            if not isfinite(float(outcome.belief.mu.sum())):
                raise FilterError(
                    "the update moved a weight to NaN or infinity: the step was refused and the belief kept; "
                    "lower filter.p0 or raise observation.r0."
                )
            noise = self._observer.learned(self.noise, first, first_outcome)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            self._write(before)
            reason = str(error).splitlines()[0].rstrip(".")
            raise FilterError(
                f"a matrix of the filter could not be factored ({reason}): the step was refused and the belief kept; "
                "look for non-finite features, or lower filter.p0."
            ) from error
        except BaseException:
            self._write(before)
            raise
        self.noise, self.belief = noise, outcome.belief
        self._write(outcome.belief.mu)
        rms, gated = torch.stack([first.nu.square().mean().sqrt(), (first_outcome.weight < 1).sum()]).tolist()
        return StepStats(
            **batch_scores(first.logits, batch, self.group),
            innovation_rms=rms,
            nis=first_outcome.nis,
            nis_per_observation=first_outcome.nis / first.nu.numel(),
            log_evidence=first_outcome.log_evidence - first.whitening.log_volume,
            jitter=first_outcome.jitter,
            gated=int(gated),
            bytes_moved=self.group.bytes_moved - moved,
            covariance_bytes=covariance_bytes(self.belief.covariance),
        )

    def state(self) -> MethodState:
        """Mean, noise and the own parts of the covariance, under global parameter names."""
        owned = self.filter.ownership.parts
        return MethodState(
            weights={name: p.detach().clone() for name, p in self._parameters.items()},
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
            for name, p in self._parameters.items():
                p.copy_(state.weights[name])
        self.noise = state.replicated["noise"].to(self.noise)
        self.belief = Belief(flatten(self._parameters), self.filter.own(nested(state.covariance, self._anchor)))

    def _write(self, mu: Tensor) -> None:
        with torch.no_grad():
            for name, value in unflatten(mu, self._parameters).items():
                self._parameters[name].copy_(value)


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
