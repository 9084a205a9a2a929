"""Crops are views of a picture: learned from beside it, counted as one with it, held out with it, never predicted."""

from dataclasses import replace

import pytest
import torch
from helpers.compare import max_error
from helpers.cones import in_both
from helpers.ranks import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

from kngd_ray.clip import ModelConfig, given_precomputed, load_model
from kngd_ray.config import load_config
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training.batched_fits import fit_together
from kngd_ray.training.batches import BatchSampler, Support, seeded
from kngd_ray.training.calibration import held_out_tasks, predictor_of
from kngd_ray.training.fit import FitTask, Towers, fit
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.novelty import calibrate_and_compare, total_variance, variance_left_out
from kngd_ray.training.options import FitOptions, counted_once
from kngd_ray.training.predict import PosteriorOptions
from kngd_ray.training.stream import Stream
from kngd_ray.training.views import crops_of

VIEWS = 3  # beside the picture
FIXED = ("filter.logit_spread=0", "filter.mean=zero_shot")


def cropped(task: FitTask, spread: float = 0.3, count: int = VIEWS) -> FitTask:
    """The fit with crops beside its shots: pictures moved by noise."""
    x = task.support.features
    noise = torch.randn(len(x), count, x.shape[1], generator=seeded(7), dtype=torch.float64).to(x)
    crops = normalize(x.unsqueeze(1) + spread * noise / x.shape[1] ** 0.5, dim=2)
    return replace(task, support=replace(task.support, crops=crops))


def task_of(shots: int, *options: str, dtype: torch.dtype = torch.float64) -> FitTask:
    return cropped(in_both(shots, *options, dtype=dtype)[0])


def belief_of(method: object) -> dict[str, Tensor]:
    assert isinstance(method, KalmanNGD)
    (P,) = method.belief.covariance.values()
    return {"mu": method.belief.mu, **P}


def test_views_that_do_not_differ_leave_the_fit_as_it_is() -> None:
    """Mean, covariance, prior variance, tau and novelty: counted as one, they say nothing that the picture does not."""
    plain = in_both(4)[0]
    same = replace(plain, support=replace(plain.support, crops=plain.support.features.unsqueeze(1).expand(-1, 5, -1)))
    own, found = fit(plain), fit(same)
    for key, expected in belief_of(own).items():
        # the metric within classes is a little smaller: six samples of a picture have one degree of freedom
        assert max_error(belief_of(found)[key], expected) < 0.2 * float(expected.abs().max()), key
    assert isinstance(own, KalmanNGD)
    assert isinstance(found, KalmanNGD)
    assert found.logit_variance == own.logit_variance


def test_all_views_are_observed_with_as_many_times_the_noise() -> None:
    """The same as a fit on all views as samples, by hand."""
    task = task_of(3, *FIXED)
    rows = task.support.all_views()
    assert rows.labels.tolist() == task.support.labels.repeat_interleave(VIEWS + 1).tolist()
    assert torch.equal(rows.features[:: VIEWS + 1], task.support.features)
    by_hand = fit(replace(task, support=rows, options=counted_once(task.options, VIEWS + 1)))
    found = fit(task)
    for key, expected in belief_of(by_hand).items():
        # to the mode's tolerance: the samples come in another order
        assert max_error(belief_of(found)[key], expected) < 1e-5 * float(expected.abs().max()), key
    unlike = fit(replace(task, support=task.support.whole()))
    assert max_error(belief_of(unlike)["mu"], belief_of(found)["mu"]) > 0.01 * float(belief_of(found)["mu"].abs().max())


def test_numbers_are_chosen_on_the_pictures_as_they_are() -> None:
    task = task_of(4)
    found, plain = fit(task), fit(replace(task, support=task.support.whole()))
    assert isinstance(found, KalmanNGD)
    assert isinstance(plain, KalmanNGD)
    assert found.logit_variance == plain.logit_variance
    assert found.head.gamma == plain.head.gamma


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_a_posterior_gives_up_a_picture_with_all_of_its_views(shots) -> None:
    """As a fit without it would, and not as one that has still seen its crops."""
    task = task_of(shots, *FIXED)
    found = variance_left_out(task, fitted=fit(task).state())
    assert found is not None
    assert found.shape == (len(task.support),)
    kept, expected = torch.arange(len(task.support)), []
    posterior = PosteriorOptions(predict="linearised")
    for n in kept[::4]:
        alone = fit(task.part(kept != n))
        predictor = predictor_of(alone, posterior)
        expected.append(total_variance(predictor, task.support.features[n : n + 1]))
    error = (found[::4] / torch.cat(expected)).log()
    seen = total_variance(predictor_of(fit(task), posterior), task.support.features)[::4]
    assert float(error.square().mean().sqrt()) < 0.12
    assert float(error.abs().mean()) < 0.2 * float((torch.cat(expected) / seen).log().mean())


