"""Many small fits that advance together: one step of all of them is one step on tensors with a trial axis.

A search of noise priors runs hundreds of fits that differ only in numbers (variances, noise, memory), seed and shots.
Their tensors are so small that calling the operations is what costs most. Here the functions that a step is made of are
transformed by ``torch.func.vmap``, so that the mathematics is written only once, for a single fit ::

    mu (n,)      P of its family      r           one fit
    mu (B, n)    P (B, ...)           r (B, ...)  B fits

What depends on the numbers themselves cannot be decided inside. A trial whose step did not end in finite numbers (a
batch to be refused, an S that needs jitter) repeats this step alone, by the ordinary code and its rules.
"""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, nan
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy

from kngd_ray.clip import CLIPHead
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Ema, NoGate, NoiseModel, RandomWalk, Transition, random_signs
from kngd_ray.filters.functional_mode import functional_mode
from kngd_ray.observations import unflatten
from kngd_ray.sharding import SingleProcess, covariance_bytes
from kngd_ray.training.batches import Batch, Support
from kngd_ray.training.ekf import IteratedEKF
from kngd_ray.training.fit import FitTask, StepRecord, begin
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import StepStats, centres
from kngd_ray.training.metrics import correct
from kngd_ray.training.observing import BatchSeen
from kngd_ray.training.options import OptimizerOptions
from kngd_ray.training.refusals import Refusals

_STILL = Transition(1.0, 1.0, 0.0)
_MU, _NOISE = ("mu",), ("noise",)

# What a step changes: mu, r, and P by layer and key. Of one trial, or with a trial axis in front.
_State = dict[tuple[str, ...], Tensor]


@dataclass(frozen=True)
class BatchedFit:
    """One of several fits that advanced together.

    Attributes:
        method: the trained filter, as :func:`~kngd_ray.training.fit.fit` gives it.
        records: its steps; their time is the fit's share of the time of all.
    """

    method: KalmanNGD
    records: Sequence[StepRecord]


class _Given(NamedTuple):
    """What goes into a step, with a trial axis in front."""

    anchor: Tensor
    transition: Tensor  # F, F^2 / lambda, q
    beta: Tensor
    inputs: Tensor
    labels: Tensor
    uniforms: list[Tensor]
    signs: list[Tensor]
    centres: dict[str, Tensor]


class _Figures(NamedTuple):
    """The numbers that a step reports; `sound` is finite where all that it computed is."""

    log_predictive: tuple[float, ...] | None
    nll: float
    accuracy: float
    innovation_rms: float
    nis: float
    log_evidence: float
    sound: float


class _Trial:
    """One fit in progress. Its method is up to date when it steps alone, and at the end."""

    def __init__(self, task: FitTask, device: torch.device | str) -> None:
        self.options = task.options
        self.sampler = task.to(device).sampler
        method = begin(task, SingleProcess(), device)
        assert isinstance(method, KalmanNGD)
        self.method = method
        assert isinstance(method.posterior, IteratedEKF)
        self.posterior = method.posterior
        self.anchor = method.belief.mu  # mu_0: a fit begins there, from a prior too
        self.records: list[StepRecord] = []
        self.refusals = Refusals(self.sampler.steps)
        self.error: FilterError | None = None

    @property
    def state(self) -> _State:
        """As the method has it."""
        return _state(self.method.belief, self.method.noise)

    @state.setter
    def state(self, state: _State) -> None:
        self.posterior.go_on(_belief(state), state[_NOISE])

    def alone(self, batch: Batch) -> tuple[StepStats | None, str | None]:
        """A step by the ordinary code: its figures, or why it was refused. It may end the fit."""
        try:
            return self.refusals.attempt(self.method, batch)
        except FilterError as error:
            self.error = error
        return None, None


def shape_of(task: FitTask) -> Hashable | None:
    """What fits must have in common to advance together.

    They may differ in numbers (``filter.p0``, ``filter.logit_variance``, ``observation.*.r0``,
    ``noise.observation.beta``), in the process model and its numbers, in seed, in prior, and in shots of one count.

    Args:
        task: a fit.

    Returns:
        The same for fits that :func:`fit_together` takes together; None where a fit can only run alone: gradient
        descent is a step of the autograd engine, a gate visits observations one by one, towers fill a process, a step
        to the mode takes as many linearisations as it needs, shots that inform gamma give each head its own, and a
        stream is judged as it goes.
    """
    options = task.options
    if options.at_mode or options.filter.mean.kind != "zero_shot" or task.stream is not None:
        return None
    if options.method != "kalman" or task.towers is not None or not isinstance(options.filter.gate, NoGate):
        return None
    assert isinstance(task.support, Support)
    noise = options.noise.observation
    alike = replace(
        options,
        observation=tuple(replace(model, r0=1.0) for model in options.observation),
        filter=replace(options.filter, p0=None, logit_variance=None, logit_spread=0.0),
        noise=replace(
            options.noise,
            process=RandomWalk(),  # of any kind, it is three numbers a step
            observation=replace(noise, beta=0.0) if isinstance(noise, Ema) else noise,
        ),
        optimizer=OptimizerOptions(),
    )
    features, classes = task.support.features, task.class_embeddings.cpu().contiguous()
    same_classes = hashlib.sha256(classes.numpy().tobytes()).digest()
    return alike, features.shape, features.dtype, classes.shape, same_classes, task.logit_scale, task.prequential


