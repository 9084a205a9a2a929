"""Samplers by name: seeded, without memory, and started from given points."""

from pathlib import Path

import pytest
from helpers.searching import POINT, drive, history, open_study

from kngd_ray.tuning.space import Range

SAMPLERS = ("random", "tpe", "nsga2", "gp")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_is_a_search(sampler: str, tmp_path: Path) -> None:
    def searched(name: str, seed: int):
        study = open_study(tmp_path / name, sampler=sampler, seed=seed, num_samples=6, batch=3)
        drive(study)
        return history(study)

    first, again, other = searched("first", 1), searched("again", 1), searched("other", 2)
    assert first == again
    assert all(one[2] != two[2] for one, two in zip(first[1:], other[1:], strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_points_are_tried_first_however_small_a_batch_is(sampler: str, tmp_path: Path) -> None:
    """Of those in the second batch on, samplers have an opinion of their own."""
    points = [
        POINT,
        {"filter.p0": 0.5, "noise.process": "ornstein_uhlenbeck", "noise.process.gamma": 0.9, "epochs": 3},
        {"filter.p0": 0.7, "noise.process": "random_walk", "noise.process.q": 1e-5, "epochs": 7},
        {"epochs": 8},
    ]
    study = open_study(tmp_path / "study", points=points, sampler=sampler, num_samples=6, batch=2)
    drive(study, most=4)
    for point, (_, _, settings, _) in zip(points, history(study), strict=True):
        assert settings.items() >= point.items()


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_it_learns(sampler: str, tmp_path: Path) -> None:
    """Of a function with its optimum at the upper end of p0, later trials are nearer to it than a random search's."""

    def late(name: str) -> list[float]:
        study = open_study(tmp_path / name, points=(), sampler=name, num_samples=18, batch=6)
        while trials := study.claim(6):
            for trial in trials:
                study.finish(trial.number, {"evidence": float(trial.settings["filter.p0"])}, {})
        return [float(result.settings["filter.p0"]) for result in study.results()[12:]]

    assert sum(late(sampler)) > 1.5 * sum(late("random"))


def test_the_population_of_nsga2_is_a_batch(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study", sampler="nsga2", objective=("evidence",), num_samples=12, batch=4)
    while trials := study.claim(4):
        for trial in trials:
            study.finish(trial.number, {"evidence": float(trial.number)}, {})
    attributes = [trial.system_attrs for trial in study.study.trials]
    generations = [value for each in attributes for key, value in each.items() if key.endswith(":generation")]
    assert generations == [n // 4 for n in range(12)]


def test_values_stay_in_their_ranges(tmp_path: Path) -> None:
    study = open_study(tmp_path / "study", sampler="tpe", num_samples=24, batch=12)
    drive(study)
    for dimension in study.space.dimensions:
        values = [s[dimension.key] for _, _, s, _ in history(study) if dimension.key in s]
        if isinstance(dimension.domain, Range):
            assert all(dimension.domain.low <= float(value) <= dimension.domain.high for value in values)
        else:
            assert set(values) == set(dimension.domain.choices)
