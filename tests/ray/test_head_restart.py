"""A cluster that outlives its commands: its head is switched off under one, a driver is killed beside it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.heads import Head, ray_head
from helpers.resuming import everything_in
from helpers.workloads import SLOW_RUN

from kngd_ray.training.resumable import latest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIT = (*SLOW_RUN, "tracking.enabled=false")


def start(head: Head, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kngd_ray.cli", "train", f"trainer.address={head.address}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=head.environment)


def wait_for_checkpoint(driver: subprocess.Popen[str], fit: Path) -> None:
    deadline = time.monotonic() + 300
    while not list(fit.glob("step-*/manifest.json")):
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(run: Path) -> dict[str, torch.Tensor]:
    found = latest(run / "fits" / "kalman-seed0")
    assert found is not None
    assert found.manifest["step"] == found.manifest["steps"]
    return everything_in(found.folder)


def ends_as_unkilled(head: Head, runs: Path, settings: Callable[..., list[str]]) -> bool:
    """Whether the run `cut`, continued, ends bitwise as one that nothing happened to."""
    resumed = start(head, f"trainer.storage_path={runs}", "--resume", "cut", "--json")
    _, errors = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, errors
    whole = start(head, *settings("whole", 2), *FIT)
    _, errors = whole.communicate(timeout=500)
    assert whole.returncode == 0, errors
    found, expected = end(runs / "cut"), end(runs / "whole")
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_head_that_is_switched_off(
    settings: Callable[..., list[str]], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("fault", "the head restarts")
    runs = tmp_path / "runs"
    with ray_head(tmp_path / "token") as head:
        driver = start(head, *settings("cut", 2), *FIT)
        wait_for_checkpoint(driver, runs / "cut" / "fits" / "kalman-seed0")
        head.kill()
        off = time.monotonic()
        _, errors = driver.communicate(timeout=120)  # a bound, not a measure
        record_property("seconds", json.dumps([round(time.monotonic() - off, 1)]))
    lines = errors.strip().splitlines()
    assert driver.returncode == 1, errors
    assert "the connection to the Ray cluster" in lines[-1], errors
    assert "--resume" in lines[-1]
    assert "Traceback" not in errors
    with ray_head(tmp_path / "token") as head:
        assert ends_as_unkilled(head, runs, settings)


def test_a_driver_killed_beside_a_head_that_lives_on(
    settings: Callable[..., list[str]], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("fault", "driver killed on a cluster that lives on")
    runs = tmp_path / "runs"
    with ray_head(tmp_path / "token") as head:
        driver = start(head, *settings("cut", 2), *FIT)
        wait_for_checkpoint(driver, runs / "cut" / "fits" / "kalman-seed0")
        assert head.workers()
        for worker in head.workers():
            worker.suspend()  # so that the run lasts until the second driver has been refused
        second = start(head, f"trainer.storage_path={runs}", "--resume", "cut")
        _, errors = second.communicate(timeout=300)
        for worker in head.workers():
            worker.resume()
        assert second.returncode == 2, errors
        assert "is being driven by another process" in errors
        driver.send_signal(signal.SIGKILL)
        driver.wait(timeout=30)
        off = time.monotonic()
        while head.workers():  # Ray's doing: they would go on writing beside a driver that resumes the run
            assert time.monotonic() - off < 60
            time.sleep(0.1)
        record_property("seconds", json.dumps([round(time.monotonic() - off, 1)]))
        assert ends_as_unkilled(head, runs, settings)
