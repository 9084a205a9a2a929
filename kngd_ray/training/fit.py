"""The one step loop: every method, on one process or many ranks, from the start or from a checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kngd_ray._allocator import keep_freed_memory
from kngd_ray.clip import CLIPHead, CLIPNetwork, Head, ModelConfig, load_model
from kngd_ray.errors import FilterError
from kngd_ray.observations import trainable
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training import loader
from kngd_ray.training.batches import Batch, BatchSampler, Shots, Support
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.informing import centre, inform
from kngd_ray.training.kalman import FORESEEN, P0, KalmanNGD
from kngd_ray.training.learned import Learned
from kngd_ray.training.method import Method, MethodState, StepStats, batch_scores, head_state, load_head
from kngd_ray.training.options import FitOptions, counted_once
from kngd_ray.training.posterior import ANCHOR, NOISE
from kngd_ray.training.prior import Prior
from kngd_ray.training.refusals import Refusals
from kngd_ray.training.start import HeadStart, begin_at, put_start, take_covariance
from kngd_ray.training.stream import Foresight, Look, Met, Stream, accuracies
from kngd_ray.training.streamed import TOWERS_BY
from kngd_ray.training.tower_prior import widen_towers


@dataclass(frozen=True)
class Towers:
    """Where a fit that trains towers gets them from: each rank loads its own.

    Attributes:
        model: the CLIP model.
        class_names: C class names.
        templates: their prompts.
    """

    model: ModelConfig
    class_names: Sequence[str]
    templates: Sequence[str]


@dataclass(frozen=True)
class FitTask:
    """One fit: what, on which shots, from which seed.

    Attributes:
        options: method and its options.
        seed: of the adapters' random weights, the shuffles and sampled labels.
        support: the training shots. Towers, and fits that predict labels before they learn from them, take no crops.
        class_embeddings: (C, d) unit text embeddings of the classes.
        logit_scale: factor from cosines to logits.
        prior: the earlier fit from whose posterior this one starts; None starts at CLIP's own weights.
        prequential: take the batches in the order in which each can be predicted before it is learned from.
        towers: of a fit that trains them; None of others.
        stream: of a fit whose shots come in an order; they are in that order, and their batches are predicted before
            they are learned from.
        head: of a fit of towers that starts where a head ends (``tune.start=head``), the fit of that head.
        learned: which pictures the shots are of, for its checkpoints; None where they are not known.
    """

    options: FitOptions
    seed: int
    support: Shots
    class_embeddings: Tensor
    logit_scale: float
    prior: Prior | None = None
    prequential: bool = False
    towers: Towers | None = None
    stream: Stream | None = None
    head: HeadStart | None = None
    learned: Learned | None = None

    def __post_init__(self) -> None:
        if isinstance(self.support, Support) and (
            self.towers is not None or self.stream is not None or self.prequential
        ):
            object.__setattr__(self, "support", self.support.whole())

    @property
    def views(self) -> int:
        """Of each picture in a batch: all of them where a step goes to the mode, else one."""
        return self.support.views if self.options.at_mode and isinstance(self.support, Support) else 1

    @property
    def sampler(self) -> BatchSampler:
        """The batches of this fit."""
        options, ordered = self.options, self.stream is not None
        prequential = self.prequential or ordered
        return BatchSampler(
            self.support,
            options.batch,
            options.epochs,
            self.seed,
            prequential=prequential,
            in_order=ordered,
            ends=[] if self.stream is None else [stage.end for stage in self.stream.stages],
            all_views=options.at_mode,
        )

    @property
    def informing(self) -> Shots:
        """The shots that inform the prior: all, or those of a stream's first batch."""
        if self.stream is None or not self.sampler.steps:
            return self.support
        return self.support.subset(torch.arange(sum(self.sampler.chosen(0).sizes)))

    def to(self, device: torch.device | str) -> "FitTask":
        """The same fit with its shots on another device."""
        head = None if self.head is None else self.head.to(device)
        return replace(self, support=self.support.to(device), head=head)

    def part(self, keep: Tensor) -> "FitTask":
        """The same fit on some of its shots, which a boolean or index tensor selects."""
        head = None if self.head is None else self.head.subset(keep)
        return replace(self, support=self.support.subset(keep), head=head)


@dataclass(frozen=True)
class StepRecord:
    """One step, as shown and logged.

    Attributes:
        step: steps done, from 1.
        steps: steps of the whole fit.
        milliseconds: wall time of the step.
        stats: figures of the batch; None when the step was refused.
        refused: why the step was refused, in one sentence; None when it was taken.
        met: for the step that meets a batch of a stream, how it was predicted; None for others.
        look: for the step after which the tests of a stream are looked at, what they say; None for others.
    """

    step: int
    steps: int
    milliseconds: float
    stats: StepStats | None
    refused: str | None = None
    met: Met | None = None
    look: Look | None = None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "StepRecord":
        """A record from its fields as plain data, as other processes send them."""
        kinds: dict[str, type[Any]] = {"stats": StepStats, "met": Met, "look": Look}
        told = {name: kind(**fields[name]) for name, kind in kinds.items() if fields[name] is not None}
        return cls(**{**fields, **told})


