"""A stream: samples that come in an order, each batch predicted before it is learned from.

::

    first batch     predicted by the zero-shot head     then it informs the prior, and is learned from
    each later one  predicted by the belief before it   then it is learned from

Whatever predicts a batch has seen neither this batch nor anything after it. So tau is the one that has predicted the
latest batches best, under its prior; in the beginning it is the prior's median. A change in the stream may change how
certain a belief should be of itself, so a batch counts half as much when 50 samples have come after it. The figures are
prequential: the method is judged as it is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kngd_ray.errors import FilterError
from kngd_ray.training.batches import Support
from kngd_ray.training.method import Method
from kngd_ray.training.metrics import correct
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.predict import TAU_GRID

_EPSILON = 1e-9  # nats
_HALF_LIFE = 50.0  # samples


@dataclass(frozen=True)
class Stage:
    """A part of a stream from one domain.

    Attributes:
        domain: its name.
        end: samples of the stream up to its end.
    """

    domain: str
    end: int


def stages_of(order: Sequence[str], count: int) -> list[Stage]:
    """The stages of a stream with as many samples of each.

    Args:
        order: their domains; none where samples come as they come.
        count: samples of the stream.

    Returns:
        The stages.
    """
    each = count // max(len(order), 1)
    return [Stage(domain, (n + 1) * each) for n, domain in enumerate(order)]


@dataclass(frozen=True)
class Stream:
    """What makes a fit one of a stream.

    Attributes:
        posterior: how the posterior enters predictions: a given tau, or the prior of the one to choose.
        stages: the domains one after another; none where they come as they come.
        tests: samples of each domain that nothing is learned from, looked at when a stage is over and at the end.
    """

    posterior: PosteriorOptions = field(default_factory=PosteriorOptions)
    stages: Sequence[Stage] = ()
    tests: Mapping[str, Support] = field(default_factory=dict)

    @property
    def taus(self) -> tuple[float, ...]:
        """The taus that may be chosen."""
        if self.posterior.predict == "mean":
            return (0.0,)
        return TAU_GRID if self.posterior.temperature is None else (self.posterior.temperature,)

    def looks(self, before: int, after: int, total: int) -> bool:
        """Whether the tests are looked at after a batch.

        Args:
            before: samples that came before it.
            after: and with it.
            total: of the whole stream.

        Returns:
            Whether a stage ends in it, or the stream.
        """
        return after == total or any(before < stage.end <= after for stage in self.stages)


class Foresight:
    """What each tau has made of the labels of a stream before they were learned from.

    Args:
        stream: says which taus there are, and how probable they are before anything is seen.
        scores: (T,) their log-probability so far, nats, which fades; None is nothing.
    """

    def __init__(self, stream: Stream, scores: Tensor | None = None) -> None:
        self.taus = stream.taus
        prior = torch.tensor([stream.posterior.log_prior(tau) for tau in self.taus], dtype=torch.float64)
        if stream.posterior.tau_median is None:
            prior[-1] = _EPSILON  # all are as probable: it begins with 1, the last, as fits without folds
        self._prior = prior if len(self.taus) > 1 else torch.zeros(1, dtype=torch.float64)
        if scores is None or len(scores) != len(self.taus):  # of other taus: the posterior's options were changed since
            scores = torch.zeros(len(self.taus))
        self.scores = scores.double().cpu()

    @property
    def tau(self) -> float:
        """The tau that predicts the next batch."""
        return self.taus[self._best]

    @property
    def _best(self) -> int:
        return int((self.scores + self._prior).argmax())

    def see(self, log_predictive: Sequence[float], size: int) -> float:
        """Learn of a batch.

        Args:
            log_predictive: (T,) of its labels, nats; a single one for a method without a posterior.
            size: its samples.

        Returns:
            The one at the tau that was chosen before.
        """
        told = log_predictive if len(log_predictive) == len(self.taus) else [log_predictive[0]] * len(self.taus)
        found = told[self._best]
        self.scores = 0.5 ** (size / _HALF_LIFE) * self.scores + torch.tensor(told, dtype=torch.float64)
        return found


def accuracies(method: Method, tests: Mapping[str, Support]) -> dict[str, float]:
    """How well a method does at its mean.

    Args:
        method: on its way.
        tests: samples by domain, on its device.

    Returns:
        The share that is classified right.
    """
    with torch.no_grad():
        return {name: float(correct(method.head(test.features), test.labels).mean()) for name, test in tests.items()}


@dataclass(frozen=True)
class Met:
    """A batch of a stream as it was predicted, before it was learned from.

    Attributes:
        size: its samples.
        accuracy: share of them that was predicted right.
        nll: of their labels, nats per sample, at tau.
        tau: chosen on the batches before; 0 for a method without a posterior.
    """

    size: int
    accuracy: float
    nll: float
    tau: float


@dataclass(frozen=True)
class Look:
    """The tests as they were looked at.

    Attributes:
        samples: of the stream, learned from until then.
        accuracy: by domain, the share that is classified right.
    """

    samples: int
    accuracy: Mapping[str, float]


def prequential(met: Sequence[Met]) -> dict[str, float]:
    """Figures of a stream as a whole, each sample predicted before it was learned from.

    Args:
        met: all of its batches.

    Returns:
        ``accuracy`` and ``nll``, nats per sample.

    Raises:
        FilterError: nothing was predicted.
    """
    total = sum(batch.size for batch in met)
    if not total:
        raise FilterError("it takes no step, so nothing is predicted: give it one epoch or more")
    return {
        "accuracy": sum(batch.size * batch.accuracy for batch in met) / total,
        "nll": sum(batch.size * batch.nll for batch in met) / total,
    }


def retention(stages: Sequence[Stage], looks: Sequence[Look]) -> dict[str, float]:
    """What is kept of domains when others follow, measured on their test samples.

    Args:
        stages: of the stream.
        looks: at the end of each, and of the stream.

    Returns:
        ``learned``, the mean accuracy on a domain right after its last stage; ``final``, the same after the end of the
        stream; and ``forgetting``, the former less the latter over all domains except the last stage's. Nothing where
        there are no stages, and no ``forgetting`` for a single domain.
    """
    if not stages:
        return {}
    ends = {stage.domain: stage.end for stage in stages}  # of a domain that comes back, its last
    final = looks[-1].accuracy
    learned = {
        domain: next(look.accuracy[domain] for look in looks if look.samples >= end) for domain, end in ends.items()
    }
    found = {
        name: sum(by[domain] for domain in ends) / len(ends) for name, by in (("learned", learned), ("final", final))
    }
    earlier = [domain for domain in ends if domain != stages[-1].domain]
    if earlier:
        found["forgetting"] = sum(learned[domain] - final[domain] for domain in earlier) / len(earlier)
    return found
