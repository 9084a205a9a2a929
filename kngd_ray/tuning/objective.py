"""The objectives of a trial: fits on the training shots of several support sets, scored on held-out labels.

Nothing here has seen a test picture: a :class:`Workload` holds training shots only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kngd_ray.config import Config, override
from kngd_ray.errors import FilterError, UsageError
from kngd_ray.training.batches import Shots, Support
from kngd_ray.training.calibration import calibration_of, decided_task, held_out_tasks
from kngd_ray.training.fit import FitTask, Towers
from kngd_ray.training.folds import single
from kngd_ray.training.start import HeadStart
from kngd_ray.training.stream import Stream, stages_of
from kngd_ray.tuning.fitting import Fitted, evidence
from kngd_ray.tuning.options import SearchOptions
from kngd_ray.tuning.space import Space, Value

_BATCHES = 4  # at least, of those that evidence is taken from; the later half of them counts

Settings = Mapping[str, Value]
Fitter = Callable[[Sequence[FitTask]], list[Fitted | FilterError]]


@dataclass(frozen=True)
class Workload:
    """What trials work on, the same for all.

    Attributes:
        config: the configuration that settings are changed in.
        search: objectives and support sets.
        shots: training shots by seed of the support set.
        class_embeddings: (C, d) unit text embeddings of the classes.
        logit_scale: factor from cosines to logits.
        towers: where fits that train towers have them from.
        space: what is searched, whose priors ``log_posterior`` counts.
        features: of the shots by seed, where towers are trained that may start at a head.
    """

    config: Config
    search: SearchOptions
    shots: Mapping[int, Shots]
    class_embeddings: Tensor
    logit_scale: float
    towers: Towers | None = None
    space: Space = field(default_factory=lambda: Space(()))
    features: Mapping[int, Support] = field(default_factory=dict)

    @cached_property
    def different(self) -> int:
        """Number of different shots in all support sets: those of a small pool are the same again and again."""
        sets = self.shots.values()
        return len({shots.subset(torch.tensor([n])).digest() for shots in sets for n in range(len(shots))})

    def task(self, config: Config, seed: int) -> FitTask:
        """The fit of a configuration on a support set."""
        stages = stages_of(config.data.order or (), len(self.shots[seed]))
        stream = Stream(config.posterior, stages) if config.protocol == "stream" else None
        return FitTask(
            config.fit_options,
            seed,
            self.shots[seed],
            self.class_embeddings,
            self.logit_scale,
            towers=self.towers,
            stream=stream,
            head=HeadStart.of(config.fit_options, self.features[seed]) if seed in self.features else None,
        )


@dataclass
class TrialScores:
    """What is known of a trial.

    Attributes:
        scores: each objective by name, one value for each support set so far.
        figures: what else was measured, one value for each support set so far.
        reason: why it failed, in one sentence.
    """

    scores: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, list[float]] = field(default_factory=dict)
    reason: str | None = None

    @property
    def objective(self) -> dict[str, float]:
        """Means over the support sets so far."""
        return {name: fmean(values) for name, values in self.scores.items()}

    def note(self, values: Mapping[str, float], objectives: Sequence[str]) -> None:
        """Add the scores of a support set."""
        for name, value in values.items():
            (self.scores if name in objectives else self.figures).setdefault(name, []).append(value)


def score_trials(
    trials: Sequence[Settings], work: Workload, fitter: Fitter, *, at_once: bool = False
) -> Iterator[list[TrialScores]]:
    """Judge trials on one support set after another, or on all at once.

    Args:
        trials: settings of each.
        work: shots and objectives.
        fitter: runs fits; those of all trials on a support set at once.
        at_once: all support sets at once too.

    Yields:
        What is known of each trial after each support set, or after all. A trial that fails is not fitted again; when
        all have, there is no more to say.
    """
    scored = [TrialScores() for _ in trials]
    configs: list[Config | None] = [None] * len(trials)
    for n, settings in enumerate(trials):
        try:
            configs[n] = override(work.config, settings)
        except UsageError as error:  # values that are good one by one, and not together
            scored[n].reason = str(error)
    seeds = work.search.seeds
    for some in [seeds] if at_once else [(seed,) for seed in seeds]:
        alive = [
            (n, config, seed)
            for seed in some
            for n, config in enumerate(configs)
            if config is not None and scored[n].reason is None
        ]
        plans = [_plan(work.task(config, seed), config, work.search) for _, config, seed in alive]
        outcomes = iter(fitter([task for plan in plans for task, _ in plan]) if plans else [])
        for (n, config, seed), plan in zip(alive, plans, strict=True):
            fits = [(next(outcomes), held) for _, held in plan]
            try:
                prior = work.space.log_prior(trials[n])
                values = _values(fits, config, prior / work.different if prior else prior)
                scored[n].note(values, work.search.objective)
            except FilterError as error:
                scored[n].reason = scored[n].reason or f"on the support set of seed {seed}: {error}"
        yield scored
        if all(one.reason is not None for one in scored):
            return


def _plan(task: FitTask, config: Config, search: SearchOptions) -> list[tuple[FitTask, Shots | None]]:
    """The fits that a task's objectives need, each with the shots that are held out from it."""
    plan: list[tuple[FitTask, Shots | None]] = []
    if "evidence" in search.objective:
        plan.append((_prequential(task), None))
    if search.cross_validated:
        plan += held_out_tasks(decided_task(task), config.posterior.folds)
    return plan


def _prequential(task: FitTask) -> FitTask:
    """The task in the order in which its labels can be predicted, in batches enough to have something to learn from."""
    if task.stream is not None:  # it has an order, and batches of its own
        return task
    options = task.options
    batch_size = min(options.batch or len(task.support), -(-len(task.support) // _BATCHES))
    return replace(task, options=replace(options, batch_size=batch_size), prequential=True)


def _values(
    fits: Sequence[tuple[Fitted | FilterError, Shots | None]], config: Config, log_prior: float
) -> dict[str, float]:
    """Objectives and figures of one support set.

    Args:
        fits: those of the plan, each with the shots held out from it.
        config: of the trial.
        log_prior: log-density of its settings for each shot of the search: the mean over support sets counts it once.

    Raises:
        FilterError: a fit could not go on.
    """
    values: dict[str, float] = {}
    held_out: list[tuple[Any, Shots]] = []
    for fitted, held in fits:
        if isinstance(fitted, FilterError):
            raise fitted
        if held is None:
            values["evidence"] = evidence(fitted)
        else:
            held_out.append((fitted.method, held))
    if held_out:
        found = calibration_of(held_out, config.posterior, config.tune.alpha)
        assert found.held_out_nll is not None
        assert found.held_out_accuracy is not None
        values |= {"held_out_nll": found.held_out_nll, "held_out_accuracy": found.held_out_accuracy}
        values |= {"tau": found.tau, "sharpening": found.sharpening}
        # of single shots each fold lacks its classes: they say nothing of a fit that knows them
        labels = torch.cat([held.labels for _, held in held_out])
        values["log_posterior"] = log_prior - (0.0 if single(labels) else found.held_out_nll)
    return values
