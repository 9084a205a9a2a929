"""The presets beside the default: not below zero-shot, whatever offset images share, whatever the logit scale."""

from dataclasses import replace

import pytest
import torch
from helpers.compare import covariance_of, max_error
from helpers.cones import CLASSES, SCALE, as_shipped, in_a_cone, in_both, made, task_of, texts_of_a_cone
from torch import Tensor

from kngd_ray.clip import CLIPHead
from kngd_ray.config import load_config
from kngd_ray.configs import names
from kngd_ray.errors import UsageError
from kngd_ray.filters.informed import common_offset
from kngd_ray.observations import Cosine, jacobian_rows
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.batched_fits import BatchedFit, fit_together, shape_of
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.fit import FitTask, begin, fit
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.predict import PosteriorOptions

PRESETS = ("kalman", "kalman_diagonal", "kf_clip", "loko")
HARD = 3.0


def logits(task: FitTask, x: Tensor) -> Tensor:
    head = fit(task).head
    with torch.no_grad():
        found: Tensor = head(x)
    return found


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


@pytest.mark.parametrize("shots", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_ends_below_zero_shot(preset, shots):
    others, texts = made(40, seed=9, spread=HARD)
    zero = accuracy(others.features @ texts.mT, others.labels)
    assert 1 / CLASSES < zero < 0.9
    tests = others.features, in_a_cone(others.features)
    tasks = [in_both(shots, f"preset={preset}", seed=seed, spread=HARD) for seed in range(3)]
    for of_geometry, x in zip(zip(*tasks, strict=True), tests, strict=True):
        assert sum(accuracy(logits(task, x), others.labels) for task in of_geometry) / len(tasks) >= zero


@pytest.mark.parametrize("preset", ["kalman_diagonal", "loko"])
def test_centred_features_give_the_same_fit_in_two_geometries(preset):
    own, cone = in_both(4, f"preset={preset}")
    others = made(5, seed=1)[0].features
    found = [logits(task, x).softmax(1) for task, x in ((own, others), (cone, in_a_cone(others)))]
    assert max_error(*found) < 1e-6


def test_uncentred_they_do_not():
    own, cone = in_both(4, "preset=kalman_diagonal", "adapter.centred=false")
    others = made(5, seed=1)[0].features
    found = [logits(task, x).softmax(1) for task, x in ((own, others), (cone, in_a_cone(others)))]
    assert max_error(*found) > 0.01


def test_features_are_measured_from_what_the_shots_share():
    task, _ = in_both(2, "preset=kalman_diagonal")
    assert isinstance(task.support, Support)
    head = begin(task, SingleProcess()).head
    assert isinstance(head, CLIPHead)
    assert head.residual is not None
    centre = common_offset(task.support.features, 0.01)
    assert max_error(head.residual.inputs(task.support.features), task.support.features - centre) < 1e-6


def test_a_cosine_per_logit_has_the_noise_that_its_scale_divides():
    for scale in (18.0, 100.0):
        support, texts = made(3)
        task = task_of(support, texts, scale, "preset=kf_clip")
        twin = replace(task, options=replace(task.options, observation=(Cosine(r0=2.5 / scale),)))
        task = replace(task, options=replace(task.options, observation=(Cosine(r0=2.5, per="logit"),)))
        x = made(5, seed=1)[0].features
        assert max_error(logits(task, x), logits(twin, x)) < 1e-9


def test_what_features_are_measured_from_is_part_of_the_state():
    task, _ = in_both(4, "preset=kalman_diagonal")
    done = fit(task)
    x = made(5, seed=1)[0].features
    state = done.state()
    again = begin(replace(task, support=made(4, seed=5)[0]), SingleProcess())
    again.load(state)
    with torch.no_grad():
        assert max_error(again.head(x), done.head(x)) == 0


@pytest.mark.parametrize("preset", ["kalman_diagonal", "loko"])
def test_fits_of_other_shots_and_variances_advance_together(preset):
    tasks = []
    for seed, variance in enumerate((10.0, 30.0, 100.0)):
        support, texts = made(2, seed=seed)
        cone = Support(in_a_cone(support.features), support.labels)
        overrides = (f"preset={preset}", f"filter.logit_variance={variance}", "noise.process=ornstein_uhlenbeck")
        tasks.append(task_of(cone, texts_of_a_cone(texts), 100.0, *overrides, "noise.process.gamma=0.99"))
    assert len({shape_of(task) for task in tasks}) == 1
    x = in_a_cone(made(5, seed=1)[0].features)
    for found, task in zip(fit_together(tasks), tasks, strict=True):
        assert isinstance(found, BatchedFit)
        predictors = [predictor_of(method, PosteriorOptions()) for method in (found.method, fit(task))]
        assert max_error(*(predictor.predict(x, 0.0).probabilities for predictor in predictors)) < 1e-5


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("preset", "variance"), [("kalman", 1000.0), ("kalman_diagonal", 30.0), ("kf_clip", 10.0), ("loko", 5.0)]
)
def test_a_logit_may_vary_as_much_as_published_results_say(preset, variance):
    """Nats^2 around its mean over the shots, before the first step; what was measured holds for no other prior."""
    task = as_shipped(2, f"preset={preset}", "filter.logit_spread=0")
    method = begin(task, SingleProcess())
    assert isinstance(method, KalmanNGD)
    x, C = task.support.features, len(task.class_embeddings)
    pieces = jacobian_rows(method.head, x, torch.eye(C, dtype=x.dtype).expand(len(x), C, C))
    H = torch.cat([*pieces.values()], 1)
    of_class = (H @ covariance_of(method) @ H.mT).view(len(x), C, len(x), C).diagonal(dim1=1, dim2=3)
    found = of_class.diagonal().sum() / len(x) / C - of_class.mean()
    assert float(found) == pytest.approx(variance, rel=1e-6)


def test_priors_that_presets_give_to_weights_and_towers():
    configs = {name: load_config(overrides=[f"preset={name}"]) for name in names("presets")}
    found = {name: config.filter for name, config in configs.items() if config.method == "kalman"}
    of_towers = {name: prior.tower_logit_variance for name, prior in found.items() if prior.logit_variance is None}
    assert of_towers.keys() == {"kalman_cite", "kalman_full", "kalman_lora", "kalman_norm"}
    assert len(set(of_towers.values())) == 1, "one number for whatever is trained"
    assert None not in of_towers.values()
    assert {name: prior.logit_spread for name, prior in found.items() if prior.logit_spread} == {"kalman": 2.0}


def test_it_is_centred_on_frozen_features_alone():
    with pytest.raises(UsageError, match="class_residual is centred on frozen features"):
        load_config(overrides=["method=kalman", "tune.parameters=lora", "adapter.centred=true"])


def test_gradient_methods_measure_features_likewise():
    support, texts = made(4)
    task = task_of(support, texts, SCALE, "adapter=class_residual", "adapter.centred=true", "method=sgd", "epochs=3")
    done = fit(task)
    assert isinstance(done.head, CLIPHead)
    assert done.head.residual is not None
    assert max_error(done.head.residual.centre, common_offset(support.features, 0.01)) < 1e-6
    again = begin(replace(task, support=made(4, seed=5)[0]), SingleProcess())
    again.load(done.state())
    x = made(5, seed=1)[0].features
    with torch.no_grad():
        assert max_error(again.head(x), done.head(x)) == 0
