"""The figures against plain numpy loops, and scikit-learn where it has them."""

from itertools import permutations

import numpy as np
import pytest
import torch
from helpers.cases import rng

from kngd_ray.training.metrics import ECE_BINS, Scores, aurc, correct, ood_auroc

M, C = 400, 5


@pytest.fixture(scope="module", params=[0.3, 1.5, 4.0], ids="sharpness={}".format)
def predictions(request) -> tuple[torch.Tensor, torch.Tensor]:
    g = rng(0)
    labels = torch.randint(C, (M,), generator=g)
    logits = torch.randn(M, C, generator=g, dtype=torch.float64)
    logits[torch.arange(M), labels] += 1.0
    return (request.param * logits).softmax(1), labels


def looped(p: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Each figure by its definition, one sample after another."""
    top, confidence = p.argmax(1), p.max(1)
    ece = 0.0
    for b in range(ECE_BINS):
        low, high = b / ECE_BINS, (b + 1) / ECE_BINS
        inside = [i for i in range(len(y)) if low < confidence[i] <= high]
        if inside:
            accuracy = np.mean([top[i] == y[i] for i in inside])
            ece += len(inside) / len(y) * abs(accuracy - np.mean([confidence[i] for i in inside]))
    brier = np.mean([sum((p[i, c] - (c == y[i])) ** 2 for c in range(p.shape[1])) for i in range(len(y))])
    return {
        "accuracy": float(np.mean([top[i] == y[i] for i in range(len(y))])),
        "nll": float(np.mean([-np.log(p[i, y[i]]) for i in range(len(y))])),
        "ece": float(ece),
        "brier": float(brier),
    }


def test_what_is_certain_shares_the_last_bin():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.95, 0.05], [0.95, 0.05]])
    y = torch.tensor([0, 1, 0, 0])
    assert Scores.of(p, y).ece == pytest.approx(abs(0.75 - 0.975), abs=1e-6)


def test_scores_equal_plain_loops(predictions):
    p, y = predictions
    expected = looped(p.numpy(), y.numpy())
    found = Scores.of(p, y).as_dict()
    assert found.pop("ece") == pytest.approx(expected["ece"], rel=1e-5)  # torchmetrics counts in float32
    assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-12)
    assert Scores.of(p.float(), y).as_dict() == pytest.approx(expected, rel=1e-5)


def test_scores_equal_scikit_learn(predictions):
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = predictions[0].numpy(), predictions[1].numpy()
    scores = Scores.of(*predictions)
    assert scores.accuracy == pytest.approx(sklearn.accuracy_score(y, p.argmax(1)), rel=1e-12)
    assert scores.nll == pytest.approx(sklearn.log_loss(y, p, labels=range(C)), rel=1e-12)
    brier = sklearn.brier_score_loss(y, p, labels=range(C), scale_by_half=False)
    assert scores.brier == pytest.approx(brier, rel=1e-12)


def test_certain_and_wrong_stays_finite():
    scores = Scores.of(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert scores.as_dict() == pytest.approx({"accuracy": 0.5, "nll": 0.5 * 12 * np.log(10), "ece": 0.5, "brier": 1.0})


@pytest.mark.parametrize("first", [0, 7])
def test_of_equal_probabilities_one_of_all_classes_is_right(first):
    labels = torch.tensor([0] * first + [1, 2, 3])
    scores = Scores.of(torch.zeros(len(labels), 4).softmax(1), labels)
    assert scores.as_dict() == pytest.approx({"accuracy": 0.25, "nll": np.log(4), "ece": 0.0, "brier": 0.75})


def test_of_equal_scores_one_of_all_classes_is_right():
    """Sample by sample: others are right where their largest score is the label's."""
    scores = torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 1.0, 1.0], [0.0, 3.0, 3.0, 1.0]])
    assert correct(scores, torch.tensor([0, 3, 0, 2])).tolist() == [0.25, 0.25, 1.0, 0.0]


def test_a_probability_that_rounds_above_one_is_still_a_probability():
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.4]])
    y = torch.tensor([0, 1, 1])
    above = torch.where(p == 1, torch.nextafter(p, torch.full_like(p, 2.0)), p)
    assert Scores.of(above, y).as_dict() == pytest.approx(Scores.of(p, y).as_dict(), rel=1e-5)


def test_mean_counts_each_set_the_same():
    a, b = Scores(0.5, 1.0, 0.2, 0.4), Scores(1.0, 3.0, 0.0, 0.0)
    assert Scores.mean([a, b]).as_dict() == pytest.approx({"accuracy": 0.75, "nll": 2.0, "ece": 0.1, "brier": 0.2})
    assert Scores.mean([Scores(0.1, 0.1, 0.1, 0.1)] * 3).nll == pytest.approx(0.1, rel=1e-15)


def test_aurc_equals_a_plain_loop():
    g = rng(2)
    uncertainty, wrong = torch.rand(50, generator=g), torch.rand(50, generator=g) < 0.3
    order = sorted(range(50), key=lambda i: float(uncertainty[i]))
    risks = [np.mean([bool(wrong[i]) for i in order[: kept + 1]]) for kept in range(50)]
    assert aurc(uncertainty, wrong) == pytest.approx(np.mean(risks), rel=1e-12)
    assert aurc(wrong.double(), wrong) < aurc(uncertainty, wrong) < aurc(-wrong.double(), wrong)


def test_aurc_of_equal_uncertainties_is_that_of_a_random_order():
    """It does not depend on which row comes first."""
    wrong = torch.tensor([True, False, False, True, False])
    for order in ([0, 1, 2, 3, 4], [1, 2, 4, 0, 3]):
        assert aurc(torch.zeros(5), wrong[order]) == pytest.approx(0.4)
    some = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.5])
    orders = [[0, *middle, 3] for middle in permutations([1, 2, 4])]
    risks = [np.mean([wrong[order[: kept + 1]].double().mean() for kept in range(5)]) for order in orders]
    assert aurc(some, wrong) == pytest.approx(np.mean(risks))


@pytest.mark.parametrize("size", [1e-9, 1.0, 30.0], ids="size={}".format)
def test_ood_auroc_equals_a_count_of_pairs(size):
    """Whatever the scale of the uncertainties; ties count half."""
    g = rng(3)
    inside = (torch.rand(40, generator=g, dtype=torch.float64) * 5).round() * size
    outside = (torch.rand(30, generator=g, dtype=torch.float64) * 5 + 1).round() * size
    inside[0] = 40.0  # beyond 1, where a score is no longer a probability
    pairs = [float(o > i) + 0.5 * float(o == i) for o in outside for i in inside]
    assert ood_auroc(inside, outside) == pytest.approx(np.mean(pairs), rel=1e-6)
    sklearn = pytest.importorskip("sklearn.metrics")
    expected = sklearn.roc_auc_score([0] * 40 + [1] * 30, torch.cat([inside, outside]).numpy())
    assert ood_auroc(inside, outside) == pytest.approx(expected, rel=1e-6)
