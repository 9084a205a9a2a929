"""Fits that advance together are the fits that each would be alone: same beliefs, figures, refusals and ends."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from helpers.cases import (
    ADAPTERS,
    FAMILIES,
    NOISES,
    OBSERVATIONS,
    PROCESSES,
    in_turn,
    make_options,
    make_support,
    make_task,
    some_slow,
)
from helpers.compare import covariance_of, max_error
from helpers.cones import as_shipped

from kngd_ray.errors import FilterError, IndefiniteError
from kngd_ray.filters import Ema, Factors, Forgetting, OrnsteinUhlenbeck, RandomWalk
from kngd_ray.filters import diagonal as diagonal_module
from kngd_ray.filters._innovation import solve_innovation
from kngd_ray.filters.diagonal import Diagonal, slices_pay
from kngd_ray.training import batched_fits as together_module
from kngd_ray.training.batched_fits import BatchedFit, fit_together, shape_of
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask, begin, fit

ALL_MOVES = (RandomWalk(q=2e-3), OrnsteinUhlenbeck(gamma=0.8), Forgetting(factor=0.8, rate=0.9), RandomWalk(q=0.0))


@pytest.fixture
def only_together(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No trial falls back to the ordinary code, and no operation to a loop over trials."""
    monkeypatch.delattr(together_module._Trial, "alone")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        yield


def varied(task: FitTask, b: int) -> FitTask:
    """The same task with all that may differ: numbers, process, seed and shots."""
    options, noise = task.options, task.options.noise.observation
    options = replace(
        options,
        filter=replace(options.filter, p0=options.filter.p0 * (1 + 0.3 * b)),
        observation=tuple(replace(model, r0=model.r0 * (1 + 0.1 * b)) for model in options.observation),
        noise=replace(
            options.noise,
            process=ALL_MOVES[b % 4] if b else options.noise.process,
            observation=replace(noise, beta=0.5 + 0.05 * b) if isinstance(noise, Ema) else noise,
        ),
    )
    support = make_support(len(task.support), task.support.features.dtype, seed=2 + b)
    return replace(task, options=options, seed=task.seed + b, support=support)


def assert_alike(found: BatchedFit | FilterError, task: FitTask, tolerance: float) -> None:
    expected = []
    method = fit(task, on_step=expected.append)
    assert isinstance(found, BatchedFit)
    assert max_error(found.method.belief.mu, method.belief.mu) < tolerance
    assert max_error(covariance_of(found.method), covariance_of(method)) < tolerance
    assert max_error(found.method.noise, method.noise) < tolerance
    for one, other in zip(found.method.head.parameters(), method.head.parameters(), strict=True):
        assert max_error(one.detach(), other.detach()) < tolerance
    for record, other in zip(found.records, expected, strict=True):
        assert (record.step, record.steps, record.refused) == (other.step, other.steps, other.refused)
        assert (record.stats is None) == (other.stats is None)
        if other.stats is not None:
            figures = asdict(record.stats)
            for name, value in asdict(other.stats).items():
                if value is None:
                    assert figures[name] is None
                else:
                    assert max_error(figures[name], value) < tolerance, name


def assert_all_alike(task: FitTask, count: int, tolerance: float = 1e-9) -> None:
    tasks = [varied(task, b) for b in range(count)]
    assert len({shape_of(task) for task in tasks}) == 1
    for found, task in zip(fit_together(tasks), tasks, strict=True):
        assert_alike(found, task, tolerance)


@pytest.mark.usefixtures("double", "only_together")
@pytest.mark.parametrize(("family", "adapter"), in_turn(FAMILIES, ADAPTERS))
def test_every_family_and_adapter(family, adapter):
    assert_all_alike(make_task(make_options(family, adapter=adapter, epochs=1), dtype=torch.float64), 2)


@pytest.mark.usefixtures("double", "only_together")
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_observation_and_noise(observation, noise):
    if (observation, noise) == ("cosine", "categorical"):
        pytest.skip("a cosine has no likelihood")
    assert_all_alike(make_task(make_options("ekf", observation, noise=noise), dtype=torch.float64), 2)


@pytest.mark.usefixtures("double", "only_together")
@pytest.mark.parametrize("count", some_slow([1, 2, 7], 2))
@pytest.mark.parametrize("process", PROCESSES)
def test_any_number_and_processes_side_by_side(process, count):
    for family in ("ekf", "kronecker", "diagonal_low_rank"):
        assert_all_alike(make_task(make_options(family, process=process), dtype=torch.float64), count)


