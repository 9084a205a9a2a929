"""The diagonal EKF as one would write it first: all rows of H, P H^T, and S from both."""

from collections.abc import Sequence

import torch

from kngd_ray.clip import CLIPHead
from kngd_ray.observations import Model, flatten, jacobian_rows, trainable, unflatten
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.batches import Batch
from kngd_ray.training.method import MethodState, StepStats, batch_scores
from kngd_ray.training.options import FilterOptions


class NaiveRows:
    """The reference bar: what :class:`~kngd_ray.filters.Diagonal` computes, with (M, n) arrays and R = I.

    Args:
        head: maps (m, d) features to (m, C) logits.
        observation: observation models.
    """

    def __init__(self, head: CLIPHead, observation: Sequence[Model]) -> None:
        self.head = head
        self.P = torch.full_like(flatten(trainable(head)), FilterOptions().weight_variance)
        self._observation = observation

    def step(self, batch: Batch) -> StepStats:
        """One update with all rows in memory."""
        with torch.no_grad():
            weights = trainable(self.head)
            logits = self.head(batch.inputs)
            none = logits[:, :0]
            seen = [o.observe(logits, batch.labels, self.head.logit_scale, none) for o in self._observation]
            nu = torch.cat([o.innovation for o in seen], 1).flatten()
            rows = jacobian_rows(self.head, batch.inputs, torch.cat([o.cotangent for o in seen], 1))
            H = torch.cat(list(rows.values()), 1)
            PHt = self.P.unsqueeze(1) * H.mT
            L = torch.linalg.cholesky(H @ PHt + torch.eye(len(nu), device=nu.device))
            mu = flatten(weights) + PHt @ torch.cholesky_solve(nu.unsqueeze(1), L).squeeze(1)
            self.P = self.P - torch.linalg.solve_triangular(L.mT, PHt, upper=True, left=False).square().sum(1)
            for name, value in unflatten(mu, weights).items():
                weights[name].copy_(value)
        return StepStats(**batch_scores(logits, batch, SingleProcess()), covariance_bytes=self.P.nbytes)

    def state(self) -> MethodState:
        """Weights and variances."""
        weights = {name: p.detach().clone() for name, p in trainable(self.head).items()}
        return MethodState(weights, replicated={"P": self.P})

    def load(self, state: MethodState) -> None:
        """Continue from a state."""
        with torch.no_grad():
            for name, p in trainable(self.head).items():
                p.copy_(state.weights[name])
        self.P = state.replicated["P"]
