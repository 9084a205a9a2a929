"""Tip-Adapter-F: the cache's keys are trained by AdamW, beginning at the shots' features."""

from collections.abc import Sequence

import optuna
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks.few_shot.methods import tip_adapter
from benchmarks.few_shot.methods._base import Method
from benchmarks.few_shot.methods._descent import descent, epochs_of, rate_of
from benchmarks.few_shot.problem import Case, Outcome, Problem, Settings, averaged
from benchmarks.few_shot.stack import Stack


class _Cache(nn.Module):
    values: Tensor

    def __init__(self, problem: Problem, settings: Settings) -> None:
        super().__init__()
        self._problem, self._alpha, self._beta = problem, settings["alpha"], settings["beta"]
        self.keys = nn.Parameter(torch.empty(0))
        self.register_buffer("values", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        near = tip_adapter.cached(x, self.keys, self.values, self._beta)
        return self._problem.zero_shot(x) + self._alpha * near


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """All cases as one stack; where one has fewer shots, the keys that it lacks have no value."""
    classes = len(problem.class_embeddings)
    longest = max(len(case.support) for case in problem.cases)

    def build(cases: Sequence[Case]) -> Stack:
        keys, values = [], []
        for case in cases:
            rest = longest - len(case.support)
            shots = case.support
            keys.append({"keys": nn.functional.pad(averaged(shots), (0, 0, 0, rest))})
            values.append({"values": nn.functional.pad(one_hot(shots.labels, classes).float(), (0, 0, 0, rest))})
        return Stack(_Cache(problem, settings), keys, values)

    return descent(problem, settings, build)


def space(trial: optuna.Trial) -> Settings:
    """The cache's and the optimiser's settings together."""
    return {**tip_adapter.space(trial), **rate_of(trial), **epochs_of(trial)}


METHOD = Method(
    "tip_adapter_f", fit, space, {"alpha": 1.0, "beta": 5.5, "lr": 1e-3, "weight_decay": 0.01, "epochs": 20}
)
