"""What a method is given, and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kngd_ray.training.batches import Support
from kngd_ray.training.evaluation import ID
from kngd_ray.training.fit import FitTask
from kngd_ray.training.folds import fold_of
from kngd_ray.training.options import FitOptions

BATCH_SIZE = 32
_EVERY = 64  # steps after each of which accuracy is looked at; then steps that are 4 % apart: it costs more than a step
_APART = 1.04

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One support set.

    Attributes:
        support: the shots.
        tests: samples by test set: ``id`` and each domain out of distribution.
        seed: that drew the shots, and that the fit starts from.
    """

    support: Support
    tests: Mapping[str, Support]
    seed: int


@dataclass(frozen=True)
class Problem:
    """Support sets of one kind.

    Attributes:
        cases: the support sets, of about the same size.
        class_embeddings: (C, d) unit text embeddings of the classes.
        logit_scale: factor from cosines to logits.
        watched: whether accuracy is followed over the steps, and steps are timed.
    """

    cases: Sequence[Case]
    class_embeddings: Tensor
    logit_scale: float
    watched: bool = True

    def task(self, case: Case, options: FitOptions) -> FitTask:
        """The fit of the package on a case."""
        return FitTask(options, case.seed, case.support, self.class_embeddings, self.logit_scale)

    def folds(self, count: int) -> "Problem":
        """The cross-validation over the shots of each case: its cases' only test set is what they do not see."""
        cases = []
        for case in self.cases:
            fold = fold_of(case.support.labels, count)
            cases += [
                Case(case.support.subset(fold != f), {ID: case.support.subset(fold == f)}, case.seed)
                for f in range(count)
            ]
        return replace(self, cases=cases, watched=False)

    def zero_shot(self, features: Tensor) -> Tensor:
        """(m, C) logits of CLIP as it is."""
        return self.logit_scale * features @ self.class_embeddings.mT


@dataclass(frozen=True)
class Curve:
    """Accuracy of a fit on its way, its weights at their mean.

    Attributes:
        steps: (k,) steps done, from 0.
        id: (k,) accuracy in distribution.
        ood: (k,) mean accuracy over the domains out of distribution; NaN without.
        seconds_per_step: median of a fit that runs alone.
    """

    steps: Sequence[int]
    id: Sequence[float]
    ood: Sequence[float]
    seconds_per_step: float


@dataclass(frozen=True)
class Outcome:
    """What a method made of a case.

    Attributes:
        probabilities: (m, C) by test set.
        variance: (m,) variance of the logits under the posterior, mean over classes, by test set; None without one.
        curve: how accuracy grew; None of a method without steps, or where nobody asked.
        chosen: what was chosen on the way, such as tau.
    """

    probabilities: Mapping[str, Tensor]
    variance: Mapping[str, Tensor] | None = None
    curve: Curve | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)


class Watch:
    """Accuracy of a stack of fits at its steps.

    Args:
        cases: what is fitted, F support sets.
        steps: of the whole fit.
        every: steps of which each is looked at.
    """

    def __init__(self, cases: Sequence[Case], steps: int, every: int = _EVERY) -> None:
        self._due = set(looked_at(steps, every))
        parts = [[(n, test) for n, test in enumerate(case.tests.values())] for case in cases]
        self._sets = len(parts[0])
        longest = max(sum(len(test) for _, test in part) for part in parts)
        first = cases[0].support.features
        # copies of a support set's pictures are in no test of it, so tests may differ in size
        self.features = first.new_zeros(len(cases), longest, first.shape[1])
        self._labels = torch.full((len(cases), longest), -1)
        self._share = first.new_zeros(len(cases), self._sets, longest)
        for f, part in enumerate(parts):
            at = 0
            for n, test in part:
                own = slice(at, at + len(test))
                self.features[f, own], self._labels[f, own] = test.features, test.labels
                self._share[f, n, own] = 1 / max(len(test), 1)
                at += len(test)
        self._id = list(cases[0].tests).index(ID)
        self._steps: list[int] = []
        self._found: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether accuracy is to be looked at after this step."""
        return step in self._due

    def see(self, step: int, logits: Tensor) -> None:
        """Take logits (F, T, C) of :attr:`features` after a step."""
        right = (logits.argmax(2) == self._labels).to(self._share)
        self._steps.append(step)
        self._found.append((self._share @ right.unsqueeze(2)).squeeze(2))

    def curves(self, seconds_per_step: float) -> list[Curve]:
        """One for each case."""
        found = torch.stack(self._found).double()  # (k, F, sets)
        others = [n for n in range(self._sets) if n != self._id]
        ood = found[:, :, others].mean(2)  # NaN of none
        return [
            Curve(list(self._steps), found[:, f, self._id].tolist(), ood[:, f].tolist(), seconds_per_step)
            for f in range(found.shape[1])
        ]


def averaged(shots: Support) -> Tensor:
    """Mean embeddings of the views of each shot, as Tip-Adapter's authors make the keys of its cache.

    Args:
        shots: N of them.

    Returns:
        (N, d) of unit length; the features as they are where there are no crops.
    """
    return shots.features if shots.crops is None else normalize(shots.features + shots.crops.sum(1), dim=1)


def looked_at(steps: int, every: int = _EVERY) -> list[int]:
    """Steps at which accuracy is looked at.

    Args:
        steps: of the whole fit.
        every: all up to this one, then 4 % apart.

    Returns:
        From 0 to the last one.
    """
    due = list(range(min(steps, every) + 1))
    while due[-1] < steps:
        due.append(min(steps, max(due[-1] + 1, int(due[-1] * _APART))))
    return due
