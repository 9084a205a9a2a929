"""Searches without fits, whose objective is a function of the settings, and searches with fits of milliseconds."""

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.cases import LOGIT_SCALE, class_embeddings, make_support

from kngd_ray.config import Config, load_config
from kngd_ray.training.fit import FitTask
from kngd_ray.tuning import SearchOptions, SearchStudy, Space, Value, Workload, parse_space

SPACE = parse_space({
    "filter.p0": {"low": 1e-3, "high": 10.0, "log": True},
    "noise.process": {"choices": ["random_walk", "ornstein_uhlenbeck"]},
    "noise.process.q": {"low": 1e-8, "high": 1e-3, "log": True, "when": {"noise.process": "random_walk"}},
    "noise.process.gamma": {"low": 0.8, "high": 1.0, "when": {"noise.process": "ornstein_uhlenbeck"}},
    "epochs": {"low": 1, "high": 9, "integer": True},
})
POINT: Mapping[str, Value] = {"filter.p0": 0.1, "noise.process": "random_walk", "epochs": 5}
TWO = ("held_out_accuracy", "held_out_nll")

History = list[tuple[int, str, dict[str, Value], dict[str, float]]]


def open_study(folder: Path, space: Space = SPACE, points: Sequence[Mapping[str, Value]] = (POINT,), **options: Any):
    """A study in a folder of its own name."""
    folder.mkdir(parents=True, exist_ok=True)
    return SearchStudy(folder, space, SearchOptions(**{"num_samples": 12, "batch": 4, **options}), points)


def score(settings: Mapping[str, Value], names: Sequence[str]) -> dict[str, float]:
    """An objective that depends on all settings."""
    total = sum(float(value) if isinstance(value, (int, float)) else len(value) for value in settings.values())
    return {name: total * (n - 0.5) + n * float(settings["epochs"]) for n, name in enumerate(names)}


def drive(study: SearchStudy, count: int = 2, most: int | None = None) -> list[int]:
    """Run trials until the end, or until about `most` are run; every sixth fails.

    Args:
        study: the study.
        count: trials claimed at once.
        most: end after so many.

    Returns:
        The numbers of the trials, in the order in which they were run.
    """
    done: list[int] = []
    while (most is None or len(done) < most) and (claimed := study.claim(count)):
        for trial in claimed:
            if trial.number % 6 == 5:
                study.fail(trial.number, "a distinctive reason")
            else:
                study.finish(trial.number, score(trial.settings, study.options.objective), {"by_seed": {}})
            done.append(trial.number)
    return done


def die(study: SearchStudy) -> None:
    """What the end of its process does to a driver: its lock is gone, all else stays."""
    study._alive.close()


def history(study: SearchStudy) -> History:
    return [(r.number, r.state, r.settings, r.objective) for r in study.results()]


@dataclass(frozen=True)
class Deadly(Workload):
    """Shots that are the death of whoever judges a trial by them.

    Attributes:
        p0: of the trials that it is the death of.
    """

    p0: float = 0.0

    def task(self, config: Config, seed: int) -> FitTask:
        if config.filter.p0 == self.p0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().task(config, seed)


def workload(*settings: str, **options: Any) -> Workload:
    """Shots that are numbers, and fits of milliseconds; `options` are of the search.

    Of the preset that advances together and whose weights have a variance, unless `settings` name another.
    """
    named = any(setting.startswith(("preset=", "method=")) for setting in settings)
    preset = [] if named else ["preset=kalman_diagonal"]
    config = load_config(
        overrides=[*preset, "epochs=2", "batch_size=9", "posterior.folds=2", "posterior.draws=4", *settings]
    )
    search = SearchOptions(**{"seeds": (0, 1), **options})
    shots = {seed: make_support(16, torch.float32, seed=10 + seed) for seed in search.seeds}
    return Workload(config, search, shots, class_embeddings(torch.float32), LOGIT_SCALE)
