"""Whole towers trained on real pictures by real Ray workers: killed, started again, and continued on fewer."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from helpers.compare import max_error
from helpers.resuming import everything_in
from helpers.workers import own_workers

from kngd_ray.cluster import run_job
from kngd_ray.config import TrainerConfig, load_config
from kngd_ray.experiment.prepared import TaskData, prepare
from kngd_ray.experiment.task import open_task
from kngd_ray.training.fit import FitTask
from kngd_ray.training.job import FitEvent, Job
from kngd_ray.training.resumable import latest
from kngd_ray.training.start import HeadStart

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FULL = (
    "tune.parameters=full",
    "data.classes=[flower,bird]",
    "data.shots=3",
    "batch_size=4",  # batches of 4 and 2
    "posterior.folds=0",
)
STEPS = 12
LONG = "epochs=6"


@pytest.fixture
def prepared(settings: Callable[..., list[str]]) -> TaskData:
    return prepare(open_task(load_config(overrides=[*settings("prepared", 0), *FULL])))


def make_job(prepared: TaskData, folder: Path, *overrides: str, every: int = 2) -> Job:
    """A fit of the whole image tower, its pictures kept where all workers see them."""
    config = load_config(overrides=[*FULL, *overrides])
    task = FitTask(
        config.fit_options,
        0,
        prepared.shots(0, config.tune, folder),
        prepared.class_embeddings,
        prepared.model.logit_scale,
        towers=prepared.towers(config.tune),
        head=HeadStart.of(config.fit_options, prepared.support(0)),
    )
    return Job({f"{config.method}-seed0": task}, prepared.identity, folder, every)


def final(fit: Path) -> dict[str, torch.Tensor]:
    found = latest(fit)
    assert found is not None
    assert found.manifest["step"] == found.manifest["steps"]
    return everything_in(found.folder)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert max_error(found[name], expected[name]) <= tolerance, name


def test_a_killed_worker_of_a_full_fine_tuning_changes_nothing(
    ray_up: None, prepared: TaskData, tmp_path: Path
) -> None:
    killed: list[int] = []
    steps: list[int] = []

    def kill(event: FitEvent) -> None:
        assert event.error is None
        if event.record is not None:
            steps.append(event.record["step"])
        if not killed and steps and steps[-1] >= 5:
            victim = own_workers()[-1]
            victim.kill()
            killed.append(victim.pid)

    trainer = TrainerConfig(num_workers=2, max_failures=2)
    run_job(make_job(prepared, tmp_path / "killed", LONG), trainer, kill)
    assert killed
    assert steps[-1] == STEPS
    assert len(steps) > STEPS, "it went back to a checkpoint"
    run_job(make_job(prepared, tmp_path / "whole", LONG), trainer, lambda event: None)
    broken, whole = (final(tmp_path / name / "fits" / "kalman-seed0") for name in ("killed", "whole"))
    assert_close(broken, whole, 0.0)
    found = latest(tmp_path / "whole" / "fits" / "kalman-seed0")
    assert found is not None
    assert len(found.manifest["pieces"]) == 2


@pytest.mark.parametrize("method", ["adamw", "kalman"])
def test_two_workers_do_what_one_does(ray_up: None, prepared: TaskData, tmp_path: Path, method: str) -> None:
    """DDP, and the sharded filter, on pictures that each worker decodes for itself.

    Four steps: sums of another order part further with every step that is learned from them.
    """
    run_job(
        make_job(prepared, tmp_path / "two", f"method={method}", "epochs=2"),
        TrainerConfig(num_workers=2),
        lambda event: None,
    )
    run_job(
        make_job(prepared, tmp_path / "one", f"method={method}", "epochs=2"),
        TrainerConfig(num_workers=1),
        lambda event: None,
    )
    two, one = (final(tmp_path / name / "fits" / f"{method}-seed0") for name in ("two", "one"))
    trained = {key for key in one if not key.startswith("state/")}  # moments of AdamW are of gradients, not of weights
    assert_close({key: two[key] for key in trained}, {key: one[key] for key in trained}, 1e-4)


def test_a_run_stopped_in_the_middle_goes_on_with_fewer_workers(
    settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "kngd_ray.cli", "train", *arguments]

    runs = tmp_path / "runs"
    given = (*FULL, LONG, "tracking.enabled=false", "trainer.checkpoint_every=2", "filter.towers=1e-4")
    driver = subprocess.Popen(command(*settings("stopped", 2), *given), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    fit = runs / "stopped" / "fits" / "kalman-seed0"
    deadline = time.monotonic() + 300
    while not list(fit.glob("step-*/manifest.json")):
        assert driver.poll() is None, driver.stderr and driver.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    for process in family:
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=30)
    stopped = latest(fit)
    assert stopped is not None
    assert stopped.manifest["step"] < STEPS
    assert len(stopped.manifest["pieces"]) == 2

    more = [f"trainer.storage_path={runs}", "trainer.num_workers=1", "--resume", "stopped", "--json"]
    resumed = subprocess.run(command(*more), capture_output=True, text=True, timeout=400)
    assert resumed.returncode == 0, resumed.stderr
    whole = subprocess.run(
        command(*settings("whole", 0), *given, "--json"), capture_output=True, text=True, timeout=400
    )
    assert whole.returncode == 0, whole.stderr
    found = latest(fit)
    assert found is not None
    assert len(found.manifest["pieces"]) == 1
    assert_close(final(fit), final(runs / "whole" / "fits" / "kalman-seed0"), 1e-4)
    for test in ("id", "zero_shot"):
        figures = [json.loads(process.stdout)[test] for process in (resumed, whole)]
        figures = [one.get("id", one) for one in figures]
        assert figures[0]["nll"] == pytest.approx(figures[1]["nll"], rel=1e-3)
