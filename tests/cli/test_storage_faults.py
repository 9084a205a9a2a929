"""A disk that fills up or turns read-only in the middle of a run: one sentence, nothing lost, and on from there.

Real processes on a real file system of some megabytes, mounted where only they can see it.
"""

import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hostile import Disk, can_mount, program

from kngd_ray.training.checkpoint import load
from kngd_ray.training.resumable import latest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_mount(), reason="needs `unshare --mount` and `mount`, as root has them"),
]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS = 480  # a few milliseconds each: enough for a fault to befall them


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    with Disk(tmp_path / "disk", 48) as disk:
        yield disk


def settings(data: Path, cache: Path, storage: Path, *more: str) -> list[str]:
    return [
        f"data.path={data}",
        "data.train_domain=noto",
        "data.shots=4",
        f"data.cache_dir={cache}",
        "trainer.num_workers=0",
        "trainer.checkpoint_every=1",
        f"trainer.storage_path={storage}",
        "tracking.enabled=false",
        f"epochs={STEPS // 3}",
        "batch_size=4",
        "posterior.folds=0",
        *more,
    ]


def run(command: list[str], code: int) -> str:
    """Run to the end; returns the last line of standard error, which is the only one by kngd-ray."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=ENVIRONMENT)
    return ended(done.returncode, done.stderr, code)


def ended(returned: int, stderr: str, code: int) -> str:
    assert returned == code, stderr
    assert "Traceback" not in stderr, stderr
    last = stderr.splitlines()[-1] if stderr else ""
    if code:
        assert last.startswith("kngd-ray: "), stderr
        assert stderr.count("kngd-ray: ") == 1, stderr
    return last


def until(step: int, fits: Path, process: "subprocess.Popen[str]") -> None:
    """Wait for a checkpoint of a step, or a later one."""
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        found = [int(match[1]) for path in fits.glob("*/step-*") if (match := re.match(r"step-(\d+)", path.name))]
        if max(found, default=0) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"no step {step}: {process.communicate()[1]}")


def tensors(fit: Path) -> dict[str, bytes]:
    """The final checkpoint's files."""
    found = latest(fit)
    assert found is not None
    assert found.manifest["step"] == found.manifest["steps"]
    return {name: (found.folder / name).read_bytes() for name in found.manifest["files"]}


@pytest.fixture(scope="module")
def reference(small_data: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run ends with that nothing befell."""
    storage = tmp_path_factory.mktemp("reference")
    run(program("train", *settings(small_data, shared_cache, storage, "trainer.name=whole")), 0)
    return tensors(storage / "whole" / "fits" / "kalman-seed0")


def befallen(
    disk: Disk, step: int, fault: Callable[[], None], mend: Callable[[], None], data: Path, cache: Path
) -> tuple[str, dict[str, bytes]]:
    """Let a fault befall a run, and continue it when it is over; returns the sentence and what the run ends with."""
    arguments = settings(data, cache, disk.folder / "runs", "trainer.name=hit")
    fits = disk.inside / "runs" / "hit" / "fits"
    process = subprocess.Popen(
        disk.command(*program("train", *arguments)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    until(step, fits, process)
    fault()
    _, stderr = process.communicate(timeout=400)
    sentence = ended(process.returncode, stderr, 1)
    good = latest(fits / "kalman-seed0")
    assert good is not None, "no checkpoint outlived the fault"
    assert good.manifest["step"] >= step - 1
    load(good.folder)
    mend()
    run(disk.command(*program("train", "--resume", disk.folder / "runs" / "hit")), 0)
    return sentence, tensors(fits / "kalman-seed0")


def test_a_disk_that_fills_up(disk: Disk, reference: dict[str, bytes], small_data: Path, shared_cache: Path) -> None:
    step = random.Random(os.urandom(8)).randrange(2, STEPS // 2)
    sentence, end = befallen(disk, step, disk.fill, disk.clear, small_data, shared_cache)
    assert "no space left while writing" in sentence, (step, sentence)
    assert "--resume" in sentence
    assert end == reference, step


@pytest.mark.parametrize("left", [1, 4096, 3 * 4096])
def test_a_disk_with_room_for_a_part_of_a_checkpoint(
    disk: Disk, reference: dict[str, bytes], small_data: Path, shared_cache: Path, left: int
) -> None:
    sentence, end = befallen(disk, 9, lambda: disk.fill(left), disk.clear, small_data, shared_cache)
    assert "no space left while writing" in sentence
    assert end == reference


def test_a_disk_that_turns_read_only(
    disk: Disk, reference: dict[str, bytes], small_data: Path, shared_cache: Path
) -> None:
    frozen = "runs/hit/fits"
    sentence, end = befallen(
        disk, 7, lambda: disk.freeze(frozen), lambda: disk.freeze(frozen, False), small_data, shared_cache
    )
    assert "cannot write" in sentence
    assert "Read-only" in sentence
    assert end == reference


def test_features_on_a_full_disk(disk: Disk, small_data: Path, tmp_path: Path) -> None:
    """Of features nothing can be kept where there is no room; there is no half of a part, and no run."""
    arguments = settings(small_data, disk.folder / "cache", tmp_path / "runs", "trainer.name=x", "epochs=1")
    disk.fill()
    sentence = run(disk.command(*program("train", *arguments)), 1)
    assert "cannot write features" in sentence
    assert "free some space" in sentence
    assert not [path for path in (disk.inside / "cache").rglob("*") if path.is_file()]
    assert not (tmp_path / "runs").exists()
    disk.clear()
    run(disk.command(*program("train", *arguments)), 0)


def test_a_tracking_database_on_a_full_disk(disk: Disk, small_data: Path, shared_cache: Path, tmp_path: Path) -> None:
    """The run goes on to its end and keeps what it has to say; ``sync`` sends each step once when there is room."""
    uri = f"sqlite:///{disk.folder}/mlflow.db"
    more = ("trainer.name=x", "tracking.enabled=true", f"tracking.uri={uri}", "tracking.log_model=false", "epochs=10")
    first = settings(small_data, shared_cache, tmp_path / "runs", *more, "trainer.name=before", "epochs=1")
    run(disk.command(*program("train", *first)), 0)  # makes the tables
    disk.fill()
    done = subprocess.run(
        disk.command(*program("train", *settings(small_data, shared_cache, tmp_path / "runs", *more), "--json")),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "has no space left: free some" in done.stderr
    assert "kngd-ray sync" in done.stderr
    assert json.loads(done.stdout)["run_id"] is None
    disk.clear()
    for _ in range(2):
        run(disk.command(*program("sync", tmp_path / "runs" / "x")), 0)
    code = (
        "import sys, json; from mlflow import MlflowClient; c = MlflowClient(sys.argv[1]);"
        "e = c.get_experiment_by_name('kngd_ray').experiment_id; runs = c.search_runs([e]);"
        "print(json.dumps({r.info.run_name: [m.step for m in c.get_metric_history(r.info.run_id, 'train/nll')]"
        " for r in runs}))"
    )
    read = subprocess.run(
        disk.command(program()[0], "-c", code, uri), capture_output=True, text=True, timeout=300, check=True
    )
    sent = json.loads(read.stdout.splitlines()[-1])
    assert sent["x/kalman-seed0"] == list(range(1, 31))
    assert len(sent) == 2
