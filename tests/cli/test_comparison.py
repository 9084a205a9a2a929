"""The statistics of a comparison against what is known of them."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from kngd_ray.comparison.page import page
from kngd_ray.comparison.rows import Found, Row
from kngd_ray.comparison.statistics import (
    TIE,
    better,
    holm,
    paired_difference,
    pareto_front,
)
from kngd_ray.comparison.tables import Table, build_tables
from kngd_ray.console import with_interval
from kngd_ray.experiment.aggregate import interval, over_seeds, student


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
    difference = paired_difference({0: 1.0, 1: 1.0}, {0: 2.49, 1: 2.51}, -1)
    assert difference is not None
    assert difference.mean == pytest.approx(-1.5)
    assert (difference.wins, difference.losses) == (2, 0)
    assert difference.decided
    unknown = paired_difference({0: 1.0}, {0: 2.0}, 0)
    assert unknown is not None
    assert (unknown.wins, unknown.losses) == (0, 0)


def test_the_same_difference_on_all_seeds_is_not_known_to_vary_and_decides_nothing() -> None:
    """Accuracies are counts: two seeds often have the same difference, and mean nothing by it."""
    same = paired_difference({0: 0.52, 1: 0.62}, {0: 0.5, 1: 0.6})
    assert same is not None
    assert (same.low, same.high, same.p, same.decided) == (None, None, None, False)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_are_those_of_scipy(seeds: int) -> None:
    for values in np.random.default_rng(seeds).normal(0.3, 1.0, (20, seeds)).tolist():
        found, expected = student(values), stats.ttest_1samp(values, 0.0)
        ends = expected.confidence_interval(0.95)
        assert (found.low, found.high, found.p) == pytest.approx((ends.low, ends.high, expected.pvalue))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_intervals_of_noise_exclude_0_in_one_case_of_twenty(seeds: int) -> None:
    found = [student(values) for values in np.random.default_rng(3).normal(size=(2000, seeds)).tolist()]
    assert 0.03 < sum(not each.low <= 0 <= each.high for each in found) / 2000 < 0.065


def table_of(figures: np.ndarray) -> Table:
    """A comparison of rows whose accuracies (rows, seeds) are given; the first is AdamW's."""
    params = {"data.path": "x", "data.shots": "4"}
    rows = [
        Row(f"id{n}", f"run{n}", *(2 * ("adamw" if n == 0 else "kalman",)), {**params, "filter.p0": str(n)}, seeds)
        for n, row in enumerate(figures.tolist())
        for seeds in [{seed: {"id/accuracy": value} for seed, value in enumerate(row)}]
    ]
    (table,) = build_tables(Found(rows, None, Counter()), [], ["id/accuracy"], None)
    return table


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_one_null_table_in_twenty_claims_a_difference(seeds: int) -> None:
    """Three methods beside AdamW, all of them equal: together they are as seldom wrong as one alone."""
    rng = np.random.default_rng(seeds)
    tables = [table_of(figures) for figures in rng.normal(0.5, 0.03, (2000, 4, seeds))]
    claimed = sum(
        any(d.decided for line in table.lines if (d := line.figures["id/accuracy"].difference)) for table in tables
    )
    assert 0.03 < claimed / 2000 < 0.065
    said = sum("significant" in table.headlines[0] and "not significant" not in table.headlines[0] for table in tables)
    assert said / 2000 < 0.065


def test_what_a_headline_says_of_one_row_and_of_several() -> None:
    base, good = [0.5, 0.52, 0.48], [0.6, 0.625, 0.575]
    (said,) = table_of(np.array([base, good])).headlines
    assert "10.0 points higher than adamw (95 % interval +8.8 to +11.2, which excludes 0)" in said
    (said,) = table_of(np.array([base, good, [0.4, 0.55, 0.5]])).headlines
    assert "+11.2 of this comparison alone, and p = 0.0017 among 2 (Holm): significant)" in said
    (said,) = table_of(np.array([base, [0.51, 0.54, 0.50], *np.random.default_rng(0).random((9, 3)) / 3])).headlines
    assert "not significant" in said


