"""From predictions to one row of figures."""

import json
from collections.abc import Mapping, Sequence
from math import nan
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.few_shot.problem import Case, Outcome
from kngd_ray.training.evaluation import ID
from kngd_ray.training.metrics import ECE_BINS, Scores, aurc, ood_auroc
from kngd_ray.training.predict import entropy

SETS = ("id", "ood")
SCORES = ("accuracy", "nll", "ece", "brier", "aurc")
UNCERTAINTIES = ("max_prob", "entropy", "variance")
STEPS = ("steps", "steps_to_95", "seconds_to_95", "seconds_per_step")
FIGURES = (*(f"{s}_{f}" for s in SETS for f in SCORES), *(f"auroc_{u}" for u in UNCERTAINTIES), *STEPS)
LOWER_IS_BETTER = tuple(name for name in FIGURES if not name.startswith("auroc") and not name.endswith("accuracy"))


def row(case: Case, outcome: Outcome) -> dict[str, Any]:
    """All figures of a case; those out of distribution are means over the domains, NaN without any.

    AURC ranks by entropy. AUROC tells out of distribution from in distribution by 1 - max probability, by entropy, and
    by the variance of the logits (mean over classes), NaN where the method has none. `steps_to_95` are those after
    which accuracy in distribution stays at 95 % of its last value or above.

    Args:
        case: with its labels.
        outcome: what a method made of it.

    Returns:
        Figures by name, the bins of the reliability diagram, and the curve.
    """
    found: dict[str, Any] = {}
    scores = {name: _scores(p, case.tests[name].labels) for name, p in outcome.probabilities.items()}
    domains = [name for name in scores if name != ID]
    for figure in SCORES:
        found[f"id_{figure}"] = scores[ID][figure]
        found[f"ood_{figure}"] = _mean([scores[name][figure] for name in domains])
    for kind, values in _uncertainties(outcome).items():
        found[f"auroc_{kind}"] = nan if values is None else _mean([ood_auroc(values[ID], values[d]) for d in domains])
    found |= _steps(outcome)
    for where, names in (("id", [ID]), ("ood", domains)):
        found |= _bins(where, [(outcome.probabilities[name], case.tests[name].labels) for name in names])
    return found | {"chosen": json.dumps(dict(outcome.chosen))}


def _scores(p: Tensor, labels: Tensor) -> dict[str, float]:
    p = p.nan_to_num(nan=1 / p.shape[1])
    return {**Scores.of(p, labels).as_dict(), "aurc": aurc(entropy(p), p.argmax(1) != labels)}


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else nan


def _uncertainties(outcome: Outcome) -> dict[str, Mapping[str, Tensor] | None]:
    p = outcome.probabilities
    return {
        "max_prob": {name: 1 - each.max(1).values for name, each in p.items()},
        "entropy": {name: entropy(each) for name, each in p.items()},
        "variance": outcome.variance,
    }


def _steps(outcome: Outcome) -> dict[str, Any]:
    curve = outcome.curve
    if curve is None:
        return dict.fromkeys(STEPS, nan) | {"curve_steps": [], "curve_id": [], "curve_ood": []}
    below = [n for n, accuracy in enumerate(curve.id) if accuracy < 0.95 * curve.id[-1]]
    reached = curve.steps[below[-1] + 1] if below else 0
    return {
        "steps": float(curve.steps[-1]),
        "steps_to_95": float(reached),
        "seconds_to_95": reached * curve.seconds_per_step,
        "seconds_per_step": curve.seconds_per_step,
        "curve_steps": list(curve.steps),
        "curve_id": [round(a, 5) for a in curve.id],
        "curve_ood": [round(a, 5) for a in curve.ood],
    }


def _bins(where: str, predicted: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """By bin of the top probability the number of samples, and the sums of it and of those that are right."""
    sums = torch.zeros(3, ECE_BINS, dtype=torch.float64)
    for p, labels in predicted:
        top, guess = p.nan_to_num().double().max(1)
        bins = (top * ECE_BINS).long().clamp(0, ECE_BINS - 1)
        for n, values in enumerate((torch.ones_like(top), top, (guess == labels).double())):
            sums[n].index_add_(0, bins, values)
    names = ("count", "confidence", "right")
    return {f"bins_{where}_{name}": sums[n].tolist() for n, name in enumerate(names)}
