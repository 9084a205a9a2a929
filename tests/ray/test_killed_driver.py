"""The whole command killed by SIGKILL, and continued by name."""

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
from helpers.resuming import everything_in
from helpers.workloads import SLOW_RUN

from kngd_ray.training.resumable import latest

pytestmark = pytest.mark.ray


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kngd_ray.cli", "train", *arguments]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_bitwise(workers: int, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    whole = subprocess.run(
        command(*settings("whole", workers), *SLOW_RUN, "--json"), capture_output=True, text=True, timeout=300
    )
    assert whole.returncode == 0, whole.stderr

    driver = subprocess.Popen(
        command(*settings("killed", workers), *SLOW_RUN), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
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

    storage = f"trainer.storage_path={runs}"
    resumed = subprocess.run(
        command(storage, "--resume", "killed", "--json"), capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr
    folders = [latest(runs / name / "fits" / "kalman-seed0") for name in ("whole", "killed")]
    expected, found = (everything_in(checkpoint.folder) for checkpoint in folders if checkpoint is not None)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    reports = [json.loads(process.stdout) for process in (whole, resumed)]
    assert [{k: r[k] for k in ("id", "ood", "zero_shot", "steps")} for r in reports[:1]] == [
        {k: r[k] for k in ("id", "ood", "zero_shot", "steps")} for r in reports[1:]
    ]
