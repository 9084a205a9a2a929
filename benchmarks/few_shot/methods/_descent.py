"""What methods that descend by AdamW share."""

from collections.abc import Callable, Sequence

import optuna

from benchmarks.few_shot.problem import Case, Outcome, Problem, Settings, Watch
from benchmarks.few_shot.stack import Batches, Stack, adamw, descend, timed

Build = Callable[[Sequence[Case]], Stack]


def descent(
    problem: Problem, settings: Settings, build: Build, seconds_of: Callable[[], float] | None = None
) -> list[Outcome]:
    """Fit all cases by AdamW, as one stack.

    Args:
        problem: the cases.
        settings: ``lr``, ``weight_decay`` and ``epochs``.
        build: the fits before their first step.
        seconds_of: times a step of a fit that runs alone; None times a stack of one.

    Returns:
        An outcome for each case.
    """

    def run(cases: Sequence[Case], epochs: int, at_most: int) -> list[float]:
        one = build(cases)
        return descend(one, cases, epochs, adamw(one, settings["lr"], settings["weight_decay"]), at_most=at_most)

    stack = build(problem.cases)
    optimizer = adamw(stack, settings["lr"], settings["weight_decay"])
    watch = Watch(problem.cases, Batches(problem.cases, settings["epochs"]).steps) if problem.watched else None
    descend(stack, problem.cases, settings["epochs"], optimizer, watch=watch)
    curves = None
    if watch is not None:
        curves = watch.curves(seconds_of() if seconds_of is not None else timed(problem.cases, run))
    return [
        Outcome(
            {name: stack.of(n, test.features).softmax(1) for name, test in case.tests.items()},
            curve=None if curves is None else curves[n],
        )
        for n, case in enumerate(problem.cases)
    ]


def rate_of(trial: optuna.Trial) -> Settings:
    """Learning rate and weight decay."""
    return {
        "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
    }


def epochs_of(trial: optuna.Trial) -> Settings:
    """Passes over the shots."""
    return {"epochs": trial.suggest_int("epochs", 2, 50, log=True)}
