"""CLIP as it is."""

from collections.abc import Sequence

from benchmarks.few_shot.methods._base import Method, softmax
from benchmarks.few_shot.problem import Outcome, Problem, Settings


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """Nothing is fitted."""
    return softmax(problem, lambda n, x: problem.zero_shot(x))


METHOD = Method("zero_shot", fit)
