"""IVON (Shen et al., arXiv 2402.17641) on the class residual: a variational posterior, prediction by draws from it.

The package's own IVON steps the stack of all cases: it acts on each weight by itself, with noise of its own.
"""

from collections.abc import Sequence
from functools import partial

import optuna
import torch
from ivon import IVON

from benchmarks.few_shot.methods._base import Method
from benchmarks.few_shot.methods._descent import epochs_of
from benchmarks.few_shot.probe import Probe
from benchmarks.few_shot.problem import Case, Outcome, Problem, Settings, Watch
from benchmarks.few_shot.stack import Batches, Stack, descend, timed

_DRAWS = 32
_SEED = 0


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """All cases as one stack."""

    def run(cases: Sequence[Case], epochs: int, at_most: int) -> list[float]:
        stack, optimizer = _begin(problem, cases, settings)
        around = partial(optimizer.sampled_params, train=True)
        return descend(stack, cases, epochs, optimizer, around=around, at_most=at_most)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        stack, optimizer = _begin(problem, problem.cases, settings)
        epochs, around = settings["epochs"], partial(optimizer.sampled_params, train=True)
        watch = Watch(problem.cases, Batches(problem.cases, epochs).steps) if problem.watched else None
        descend(stack, problem.cases, epochs, optimizer, around=around, watch=watch)
        curves = None if watch is None else watch.curves(timed(problem.cases, run))
        logits: list[dict[str, list[torch.Tensor]]] = [{name: [] for name in case.tests} for case in problem.cases]
        for _ in range(_DRAWS):
            with optimizer.sampled_params():
                for n, case in enumerate(problem.cases):
                    for name, test in case.tests.items():
                        logits[n][name].append(stack.of(n, test.features))
    return [
        Outcome(
            {name: torch.stack(drawn).softmax(2).mean(0) for name, drawn in sets.items()},
            {name: torch.stack(drawn).var(0).mean(1) for name, drawn in sets.items()},
            None if curves is None else curves[n],
        )
        for n, sets in enumerate(logits)
    ]


def _begin(problem: Problem, cases: Sequence[Case], settings: Settings) -> tuple[Stack, IVON]:
    probe = Probe(problem.class_embeddings, problem.logit_scale)
    stack = Stack(probe, [dict(probe.named_parameters()) for _ in cases])
    shots = sum(len(case.support) for case in cases) / len(cases)
    return stack, IVON(
        list(stack.parameters.values()),
        lr=settings["lr"],
        ess=settings["samples_per_shot"] * shots,
        hess_init=settings["hess_init"],
        weight_decay=settings["weight_decay"],
    )


def space(trial: optuna.Trial) -> Settings:
    """Step size, effective sample size in shots, initial Hessian, weight decay, passes."""
    return {
        "lr": trial.suggest_float("lr", 0.1, 100.0, log=True),
        "samples_per_shot": trial.suggest_float("samples_per_shot", 0.3, 300.0, log=True),
        "hess_init": trial.suggest_float("hess_init", 3e-3, 1.0, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
        **epochs_of(trial),
    }


METHOD = Method(
    "ivon",
    fit,
    space,
    {"lr": 3.0, "samples_per_shot": 10.0, "hess_init": 0.1, "weight_decay": 1e-4, "epochs": 30},
)