def test_folds_hold_out_pictures_with_their_views() -> None:
    task = task_of(4)
    everything = task.support.features
    for part, held in held_out_tasks(task, 3):
        assert isinstance(part.support, Support)
        assert part.support.crops is not None
        assert part.support.crops.shape[:2] == (len(task.support) - len(held), VIEWS)
        missing = ~(everything.unsqueeze(1) == part.support.features).all(2).any(1)
        assert torch.equal(everything[missing], held.inputs)
    calibration, novelty = calibrate_and_compare(task, load_config().posterior, fitted=fit(task).state())
    assert calibration.held_out_accuracy is not None
    assert novelty is not None
    assert len(novelty.quantiles) == len(task.support)


def test_other_methods_see_another_view_in_each_epoch() -> None:
    """First the picture as it is, and never more samples than there are shots."""
    task = task_of(3)
    support, steps = task.support, 2 * (VIEWS + 1)
    assert isinstance(support, Support)
    sampler = BatchSampler(support, 0, steps, seed=0)
    for step in range(steps):
        chosen, batch = sampler.chosen(step), sampler.batch(step)
        assert torch.equal(batch.inputs, support.view(step % (VIEWS + 1)).features[chosen.local])
    assert torch.equal(support.view(0).features, support.features)
    for options in (
        load_config(overrides=["method=adamw", "epochs=3"]).fit_options,
        load_config(overrides=["preset=kalman_diagonal", "epochs=3"]).fit_options,
    ):
        own = replace(task, options=options)
        assert own.views == 1
        once = replace(own, options=replace(options, epochs=1))
        for told, alike in ((own, False), (once, True)):
            with_crops, whole = fit(told).state(), fit(replace(told, support=support.whole())).state()
            weights = [torch.equal(weight, whole.weights[name]) for name, weight in with_crops.weights.items()]
            assert all(weights) is alike


def test_fits_advance_together_as_alone() -> None:
    options = load_config(overrides=["preset=kalman_diagonal", "epochs=3"]).fit_options
    tasks = [replace(task_of(3), options=options, seed=seed) for seed in (0, 1)]
    for task, together in zip(tasks, fit_together(tasks), strict=True):
        alone = fit(task)
        assert isinstance(alone, KalmanNGD)
        assert max_error(together.method.belief.mu, alone.belief.mu) < 1e-8  # type: ignore[union-attr]


def test_who_predicts_before_learning_and_towers_take_no_crops() -> None:
    task = task_of(3)
    towers = Towers(ModelConfig(), ("a", "b"), ("{}",))
    for changed in (
        replace(task, prequential=True),
        replace(task, stream=Stream(load_config().posterior)),
        replace(task, towers=towers),
    ):
        assert isinstance(changed.support, Support)
        assert changed.support.crops is None
        assert torch.equal(changed.support.features, task.support.features)


def on_ranks(group: Group) -> dict[str, Tensor]:
    """The mean (n,) that several fits end at."""
    options = {"all": (), "minibatches": ("batch_size=7", "epochs=2")}
    return {name: fit(task_of(3, *told, *FIXED), group=group).belief.mu for name, told in options.items()}


def test_ranks_see_the_views_of_their_own_pictures() -> None:
    alone = on_ranks(SingleProcess())
    for rank in run_ranks(2, on_ranks):
        for name, mu in alone.items():
            assert max_error(rank[name], mu) < 1e-9 * float(mu.abs().max()), name


def test_other_crops_are_another_support_set() -> None:
    support = task_of(3).support
    assert isinstance(support, Support)
    digests = {support.digest(), support.whole().digest(), cropped(replace(task_of(3)), 0.1).support.digest()}
    assert len(digests) == 3
    moved = support.to("cpu").subset(torch.tensor([1, 2]))
    assert moved.crops is not None
    assert torch.equal(moved.crops, support.crops[1:3])  # type: ignore[index]


def test_which_fits_ask_for_crops() -> None:
    model = load_model(ModelConfig())
    default = load_config(overrides=["method=kalman"]).fit_options

    def count(options: FitOptions, pictures: int = 100) -> int:
        crops = crops_of(options, model, pictures)
        return 0 if crops is None else crops.count

    def tuned(options: FitOptions, **tune: object) -> FitOptions:
        return replace(options, tune=replace(options.tune, **tune))

    lora = load_config(overrides=["method=kalman", "preset=kalman_lora"]).fit_options
    one_pass = load_config(overrides=["preset=kalman_diagonal", "epochs=1"]).fit_options
    assert count(default) == count(lora) == 8
    assert count(tuned(default, views=2)) == 2
    assert count(default, 4000) == 3  # of more pictures fewer views
    assert count(default, 1 << 14) == count(default, 0) == 0
    assert count(tuned(default, views=0)) == count(tuned(default, augment="none")) == 0
    assert count(tuned(lora, start="zero_shot")) == 0
    assert count(one_pass) == 0
    assert count(replace(one_pass, epochs=2)) == 8
    assert count(load_config(overrides=["method=adamw"]).fit_options) == 8
    features = given_precomputed(torch.eye(4).numpy(), "abcd", 4, 100.0, "texts.npy")
    assert crops_of(default, features, 10) is None
