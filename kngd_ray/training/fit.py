"""The one step loop: every method, on one process or many ranks, from the start or from a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from kngd_ray.clip import CLIPHead
from kngd_ray.errors import FilterError, IndefiniteError
from kngd_ray.observations import trainable
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training.batches import BatchSampler, Support
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import Method, MethodState, StepStats
from kngd_ray.training.options import FitOptions
from kngd_ray.training.prior import Prior

_MAX_REFUSED = 10


@dataclass(frozen=True)
class FitTask:
    """One fit: what, on which shots, from which seed.

    Attributes:
        options: method and its options.
        seed: of the adapters' random weights, the shuffles and sampled labels.
        support: the training shots.
        class_embeddings: (C, d) unit text embeddings of the classes.
        logit_scale: factor from cosines to logits.
        prior: the earlier fit from whose posterior this one starts; None starts at CLIP's own weights.
    """

    options: FitOptions
    seed: int
    support: Support
    class_embeddings: Tensor
    logit_scale: float
    prior: Prior | None = None

    @property
    def sampler(self) -> BatchSampler:
        """The batches of this fit."""
        return BatchSampler(self.support, self.options.batch_size, self.options.epochs, self.seed)


@dataclass(frozen=True)
class StepRecord:
    """One step as it is shown and logged.

    Attributes:
        step: steps done, from 1.
        steps: steps of the whole fit.
        milliseconds: wall time of the step.
        stats: figures of the batch; None when the step was refused.
        refused: why the step was refused, in one sentence; None when it was taken.
    """

    step: int
    steps: int
    milliseconds: float
    stats: StepStats | None
    refused: str | None = None


def build_head(task: FitTask, device: torch.device | str = "cpu") -> CLIPHead:
    """The head of a task with its initial weights.

    Args:
        task: the fit.
        device: where the head lives.

    Returns:
        The untrained head.
    """
    head = CLIPHead(task.class_embeddings, task.logit_scale, task.options.adapter, task.seed)
    return head.to(device)


def build_method(task: FitTask, head: CLIPHead, group: Group) -> Method:
    """The optimiser that a task's options name.

    Args:
        task: the fit.
        head: its head.
        group: the ranks.

    Returns:
        The optimiser, before its first step.
    """
    if task.options.method == "kalman":
        return KalmanNGD(head, task.options, task.seed, group)
    return GradientDescent(head, task.options, task.sampler.steps, group)


def begin(task: FitTask, group: Group, device: torch.device | str = "cpu") -> Method:
    """The optimiser of a task before its first step: at its prior.

    Args:
        task: the fit.
        group: the ranks.
        device: where to compute.

    Returns:
        The optimiser with its head.
    """
    head = build_head(task, device)
    if task.prior is None:
        return build_method(task, head, group)
    prior = task.prior.load()
    with torch.no_grad():
        for name, p in trainable(head).items():
            p.copy_(prior.weights[name])
    # Built on these weights: they are the mu_0 that an Ornstein-Uhlenbeck process returns to.
    method = build_method(task, head, group)
    method.load(replace(prior, replicated=method.state().replicated))
    return method


def fit(
    task: FitTask,
    *,
    group: Group | None = None,
    device: torch.device | str = "cpu",
    resume: tuple[int, MethodState] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_checkpoint: Callable[[int, Method], None] | None = None,
    checkpoint_every: int = 0,
) -> Method:
    """Run a fit to its end.

    A step whose innovations or loss are not finite is refused: the belief stays as it was, the fit goes
    on with the next batch. An S that cannot be factored ends the fit: the next batch would meet the same P.

    Args:
        task: what to fit.
        group: the ranks that advance together; all call this with the same task.
        device: where to compute.
        resume: steps done and the state after them; None starts from the beginning.
        on_step: told of every step.
        on_checkpoint: called with (steps done, method) every `checkpoint_every` steps and at the end.
        checkpoint_every: 0 is only at the end.

    Returns:
        The method with its trained head.

    Raises:
        FilterError: ten steps in a row were refused, or all there are.
        IndefiniteError: the innovation covariance S is not positive definite, whatever its jitter.
    """
    group = group or SingleProcess()
    support = task.support.to(device)
    sampler = BatchSampler(support, task.options.batch_size, task.options.epochs, task.seed)
    method = begin(task, group, device)
    start = 0
    if resume is not None:
        start, state = resume
        method.load(state)
    refused = 0
    for step in range(start, sampler.steps):
        began = perf_counter()
        stats: StepStats | None = None
        reason: str | None = None
        try:
            stats = method.step(sampler.batch(step, group.rank, group.world_size))
            refused = 0
        except IndefiniteError:
            raise
        except FilterError as error:
            refused += 1
            reason = str(error)
            # a few-shot fit may have fewer steps than that; one that never moved has failed too
            if refused >= min(_MAX_REFUSED, sampler.steps):
                raise FilterError(
                    f"{refused} steps in a row were refused, the last at step {step + 1}: {error}"
                ) from error
        if on_step is not None:
            on_step(StepRecord(step + 1, sampler.steps, 1e3 * (perf_counter() - began), stats, reason))
        done = step + 1
        if on_checkpoint is not None and checkpoint_every and done % checkpoint_every == 0 and done < sampler.steps:
            on_checkpoint(done, method)
    if on_checkpoint is not None:
        on_checkpoint(sampler.steps, method)
    return method