@pytest.mark.usefixtures("double", "only_together")
@pytest.mark.parametrize("columns", some_slow(["function", "within_class"], "within_class"))
@pytest.mark.parametrize(
    "changes",
    [
        ("filter.iterations=4",),
        ("filter.iterations=1", "filter.serial=3"),
        ("filter.iterations=2", "filter.serial=2"),
        ("filter.iterations=1", "noise.tempering=passes"),
    ],
    ids="-".join,
)
def test_relinearised_serial_and_untempered_where_real_fits_happen(changes, columns):
    """At scale 100, in a cone, under a prior that each trial's shots inform."""
    settings = [
        f"filter.covariance={{kind: kronecker, columns: {columns}, shrinkage: 0.3}}",
        "filter.mean=zero_shot",
        "filter.logit_spread=0",
        "observation=log_likelihood,cosine",
        "noise.observation=ema",
        "epochs=2",
        "batch_size=16",
        "filter.tolerance=1e-9",  # a fit alone stops once it is met, those of a batch go on
        *changes,
    ]
    tasks = [as_shipped(2, *settings, f"filter.logit_variance={30 * 3**b}", seed=b) for b in range(3)]
    assert len({shape_of(task) for task in tasks}) == 1
    for found, task in zip(fit_together(tasks), tasks, strict=True):
        assert_alike(found, task, 1e-6)  # a loss of 1e-5 nats is what large logits leave


@pytest.mark.usefixtures("double", "only_together")
@pytest.mark.parametrize("rule", some_slow(["ekf", "vdekf"], "vdekf"))
@pytest.mark.parametrize("changes", [{}, {"serial": 3}, {"iterations": 3}], ids=str)
@pytest.mark.parametrize("adapter", ["class_residual", "bottleneck-image"])
def test_each_draws_its_own_signs(adapter, changes, rule):
    options = make_options("ekf", adapter=adapter, **changes)
    family = Diagonal(rule=rule, samples=2)
    options = replace(options, filter=replace(options.filter, covariance=family))
    task = make_task(options, dtype=torch.float64)
    assert_all_alike(task, 2)
    one, other = fit_together([task, replace(task, seed=1)])
    assert max_error(covariance_of(one.method), covariance_of(other.method)) > 1e-3


@pytest.mark.usefixtures("double", "only_together")
def test_pairs_in_several_runs(monkeypatch):
    monkeypatch.setattr(diagonal_module, "_PAIR_NUMBERS", 60)
    assert_all_alike(make_task(make_options("ekf", adapter="bottleneck-image"), dtype=torch.float64), 2)


@pytest.mark.usefixtures("only_together")
@pytest.mark.parametrize("family", ["ekf", "vdekf", "kronecker"])
@pytest.mark.parametrize("adapter", ["class_residual", "bottleneck-image", "linear+class_residual"])
def test_single_precision(family, adapter):
    assert_all_alike(make_task(make_options(family, noise="ema-scalar", adapter=adapter)), 3, tolerance=1e-4)


@pytest.mark.usefixtures("double")
def test_a_posterior_as_the_prior():
    class Earlier:
        """A prior in memory, of no stream."""

        taken = 0

        def load(self):
            return state

    task = make_task(make_options(noise="ema-scalar", process="ornstein_uhlenbeck"), dtype=torch.float64)
    state = fit(task).state()
    assert_all_alike(replace(task, prior=Earlier()), 3)


@pytest.mark.usefixtures("double", "only_together")
@pytest.mark.parametrize(("family", "adapter"), in_turn(FAMILIES, ADAPTERS))
def test_predicting_labels_before_they_are_learned_from(family, adapter):
    options = make_options(family, adapter=adapter, noise="ema-scalar", process="ornstein_uhlenbeck")
    assert_all_alike(replace(make_task(options, dtype=torch.float64), prequential=True), 2)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("noise", ["fixed", "ema-full"])
def test_a_refused_batch_is_that_trials_alone(noise):
    """NaN shots, one and many: some steps are refused, the others go on; ema-full also raises within a matrix."""
    task = make_task(make_options(noise=noise, batch_size=2, epochs=3), dtype=torch.float64)
    tasks = [varied(task, b) for b in range(3)]
    for b, bad in ((1, [4]), (2, range(1, 15))):
        features = tasks[b].support.features.clone()
        features[list(bad)] = math.nan
        tasks[b] = replace(tasks[b], support=Support(features, tasks[b].support.labels))
    told = []
    found = fit_together(tasks, on_step=told.append)
    for b in (0, 1):
        assert_alike(found[b], tasks[b], 1e-9)
    assert any(record.refused for record in found[1].records)
    assert isinstance(found[2], FilterError)
    with pytest.raises(FilterError, match="10 steps in a row were refused") as alone:
        fit(tasks[2])
    assert str(found[2]) == str(alone.value)
    assert len(told) == 24
    ended = [records[2] is None for records in told]
    assert ended == sorted(ended)
    assert all(record is not None for records in told for record in records[:2])


