"""Accuracy, NLL, ECE and Brier score of predicted probabilities."""

from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from torch import Tensor

from kngd_ray.clip.builds import torchvision_errors

ECE_BINS = 15
_BELOW_1 = 1.0 - 2.0**-24  # the float32 below 1
_MIN_P = 1e-12  # float32 softmax can round to zero; an infinite NLL would say nothing


def load_scorers() -> ModuleType:
    """Import torchmetrics' functions: with torchvision, which it imports, it takes longer than torch itself.

    A fit on features needs neither, nor does what predicts from it. Raises a KngdError where torchvision is built for
    another torch.
    """
    with torchvision_errors():
        from torchmetrics.functional import classification as functions
    return functions


def correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Which samples are classified right.

    A sample of which all classes score the same, as without class embeddings before anything is learned, is right with
    probability 1 / C: its argmax is the first class, of which there may be any number.

    Args:
        scores: (m, C) logits or probabilities.
        labels: (m,) int64 true classes.

    Returns:
        (m,) float64, 1 where the largest score is the label's.
    """
    right = (scores.argmax(1) == labels).double()
    return right.masked_fill((scores == scores[:, :1]).all(1), 1 / scores.shape[1])


@dataclass(frozen=True)
class Scores:
    """Figures of one set of predictions.

    Attributes:
        accuracy: share of samples classified right, in [0, 1].
        nll: mean negative log-likelihood, nats per sample.
        ece: expected calibration error over 15 equal-width bins of the top probability.
        brier: mean squared distance of the probability vector from the one-hot label, in [0, 2].
    """

    accuracy: float
    nll: float
    ece: float
    brier: float

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> "Scores":
        """Score predictions.

        A model that gives all classes the same probability, for every sample, is calibrated, and right about one of C.

        Args:
            probabilities: (m, C) class probabilities.
            labels: (m,) int64 true classes.

        Returns:
            The four figures.
        """
        classes = probabilities.shape[1]
        # Rounding may leave a float32 probability just above 1, which torchmetrics would take for a logit.
        p = probabilities.double().clamp(0.0, 1.0)
        of_label = p.gather(1, labels.unsqueeze(1)).squeeze(1)  # |p - e_y|^2 needs no (m, C) matrix of e_y
        brier = (p.square().sum(1) - 2 * of_label + 1).clamp_min(0.0).mean()
        nll = float(-of_label.clamp_min(_MIN_P).log().mean())
        accuracy = correct(p, labels).mean()
        if len(p) and bool((p == p[:, :1]).all()):
            return cls(float(accuracy), nll, 0.0, float(brier))
        binned = p.clamp_max(_BELOW_1)  # torchmetrics has a bin of its own for 1
        scorer = load_scorers().multiclass_calibration_error
        ece = scorer(binned, labels, num_classes=classes, n_bins=ECE_BINS, norm="l1")
        return cls(float(accuracy), nll, float(ece), float(brier))

    @classmethod
    def mean(cls, scores: "list[Scores]") -> "Scores":
        """Average of figures, each set counting the same."""
        figures = torch.tensor([list(asdict(s).values()) for s in scores], dtype=torch.float64)
        return cls(*figures.mean(0).tolist())

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def aurc(uncertainty: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve: mean error rate over all shares of the most certain samples.

    Args:
        uncertainty: (m,) larger is less certain.
        wrong: (m,) whether the prediction is wrong.

    Returns:
        The area, 0 is best; the error rate itself is what random ranking gives. Samples of one uncertainty count as in
        a random order, and so do not depend on the rows of the data.
    """
    _, level, counts = uncertainty.unique(return_inverse=True, return_counts=True)
    rates = level.bincount(wrong.double()) / counts
    errors = rates.repeat_interleave(counts).cumsum(0)
    return float((errors / torch.arange(1, len(errors) + 1, device=errors.device)).mean())


def ood_auroc(in_distribution: Tensor, out_of_distribution: Tensor) -> float:
    """How well uncertainty tells out-of-distribution samples from in-distribution ones.

    Args:
        in_distribution: (m,) uncertainties.
        out_of_distribution: (k,) uncertainties.

    Returns:
        Area under the ROC curve, 0.5 is chance.
    """
    # As ranks in [0, 1): outside it torchmetrics would take a sigmoid, in which small uncertainties tie.
    ranks = torch.cat([in_distribution, out_of_distribution]).unique(return_inverse=True)[1]
    target = torch.cat([torch.zeros(len(in_distribution)), torch.ones(len(out_of_distribution))]).long()
    return float(load_scorers().binary_auroc(ranks.double() / len(ranks), target.to(ranks.device)))
