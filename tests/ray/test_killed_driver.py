"""The whole command killed by SIGKILL, and continued by name."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from helpers.resuming import everything_in
from helpers.workloads import SLOW_RUN

from kngd_ray.config import load_config
from kngd_ray.console import Display
from kngd_ray.experiment.run import train
from kngd_ray.experiment.run_folder import resumed_config
from kngd_ray.training.resumable import latest

pytestmark = pytest.mark.ray

# the command in one thread, as this process has: sums come out the same, and no thread spins on a busy machine
PROGRAM = "from kngd_ray.experiment import run\nrun.cores = lambda: 1\nfrom kngd_ray import cli\ncli.main()"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_bitwise(
    workers: int, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed one is a process of its own; the others are run by this one, to spare what they would import."""
    monkeypatch.setattr("kngd_ray.experiment.run.cores", lambda: 1)
    runs = tmp_path / "runs"
    given = [*SLOW_RUN, f"tracking.enabled={str(workers > 0).lower()}"]
    display = Display(quiet_stdout=True)
    whole = train(load_config(overrides=[*settings("whole", workers), *given]), display)

    command = [sys.executable, "-c", PROGRAM, "train", *settings("killed", workers), *given]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    fit = runs / "killed" / "fits" / "kalman-seed0"
    deadline = time.monotonic() + 200
    while not list(fit.glob("step-*/manifest.json")):
        assert driver.poll() is None, driver.stderr and driver.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    for process in family:  # as a machine that goes down takes all its processes along
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=30)
    stopped = latest(fit)
    assert stopped is not None
    assert stopped.manifest["step"] < stopped.manifest["steps"]

    config = resumed_config("killed", [f"trainer.storage_path={runs}"])
    resumed = train(config, display, resume=True)
    folders = [latest(runs / name / "fits" / "kalman-seed0") for name in ("whole", "killed")]
    expected, found = (everything_in(checkpoint.folder) for checkpoint in folders if checkpoint is not None)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for part in ("id", "ood", "zero_shot", "steps"):
        assert resumed[part] == whole[part], part
