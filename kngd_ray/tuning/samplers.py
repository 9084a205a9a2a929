"""Optuna's samplers by name, seeded so that a suggestion is a function of seed, trial and what the study knows.

A sampler of Optuna draws from a stream of random numbers of its own, which ends with its process. Here each trial
gets a new one, seeded by the search's seed and the trial's number: a search that was killed goes on as if it were not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from zlib import crc32

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from kngd_ray.tuning.options import SearchOptions
from kngd_ray.tuning.space import Value


def sampler_of(options: SearchOptions, points: Sequence[Mapping[str, Value]]) -> BaseSampler:
    """The sampler of a search.

    Args:
        options: sampler and seed.
        points: values by key of the first trials, as far as they are given.

    Returns:
        The sampler.
    """
    make: dict[str, Callable[[int], BaseSampler]] = {
        # running trials count as bad ones, so that those of a batch differ
        "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
        "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=False),
        "nsga2": lambda seed: _Genetic(seed=seed, population_size=options.batch),
        "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    }
    return _Replayable(make[options.sampler], options.seed, points)


class _Genetic(optuna.samplers.NSGAIISampler):
    """Parents in one order; Optuna's is another for the trial that chooses them than for those after it."""

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)


class _Replayable(BaseSampler):
    """A sampler without memory.

    Args:
        make: a sampler of a seed.
        seed: of the search.
        points: values of the first trials.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, points: Sequence[Mapping[str, Value]]) -> None:
        self._make = make
        self._seed = seed
        self._points = points

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampled = self._of(trial, "").sample_relative(study, trial, search_space)
        given = self._given(trial)
        return {name: given.get(name, value) for name, value in sampled.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        given = self._given(trial)
        if param_name in given:
            return given[param_name]
        # by name, not by turn: a trial whose process died between two parameters is completed with the same values
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(trial, "").before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(trial, "").after_trial(study, trial, state, values)

    def _of(self, trial: FrozenTrial, parameter: str) -> BaseSampler:
        return self._make(crc32(f"{self._seed} {trial.number} {parameter}".encode()))

    def _given(self, trial: FrozenTrial) -> Mapping[str, Value]:
        return self._points[trial.number] if trial.number < len(self._points) else {}
