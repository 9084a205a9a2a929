"""The statistics of a comparison against what is known of them."""

import math

import numpy as np
import pytest

from kngd_ray.commands.comparison import (
    TIE,
    better,
    bootstrap_interval,
    coverage_limit,
    paired_difference,
    pareto_front,
)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("id/accuracy", 1),
        ("ood/mean/auroc", 1),
        ("objective/evidence", 1),
        ("objective/held_out_accuracy", 1),
        ("ood/sketch/nll", -1),
        ("id/temperature_scaled/ece", -1),
        ("objective/held_out_nll", -1),
        ("time/fit_s", -1),
        ("calibration/tau", 0),
        ("train/nis", 0),
        ("ece/of_nothing", 0),
    ],
)
def test_direction_is_that_of_the_figure(metric: str, direction: int) -> None:
    assert better(metric) == direction


def test_only_common_seeds_are_paired() -> None:
    difference = paired_difference({0: 1.0, 1: 2.0, 5: 9.0}, {1: 1.5, 0: 0.0, 7: 3.0})
    assert difference is not None
    assert difference.seeds == (0, 1)
    assert difference.mean == 0.75
    assert (difference.wins, difference.ties, difference.losses) == (2, 0, 0)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_common_seed_gives_no_interval() -> None:
    difference = paired_difference({3: 1.0}, {3: 2.0}, -1)
    assert difference is not None
    assert (difference.low, difference.high, difference.decided) == (None, None, False)
    assert (difference.wins, difference.losses) == (1, 0)


def test_ties_are_equal_figures_and_rounding() -> None:
    values = {0: 0.5, 1: 0.5 + TIE / 2, 2: 0.5 + 10 * TIE, 3: 0.4}
    difference = paired_difference(values, dict.fromkeys(values, 0.5))
    assert difference is not None
    assert (difference.wins, difference.ties, difference.losses) == (1, 2, 1)


def test_less_is_better_turns_wins_round_and_not_the_difference() -> None:
    difference = paired_difference({0: 1.0, 1: 1.0}, {0: 2.0, 1: 3.0}, -1)
    assert difference is not None
    assert difference.mean == -1.5
    assert (difference.wins, difference.losses) == (2, 0)
    assert difference.decided
    unknown = paired_difference({0: 1.0}, {0: 2.0}, 0)
    assert unknown is not None
    assert (unknown.wins, unknown.losses) == (0, 0)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval(np.full(4, 0.25)) == (0.25, 0.25)


def test_the_same_values_give_the_same_interval_inside_their_range() -> None:
    values = np.array([0.1, -0.4, 0.3, 0.2, 0.9])
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert values.min() <= low < values.mean() < high <= values.max()


def test_shift_and_sign_carry_over() -> None:
    values = np.random.default_rng(1).normal(size=20)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values + 3) == pytest.approx((low + 3, high + 3))
    assert bootstrap_interval(-values) == pytest.approx((-high, -low), abs=0.05)


def test_many_values_give_the_normal_interval() -> None:
    values = np.random.default_rng(2).normal(size=400)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    low, high = bootstrap_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize(("seeds", "least"), [(3, 0.65), (5, 0.88), (10, 0.91)])
def test_coverage_on_normal_differences(seeds: int, least: float) -> None:
    """95 % is asked for; five seeds cannot give more than 94 %, and the plain percentile interval gives 84 %."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(rng.normal(size=seeds))
        covered += low <= 0 <= high
    assert least < covered / 300 < coverage_limit(seeds) + 0.06


def test_coverage_limit() -> None:
    assert coverage_limit(2) == 0.5
    assert coverage_limit(5) == 0.9375


def test_front_of_three_figures() -> None:
    points = [(0.9, 0.5, 0.3), (0.8, 0.6, 0.3), (0.8, 0.5, 0.3), (0.7, 0.4, 0.2), (0.9, 0.5, 0.3), (0.6, 0.4, 0.2)]
    assert pareto_front(points, (1, 1, -1)) == [True, True, False, True, True, False]


def test_front_without_a_figure_and_of_nothing() -> None:
    assert pareto_front([(1.0, math.nan), (0.5, 0.5)], (1, 1)) == [False, True]
    assert pareto_front([], (1, 1)) == []
    assert pareto_front([(1.0,), (2.0,)], (-1,)) == [True, False]
    assert pareto_front([(), ()], ()) == [True, True]


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_no_other_point_dominates(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 5, (30, 3)).astype(float)
    directions = np.array((1, -1, 1))
    gains = points * directions
    expected = [not any((other >= gain).all() and (other > gain).any() for other in gains) for gain in gains]
    assert pareto_front(points.tolist(), directions.tolist()) == expected