def test_a_trial_that_diverges_ends_alone():
    """A prior so wide that S overflows float32 at every step, beside healthy ones."""
    task = make_task(make_options("ekf", "categorical", tempering="none"))
    tasks = [varied(task, b) for b in range(3)]
    wild = replace(tasks[1].options, filter=replace(tasks[1].options.filter, p0=3e38))
    tasks[1] = replace(tasks[1], options=wild)
    found = fit_together(tasks)
    for b in (0, 2):
        assert_alike(found[b], tasks[b], 1e-4)
    with pytest.raises(FilterError) as alone:
        fit(tasks[1])
    assert type(found[1]) is type(alone.value)
    assert str(found[1]) == str(alone.value)


@pytest.mark.usefixtures("double")
def test_an_s_that_needs_jitter_gets_it(monkeypatch):
    """Duplicate shots with next to no noise make S singular to the last digit: the trial steps alone, as it would."""
    task = make_task(make_options("dense", "cosine", epochs=1, tempering="none", batch_size=15), dtype=torch.float64)
    tasks = [varied(task, b) for b in range(2)]
    features, labels = tasks[1].support.features, tasks[1].support.labels
    tasks[1] = replace(
        tasks[1],
        support=Support(features[:1].expand(15, -1).clone(), labels[:1].expand(15).clone()),
        options=replace(
            tasks[1].options,
            observation=tuple(replace(model, r0=1e-8) for model in tasks[1].options.observation),
            filter=replace(tasks[1].options.filter, p0=1e12),
        ),
    )
    stepped = []
    alone = together_module._Trial.alone
    monkeypatch.setattr(together_module._Trial, "alone", lambda self, batch: stepped.append(self) or alone(self, batch))
    found = fit_together(tasks)
    assert_alike(found[0], tasks[0], 1e-9)
    assert len(stepped) == 1
    if isinstance(found[1], BatchedFit):
        assert found[1].records[0].stats.jitter > 0
        assert_alike(found[1], tasks[1], 1e-9)
    else:
        assert isinstance(found[1], IndefiniteError)


@pytest.mark.parametrize(
    "changes", [{"method": "adamw"}, {"gate": "skip"}, {"gate": "inflate"}], ids=lambda c: "-".join(c.values())
)
def test_what_runs_alone_has_no_shape(changes):
    task = make_task(make_options(**changes))
    assert shape_of(task) is None
    with pytest.raises(ValueError, match="cannot advance together"):
        fit_together([task, task])


def test_what_differs_in_more_than_numbers_has_another_shape():
    task = make_task(make_options(noise="ema-scalar"))
    others = [make_task(make_options(noise="ema-scalar"), shots=16)]
    others += [replace(task, logit_scale=9.0), replace(task, prequential=True)]
    others += [replace(task, class_embeddings=-task.class_embeddings)]
    for changes in ({"family": "kronecker"}, {"noise": "ema-diagonal"}, {"observation": "cosine"}, {"epochs": 3}):
        others.append(make_task(make_options(**({"noise": "ema-scalar"} | changes))))
    others.append(make_task(make_options(noise="ema-scalar", tempering="none")))
    assert len({shape_of(other) for other in (task, *others)}) == 1 + len(others)
    with pytest.raises(ValueError, match="cannot advance together"):
        fit_together([task, others[0]])


def test_no_fits_and_no_steps():
    assert fit_together([]) == []
    task = make_task(make_options(epochs=0))
    (found,) = fit_together([task])
    assert found.records == []
    assert torch.equal(found.method.belief.mu, begin(task, found.method.group).belief.mu)


@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
@pytest.mark.parametrize(("o", "i", "s", "k"), [(2, 40, 9, 1), (3, 60, 8, 2), (1, 7, 5, 3), (2, 30, 1, 1)])
def test_slices_of_factors_are_the_same_as_pairs(monkeypatch, o, i, s, k, rule):
    generator = torch.Generator().manual_seed(0)
    g, x, nu, variance = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((s, k, 1, o), (s, 1, i), s * k, o * i)
    )
    H, P, family = Factors(g, x), {"variance": variance.exp()}, Diagonal(rule=rule)
    results = []
    for by_slices in (True, False):
        monkeypatch.setattr(diagonal_module, "slices_pay", lambda H, take=by_slices: take)
        monkeypatch.setattr(diagonal_module, "pairs_pay", lambda H: True)
        gram, work = family.gram_layer(P, H)
        innovation = solve_innovation(gram + torch.eye(s * k, dtype=torch.float64), nu)
        results.append((gram, family.update_layer(P, H, work, innovation)["variance"]))
    for slices, pairs in zip(*results, strict=True):
        assert max_error(slices, pairs) < 1e-12


def test_slices_are_taken_for_few_classes():
    assert slices_pay(Factors(torch.zeros(32, 2, 1, 7), torch.zeros(32, 1, 256)))
    assert not slices_pay(Factors(torch.zeros(32, 2, 1, 100), torch.zeros(32, 1, 256)))
    assert not slices_pay(Factors(torch.zeros(512, 2, 1, 7), torch.zeros(512, 1, 256)))
