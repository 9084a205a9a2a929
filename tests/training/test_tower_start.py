"""Towers that start where a head ended: at that head, with its belief, by a prior that means the same everywhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.cases import some_slow
from helpers.compare import max_error
from helpers.ranks import run_ranks
from helpers.resuming import IDENTITY, Killed, everything_in, kill_after
from helpers.tower_fits import FITS, in_dtype, make_task, started, write_shots

from kngd_ray.clip import CLIPNetwork, TuneOptions
from kngd_ray.clip.adapters import Bottleneck, ClassResidual, Linear
from kngd_ray.filters import BlockDiagonal, Diagonal, Factors, Inflate, Kronecker, Layer, Rows, Transition
from kngd_ray.observations import Categorical, Linearizer, trainable
from kngd_ray.observations.linearise import Linearisation
from kngd_ray.sharding import Group, Observed, SingleProcess, StreamedFilter
from kngd_ray.training import calibration, checkpoint
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import Calibration, calibrate_by_head, posterior_of_head, predictor_of
from kngd_ray.training.first_head import fitted_head
from kngd_ray.training.fit import FitTask, begin, fit, head_task
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.predict import PosteriorOptions
from kngd_ray.training.prior import Prior
from kngd_ray.training.resumable import run_fit
from kngd_ray.training.streamed import HELD_OUT
from kngd_ray.training.tower_prior import measured_variance

BEFORE = "start-lora"
MEAN = PosteriorOptions(predict="mean")


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Pictures:
    return write_shots(tmp_path_factory.mktemp("shots") / "pictures.arrow")


def changed(shots: Pictures, filter: dict[str, Any] | None = None, **options: Any) -> FitTask:
    """The fit of LoRA by the filter with other options, from the head of the pictures as they are."""
    before = FITS[BEFORE]
    told = replace(before, filter=replace(before.filter, **(filter or {})), **options)
    told = replace(told, tune=replace(told.tune, views=0))
    return started(replace(make_task(BEFORE, shots), options=told, head=None))


def with_crops(task: FitTask, views: int) -> FitTask:
    return started(replace(task, options=replace(task.options, tune=replace(task.options.tune, views=views))))


FAMILIES = {
    "lora": ({}, {}),
    "norm": ({}, {"tune": TuneOptions(parameters="norm")}),
    "full, both towers": ({}, {"tune": TuneOptions(parameters="full", include=("*",))}),
    "kronecker": ({"covariance": Kronecker()}, {}),
    "kronecker, reduced tokens": ({"covariance": Kronecker(tokens="reduced")}, {}),
    "block_diagonal": ({"covariance": BlockDiagonal(size=8)}, {}),
    "gate": ({"gate": Inflate()}, {}),
    "sampled labels": ({}, {"observation": (Categorical(samples=2),)}),
    "linear adapter": ({}, {"adapter": (Linear(),)}),
    "bottleneck": ({}, {"adapter": (Bottleneck(width=4), ClassResidual())}),
}


@pytest.mark.parametrize("case", some_slow(FAMILIES, "lora", "full, both towers", "kronecker, reduced tokens", "gate"))
def test_towers_that_may_not_move_leave_the_head(case, shots) -> None:
    """At a prior variance of 0 weights, covariance and predictions are those of the head's own run."""
    told, options = FAMILIES[case]
    task = changed(shots, {**told, "tower_logit_variance": 0.0}, **options)
    assert task.head is not None
    own, method = fit(head_task(task)), fit(task)
    assert isinstance(own, KalmanNGD)
    assert isinstance(method, KalmanNGD)
    assert isinstance(method.head, CLIPNetwork)
    for name, weight in own.parameters.items():
        assert torch.equal(method.parameters[f"head.{name}"], weight), name
        for key, P in own.belief.covariance[name].items():
            assert torch.equal(method.belief.covariance[f"head.{name}"][key], P), (name, key)
    assert method.head.head.gamma == own.head.gamma != 1.0  # type: ignore[union-attr]
    predicted = predictor_of(own, MEAN).predict(task.head.support.features, 0.0).probabilities
    found = predictor_of(method, MEAN).predict(shots, 0.0).probabilities
    assert max_error(found, predicted) < 1e-5


def test_towers_start_at_a_head_that_has_seen_crops(shots) -> None:
    task = with_crops(changed(shots, {"tower_logit_variance": 0.0}), 3)
    assert task.head is not None
    crops = task.head.support.crops
    assert crops is not None
    assert crops.shape[:2] == (len(shots), 3)
    assert not torch.equal(crops[:, 0], crops[:, 1])
    state, held_out = fitted_head(task, "cpu")
    method, plain = fit(task), fit(with_crops(task, 0))
    for name, weight in state.weights.items():
        assert torch.equal(method.state().weights[f"head.{name}"], weight)
        assert not torch.equal(plain.state().weights[f"head.{name}"], weight)
    assert held_out is not None
    assert torch.equal(method.state().replicated[HELD_OUT], held_out)


