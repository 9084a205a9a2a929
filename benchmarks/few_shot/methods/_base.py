"""What a method is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import optuna
from torch import Tensor

from benchmarks.few_shot.problem import Outcome, Problem, Settings


@dataclass(frozen=True)
class Method:
    """A way to classify from few shots.

    Attributes:
        name: on the command line and in the tables.
        fit: fits the cases of a problem under settings; an outcome for each.
        space: settings of a trial; None of a method that is not searched.
        usual: the setting that a search begins with.
        log_prior: log-density of settings, nats, which the search adds to that of the held-out labels.
        searched_as: the method whose search it takes its settings from; None is its own.
        recipe: what else decides its figures; rows of another recipe are computed again.
    """

    name: str
    fit: Callable[[Problem, Settings], Sequence[Outcome]]
    space: Callable[[optuna.Trial], Settings] | None = None
    usual: Settings = field(default_factory=dict)
    log_prior: Callable[[Settings], float] = lambda settings: 0.0
    searched_as: str | None = None
    recipe: str = ""


def softmax(problem: Problem, logits: Callable[[int, Tensor], Tensor]) -> list[Outcome]:
    """Outcomes of a method without steps or posterior.

    Args:
        problem: what was fitted.
        logits: of features, by the fit of the case of that number.

    Returns:
        One for each case.
    """
    return [
        Outcome({name: logits(n, test.features).softmax(1) for name, test in case.tests.items()})
        for n, case in enumerate(problem.cases)
    ]