def build_head(task: FitTask, device: torch.device | str = "cpu") -> Head:
    """The head of a task with its initial weights, and the towers below it if they are trained.

    Args:
        task: the fit.
        device: where it lives.

    Returns:
        The untrained head or network.
    """
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    if task.towers is None:
        head = CLIPHead(task.class_embeddings, task.logit_scale, task.options.adapter, task.seed)
        return head.to(device, task.class_embeddings.dtype)
    return CLIPNetwork(
        load_model(task.towers.model, device),
        task.towers.class_names,
        task.towers.templates,
        task.options.tune,
        task.options.adapter,
        seed=task.seed,
        pairs=task.options.pairs,
        class_embeddings=task.class_embeddings.to(device),
    )


def build_method(task: FitTask, head: Head, group: Group) -> Method:
    """The optimiser that a task's options name.

    Args:
        task: the fit.
        head: its head.
        group: the ranks.

    Returns:
        The optimiser, before its first step.
    """
    if task.options.method != "kalman":
        return GradientDescent(head, task.options, task.sampler.steps, group)
    options = counted_once(task.options, task.views)
    return KalmanNGD(head, options, task.seed, group, streamed=task.towers is not None)


def begin(
    task: FitTask, group: Group, device: torch.device | str = "cpu", resumed: MethodState | None = None
) -> Method:
    """The optimiser of a task before its first step: at its prior.

    Args:
        task: the fit.
        group: the ranks.
        device: where to compute.
        resumed: a later state of the fit, which is to be loaded: what it holds is not computed again.

    Returns:
        The optimiser with its head.
    """
    head = build_head(task, device)
    if isinstance(head, CLIPNetwork) and task.prior is None:
        return _begin_towers(task, head, group, device, resumed)
    if task.prior is None:
        shots = task.to(device).informing
        assert isinstance(head, CLIPHead)
        assert isinstance(shots, Support)
        learned = shots.all_views() if task.views > 1 else shots.whole()
        centre(head, learned)
        method = build_method(task, head, group)
        if isinstance(method, KalmanNGD):
            inform(method, task.options.filter, shots, learned)
        return _in_stream(method, task)
    prior = task.prior.load()
    with torch.no_grad():
        for name, p in trainable(head).items():
            p.copy_(prior.weights[name])
    load_head(head, prior)
    # Built on these weights: they are the mu_0 that an Ornstein-Uhlenbeck process returns to.
    method = build_method(task, head, group)
    # Noise and moments start anew; what the earlier fit took from its shots is part of its posterior.
    goes_on = (ANCHOR, FORESEEN, NOISE) if task.prior.taken else ()  # the same stream, and not another task
    told = (P0, TOWERS_BY, *goes_on, *head_state(head))
    kept = {key: value for key, value in prior.replicated.items() if key in told}
    method.load(replace(prior, replicated=method.state().replicated | kept))
    if isinstance(method, KalmanNGD):
        method.posterior.unsettle()  # its head has not seen these shots
    return _in_stream(method, task)


def head_task(task: FitTask) -> FitTask:
    """The fit of the head that a fit of towers starts from.

    Args:
        task: a fit that starts at a head.

    Returns:
        The head's, on features.
    """
    assert task.head is not None
    return FitTask(task.head.options, task.seed, task.head.support, task.class_embeddings, task.logit_scale)


def _begin_towers(
    task: FitTask, network: CLIPNetwork, group: Group, device: torch.device | str, resumed: MethodState | None
) -> Method:
    """The optimiser of towers, where their head ended or at CLIP.

    Raises:
        ValueError: the task is to start at a head, and has no features to fit one on.
        FilterError: the head's fit could not go on.
    """
    from kngd_ray.training.first_head import fitted_head  # which itself fits

    fitted, held_out = None, None
    if resumed is not None:
        load_head(network, resumed)
        put_start(network)
    elif task.head is not None:
        try:
            fitted, held_out = fitted_head(task, device)
        except FilterError as error:
            raise FilterError(f"the head that the towers start from could not be fitted: {error}") from error
        begin_at(network, fitted, group)
    elif task.options.tune.start == "head":
        raise ValueError("tune.start is head: give the task its head's fit (HeadStart.of), or set tune.start=zero_shot")
    method = build_method(task, network, group)
    if not isinstance(method, KalmanNGD) or resumed is not None:
        return method
    if fitted is not None:
        take_covariance(method, fitted, held_out)
    if (variance := task.options.filter.tower_logit_variance) is not None:
        widen_towers(method, task.to(device).support, variance)
    return method


