"""Fits as Ray Train jobs: equal to one process, and bitwise unmoved by the death of a worker."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import failing
from helpers.cases import make_options, make_task
from helpers.compare import max_error
from helpers.failing import FailsOnOneRank
from helpers.resuming import IDENTITY, everything_in
from helpers.workers import own_processes, own_workers
from helpers.workloads import long_task
from ray import cloudpickle
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from kngd_ray.cluster import ray_session, run_job
from kngd_ray.cluster.train_job import _explained
from kngd_ray.config import TrainerConfig
from kngd_ray.errors import KngdError, StorageError
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask
from kngd_ray.training.job import FitEvent, Job, run_fits
from kngd_ray.training.resumable import latest

pytestmark = pytest.mark.ray


def final(folder: Path, fit: str) -> dict[str, torch.Tensor]:
    found = latest(folder / "fits" / fit)
    assert found is not None
    assert found.manifest["step"] == found.manifest["steps"]
    return everything_in(found.folder)


SAME = {  # on two workers as in one process
    f"{method}-seed0": make_task(make_options(method=method, adapter="bottleneck+linear+class_residual"))
    for method in ("kalman", "adamw")
}
LONG = {"kalman-seed1": long_task(100), "kalman-seed2": long_task(20)}
BROKEN = "kalman-seed3"


def broken_task() -> FitTask:
    """A fit none of whose steps is taken."""
    task = long_task(20)
    features = torch.full_like(task.support.features, torch.nan)
    return replace(task, support=Support(features, task.support.labels))


@dataclass(frozen=True)
class Done:
    """A job on two workers that has come to its end."""

    folder: Path
    events: list[FitEvent]
    killed: list[int]  # by process ID
    passes_on: list[str]  # the files that the process which passes events on has mapped into memory


def job(folder: Path, kill: bool) -> Done:
    """One job for all, since it is the start of its workers that takes long."""
    done = Done(folder, [], [], [])

    def on_event(event: FitEvent) -> None:
        done.events.append(event)
        in_the_middle = event.fit in LONG and event.record is not None and event.record["step"] >= 20
        if kill and in_the_middle and not done.killed:
            (queue,) = own_processes("_QueueActor")
            done.passes_on.extend(mapped.path for mapped in queue.memory_maps())
            victim = own_workers()[-1]
            victim.kill()
            done.killed.append(victim.pid)

    fits = {BROKEN: broken_task(), **SAME, **LONG}
    run_job(Job(fits, IDENTITY, folder, checkpoint_every=5), TrainerConfig(num_workers=2, max_failures=2), on_event)
    return done


@pytest.fixture(scope="module")
def killed(ray_up: None, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A worker died in the middle of its first long fit."""
    done = job(tmp_path_factory.mktemp("killed"), kill=True)
    assert done.killed
    return done


def test_two_workers_do_what_one_process_does(killed: Done, tmp_path: Path) -> None:
    """Though one of them died in the middle of a fit."""
    run_fits(Job({**SAME, **LONG}, IDENTITY, tmp_path), lambda event: None)
    for fit in (*SAME, *LONG):
        two, one = final(killed.folder, fit), final(tmp_path, fit)
        assert two.keys() == one.keys()
        for name in one:
            assert max_error(two[name], one[name]) < 1e-5, (fit, name)
    for fit, task in SAME.items():
        steps = [event.record["step"] for event in killed.events if event.fit == fit and event.record]
        assert steps == list(range(1, task.sampler.steps + 1))


def test_what_passes_events_on_needs_no_torch(killed: Done) -> None:
    """It would keep half a gigabyte for as long as the job runs."""
    assert killed.passes_on
    assert not [path for path in killed.passes_on if "torch" in path]


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(killed: Done, tmp_path: Path) -> None:
    whole = job(tmp_path, kill=False)
    assert not whole.killed
    for fit in LONG:
        found, expected = final(killed.folder, fit), final(whole.folder, fit)
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (fit, name)


def test_a_fit_that_cannot_go_on_says_so_and_the_next_one_runs(killed: Done) -> None:
    errors = {event.fit: event.error for event in killed.events if event.error}
    assert list(errors) == [BROKEN]
    assert "10 steps in a row were refused" in str(errors[BROKEN])
    refused = [event.record["refused"] for event in killed.events if event.fit == BROKEN and event.record]
    assert all("are NaN or infinite" in reason for reason in refused)
    assert all(len(final(killed.folder, fit)) > 0 for fit in (*SAME, *LONG))


@pytest.mark.slow
def test_a_worker_that_raises_ends_the_job_with_its_reason(ray_up: None, tmp_path: Path) -> None:
    task = long_task(20)
    broken = replace(task, support=Support(task.support.features, task.support.labels + 7))
    with pytest.raises(KngdError, match=r"^worker [01] failed: .*; the run can be continued with resume\.$"):
        run_job(Job({"kalman-seed0": broken}, IDENTITY, tmp_path), TrainerConfig(num_workers=2, max_failures=0), print)


