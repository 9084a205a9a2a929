"""The head of trained towers: fitted again on their features, by the prior that its shots had decided before."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cases import some_slow
from helpers.compare import max_error
from helpers.ranks import run_ranks
from helpers.tower_fits import FITS, make_task, started, write_shots

from kngd_ray.clip import CLIPNetwork, TuneOptions
from kngd_ray.clip.adapters import Linear
from kngd_ray.errors import FilterError
from kngd_ray.filters import ZeroShot
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training import refit
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import decided_task
from kngd_ray.training.fit import FitTask, begin, fit, head_task
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.refit import refits
from kngd_ray.training.start import describe_start

BOTH, TEXT = ("*",), ("transformer.*",)


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Pictures:
    return write_shots(tmp_path_factory.mktemp("shots") / "pictures.arrow")


def made(shots: Pictures, name: str = "start-lora", **options: Any) -> FitTask:
    """A fit from the head of the pictures as they are."""
    before = FITS[name]
    told = replace(before, **({"tune": replace(before.tune, views=0)} | options))
    task = replace(make_task(name, shots), options=told, head=None)
    return started(task)


def kept_as_left(task: FitTask) -> FitTask:
    tune = replace(task.options.tune, refit=False)
    return replace(task, options=replace(task.options, tune=tune))


TUNED = {
    "lora": TuneOptions(parameters="lora", targets=("q", "v", "mlp"), views=0),
    "norm": TuneOptions(parameters="norm", views=0),
    "both towers": TuneOptions(parameters="lora", include=BOTH, views=0),
}


@pytest.mark.parametrize("case", some_slow(TUNED, "lora", "both towers"))
def test_it_is_the_fit_of_the_head_on_features_of_the_trained_towers(case, shots) -> None:
    """By the prior of the first: its gamma, and the variance that its shots chose."""
    task = made(shots, tune=TUNED[case])
    left, found = fit(kept_as_left(task)), fit(task)
    assert isinstance(left, KalmanNGD)
    assert isinstance(found, KalmanNGD)
    assert isinstance(left.head, CLIPNetwork)
    first = decided_task(head_task(task))
    own = begin(first, SingleProcess()).head
    prior = replace(first.options.filter, mean=ZeroShot(gamma=own.gamma))  # type: ignore[union-attr]
    assert prior.logit_variance is not None
    assert prior.logit_spread == 0
    with torch.no_grad():
        pixels = torch.cat(list(shots.pixels(left.head.pictures.decoded)))
        seen = Support(left.head.encode(left.head.received(pixels)), shots.labels)
        again = replace(first, support=seen, class_embeddings=left.head.classifier())
    expected = fit(replace(again, options=replace(again.options, filter=prior)))
    assert isinstance(expected, KalmanNGD)
    for name, weight in expected.parameters.items():
        assert max_error(found.parameters[f"head.{name}"].detach(), weight.detach()) < 1e-4, name
        assert max_error(left.parameters[f"head.{name}"].detach(), weight.detach()) > 1e-3, name
        for key, P in expected.belief.covariance[name].items():
            assert max_error(found.belief.covariance[f"head.{name}"][key], P) < 1e-4, (name, key)
    towers = [name for name in left.parameters if name.startswith("clip.")]
    assert towers
    for name in towers:
        assert torch.equal(found.parameters[name], left.parameters[name]), name
        for key, P in left.belief.covariance[name].items():
            assert torch.equal(found.belief.covariance[name][key], P), (name, key)
    assert found.head.head.gamma == left.head.head.gamma == own.gamma  # type: ignore[union-attr]


def test_towers_that_have_not_moved_give_the_features_and_crops_that_the_head_has_seen(shots) -> None:
    task = made(shots, tune=replace(TUNED["norm"], views=3))
    assert task.head is not None
    network = begin(task, SingleProcess()).head
    assert isinstance(network, CLIPNetwork)
    with torch.no_grad():
        found = refit._features(network, task, SingleProcess())
    assert max_error(found.features, task.head.support.features) < 1e-5
    assert torch.equal(found.labels, shots.labels)
    assert found.crops is not None
    assert task.head.support.crops is not None
    assert max_error(found.crops, task.head.support.crops) < 1e-5


def on_ranks(group: Group, shots: Pictures) -> dict[str, Any]:
    method = fit(made(shots), group=group)
    return {name: p.detach().clone() for name, p in method.state().weights.items()}


def test_ranks_may_outnumber_shots(tmp_path) -> None:
    few = write_shots(tmp_path / "pictures.arrow", 2)
    alone = on_ranks(SingleProcess(), few)
    for rank in run_ranks(3, on_ranks, few):
        for name, weight in alone.items():
            assert max_error(rank[name], weight) < 1e-2, name


def test_a_frozen_image_tower_keeps_its_features(shots, monkeypatch) -> None:
    """Where only the text tower is trained, the head is fitted again to its class embeddings."""
    task = made(shots, tune=TuneOptions(parameters="lora", include=TEXT, views=0))
    assert task.head is not None
    task = replace(task, support=task.head.support)
    asked: list[FitTask] = []
    monkeypatch.setattr(refit, "fit", lambda task, **more: asked.append(task) or fit(task, **more))
    found = fit(task)
    assert isinstance(found.head, CLIPNetwork)
    (again,) = asked
    assert torch.equal(again.support.features, task.head.support.features)  # type: ignore[union-attr]
    with torch.no_grad():
        assert max_error(again.class_embeddings, found.head.classifier()) < 1e-6
    assert not torch.equal(again.class_embeddings, task.class_embeddings)


def test_towers_that_cannot_have_moved_keep_the_head(shots) -> None:
    task = made(shots)
    assert refits(task)
    narrow = replace(task.options.filter, tower_logit_variance=0.0)
    others = {
        "filter": {"filter": narrow},
        "epochs": {"epochs": 0},
        "alpha": {"tune": replace(task.options.tune, alpha=0.5)},
        "refit": {"tune": replace(task.options.tune, refit=False)},
    }
    for name, changed in others.items():
        other = replace(task, options=replace(task.options, **changed))
        assert not refits(other), name
        assert "again" not in str(describe_start(other.options, None)), name
    assert not refits(replace(task, prequential=True))
    assert refits(replace(task, options=replace(task.options, adapter=(Linear(),))))
    assert not refits(make_task("start-adamw", shots))
    assert not refits(replace(task, head=None))


def test_a_head_that_cannot_be_fitted_again_stays(shots, monkeypatch, caplog) -> None:
    """The towers have taken their time, and are kept."""

    def refused(*_: object, **__: object) -> None:
        raise FilterError("all 1 steps were refused.")

    task = made(shots)
    left = fit(kept_as_left(task))
    monkeypatch.setattr(refit, "fit", refused)
    found = fit(task)
    assert "stays as the trained towers left it" in caplog.text
    assert "all 1 steps were refused" in caplog.text
    assert all(torch.equal(found.state().weights[name], p) for name, p in left.state().weights.items())


def test_the_first_lines_tell(shots) -> None:
    options = FITS["start-lora"]
    assert "and fitted again on features of the trained towers" in str(describe_start(options, None))
    assert "again" not in str(describe_start(kept_as_left(made(shots)).options, None))
    assert "again" not in str(describe_start(FITS["start-adamw"], None))