def _in_stream(method: Method, task: FitTask) -> Method:
    """Tell a method of a stream what came before, and at which taus labels are to be predicted."""
    if task.stream is not None and isinstance(method, KalmanNGD):
        method.posterior.taus = task.stream.taus
        if task.prior is None:
            method.taken = 0
        elif task.prior.taken:
            method.taken = task.prior.taken
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
        on_step: called with every step.
        on_checkpoint: called with (steps done, method) every `checkpoint_every` steps and at the end.
        checkpoint_every: 0 is only at the end.

    Returns:
        The method with its trained head.

    Raises:
        FilterError: ten steps in a row were refused, or all there are.
        IndefiniteError: the innovation covariance S is not positive definite, whatever its jitter.
    """
    group = group or SingleProcess()
    steps = task.sampler.steps
    method = begin(task, group, device, None if resume is None else resume[1])
    start = 0
    if resume is not None:
        start, state = resume
        method.load(state)
    refusals = Refusals(steps)
    meeting = None if task.stream is None else _Meeting(task, task.stream, method, group, device)
    began = perf_counter()  # a step's time is what it waits for its batch too
    with loader.batches(task.to(device).sampler, method.head, group, start) as batches:
        for batch in batches:
            stats, reason = refusals.attempt(method, batch)
            done = batch.step + 1
            milliseconds = 1e3 * (perf_counter() - began)
            met = look = None
            if meeting is not None:
                stats, met = meeting.meet(batch, stats)
                look = meeting.look(batch)
            if on_step is not None:
                on_step(StepRecord(done, steps, milliseconds, stats, reason, met, look))
            if on_checkpoint is not None and checkpoint_every and done % checkpoint_every == 0 and done < steps:
                on_checkpoint(done, method)
            began = perf_counter()
    from kngd_ray.training.refit import refit_head, refits  # which itself fits

    if refits(task):
        refit_head(task, method, group, device)
    if on_checkpoint is not None:
        on_checkpoint(steps, method)
    return method


class _Meeting:
    """How the batches of a stream are predicted as they come.

    Args:
        task: the fit.
        stream: its stream.
        method: the optimiser.
        group: the ranks.
        device: where to compute.
    """

    def __init__(self, task: FitTask, stream: Stream, method: Method, group: Group, device: torch.device | str) -> None:
        self._task, self._stream, self._method = task, stream, method
        self._group, self._device = group, device
        self._sampler, self._turns = task.sampler, max(task.options.epochs, 1)
        self._tests = {name: test.to(device) for name, test in stream.tests.items()}
        self._kalman = method if isinstance(method, KalmanNGD) else None
        self._foresight = Foresight(stream, None if self._kalman is None else self._kalman.foreseen)

    def meet(self, batch: Batch, stats: StepStats | None) -> tuple[StepStats | None, Met | None]:
        """What a step says about its batch.

        Args:
            batch: this rank's part of it.
            stats: figures of the step; None where it was refused, and the head is as before.

        Returns:
            The figures, and where the batch is met for the first time, how it was predicted.
        """
        if not batch.scored:
            return stats, None
        first = batch.step == 0 and self._task.prior is None
        if first or stats is None:
            # CLIP as it is has seen nothing of the first batch; a refused one is predicted by the mean
            head = self._zero_shot() if first else self._method.head
            with torch.no_grad():
                told = batch_scores(head(batch.inputs), batch, self._group)
            log_predictive: Sequence[float] = (-told["nll"] * batch.total,)
            if stats is not None:
                stats = replace(stats, **told)
            accuracy = told["accuracy"]
        else:
            assert stats.log_predictive is not None
            log_predictive, accuracy = stats.log_predictive, stats.accuracy
        tau = self._foresight.tau if self._kalman is not None else 0.0
        nll = -self._foresight.see(log_predictive, batch.total) / batch.total
        if self._kalman is not None:
            self._kalman.foreseen = self._foresight.scores
        return stats, Met(batch.total, accuracy, nll, tau)

    def look(self, batch: Batch) -> Look | None:
        """What the tests say after a step, if it is the last of a stage or of the stream."""
        if not self._tests or (batch.step + 1) % self._turns:
            return None
        before = self._sampler.before(batch.step)
        after = before + batch.total
        if not self._stream.looks(before, after, len(self._task.support)):
            return None
        return Look(after, accuracies(self._method, self._tests))

    def _zero_shot(self) -> CLIPHead:
        embeddings = self._task.class_embeddings
        return CLIPHead(embeddings, self._task.logit_scale).to(self._device, embeddings.dtype)