@pytest.mark.parametrize(
    ("reason", "rank"),
    [
        ("ValueError", 1),
        ("StorageError", 0),
        ("death", 1),
    ],
)
@pytest.mark.slow
def test_the_rank_that_failed_by_its_own_fault_is_named(ray_up: None, tmp_path: Path, reason: str, rank: int) -> None:
    """In the middle of a fit, while the other rank waits in a collective for 30 minutes: no test may last so long."""
    task = long_task(200)
    support = FailsOnOneRank(task.support.features, task.support.labels, rank=rank, reason=reason)
    broken = FitTask(task.options, 0, support, task.class_embeddings, 18.0)
    steps: list[int] = []

    def on_event(event: FitEvent) -> None:
        if event.record is not None:
            steps.append(event.record["step"])

    cloudpickle.register_pickle_by_value(failing)  # workers do not import the tests
    try:
        with pytest.raises(KngdError) as error:
            run_job(
                Job({"kalman-seed0": broken}, IDENTITY, tmp_path),
                TrainerConfig(num_workers=2, max_failures=0),
                on_event,
            )
    finally:
        cloudpickle.unregister_pickle_by_value(failing)
    assert str(error.value).startswith(f"worker {rank} failed: ")
    assert ("its process died" if reason == "death" else "a distinctive reason") in str(error.value)
    assert type(error.value) is (StorageError if reason == "StorageError" else KngdError)
    assert str(error.value).endswith("continued with resume.") == (reason != "StorageError")
    assert "\n" not in str(error.value)
    assert steps == list(range(1, len(steps) + 1))


GLOO = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer [::1]:4\nHint"
)
DEAD = WorkerHealthCheckFailedError("a worker is unhealthy.\nMore", ActorDiedError())


@pytest.mark.parametrize(
    ("failures", "says"),
    [
        ({0: GLOO, 1: ValueError("a reason.")}, "worker 1 failed: a reason; the run can be continued with resume."),
        ({0: GLOO, 2: StorageError("No space.")}, "worker 2 failed: No space."),
        ({0: torch.distributed.DistBackendError("NCCL"), 1: KeyError("x")}, "worker 1 failed: 'x'; the run can"),
        ({0: GLOO, 1: DEAD}, "worker 1 failed: its process died or stopped answering (out of memory, killed, or its"),
        ({0: GLOO}, "worker 0 failed: it lost the connection to another worker, which must have died (Hint)"),
        ({0: RuntimeError("one"), 1: RuntimeError("two")}, "worker 0 failed: one"),
        ({}, "the Ray Train job failed: all of it"),
    ],
)
def test_a_rank_that_lost_its_peer_is_not_to_blame(failures: dict[int, Exception], says: str) -> None:
    found = _explained(WorkerGroupError("all of it", failures))
    assert str(found).startswith(says)
    assert "\n" not in str(found)


def test_a_worker_that_died_before_it_had_its_work() -> None:
    """Ray Train takes it for its own fault, and does not start it again."""
    says = "a worker died while it was handed its work (out of memory, killed, or its node is gone); the run can be"
    assert str(_explained(ControllerError(ActorDiedError()))).startswith(says)
    assert str(_explained(ControllerError(ValueError("else.")))).startswith("the Ray Train job failed: else; the run")


def test_more_workers_than_cores_are_refused(ray_up: None) -> None:
    with pytest.raises(KngdError, match=r"lower trainer\.num_workers"), ray_session(None, cpus=1e6):
        pass


@pytest.mark.slow
def test_an_unreachable_cluster_is_one_sentence() -> None:
    import subprocess
    import sys

    code = (
        "from kngd_ray.cluster import ray_session\n"
        "from kngd_ray.errors import KngdError\n"
        "try:\n"
        "    with ray_session('127.0.0.1:1'): pass\n"
        "except KngdError as error: print('SENTENCE', error)\n"
    )
    found: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "SENTENCE cannot reach the Ray cluster at 127.0.0.1:1" in found.stdout, found.stderr


@pytest.mark.slow
def test_workers_of_an_interrupted_driver_end(ray_up: None, tmp_path: Path) -> None:
    """In a Ray that is not ours to stop they would train on, and write beside those of whoever resumes."""
    fits = {"kalman-seed1": long_task(2000)}
    pids: set[int] = set()

    def on_event(event: FitEvent) -> None:
        if event.record is not None and event.record["step"] >= 5:
            pids.update(worker.pid for worker in own_workers())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(Job(fits, IDENTITY, tmp_path, checkpoint_every=5), TrainerConfig(num_workers=2), on_event)
    assert len(pids) == 2
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=120)
    assert not left
    found = latest(tmp_path / "fits" / "kalman-seed1")
    assert found is not None
    assert found.manifest["step"] < 2000
