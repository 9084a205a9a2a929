"""The gradient baselines: a loss with torch's AdamW or SGD, under DDP where there are ranks."""

from contextlib import nullcontext
from math import cos, isfinite, pi

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kngd_ray.clip import CLIPNetwork, Head, TuneOptions, tower_products
from kngd_ray.errors import FilterError
from kngd_ray.observations import trainable
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training.batches import Batch
from kngd_ray.training.method import MethodState, StepStats, batch_scores, head_state, load_head
from kngd_ray.training.options import FitOptions


class GradientDescent:
    """A loss minimised by AdamW or SGD.

    Args:
        head: maps inputs of m samples to (m, C) logits, or to these and the pairs of a batch beside them.
        options: method, loss, learning rate, weight decay, momentum and schedule.
        steps: length of the run, for the cosine schedule.
        group: the ranks that advance together.
    """

    def __init__(self, head: Head, options: FitOptions, steps: int, group: Group | None = None) -> None:
        self.head = head
        self.group = group or SingleProcess()
        self._parameters = trainable(head)
        self._forward: nn.Module = head
        if self.group.world_size > 1:
            # a pattern may name weights of a tower that no output depends on
            self._forward = DistributedDataParallel(
                head, broadcast_buffers=False, find_unused_parameters=options.tune.images
            )
        self._logit_scale, self._classes = head.logit_scale, len(head.class_embeddings)
        o = options.optimizer
        weights = list(self._parameters.values())
        self._optimizer: torch.optim.Optimizer
        if options.method == "adamw":
            self._optimizer = torch.optim.AdamW(weights, lr=o.lr, weight_decay=o.weight_decay)
        else:
            self._optimizer = torch.optim.SGD(weights, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum)
        self._lr, self._loss = o.lr, o.loss
        self._tune = options.tune
        self._cosine = o.schedule == "cosine"
        self._steps = steps

    def step(self, batch: Batch) -> StepStats:
        """One gradient step on the loss of the global batch.

        Args:
            batch: this rank's part of the global batch.

        Returns:
            NLL and accuracy of the global batch, before the step.

        Raises:
            FilterError: the loss is not finite, and the weights are as before; or the step overflows.
            RuntimeError: any other error of torch's.
        """
        self._set_lr(batch.step)
        if len(batch.labels) or not isinstance(self.head, CLIPNetwork):
            outputs = self._forward(batch.inputs)
        else:  # towers cannot take a batch of nothing, and DDP waits for every rank
            outputs = self._forward(self.head.example(1))[:0]
        scores = batch_scores(outputs[:, : self._classes], batch, self.group)
        gradient = self._loss.gradient(outputs, batch, self.group, self._logit_scale, self._classes)
        sound = self.group.sum(outputs.detach().sum().double())  # of all outputs, those beside the logits too
        if not isfinite(scores["nll"]) or not isfinite(float(sound)):
            raise FilterError(
                "the training loss is NaN or infinite: the step was refused and the weights kept; lower "
                f"optimizer.lr{wider(self._tune)}."
            )
        self._optimizer.zero_grad()
        # DDP averages gradients over ranks; their sum is meant
        towers = tower_products(outputs.device) if isinstance(self.head, CLIPNetwork) else nullcontext()
        with towers:
            outputs.backward(gradient * self.group.world_size)
        try:
            self._optimizer.step()
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            largest = torch.finfo(outputs.dtype).max
            raise FilterError(f"a step is larger than numbers can be ({largest:.2g}): lower optimizer.lr.") from error
        return StepStats(**scores, log_predictive=(-scores["nll"] * batch.total,) if batch.scored else None)

    def state(self) -> MethodState:
        """Weights and the optimiser's moments by parameter name."""
        replicated = head_state(self.head)
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
        load_head(self.head, state)
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


def wider(tune: TuneOptions) -> str:
    """What else can be done about activations that are not finite, for the end of a message."""
    narrow = tune.images and tune.precision != "float32"
    return " or set tune.precision=float32" if narrow else ""
