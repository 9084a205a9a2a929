"""Tables on a terminal narrower than they are: no figure and no name is cut off."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from kngd_ray.console import Display
from kngd_ray.experiment.predict import _show

Printed = Callable[[Callable[[Display], None], int], str]


@pytest.fixture
def printed() -> Printed:
    """What is printed on a terminal of some width."""

    def shown(show: Callable[[Display], None], width: int) -> str:
        display, stream = Display(), io.StringIO()
        display.out = display.console = Console(file=stream, width=width, force_terminal=True, color_system=None)
        show(display)
        return stream.getvalue()

    return shown


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}


def test_results_in_and_out_of_distribution_stand_below_one_another(printed: Printed) -> None:
    inside = {"accuracy": interval(0.495), "nll": interval(1.791), "ece": interval(0.075)}
    outside = {"accuracy": interval(0.32), "nll": interval(2.374), "ece": interval(0.096)}
    report = {"id": inside, "ood": {"mean": outside, "twemoji": outside}}

    def show(display: Display) -> None:
        display.table("emoji", [("zero-shot", report), ("adamw, 150 steps", report)], ["seeds 0, 1"])

    narrow, wide = printed(show, 60), printed(show, 120)
    for text in (narrow, wide):
        assert "…" not in text
        assert text.count("emoji") == text.count("seeds 0, 1") == 1
        for figure in ("49.5±2.0", "1.791±0.020", "0.075±0.020", "32.0±2.0", "2.374±0.020", "0.096±0.020"):
            assert text.count(figure) == 2
    assert narrow.count("adamw, 150 steps") == 2
    assert wide.count("adamw, 150 steps") == 1
    assert max(map(len, narrow.splitlines())) <= 60


def test_predictions_keep_their_names_and_leave_figures_out(printed: Printed) -> None:
    row = {
        "class": "elephant",
        "probability": 0.683,
        "probability_low": 0.018,
        "probability_high": 0.996,
        "novelty": 0.06,
        "logit_std": 0.329,
        "uncertainty": 0.633,
    }
    name = "new_pictures/elephant/23.jpg"

    def show(display: Display) -> None:
        _show([row], [name], "image", display)

    narrow, wide = printed(show, 60), printed(show, 120)
    for text in (narrow, wide):
        assert "…" not in text
        assert all(figure in text for figure in ("0.683", "0.018 to", "0.996", "0.06", "elephant"))
    assert name in wide
    assert "0.329" in wide
    assert "0.633" in wide
    assert name in "".join(line[1:].split("  ")[0].strip() for line in narrow.splitlines())
    assert "0.329" not in narrow
    assert "logit std and uncertainty (nats) are left out, as this terminal has under" in " ".join(narrow.split())
    assert "left out" not in wide


def test_progress_keeps_the_names_of_fits(printed: Printed) -> None:
    stats = {"innovation_rms": 0.561, "nis_per_observation": 0.0, "log_evidence": -23.6, "nll": 0.65, "accuracy": 0.76}
    record = {"step": 2, "steps": 3, "milliseconds": 1234.5, "refused": None, "stats": stats}

    def show(display: Display) -> None:
        display._live = True
        with display.steps({"kalman-seed0": 3}) as advance:
            advance("kalman-seed0", record)

    for width in (50, 160):
        last = [line for line in printed(show, width).splitlines() if "kalman-seed0 ━" in line][-1]
        assert "2/3" in last
        assert ("1234.5 ms/step" in last) == (width == 160)


class Watched(Display):
    """Its log's line on what is going on, at any time."""

    @contextmanager
    def _alive(self, going: Callable[[], str]) -> Iterator[Callable[[], None]]:
        self.going = going
        yield lambda: None


@pytest.mark.parametrize(
    ("refitted", "between", "after"),
    [
        (["seed0", "seed1"], "seed0: fitting its head again, then seed1", "seed1: fitting its head again"),
        ([], "seed1: fitting", "all steps are done"),
    ],
)
def test_what_a_log_says_while_no_step_is_done(refitted: list[str], between: str, after: str) -> None:
    record = {"step": 1, "steps": 1, "milliseconds": 1.0, "refused": "for the test", "stats": None}
    display = Watched(quiet=True)
    display._live = False
    with display.steps({"seed0": 1, "seed1": 1}, refitted=refitted) as advance:
        assert display.going() == "seed0: fitting"
        advance("seed0", record)
        assert display.going() == between
        advance("seed1", record)
        assert display.going() == after