def fit_together(
    tasks: Sequence[FitTask],
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[Sequence[StepRecord | None]], None] | None = None,
) -> list[BatchedFit | FilterError]:
    """Run several fits of one shape to their ends, all a step at a time.

    Each is what :func:`~kngd_ray.training.fit.fit` makes of its task in one process, up to rounding.

    Args:
        tasks: fits with the same :func:`shape_of`, not None.
        device: where to compute.
        on_step: called with every step, a record for each task; None for a fit that has ended.

    Returns:
        For each task the fit, or the error that ended it.

    Raises:
        ValueError: the tasks are of different shapes, or of one that runs alone.
    """
    shapes = {shape_of(task) for task in tasks}
    if len(shapes) > 1 or None in shapes:
        raise ValueError("these fits cannot advance together: shape_of must give the same for all, and not None")
    trials = alive = [_Trial(task, device) for task in tasks]
    states = [trial.state for trial in trials]
    state = {key: torch.stack([other[key] for other in states]) for key in (states[0] if states else ())}
    for step in range(trials[0].sampler.steps if trials else 0):
        began = perf_counter()
        state, outcomes = _stepped(alive, state, step)
        milliseconds = 1e3 * (perf_counter() - began) / len(alive)
        for trial, (stats, reason) in zip(alive, outcomes, strict=True):
            if trial.error is None:
                trial.records.append(StepRecord(step + 1, trial.sampler.steps, milliseconds, stats, reason))
        if on_step is not None:
            on_step([trial.records[-1] if trial.error is None else None for trial in trials])
        going = [b for b, trial in enumerate(alive) if trial.error is None]
        if len(going) < len(alive):
            alive = [alive[b] for b in going]
            state = {key: tensor[going] for key, tensor in state.items()}
        if not alive:
            break
    for b, trial in enumerate(alive):
        trial.state = _of(state, b)
    return [trial.error or BatchedFit(trial.method, trial.records) for trial in trials]


def _stepped(
    trials: Sequence[_Trial], state: _State, step: int
) -> tuple[_State, list[tuple[StepStats | None, str | None]]]:
    """One step of all trials: their new states, and for each its figures or why it was refused."""
    batches = [trial.sampler.batch(step) for trial in trials]
    after, rows = _tried(trials, state, batches) or (
        {key: tensor.clone() for key, tensor in state.items()},
        [None] * len(trials),
    )
    M = batches[0].total * trials[0].method.observer.per_sample
    outcomes: list[tuple[StepStats | None, str | None]] = []
    for b, (trial, figures) in enumerate(zip(trials, rows, strict=True)):
        if figures is not None and isfinite(figures.sound):
            trial.refusals.taken()
            outcomes.append((_stats(trial, figures, M), None))
            continue
        trial.state = _of(state, b)
        outcomes.append(trial.alone(batches[b]))
        for key, tensor in trial.state.items():
            after[key][b] = tensor
    return after, outcomes


def _tried(
    trials: Sequence[_Trial], state: _State, batches: Sequence[Batch]
) -> tuple[_State, Sequence[_Figures | None]] | None:
    """One step of all trials at once; None where an operation refused one of them, without saying which."""
    leader, first = trials[0].posterior, batches[0]
    transitions = [trial.options.noise.process.transition(first.step, trial.method.p0) for trial in trials]
    noises = [trial.options.noise.observation for trial in trials]
    uniforms = [trial.method.observer.uniforms(batch) for trial, batch in zip(trials, batches, strict=True)]
    own = [centres(trial.method.head) if isinstance(trial.method.head, CLIPHead) else {} for trial in trials]
    given = _Given(
        anchor=torch.stack([trial.anchor for trial in trials]),
        transition=state[_MU].new_tensor([t[:3] for t in transitions]),
        beta=state[_NOISE].new_tensor([noise.beta if isinstance(noise, Ema) else nan for noise in noises]),
        inputs=torch.stack([batch.inputs for batch in batches]),
        labels=torch.stack([batch.labels for batch in batches]),
        uniforms=[torch.stack(of_model) for of_model in zip(*uniforms, strict=True)],
        signs=[torch.stack(of_run) for of_run in zip(*map(_signs, trials, batches), strict=True)],
        centres={name: torch.stack([of_head[name] for of_head in own]) for name in own[0]},
    )
    still = all(transition == _STILL for transition in transitions)
    try:
        with torch.no_grad(), functional_mode():
            after, numbers, scores = vmap(partial(_advance, leader, first, still))(state, given)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return after, [_Figures(tuple(s) or None, *row) for s, row in zip(scores.tolist(), numbers.tolist(), strict=True)]


