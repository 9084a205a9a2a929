"""A Kronecker prior whose A knows how the shots vary within their classes."""

import pytest
import torch
from helpers.cases import make_task

from kngd_ray.clip.adapters import Bottleneck, ClassResidual, Linear
from kngd_ray.filters import Diagonal, Kronecker, Layer, Part
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.fit import begin
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions, FitOptions

LIKE = torch.zeros(1, dtype=torch.float64)
LAYER = Layer("delta", 3, 4, True)


def prior(family: Kronecker) -> dict[str, torch.Tensor]:
    return dict(family.init_layer(Part(LAYER, 0, 3), 0.1, LIKE))


def shots() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    return x, labels


def test_columns_are_the_inverse_of_the_shrunk_covariance_within_classes() -> None:
    x, labels = shots()
    family = Kronecker(columns="within_class", shrinkage=2.0)
    W = torch.zeros(4, 4, dtype=torch.float64)
    for c in range(3):
        for one in x[labels == c]:
            rest = one - x[labels == c].mean(0)
            W += torch.outer(rest, rest)
    W /= 6 - 3
    expected = torch.linalg.inv(W + 2.0 * W.trace() / 4 * torch.eye(4, dtype=torch.float64))
    expected *= 4 / expected.trace()
    informed = family.informed_layer(prior(family), x, labels)
    torch.testing.assert_close(informed["A"], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(informed["B"], prior(family)["B"])
    torch.testing.assert_close(informed["A"].trace(), torch.tensor(4.0, dtype=torch.float64))


def test_much_shrinkage_is_the_identity() -> None:
    family = Kronecker(columns="within_class", shrinkage=1e9)
    informed = family.informed_layer(prior(family), *shots())
    torch.testing.assert_close(informed["A"], torch.eye(4, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("labels", [torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 5])])
def test_one_shot_per_class_says_nothing(labels: torch.Tensor) -> None:
    family = Kronecker(columns="within_class")
    before = prior(family)
    assert torch.equal(family.informed_layer(before, shots()[0], labels)["A"], before["A"])


def test_no_shots_say_nothing() -> None:
    """Of a few shots a fold may hold out all."""
    family = Kronecker(columns="within_class")
    x, labels = shots()
    before = prior(family)
    assert torch.equal(family.informed_layer(before, x[:0], labels[:0])["A"], before["A"])


def test_shrinkage_must_be_positive() -> None:
    with pytest.raises(ValueError, match="shrinkage is 0; it must be above 0"):
        Kronecker(shrinkage=0)


@pytest.mark.parametrize("adapter", [ClassResidual(), Linear(), Linear(tower="text"), Bottleneck(width=4)])
def test_a_fit_begins_with_what_its_layers_see(adapter: ClassResidual | Linear | Bottleneck) -> None:
    family = Kronecker(columns="within_class")
    options = FitOptions(adapter=(adapter,), filter=FilterOptions(covariance=family))
    task = make_task(options)
    method = begin(task, SingleProcess())
    assert isinstance(method, KalmanNGD)
    seen = [state["A"] for state in method.belief.covariance.values()]
    told = [not torch.allclose(A, torch.eye(len(A), dtype=A.dtype)) for A in seen]
    # the texts are the same for all pictures: there is nothing within a class
    assert told[0] is not (isinstance(adapter, Linear) and adapter.tower == "text")
    if isinstance(adapter, ClassResidual):
        z = task.support.features
        expected = family.informed_layer(
            {"B": torch.eye(1), "A": torch.eye(z.shape[1], dtype=seen[0].dtype)},
            torch.nn.functional.normalize(z, dim=1),
            task.support.labels,
        )["A"]
        torch.testing.assert_close(seen[0], expected)


def test_other_families_and_the_identity_are_left_alone() -> None:
    for family in (Kronecker(), Diagonal()):
        options = FitOptions(filter=FilterOptions(covariance=family))
        assert isinstance(begin(make_task(options), SingleProcess()), KalmanNGD)


def test_towers_have_no_features_to_look_at() -> None:
    from kngd_ray.clip import TuneOptions

    with pytest.raises(ValueError, match="within_class, for which shots must be features"):
        FitOptions(
            tune=TuneOptions(parameters="lora"), filter=FilterOptions(covariance=Kronecker(columns="within_class"))
        )
