"""The Kalman filter as an optimiser of a head's trainable weights."""

import torch
from torch import Tensor, nn

from kngd_ray.clip import CLIPHead
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief
from kngd_ray.observations import flatten, jacobian_rows, stack, trainable, unflatten
from kngd_ray.sharding import Group, LocalRows, ShardedFilter, SingleProcess
from kngd_ray.training.batches import Batch, seeded
from kngd_ray.training.method import MethodState, StepStats, batch_scores
from kngd_ray.training.options import FitOptions

_DRAWS = 1  # stream of the observation models' random numbers, apart from the sampler's


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
        self._logit_scale = head.logit_scale
        self._classes = len(head.class_embeddings)
        self._options = options
        self._seed = seed
        self.group = group or SingleProcess()
        self._parameters = trainable(head)
        self.family = options.filter.covariance
        mu = flatten(self._parameters)
        self.filter = ShardedFilter(self.family, options.noise.observation, len(mu), self.group)
        self.belief = self.filter.init(mu, options.filter.p0)
        self._channels = options.noise.observation.channels(self._classes)
        self.noise = torch.cat([mu.new_full((self._channels,), model.r0) for model in options.observation])
        self._estimated = torch.tensor([model.residual for model in options.observation]).to(mu.device)

    def step(self, batch: Batch) -> StepStats:
        """Predict, then condition on one batch.

        Args:
            batch: this rank's part of the global batch.

        Returns:
            Figures of the global batch, before the update.

        Raises:
            FilterError: the step was refused; belief, noise and head are as before.
        """
        with torch.no_grad():
            logits = self.head(batch.features)
        rows, k = self._observe(logits, batch)
        transition = self._options.noise.process.transition(batch.step, self._options.filter.p0)
        predicted = self.filter.predict(self.belief, transition)
        outcome = self.filter.update(predicted, self.noise, rows, [size * k for size in batch.sizes])
        if not bool(torch.isfinite(outcome.belief.mu).all()):
            raise FilterError(
                "the update moved a weight to NaN or infinity: the step was refused and the belief kept; "
                "lower filter.p0 or raise observation.r0."
            )
        estimated = self._estimated.repeat_interleave(self._channels)
        self.belief, self.noise = outcome.belief, torch.where(estimated, outcome.noise, self.noise)
        self._write_mean()
        innovation = outcome.innovation
        return StepStats(
            **batch_scores(logits, batch, self.group),
            innovation_rms=float(outcome.nu.square().mean().sqrt()),
            nis=innovation.nis,
            nis_per_observation=innovation.nis / len(outcome.nu),
            log_evidence=innovation.log_evidence,
            jitter=innovation.jitter,
        )

    def state(self) -> MethodState:
        """Mean, noise and the own slice of the covariance, under global parameter names."""
        sizes = {name: p.numel() for name, p in self._parameters.items()}
        pieces = self.filter.ownership.pieces(self.group.rank, sizes)
        parts = self.belief.covariance.split([stop - start for start, stop in pieces.values()])
        return MethodState(
            weights={name: p.detach().clone() for name, p in self._parameters.items()},
            replicated={"noise": self.noise},
            covariance=dict(zip(pieces, parts, strict=True)) if pieces else {},
            pieces=[self.filter.ownership.pieces(rank, sizes) for rank in range(self.group.world_size)],
        )

    def load(self, state: MethodState) -> None:
        """Continue from a state; its covariance holds every parameter in full, on whatever ranks it was written."""
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(state.weights[name])
        self.noise = state.replicated["noise"].to(self.noise)
        own = self.filter.ownership.slice(self.group.rank)
        P = self.belief.covariance
        if own.stop > own.start:
            full = torch.cat([state.covariance[name] for name in self._parameters])
            P = full[own].to(P)
        self.belief = Belief(flatten(self._parameters), P)

    def _observe(self, logits: Tensor, batch: Batch) -> tuple[LocalRows, int]:
        observations = []
        for number, model in enumerate(self._options.observation):
            # Drawn for the global batch and cut, so that the ranks together see what one process would.
            shape = (batch.total, model.draws(self._classes))
            generator = seeded(self._seed, batch.step, _DRAWS, number)
            uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)[batch.own]
            uniforms = uniforms.to(logits)
            observations.append(model.observe(logits, batch.labels, self._logit_scale, uniforms))
        seen = stack(observations, self._channels)
        H = jacobian_rows(self.head, batch.features, seen.cotangent)
        k = seen.cotangent.shape[1]
        return LocalRows(H, seen.innovation.flatten(), seen.base_noise.flatten(), seen.channel.flatten()), k

    def _write_mean(self) -> None:
        with torch.no_grad():
            for name, value in unflatten(self.belief.mu, self._parameters).items():
                self._parameters[name].copy_(value)
