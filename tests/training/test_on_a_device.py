"""What is fitted and calibrated works on a device that refuses what CUDA refuses, and says what the CPU says.

With ``KNGD_TEST_DEVICE=cuda`` it is the GPU itself, and the collectives are nccl's on one rank; see ``make gpu``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from helpers.cases import (
    ADAPTERS,
    FAMILIES,
    GATES,
    NOISES,
    OBSERVATIONS,
    PROCESSES,
    in_turn,
    make_options,
    make_task,
    some_slow,
)
from helpers.compare import max_error
from helpers.cones import as_shipped
from helpers.pretended_device import REAL, Counts, DeviceGroup, Machine, RealDevice, device_to_test, pretended_device
from helpers.ranks import run_ranks
from helpers.resuming import IDENTITY
from helpers.tower_fits import FITS, in_dtype, write_shots
from helpers.tower_fits import make_task as make_tower_task
from torch import Tensor

from kngd_ray.filters import Diagonal, newton
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training import first_head
from kngd_ray.training.batched_fits import BatchedFit, fit_together
from kngd_ray.training.calibration import Calibration, calibrate
from kngd_ray.training.checkpoint import load
from kngd_ray.training.classifier import Classifier
from kngd_ray.training.evaluation import evaluate
from kngd_ray.training.fit import FitTask, begin, fit
from kngd_ray.training.method import Method, MethodState
from kngd_ray.training.novelty import Novelty, calibrate_and_compare
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.predict import PosteriorOptions
from kngd_ray.training.restoring import restore_predictor
from kngd_ray.training.resumable import run_fit

HEADS = ("kalman", "kalman_diagonal", "kf_clip", "loko", "adamw", "sgd")  # presets whose towers are frozen


@pytest.fixture
def machine() -> Iterator[Machine | RealDevice]:
    """The device, plugged in for a test."""
    with device_to_test() as machine:
        yield machine


def numbers(method: Method) -> dict[str, Tensor]:
    """All that a checkpoint would hold, on the CPU."""
    state = method.state()
    parts = {"weights": state.weights, "replicated": state.replicated, "covariance": state.covariance}
    return {f"{part}/{name}": x.detach().cpu() for part, found in parts.items() for name, x in found.items()}


def assert_alike(found: Method, expected: dict[str, Tensor], tolerance: float) -> None:
    told = numbers(found)
    assert told.keys() == expected.keys()
    for name, x in expected.items():
        if x.numel() and bool(x.isfinite().all()):
            assert max_error(told[name], x) < tolerance, name


def assert_fits(task: FitTask, tolerance: float = 1e-4) -> None:
    """The fit of a task on the device is that on the CPU, with steps taken on the way."""
    steps = []
    expected = numbers(fit(task, on_step=steps.append))
    assert any(step.stats is not None for step in steps)
    with device_to_test() as machine:
        there = []
        method = fit(task, device=machine.device, on_step=there.append)
        assert_alike(method, expected, tolerance)
    assert [step.refused is None for step in there] == [step.refused is None for step in steps]


@pytest.mark.parametrize("preset", HEADS)
def test_every_preset_over_frozen_towers(preset):
    method = preset if preset in ("adamw", "sgd") else "kalman"
    assert_fits(as_shipped(2, f"method={method}", f"preset={preset}", dtype=torch.float32), tolerance=1e-3)


@pytest.mark.parametrize(("adapter", "family"), in_turn(ADAPTERS, FAMILIES))
def test_every_adapter_and_family(adapter, family):
    assert_fits(make_task(make_options(family, adapter=adapter, epochs=1)))


@pytest.mark.parametrize(("observation", "noise", "gate"), in_turn(OBSERVATIONS, NOISES, GATES))
def test_every_observation_noise_and_gate(observation, noise, gate):
    if (observation, noise) == ("cosine", "categorical"):
        pytest.skip("a cosine has no likelihood")
    assert_fits(make_task(make_options("ekf", observation, noise=noise, gate=gate, epochs=1)))


@pytest.mark.parametrize(
    ("changes", "family", "process"), in_turn([{}, {"iterations": 3}, {"serial": 3}], FAMILIES, PROCESSES), ids=str
)
def test_every_process_iterated_and_serial(process, family, changes):
    assert_fits(make_task(make_options(family, process=process, epochs=1, **changes)))


@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
def test_random_signs(rule):
    options = make_options("ekf")
    assert_fits(make_task(replace(options, filter=replace(options.filter, covariance=Diagonal(rule=rule, samples=2)))))


@pytest.mark.parametrize("family", some_slow(FAMILIES, "ekf", "kronecker"))
def test_fits_together(family, machine):
    tasks = [make_task(make_options(family, noise="ema-scalar"), seed=seed) for seed in range(3)]
    for task, found in zip(tasks, fit_together(tasks, device=machine.device), strict=True):
        assert isinstance(found, BatchedFit)
        assert_alike(found.method, numbers(fit(task)), 1e-4)


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return write_shots(tmp_path_factory.mktemp("shots") / "shots.bin")


@contextmanager
def on_one_head(monkeypatch: pytest.MonkeyPatch, tolerance: float) -> Iterator[None]:
    """Towers on all devices start at the head that the CPU fits; each device's own differs by no more than tolerance.

    Its mode is as exact as its tolerance, and its Newton steps are directed in float32. Training magnifies what is
    left, so that towers would be compared by how their device rounds.
    """
    own = first_head.fitted_head

    def of_the_cpu(task: FitTask, device: torch.device | str) -> tuple[MethodState, Tensor | None]:
        (fitted, held_out), (there, _) = own(task, "cpu"), own(task, device)
        for name, weight in fitted.weights.items():
            assert max_error(there.weights[name].cpu(), weight) < tolerance, name
        state = replace(
            fitted,
            weights={name: x.to(device) for name, x in fitted.weights.items()},
            replicated={name: x.to(device) for name, x in fitted.replicated.items()},
            covariance={name: x.to(device) for name, x in fitted.covariance.items()},
        )
        return state, None if held_out is None else held_out.to(device)

    with monkeypatch.context() as patched:
        patched.setattr(first_head, "fitted_head", of_the_cpu)
        yield


@pytest.mark.parametrize("name", some_slow(FITS, "full-ekf", "start-lora", "adamw"))
def test_trained_towers(name, shots, monkeypatch):
    task = make_tower_task(name, shots)
    if task.head is not None:
        support = task.head.support
        support = replace(support, features=support.features.double(), crops=support.crops.double())
        task = replace(task, head=replace(task.head, support=support), class_embeddings=task.class_embeddings.double())
    with in_dtype(torch.float64), on_one_head(monkeypatch, tolerance=1e-4):
        assert_fits(task, tolerance=1e-4 if task.options.refits else 1e-6)  # a refitted head is at its mode, too


@pytest.mark.parametrize("shots_of_a_class", some_slow([1, 2], 2))
@pytest.mark.parametrize("preset", some_slow(HEADS, "kalman"))
def test_calibration_and_novelty(preset, shots_of_a_class, machine):
    method = preset if preset in ("adamw", "sgd") else "kalman"
    epochs = ("epochs=2",) if preset in ("kalman_diagonal", "adamw", "sgd") else ()  # the others have one
    task = as_shipped(shots_of_a_class, f"method={method}", f"preset={preset}", *epochs, dtype=torch.float32)
    for options in (PosteriorOptions(predict="linearised", folds=2), PosteriorOptions(draws=4, folds=2)):
        expected, compared = calibrate_and_compare(task, options)
        found, there = calibrate_and_compare(task, options, machine.device)
        assert found.tau == expected.tau
        assert found.scaling == pytest.approx(expected.scaling, rel=1e-3)
        if expected.held_out_nll is None:
            assert found.held_out_nll is None
        else:
            assert found.held_out_nll == pytest.approx(expected.held_out_nll, rel=1e-3)
        assert (there is None) == (compared is None)
        if there is not None:
            assert there.quantiles == pytest.approx(compared.quantiles, rel=1e-3)
    assert calibrate(task, options, machine.device).tau == expected.tau


@pytest.mark.slow
def test_calibration_of_trained_towers(shots, machine):
    task = make_tower_task("lora-kronecker", shots)
    options = PosteriorOptions(draws=2, folds=2)
    expected, found = calibrate(task, options), calibrate(task, options, machine.device)
    assert found.tau == expected.tau
    assert found.held_out_nll == pytest.approx(expected.held_out_nll, rel=1e-3)


@dataclass
class NoTowers:
    """What stands for the model of a fit on features."""

    logit_scale: float
    device: str = "cpu"


@pytest.mark.parametrize("predict", ["linearised", "draws", "mean"])
@pytest.mark.parametrize("adapter", ["class_residual", "bottleneck"])
def test_predictions_of_a_checkpoint(tmp_path, adapter, predict, machine):
    task = as_shipped(2, "preset=kalman_diagonal", f"adapter={adapter}", dtype=torch.float32)
    kept = load(run_fit(task, tmp_path, IDENTITY, SingleProcess(), "cpu", checkpoint_every=0))
    options, model = PosteriorOptions(predict=predict, draws=3), NoTowers(task.logit_scale)
    here, there = (
        restore_predictor(kept, model, options, class_embeddings=task.class_embeddings, device=device)
        for device in ("cpu", machine.device)
    )
    one, other = (evaluate(p, {"id": task.support}, Calibration(0.1, 1.0)) for p in (here, there))
    assert max_error(other.probabilities["id"], one.probabilities["id"]) < 1e-4
    names = [str(c) for c in range(len(task.class_embeddings))]
    classifiers = [Classifier(model, p, names, Calibration(0.1, 1.0), Novelty((0.1, 1.0))) for p in (here, there)]
    one, other = (c.classify(task.support.features) for c in classifiers)
    for attribute in ("probabilities", "logit_std", "interval", "novelty"):
        if getattr(one, attribute) is not None:
            assert max_error(getattr(other, attribute), getattr(one, attribute)) < 1e-3, attribute


RANKED = {
    "default": lambda: as_shipped(2, dtype=torch.float32),
    **{
        f"{family}-{gate}": partial(
            lambda family, gate: make_task(
                make_options(family, adapter="linear+class_residual", noise="ema-full", gate=gate, epochs=1)
            ),
            family,
            gate,
        )
        for family in FAMILIES
        for gate in ("off", "inflate")
    },
}


TAKING_TURNS = ["default", *(f"{family}-{'off' if n % 2 else 'inflate'}" for n, family in enumerate(FAMILIES))]
RANKED_TOWERS = ("full-ekf", "cite-vdekf", "lora-kronecker")


def fitted_on_ranks(
    group: Group, shots: Pictures, names: Sequence[str], towers: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """What fits leave whose collectives refuse tensors of the CPU."""
    tasks = {name: RANKED[name]() for name in names}
    tasks |= {name: make_tower_task(name, shots) for name in towers}
    found = {}
    for name, task in tasks.items():
        with device_to_test() as machine:
            collectives = DeviceGroup(group, machine) if isinstance(machine, Machine) else group
            method = fit(task, group=collectives, device=machine.device)
            found[name] = {key: p.detach().cpu() for key, p in method.state().weights.items()}
    return found


@pytest.mark.parametrize(
    ("names", "towers"),
    [
        (TAKING_TURNS, RANKED_TOWERS),
        pytest.param([name for name in RANKED if name not in TAKING_TURNS], (), marks=pytest.mark.slow),
    ],
    ids=["taking turns", "the others"],
)
def test_ranks_whose_collectives_refuse_tensors_of_the_cpu(shots, names, towers):
    alone = {name: fit(RANKED[name]()).state().weights for name in names}
    world_size, backend = (1, "nccl") if REAL == "cuda" else (2, "gloo")
    ranks = run_ranks(world_size, fitted_on_ranks, shots, names, towers, backend=backend)
    for name, weights in alone.items():
        for rank in ranks:
            for key, x in weights.items():
                assert max_error(rank[name][key], x) < 1e-3, name
    for name in ranks[0].keys() - alone.keys():
        for key, x in ranks[0][name].items():
            assert torch.equal(ranks[-1][name][key], x), name


pretended = pytest.mark.skipif(REAL is not None, reason="a real device does not count")


def of_a_step(task: FitTask) -> Counts:
    """What the second half of a fit asks of the device, a step."""
    with pretended_device() as machine:
        marks: list[Counts] = []
        fit(task, device=machine.device, on_step=lambda _: marks.append(machine.counts.copy()))
    return marks[-1].since(marks[-2])


@pretended
def test_reads_and_kernels_of_a_step_of_adamw():
    counts = of_a_step(as_shipped(8, "method=adamw", dtype=torch.float32))
    assert counts.reads.total() <= 2, counts.reads
    assert counts.kernels.total() <= 50, counts.kernels
    assert not counts.unordered


@pretended
@pytest.mark.parametrize("observation", ["categorical", "log_likelihood"])
@pytest.mark.parametrize("covariance", ["diagonal", "kronecker"])
def test_reads_and_kernels_of_a_step_by_rows(covariance, observation):
    """Two solves, one of them for the evidence of an untempered noise, scores, figures and the check of the mean."""
    overrides = (f"filter.covariance={covariance}", f"observation={observation}", "filter.iterations=1")
    counts = of_a_step(as_shipped(8, "preset=kalman_diagonal", *overrides, dtype=torch.float32))
    assert counts.reads.total() <= (5 if covariance == "diagonal" else 8), counts.reads
    assert counts.kernels.total() <= (145 if covariance == "diagonal" else 200), counts.kernels.total()
    assert not counts.unordered, counts.unordered


@pretended
def test_reads_and_kernels_of_the_step_of_the_default(monkeypatch):
    """One step, which ends at the mode after as many linearisations as it takes: a read and 150 kernels for each."""
    taken = []
    mode = newton.mode

    def counted(*args, **options):
        before = machine.counts.copy()
        found = mode(*args, **options)
        taken.append((found.linearisations, machine.counts.since(before)))
        return found

    task = as_shipped(8, dtype=torch.float32)
    with pretended_device() as machine:
        method = begin(task, SingleProcess(), machine.device)
        monkeypatch.setattr(newton, "mode", counted)
        batch, before = task.to(machine.device).sampler.batch(0), machine.counts.copy()
        method.step(batch)
    counts = machine.counts.since(before)
    linearisations = sum(found for found, _ in taken)  # in single precision first, then in that of the belief
    reads, kernels = (sum(getattr(of, kind).total() for _, of in taken) for kind in ("reads", "kernels"))
    assert reads <= linearisations, [of.reads for _, of in taken]
    assert kernels <= 150 * linearisations + 20, kernels / linearisations
    assert counts.reads.total() - reads <= 16, counts.reads  # sweeps for the covariance, and figures
    assert counts.kernels.total() - kernels <= 400, counts.kernels.total()
    assert not counts.unordered, counts.unordered
