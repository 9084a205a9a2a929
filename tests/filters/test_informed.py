"""The prior over functions that shots give: the same in any coordinates of the features."""

import pytest
import torch
from helpers.compare import max_error
from torch.nn.functional import pad

from kngd_ray.filters import Calibrated, ZeroShot
from kngd_ray.filters.informed import common_offset, measured_columns, typical, within_class_covariance
from kngd_ray.filters.prior_mean import likeliest_scale

DIM, CLASSES = 12, 4
OPTIONS = {"shrinkage": 0.3, "reach": 0.01, "bias": 0.1}


def shots(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(count)
    centres = torch.randn(CLASSES, DIM, dtype=torch.float64, generator=g)
    x = centres[labels] + 0.5 * torch.randn(len(labels), DIM, dtype=torch.float64, generator=g)
    return torch.nn.functional.normalize(x, dim=1), labels


def kernel(x: torch.Tensor, labels: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Prior covariance of the layer's outputs at other inputs, that around the shots being 1."""
    x, other = (pad(inputs, (0, 1), value=1.0) for inputs in (x, other))
    A = measured_columns(x, labels, **OPTIONS)
    centred = x - x.mean(0)
    return other @ A @ other.mT / ((centred @ A) * centred).sum(1).mean()


def rotated(x: torch.Tensor, width: int) -> torch.Tensor:
    """In more dimensions, in which nothing varies, and turned."""
    Q = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(7)))[0]
    return pad(x, (0, width - x.shape[1])) @ Q


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_rotation_and_empty_dimensions_change_nothing(count):
    x, labels = shots(count)
    other = shots(3, 5)[0]
    expected = kernel(x, labels, other)
    assert max_error(kernel(rotated(x, DIM), labels, rotated(other, DIM)), expected) < 1e-10
    assert max_error(kernel(rotated(x, DIM + 5), labels, rotated(other, DIM + 5)), expected) < 1e-10


@pytest.mark.parametrize("count", [1, 2, 9])
def test_clips_geometry_changes_nothing(count):
    """Images in a cone: x -> [a x, rho]. Distances shrink, all share an offset, and the prior stays."""
    a = 0.65
    x, labels = shots(count)
    other = shots(3, 5)[0]
    cone = [pad(a * inputs, (0, 1), value=(1 - a * a) ** 0.5) for inputs in (x, other)]
    assert max_error(kernel(cone[0], labels, cone[1]), kernel(x, labels, other)) < 1e-9


def test_around_the_shots_outputs_vary_by_one():
    x, labels = shots(6)
    K = kernel(x, labels, x)
    assert float(K.diagonal().mean() - K.mean()) == pytest.approx(1.0, abs=1e-12)


def test_at_the_common_offset_they_vary_by_the_bias():
    x, labels = shots(6)
    c = common_offset(x, OPTIONS["reach"])
    assert float(kernel(x, labels, c.unsqueeze(0))) == pytest.approx(OPTIONS["bias"], abs=1e-9)


def test_the_offset_is_what_shots_do_not_vary_along():
    """A mean that lies across the plane of the shots is all offset, one within it is particular to them."""
    g = torch.Generator().manual_seed(1)
    plane = torch.randn(200, 3, dtype=torch.float64, generator=g)
    x = pad(plane + torch.tensor([4.0, 0.0, 0.0]), (0, 2))
    x[:, 4] = 2.0
    assert max_error(common_offset(x, 0.01), torch.tensor([0.0, 0, 0, 0, 2.0], dtype=torch.float64)) < 0.1
    assert max_error(common_offset(x, 1e9), x.mean(0)) < 1e-6
    assert max_error(common_offset(x, 0.0), x.mean(0)) < 1e-12


@pytest.mark.parametrize("count", [3, 30])  # by the shots' products, and by the features' covariance
def test_both_ways_to_the_offset_agree(count):
    x, _ = shots(count)
    V = (x - x.mean(0)).mT @ (x - x.mean(0)) / len(x)
    ridge = 0.05 * typical(V)
    expected = ridge * torch.linalg.solve(V + ridge * torch.eye(DIM, dtype=V.dtype), x.mean(0))
    assert max_error(common_offset(x, 0.05), expected) < 1e-10


def test_single_shots_have_no_metric_of_their_own():
    x, labels = shots(1)
    assert not within_class_covariance(x, labels).any()
    A = measured_columns(x, labels, **OPTIONS)
    assert max_error(A, torch.eye(DIM, dtype=A.dtype)) < 1e-12


def test_shots_that_do_not_vary_leave_the_identity():
    x = torch.ones(6, DIM, dtype=torch.float64) / DIM**0.5
    A = measured_columns(pad(x, (0, 1), value=1.0), torch.tensor([0, 0, 1, 1, 2, 2]), **OPTIONS)
    assert max_error(A, torch.eye(DIM + 1, dtype=A.dtype)) < 1e-12


def labelled_logits(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of which the labels were drawn, divided by a factor."""
    g = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(20_000, CLASSES, dtype=torch.float64, generator=g)
    return logits / scale, torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_likeliest_scale_is_that_of_the_labels(scale):
    logits, labels = labelled_logits(scale)
    assert likeliest_scale(logits, labels) == pytest.approx(scale, rel=0.05)
    assert likeliest_scale(logits + 25, labels) == pytest.approx(likeliest_scale(logits, labels), abs=1e-9)


def test_timid_logits_are_believed_more_and_others_hardly_less():
    mean = Calibrated(gamma=0.7, rise=0.5, fall=0.05)
    timid, bold = (mean.factor(*labelled_logits(scale)) for scale in (2.0, 0.5))
    assert timid == pytest.approx(0.7 * 2**0.5, rel=0.05)
    assert bold == pytest.approx(0.7 * 0.5**0.05, rel=0.02)
    logits, labels = labelled_logits(1.0)
    assert 0 < mean.factor(-logits, labels) < 0.7  # worse than chance is not turned round
    assert mean.factor(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)) == pytest.approx(0.7)
    assert mean.factor(logits[:0], labels[:0]) == 0.7
    assert ZeroShot(gamma=0.4).factor(logits, labels) == 0.4


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"gamma": float("nan")}, {"rise": 2.0}, {"fall": -0.1}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Calibrated(**options)