def test_figures_that_are_no_numbers_are_told_of() -> None:
    """MLflow is not given them: the mean was over the other seeds, and nothing said so."""
    figures = {seed: {"id/accuracy": 0.5, "id/nll": 1.0 + seed} for seed in range(3)}
    lacking = {**figures, 1: {"id/accuracy": 0.5}}
    rows = [
        Row(f"r{n}", f"r{n}", m, "None", {}, s) for n, (m, s) in enumerate({"adamw": figures, "sgd": lacking}.items())
    ]
    (table,) = build_tables(Found(rows, None, Counter()), [], [], None)
    assert "sgd has no ID NLL of seed 1, and its mean is over the others" in table.notes
    assert not any("adamw has no" in note for note in table.notes)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_intervals_end_where_their_figures_do() -> None:
    found = interval([0.99, 0.9, 1.0], "id/accuracy")
    assert found["high"] == 1.0
    assert found["low"] == pytest.approx(student([0.99, 0.9, 1.0]).low)
    assert interval([0.01, 0.0], "ece")["low"] == 0.0
    assert interval([0.99, 0.9, 1.0], "stream/final")["high"] == 1.0
    assert interval([-0.99, 0.9], "stream/forgetting") == pytest.approx({"mean": -0.045, "low": -1.0, "high": 1.0})
    assert interval([0.5, 3.0], "nll")["low"] == 0.0
    assert over_seeds([{"id": {"accuracy": 0.0}}, {"id": {"accuracy": 1.0}}])["id"]["accuracy"] == {
        "mean": 0.5,
        "low": 0.0,
        "high": 1.0,
    }
    difference = paired_difference({0: 0.0, 1: 1.0}, {0: 1.0, 1: 0.0}, 1, "id/accuracy")
    assert difference is not None
    assert (difference.low, difference.high) == (-1.0, 1.0)


def test_one_support_set_has_no_interval() -> None:
    """What differs between its seeds is the order of the batches: it says nothing of other shots."""
    assert over_seeds([{"id": {"accuracy": 0.0}}, {"id": {"accuracy": 1.0}}], one_support=True) == {
        "id": {"accuracy": 0.5}
    }
    difference = paired_difference({0: 0.30, 1: 0.31, 2: 0.32}, {0: 0.0, 1: 0.0, 2: 0.0}, one_support=True)
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == (pytest.approx(0.31), None, None)
    assert (difference.wins, difference.decided) == (3, False)


def test_an_interval_without_a_half_shows_both_ends() -> None:
    assert with_interval({"mean": 0.487, "low": 0.463, "high": 0.511}, 100, 1) == "48.7±2.4"
    assert with_interval({"mean": 0.963, "low": 0.91, "high": 1.0}, 100, 1) == "96.3 [91.0, 100.0]"


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


def test_plots_take_the_colours_of_the_page_and_show_names_as_text(painted: None) -> None:
    nasty = '<script>alert(1)</script>&"$x^2$'
    figures = [{"id/accuracy": a, "ood/mean/accuracy": b, "id/nll": 1.0} for a, b in ((0.5, 0.3), (0.6, 0.2))]
    rows = [Row(str(n), nasty, f"{nasty}{n}", "None", {}, {0: values, 1: values}) for n, values in enumerate(figures)]
    (table,) = build_tables(Found(rows, None, Counter()), [], [], None)
    text = page(nasty, nasty, [table])
    drawings = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert len(drawings) == 3
    for svg in drawings:
        assert svg.count("<title>") == 2
        assert ": &lt;script&gt;alert(1)&lt;/script&gt;&amp;&#34;$x^2$0</title>" in svg
        assert {f"var({name})" in svg for name in ("--ink", "--soft", "--line", "--page", "--mark")} == {True}
        assert not re.search(r"#0000|<script|href=|url\(|https?:|id=\"|xmlns", svg)
        assert "higher is better" in svg
    assert len(re.findall("<script", text)) == 1
