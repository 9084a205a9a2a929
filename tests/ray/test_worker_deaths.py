"""Workers killed at any moment: the last sound checkpoint is gone on from, and the end is bitwise the same."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from helpers.cases import some_slow
from helpers.dying import EVERY, POINTS, fit_or_die
from helpers.ranks import RankError, run_ranks
from helpers.resuming import IDENTITY, everything_in
from helpers.workers import own_workers
from helpers.workloads import long_task

from kngd_ray.cluster import run_job
from kngd_ray.config import TrainerConfig
from kngd_ray.errors import CheckpointError, KngdError
from kngd_ray.storage import write_text
from kngd_ray.training import checkpoint
from kngd_ray.training.job import FitEvent, Job
from kngd_ray.training.resumable import latest

FIT = "kalman-seed0"
QUICK = ("half of covariance", "before rename", "while pruning")
JOBS, KILLS = 5, 4
STEPS, EVERY_STEPS = 200, 5  # of a job, and between its checkpoints


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, torch.Tensor]]:
    """The end of the short fit that nobody kills, by number of ranks."""
    ends: dict[int, dict[str, torch.Tensor]] = {}

    def of(ranks: int) -> dict[str, torch.Tensor]:
        if ranks not in ends:
            folder = tmp_path_factory.mktemp("whole")
            run_ranks(ranks, fit_or_die, folder, None)
            found = latest(folder)
            assert found is not None
            ends[ranks] = everything_in(found.folder)
        return ends[ranks]

    return of


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("point", some_slow(POINTS, *QUICK))
def test_killed_inside_a_checkpoint(
    point: str,
    ranks: int,
    tmp_path: Path,
    whole: Callable[[int], dict[str, torch.Tensor]],
    record_property: Callable[[str, object], None],
) -> None:
    """A real process, killed between any two files of a checkpoint, or in the middle of one."""
    record_property("fault", "SIGKILL during the checkpoint write")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(ranks, fit_or_die, tmp_path, point)
    torn = [path for path in tmp_path.glob("step-*") if not _is_sound(path)]
    assert len(torn) == (0 if point == "after rename" else 1)
    found = latest(tmp_path)
    assert found is not None
    assert found.manifest["step"] == POINTS[point][1]
    assert len(found.manifest["pieces"]) == ranks
    run_ranks(ranks, fit_or_die, tmp_path, None)
    end = latest(tmp_path)
    assert end is not None
    assert end.manifest["step"] == 3 * EVERY
    assert same(everything_in(end.folder), whole(ranks))


def _is_sound(folder: Path) -> bool:
    try:
        checkpoint.load(folder)
    except CheckpointError:
        return False
    return True


def committed(folder: Path) -> int:
    """The step of the newest checkpoint that has a manifest; 0 if there is none."""
    return max((int(path.parent.name[5:13]) for path in folder.glob("step-*/manifest.json")), default=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_a_random_step(ray_up: None, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Five jobs on one Ray instance, in each of which a worker is killed four times, either rank at any step."""
    record_property("fault", "SIGKILL of a Train worker at a random step")
    task = long_task(STEPS)
    job = Job({FIT: task}, IDENTITY, tmp_path / "whole", checkpoint_every=EVERY_STEPS)
    run_job(job, TrainerConfig(num_workers=2), lambda event: None)
    expected = _end(job.folder / "fits" / FIT)
    draw = random.Random(0)
    survived, seconds = 0, []
    for number in range(JOBS):
        folder = tmp_path / f"killed-{number}"
        steps = sorted(draw.sample(range(1, STEPS - 20), KILLS))
        killer = _Killer(folder / "fits" / FIT, steps, [draw.randrange(2) for _ in steps])
        job = Job({FIT: task}, IDENTITY, folder, checkpoint_every=EVERY_STEPS)
        run_job(job, TrainerConfig(num_workers=2, max_failures=KILLS), killer)
        assert len(killer.seconds) == KILLS, "the job ended before its workers were dead"
        seconds += killer.seconds
        survived += KILLS * same(_end(folder / "fits" / FIT), expected)
        _cores_come_back()
    record_property("tries", JOBS * KILLS)
    record_property("survived", survived)
    record_property("seconds", json.dumps(seconds))
    assert survived == JOBS * KILLS


def _end(fit: Path) -> dict[str, torch.Tensor]:
    found = latest(fit)
    assert found is not None
    assert found.manifest["step"] == STEPS
    return everything_in(found.folder)


class _Killer:
    """Kills a worker when a step is heard of, and looks at where the job goes on.

    Attributes:
        seconds: from each kill to the first step after it.
    """

    def __init__(self, fit: Path, steps: list[int], victims: list[int]) -> None:
        self._fit = fit
        self._due = list(zip(steps, victims, strict=True))
        self._last = self._committed = 0
        self._killed: float | None = None
        self._dead: set[int] = set()
        self.seconds: list[float] = []

    def __call__(self, event: FitEvent) -> None:
        assert event.error is None
        if event.record is None:
            return
        step = event.record["step"]
        # the next attempt; what the dead one had sent is heard before another one has workers
        if self._killed is not None and {p.pid for p in own_workers()} - self._dead:
            self.seconds.append(round(time.monotonic() - self._killed, 1))
            self._killed = None
            assert (step - 1) % EVERY_STEPS == 0
            assert step - 1 >= self._committed
        if self._killed is None and self._due and step >= self._due[0][0]:
            self._committed = committed(self._fit)
            pair = own_workers()[-2:]
            pair[self._due.pop(0)[1]].kill()
            self._killed, self._dead = time.monotonic(), {process.pid for process in pair}
        self._last = step


def _cores_come_back() -> None:
    deadline = time.monotonic() + 120
    while ray.available_resources().get("CPU", 0.0) < 2:
        assert time.monotonic() < deadline, "a killed worker's core was not given back"
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_writes_nothing_once_another_driver_has_taken_over(ray_up: None, tmp_path: Path) -> None:
    """As those that a killed driver left behind, on nodes that have not heard of it."""
    fit = tmp_path / "fits" / FIT
    after: list[int] = []

    def take_over(event: FitEvent) -> None:
        if not after and event.record is not None and event.record["step"] >= 20:
            write_text(tmp_path / "ray" / "driver", "job-another")
            time.sleep(1)  # what was being written is written
            after.append(committed(fit))

    job = Job({FIT: long_task(2000)}, IDENTITY, tmp_path, checkpoint_every=EVERY_STEPS)
    with pytest.raises(
        KngdError, match=r"^worker [01] failed: \S+ was taken over by another process: this worker ends"
    ):
        run_job(job, TrainerConfig(num_workers=2, max_failures=0), take_over)
    assert after == [committed(fit)]
