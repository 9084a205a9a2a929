"""AdamW on the package's adapters, all cases as one stack; the batches are those of the package's own fits."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import optuna

from benchmarks.few_shot.methods._base import Method
from benchmarks.few_shot.methods._descent import descent, epochs_of, rate_of
from benchmarks.few_shot.problem import BATCH_SIZE, Case, Outcome, Problem, Settings
from benchmarks.few_shot.stack import Batches, Stack
from kngd_ray.clip.adapters import AnyAdapter, Bottleneck, ClassResidual, Linear
from kngd_ray.observations import trainable
from kngd_ray.training.fit import StepRecord, build_head, fit
from kngd_ray.training.options import FitOptions, OptimizerOptions

ADAPTERS: dict[str, tuple[AnyAdapter, ...]] = {
    "bottleneck": (Bottleneck(),),
    "class_residual": (ClassResidual(),),
    "linear_class_residual": (Linear(), ClassResidual()),
}
_TIMED = 30  # steps


def fitted(problem: Problem, settings: Settings) -> list[Outcome]:
    """Fit all cases.

    Args:
        problem: the cases.
        settings: ``adapter``, ``lr``, ``weight_decay`` and ``epochs``.

    Returns:
        An outcome for each.
    """
    options = options_of(settings)

    def seconds() -> float:
        case = problem.cases[0]
        epochs = -(-_TIMED // Batches([case], 1).steps)
        taken: list[StepRecord] = []
        fit(problem.task(case, options_of({**settings, "epochs": epochs})), on_step=taken.append)
        return median(record.milliseconds for record in taken[_TIMED // 6 :]) / 1e3

    return descent(problem, settings, lambda cases: stack_of(problem, cases, options), seconds)


def options_of(settings: Settings) -> FitOptions:
    """The package's own options of such a fit."""
    return FitOptions(
        method="adamw",
        epochs=settings["epochs"],
        batch_size=BATCH_SIZE,
        adapter=ADAPTERS[settings["adapter"]],
        optimizer=OptimizerOptions(lr=settings["lr"], weight_decay=settings["weight_decay"]),
    )


def stack_of(problem: Problem, cases: Sequence[Case], options: FitOptions) -> Stack:
    """The fits before their first step, each with the initial weights of the package's."""
    heads = [build_head(problem.task(case, options)) for case in cases]
    return Stack(heads[0], [trainable(head) for head in heads])  # type: ignore[arg-type]


def _space(adapters: Sequence[str], passes: Callable[[optuna.Trial], Settings], trial: optuna.Trial) -> Settings:
    adapter = trial.suggest_categorical("adapter", adapters) if len(adapters) > 1 else adapters[0]
    return {"adapter": adapter, **rate_of(trial), **passes(trial)}


def _method(name: str, adapters: Sequence[str], *, single_pass: bool = False) -> Method:
    passes = (lambda trial: {"epochs": 1}) if single_pass else epochs_of
    usual = {"lr": 3e-3, "weight_decay": 0.01}
    usual |= {} if len(adapters) == 1 else {"adapter": "class_residual"}
    usual |= {} if single_pass else {"epochs": 30}
    return Method(name, fitted, partial(_space, adapters, passes), usual)


CLIP_ADAPTER = _method("clip_adapter", ["bottleneck"])
CLASS_RESIDUAL = _method("adamw_class_residual", ["class_residual"])
LINEAR_CLASS_RESIDUAL = _method("adamw_linear_class_residual", ["linear_class_residual"])
# of a thousand classes a search takes hours: this was the best of six on training pictures of many200
_FIXED: Settings = {"adapter": "class_residual", "lr": 3e-4, "weight_decay": 0.01, "epochs": 30}
FIXED = Method(
    "adamw_class_residual_fixed", lambda problem, settings: fitted(problem, _FIXED), recipe=repr(sorted(_FIXED.items()))
)
BEST = _method("adamw", list(ADAPTERS))
SINGLE_PASS = _method("adamw_single_pass", list(ADAPTERS), single_pass=True)
