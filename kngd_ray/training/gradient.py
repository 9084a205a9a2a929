"""The gradient baselines: cross-entropy with torch's AdamW or SGD, under DDP where there are ranks."""

from math import cos, isfinite, pi

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from kngd_ray.clip import CLIPHead
from kngd_ray.errors import FilterError
from kngd_ray.observations import trainable
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training.batches import Batch
from kngd_ray.training.method import MethodState, StepStats, batch_scores
from kngd_ray.training.options import FitOptions


class GradientDescent:
    """Cross-entropy minimised by AdamW or SGD.

    Args:
        head: maps (m, d) features to (m, C) logits.
        options: method, learning rate, weight decay, momentum and schedule.
        steps: length of the run, for the cosine schedule.
        group: the ranks that advance together.
    """

    def __init__(self, head: CLIPHead, options: FitOptions, steps: int, group: Group | None = None) -> None:
        self.head: nn.Module = head
        self.group = group or SingleProcess()
        self._parameters = trainable(head)
        self._forward = DistributedDataParallel(head) if self.group.world_size > 1 else head
        o = options.optimizer
        weights = list(self._parameters.values())
        self._optimizer: torch.optim.Optimizer
        if options.method == "adamw":
            self._optimizer = torch.optim.AdamW(weights, lr=o.lr, weight_decay=o.weight_decay)
        else:
            self._optimizer = torch.optim.SGD(weights, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum)
        self._lr = o.lr
        self._cosine = o.schedule == "cosine"
        self._steps = steps

    def step(self, batch: Batch) -> StepStats:
        """One gradient step on the mean cross-entropy of the global batch.

        Args:
            batch: this rank's part of the global batch.

        Returns:
            NLL and accuracy of the global batch, before the step.

        Raises:
            FilterError: the loss is not finite; the weights are as before.
        """
        self._set_lr(batch.step)
        logits = self._forward(batch.features)
        scores = batch_scores(logits, batch, self.group)
        if not isfinite(scores["nll"]):
            raise FilterError(
                "the training loss is NaN or infinite: the step was refused and the weights kept; lower optimizer.lr."
            )
        # DDP averages gradients over ranks; the sum over the global batch divided by its size is meant.
        loss = cross_entropy(logits, batch.labels, reduction="sum") * self.group.world_size / batch.total
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return StepStats(**scores, log_predictive=(-scores["nll"] * batch.total,) if batch.scored else None)

    def state(self) -> MethodState:
        """Weights and the optimiser's moments by parameter name."""
        replicated = {}
        for name, p in self._parameters.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    replicated[f"{key}/{name}"] = value.clone()  # the optimiser writes in place
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        return MethodState(weights=weights, replicated=replicated)

    def load(self, state: MethodState) -> None:
        """Continue from a state."""
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(state.weights[name])
        by_parameter: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.replicated.items():
            moment, name = key.split("/", 1)
            by_parameter.setdefault(name, {})[moment] = value
        for name, p in self._parameters.items():
            if name in by_parameter:
                moments = by_parameter[name].items()
                self._optimizer.state[p] = {k: (v.to(p.device) if v.dim() else v).clone() for k, v in moments}

    def _set_lr(self, step: int) -> None:
        factor = 0.5 * (1 + cos(pi * step / self._steps)) if self._cosine else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * factor
