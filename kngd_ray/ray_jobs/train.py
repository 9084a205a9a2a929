"""A job of fits as one Ray Train job, its events sent to the driver."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import ray
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Empty, Queue

from kngd_ray.config import TrainerConfig
from kngd_ray.errors import FilterError, KngdError
from kngd_ray.sharding import Group, ProcessGroup, SingleProcess
from kngd_ray.training.job import FitEvent, Job, run_fits

_FLUSH_SECONDS = 0.2


def run_job(job: Job, trainer: TrainerConfig, on_event: Callable[[FitEvent], None]) -> None:
    """Run a job to its end on the workers of a Ray Train job; Ray must be up.

    Args:
        job: the fits.
        trainer: workers, resources and fault tolerance.
        on_event: told of steps, from one thread of this process.

    Raises:
        FilterError: a fit could not go on.
        KngdError: a worker failed more often than is allowed; what was finished is kept.
    """
    failures: list[str] = []

    def receive(event: FitEvent) -> None:
        if event.error is not None:
            failures.append(event.error)
        on_event(event)

    with _listening(receive) as queue:
        torch_trainer = TorchTrainer(
            _train_loop,
            # The job travels through the object store: once, however many workers there are.
            train_loop_config={"job": ray.put(job), "queue": queue},
            scaling_config=ScalingConfig(
                num_workers=trainer.num_workers,
                use_gpu=trainer.use_gpu,
                resources_per_worker={
                    "CPU": trainer.cpus_per_worker,
                    **({"GPU": 1} if trainer.use_gpu else {}),
                },
            ),
            # Checkpoints are ours, in the run's folder: Ray is not asked to copy or to choose them (a report of
            # one costs seconds), and since it resumes a name that it has seen by its own records, each job is new to it.
            run_config=RunConfig(
                name=f"job-{uuid4().hex[:8]}",
                storage_path=str(job.folder / "ray"),
                failure_config=FailureConfig(max_failures=trainer.max_failures),
            ),
        )
        try:
            torch_trainer.fit()
        except TrainingFailedError as error:
            reason = _explained(error)
            raise reason from error
    if failures:
        raise FilterError(failures[0])


@dataclass
class _EventSender:
    """Sends events to the driver through an actor, a few times a second: a step is shorter than a call."""

    queue: Queue
    pending: list[FitEvent] = field(default_factory=list)
    sent: float = 0.0

    def send(self, event: FitEvent) -> None:
        self.pending.append(event)
        if time.monotonic() - self.sent > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        pending, self.pending, self.sent = self.pending, [], time.monotonic()
        if pending:
            self.queue.put(pending)


def _train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    job: Job = ray.get(config["job"])
    sender = _EventSender(config["queue"])
    group: Group = ProcessGroup() if dist.is_initialized() and dist.get_world_size() > 1 else SingleProcess()

    try:
        run_fits(job, sender.send, group=group, device=get_device())
    except FilterError as error:
        # Every rank decides the same from the same numbers; trying again would end the same way.
        if group.rank == 0:
            sender.send(FitEvent("", error=str(error)))
    finally:
        sender.flush()


@contextmanager
def _listening(receive: Callable[[FitEvent], None]) -> Iterator[Queue]:
    """A queue whose events are handed to `receive` by a thread of this process, all of them before it ends."""
    queue = Queue(actor_options={"num_cpus": 0})
    ending = Event()

    def listen() -> None:
        while True:
            last_look = ending.is_set()
            try:
                for event in queue.get(timeout=_FLUSH_SECONDS):
                    receive(event)
            except Empty:
                if last_look:
                    return
            except ray.exceptions.RayError:
                return

    thread = Thread(target=listen, daemon=True, name="fit events")
    thread.start()
    try:
        yield queue
    finally:
        ending.set()
        thread.join()
        queue.shutdown(force=True)


def _explained(error: TrainingFailedError) -> KngdError:
    """One sentence with the rank that failed and its reason."""
    failed: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    for rank, cause in failed.items():
        inner = getattr(cause, "cause", None) or cause
        if isinstance(inner, KngdError):
            return inner
        return KngdError(f"worker {rank} failed: {_last_line(inner)}; the run can be continued with --resume.")
    return KngdError(f"the Ray Train job failed: {_last_line(error)}; the run can be continued with --resume.")


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].rstrip(".") if lines else type(error).__name__