@pytest.mark.parametrize("name", [BEFORE, "start-adamw"])
def test_the_first_step_is_taken_at_the_head(name, shots) -> None:
    task = with_crops(make_task(name, shots), 0)
    head = fit(head_task(task)).head
    method = begin(task, SingleProcess())
    for key, weight in trainable(head).items():
        assert torch.equal(trainable(method.head)[f"head.{key}"], weight)
        assert bool(weight.any())
    tuned = fit(task)
    for key, weight in trainable(method.head).items():
        moved = trainable(tuned.head)[key]
        assert key.endswith("down") or not torch.equal(moved, weight), key


def test_an_ensemble_keeps_the_head(shots) -> None:
    """Averaged with the pretrained towers, not with CLIP's head: at alpha 0 it is the head's own fit."""
    task = with_crops(make_task(BEFORE, shots), 0)
    assert task.head is not None
    own, method = fit(head_task(task)), fit(task)
    found = predictor_of(method, MEAN, alpha=0.0).predict(shots, 0.0).probabilities
    expected = predictor_of(own, MEAN).predict(task.head.support.features, 0.0).probabilities
    assert max_error(found, expected) < 1e-5


def test_a_start_without_features_is_refused(shots) -> None:
    with pytest.raises(ValueError, match=r"tune.start is head.*zero_shot"):
        fit(replace(make_task(BEFORE, shots), head=None))