def _advance(
    leader: IteratedEKF, like: Batch, still: bool, state: _State, given: _Given
) -> tuple[_State, Tensor, Tensor]:
    """One step of one trial, as a function of tensors: the state after it, its :class:`_Figures` but one, and that one.

    Args:
        leader: any of the trials' posteriors, for what all have in common.
        like: any of the trials' batches; all have its size and number.
        still: whether no trial's belief moves between steps.
        state: the trial's, before the step.
        given: the trial's batch and numbers.
    """
    belief, r = _belief(state), state[_NOISE]
    observer, (decay, scale, q) = leader.observer, given.transition
    if not still:
        # scale and q are tensors here, on which the families compute as on numbers
        P = leader.filter.family.predict(belief.covariance, scale, q, lambda share: share)
        belief = Belief(given.anchor.lerp(belief.mu, decay), P)
    batch = replace(like, inputs=given.inputs, labels=given.labels)

    def observe(mu: Tensor, displaced: Tensor | None) -> BatchSeen:
        passed = observer.linearizer.run_at(unflatten(mu, leader.parameters) | given.centres, batch.inputs)
        seen = observer.look(passed, batch, given.uniforms, r, displaced)
        return replace(seen, observed=replace(seen.observed, signs=given.signs))

    scores = belief.mu.new_zeros(0)
    if batch.scored:
        passed = observer.linearizer.run_at(unflatten(belief.mu, leader.parameters) | given.centres, batch.inputs)
        scores = leader.log_predictive(belief, passed, batch)
    learn = partial(observer.learned, r, model=_with_beta(observer.noise_model, given.beta))
    update = leader.condition(belief, observe, learn)
    after, logits = _state(update.belief, update.noise), update.logits
    numbers = [
        cross_entropy(logits, batch.labels),
        correct(logits, batch.labels).mean(),
        update.innovation_rms,
        torch.as_tensor(update.nis),
        torch.as_tensor(update.log_evidence),
    ]
    sound = torch.stack([tensor.sum().double() for tensor in (*after.values(), *numbers[3:])]).sum()
    return after, torch.stack([number.double() for number in (*numbers, sound)]), scores


def _signs(trial: _Trial, batch: Batch) -> list[Tensor]:
    """The signs that a trial's covariance family draws in a step, run by run; none where it draws none."""
    method, device = trial.method, batch.inputs.device
    draws = method.family.signs
    if not draws:
        return []
    seed, k = method.observer.seed_of_signs(batch), method.observer.per_sample
    runs = trial.posterior.filter.runs(batch.total)
    return [random_signs(seed + run, draws, (stop - start) * k, device) for run, (start, stop) in enumerate(runs)]


def _with_beta(model: NoiseModel, beta: Tensor) -> NoiseModel:
    """A model whose memory is a tensor, which its validation could not look at."""
    if isinstance(model, Ema):
        model = copy(model)
        object.__setattr__(model, "beta", beta)
    return model


def _stats(trial: _Trial, figures: _Figures, observations: int) -> StepStats:
    return StepStats(
        nll=figures.nll,
        accuracy=figures.accuracy,
        innovation_rms=figures.innovation_rms,
        nis=figures.nis,
        nis_per_observation=figures.nis / observations,
        log_evidence=figures.log_evidence,
        jitter=0.0,
        gated=0,
        bytes_moved=0,
        covariance_bytes=covariance_bytes(trial.method.belief.covariance),
        log_predictive=figures.log_predictive,
    )


def _state(belief: Belief, noise: Tensor) -> _State:
    P: _State = {(name, key): tensor for name, layer in belief.covariance.items() for key, tensor in layer.items()}
    return {_MU: belief.mu, _NOISE: noise, **P}


def _belief(state: _State) -> Belief:
    P: dict[str, dict[str, Tensor]] = {}
    for (name, *key), tensor in state.items():
        if key:
            P.setdefault(name, {})[key[0]] = tensor
    return Belief(state[_MU], P)


def _of(state: _State, b: int) -> _State:
    """The state of one trial, in memory of its own."""
    return {key: tensor[b].clone() for key, tensor in state.items()}