@pytest.mark.parametrize("name", [BEFORE, "start-adamw"])
def test_killed_and_resumed_bitwise(name, shots, tmp_path) -> None:
    task = make_task(name, shots)
    straight = run_fit(task, tmp_path / "straight", IDENTITY, SingleProcess(), "cpu", checkpoint_every=2)
    with pytest.raises(Killed):
        run_fit(task, tmp_path / "killed", IDENTITY, SingleProcess(), "cpu", checkpoint_every=2, on_step=kill_after(3))
    resumed = run_fit(task, tmp_path / "killed", IDENTITY, SingleProcess(), "cpu", checkpoint_every=2)
    found, expected = everything_in(resumed), everything_in(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_that_continues_another_is_resumed_bitwise(shots, tmp_path) -> None:
    """The towers' prior is widened once, not again by the checkpoint: the process noise is in its units."""
    task = make_task(BEFORE, shots)
    first = run_fit(task, tmp_path / "first", IDENTITY, SingleProcess(), "cpu", checkpoint_every=0)
    task = replace(task, head=None, prior=Prior(first, checkpoint.read_manifest(first)))
    straight = run_fit(task, tmp_path / "straight", IDENTITY, SingleProcess(), "cpu", checkpoint_every=2)
    with pytest.raises(Killed):
        run_fit(task, tmp_path / "killed", IDENTITY, SingleProcess(), "cpu", checkpoint_every=2, on_step=kill_after(3))
    resumed = run_fit(task, tmp_path / "killed", IDENTITY, SingleProcess(), "cpu", checkpoint_every=2)
    found, expected = everything_in(resumed), everything_in(straight)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def in_float64(group: Group, shots: Pictures) -> dict[str, Any]:
    """A fit on some ranks."""
    with in_dtype(torch.float64):
        method = fit(make_task(BEFORE, shots), group=group)
    assert isinstance(method, KalmanNGD)
    return {"mu": method.belief.mu.clone(), "by": torch.tensor(method.posterior.towers_by, dtype=torch.float64)}


def test_ranks_agree(shots) -> None:
    alone = in_float64(SingleProcess(), shots)
    for rank in run_ranks(2, in_float64, shots):
        for key, expected in alone.items():
            assert max_error(rank[key], expected) < 1e-9, key


@pytest.mark.parametrize("parameters", ["lora", "norm", "full"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_prior_is_the_variance_of_a_logit(parameters, scale, shots) -> None:
    """Whatever is trained and whatever the logit scale, as all of the Jacobian has it."""
    tune = TuneOptions(parameters=parameters)
    task = changed(shots, {"tower_logit_variance": 7.0, "covariance": Diagonal()}, tune=tune)
    task = replace(task, logit_scale=task.logit_scale * scale)
    method = begin(task, SingleProcess())
    assert isinstance(method, KalmanNGD)
    assert measured_variance(method, shots) == pytest.approx(7.0, rel=1e-4)
    network = method.head
    assert isinstance(network, CLIPNetwork)
    passed = Linearizer(network, network.example(2)).run(
        network.inputs(shots.labels, image=torch.cat(list(shots.pixels(network.transform))))
    )
    C = network.classes
    H = passed.jacobian((torch.eye(C) - 1 / C).expand(len(shots), C, C))
    exact = sum(
        (H[name].rows().square() * state["variance"].flatten()).sum()
        for name, state in method.belief.covariance.items()
        if name.startswith("clip.")
    ) / (len(shots) * C)
    assert float(exact) == pytest.approx(7.0, rel=1e-3)


def test_the_prior_is_measured_on_no_more_rows_at_once_than_a_step_has(shots, monkeypatch) -> None:
    """A row holds the derivative at the output of every layer: of many at once they would not fit into memory."""
    task = changed(shots, {"tower_logit_variance": 7.0, "covariance": Diagonal()}, tune=TuneOptions(parameters="lora"))
    method, rows, own = begin(task, SingleProcess()), [], Linearisation.jacobian
    assert isinstance(method, KalmanNGD)
    monkeypatch.setattr(Linearisation, "jacobian", lambda self, V: rows.append(V.shape[0] * V.shape[1]) or own(self, V))
    expected = measured_variance(method, shots)
    assert max(rows) > 8
    monkeypatch.setattr("kngd_ray.training.tower_prior._AT_ONCE", 8)
    rows.clear()
    assert measured_variance(method, shots) == pytest.approx(expected, rel=1e-4)
    assert max(rows) <= 8


def test_towers_are_conditioned_as_if_head_and_towers_had_been_together() -> None:
    """On a linear model the means are those of one posterior of both from the shots, seen once."""
    torch.manual_seed(0)
    M = 4
    Hh, Ht, nu = (torch.randn(M, 1).double(), torch.randn(M, 3).double(), torch.randn(M).double())
    Ph, Pt = 0.05 * torch.eye(1).double(), 0.3 * torch.eye(3).double()
    head = torch.linalg.inv(torch.linalg.inv(Ph) + Hh.mT @ Hh)
    at = head @ Hh.mT @ nu  # the head's own fit
    H, P = torch.cat([Hh, Ht], 1), torch.block_diag(Ph, Pt)
    both = torch.linalg.solve(torch.linalg.inv(P) + H.mT @ H, H.mT @ nu)
    layers = [Layer("head", 1, 1, factored=False), Layer("tower", 3, 1, factored=False)]
    filter = StreamedFilter(BlockDiagonal(size=3), layers, SingleProcess(), settled=["head"])
    belief = filter.init(torch.cat([at, torch.zeros(3).double()]), 0.3)
    belief.covariance["head"]["covariance"].copy_(head)
    seen: dict[str, Factors | Rows] = {"head": Rows(Hh), "tower": Rows(Ht)}
    filter.update(belief, Transition(1.0, 1.0, 0.0), Observed(seen, nu - Hh @ at, None, [M], 1))
    assert max_error(belief.mu, both) < 1e-12
    assert torch.equal(belief.covariance["head"]["covariance"], head)
    expected = torch.linalg.inv(torch.linalg.inv(P) + H.mT @ H)[1:, 1:]
    assert max_error(belief.covariance["tower"]["covariance"], expected) < 1e-12


def test_the_head_s_folds_choose_for_its_towers(shots, monkeypatch) -> None:
    """What was held out was held out from the head alone: its figures are not the towers'."""
    asked = []

    def chosen(task: FitTask, options: PosteriorOptions, device: str, *_: object) -> Calibration:
        asked.append((task, options))
        return Calibration(0.4, 1.2, 0.7, 0.9, 1.3)

    monkeypatch.setattr(calibration, "calibrate", chosen)
    task = make_task(BEFORE, shots)
    of_towers = PosteriorOptions(predict="linearised", folds=0, sharpening_spread=0.2, tau_median=0.6)
    assert calibrate_by_head(task, of_towers) == Calibration(0.4, 1.2, sharpening=1.3)
    calibrate_by_head(task, replace(of_towers, temperature=0.05))
    own = replace(task.head.posterior, sharpening_spread=0.2)
    assert [options for _, options in asked] == [own, replace(own, temperature=0.05)]
    assert posterior_of_head(task, replace(of_towers, temperature=0.05)).unasked == 0.05, "also where folds fail"
    assert own.folds, "the head's own, which the towers have none of"
    assert all(isinstance(head.support, Support) and head.towers is None for head, _ in asked)
    drawn = replace(of_towers, predict="draws", folds=0)
    assert calibrate_by_head(task, drawn) == Calibration(drawn.unasked, 1.0)
    assert len(asked) == 2
