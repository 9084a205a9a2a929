"""Fits as one Ray Train job: every fit of a run, one after another, on the same group of workers.

Starting a worker group takes seconds, a few-shot fit often less than one; so a run's fits (seeds,
baselines) share a job. The job's function is idempotent: finished fits are recognised by their final
checkpoints, an unfinished one resumes from its newest, and so a worker that dies, a driver that dies
and ``--resume`` are one case.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol
from uuid import uuid4

import ray
import torch
import torch.distributed as dist
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Empty, Queue

from kngd_ray.config import TrainerConfig
from kngd_ray.errors import FilterError, KngdError
from kngd_ray.ray_jobs.session import ray_session
from kngd_ray.sharding import Group, ProcessGroup, SingleProcess
from kngd_ray.training.fit import FitTask, StepRecord
from kngd_ray.training.resumable import run_fit

_FLUSH_SECONDS = 0.2


@dataclass(frozen=True)
class FitEvent:
    """Something that happened on rank 0 of a job.

    Attributes:
        fit: which fit of the job.
        record: a step, as the fields of a ``StepRecord``; None for other events.
        checkpoint: folder of a checkpoint just written; None for other events.
        error: why the fit ended early, in one sentence; None for other events.
    """

    fit: str
    record: dict[str, Any] | None = None
    checkpoint: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """What the workers are given.

    Attributes:
        fits: the fits by name, in the order in which they run.
        identity: what their weights belong to; see :func:`kngd_ray.training.resumable.run_fit`.
        folder: of the run, on storage that all nodes share.
    """

    fits: Mapping[str, FitTask]
    identity: Mapping[str, Any]
    folder: Path

    def folder_of(self, fit: str) -> Path:
        """Where a fit's checkpoints live."""
        return self.folder / "fits" / fit


class _Sink(Protocol):
    def send(self, event: FitEvent) -> None: ...

    def flush(self) -> None: ...


@dataclass
class _DirectSink:
    """Events of a job that runs in this process."""

    receive: Callable[[FitEvent], None]

    def send(self, event: FitEvent) -> None:
        self.receive(event)

    def flush(self) -> None:
        pass


@dataclass
class _QueueSink:
    """Events sent to the driver through an actor, a few times a second: a step is shorter than a call."""

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


def run_job(job: Job, trainer: TrainerConfig, on_event: Callable[[FitEvent], None]) -> None:
    """Run a job to its end on Ray Train, or in this process when ``num_workers`` is 0.

    Args:
        job: the fits.
        trainer: workers, resources and fault tolerance.
        on_event: told of steps and checkpoints, from one thread.

    Raises:
        KngdError: the job could not be run to its end; what it finished is kept in its folder.
    """
    if trainer.num_workers == 0:
        _run(job, trainer.checkpoint_every, _DirectSink(on_event), reporting=False)
        return
    failures: list[str] = []

    def receive(event: FitEvent) -> None:
        if event.error is not None:
            failures.append(event.error)
        on_event(event)

    cpus = trainer.num_workers * trainer.cpus_per_worker
    with ray_session(trainer.address, cpus=cpus, gpus=trainer.num_workers * trainer.use_gpu):
        with _listening(receive) as queue:
            _fit(job, trainer, queue)
    if failures:
        raise FilterError(failures[0])


def _fit(job: Job, trainer: TrainerConfig, queue: Queue) -> None:
    config = {"job": ray.put(job), "checkpoint_every": trainer.checkpoint_every, "queue": queue}
    torch_trainer = TorchTrainer(
        _train_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=trainer.num_workers,
            use_gpu=trainer.use_gpu,
            resources_per_worker={"CPU": trainer.cpus_per_worker, **({"GPU": 1} if trainer.use_gpu else {})},
        ),
        run_config=RunConfig(
            # Ray resumes a name it has seen by its own records; ours are the checkpoints, so each job is new to it.
            name=f"job-{uuid4().hex[:8]}",
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=trainer.max_failures),
        ),
    )
    try:
        torch_trainer.fit()
    except TrainingFailedError as error:
        raise _explained(error) from error


def _explained(error: TrainingFailedError) -> KngdError:
    """One sentence with the rank that failed and its reason."""
    failed: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    for rank, cause in failed.items():
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, KngdError):
            return inner
        lines = str(inner).strip().splitlines() or [type(inner).__name__]
        return KngdError(f"worker {rank} failed: {lines[-1]}; the run can be continued with --resume.")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return KngdError(f"the Ray Train job failed: {lines[-1]}; the run can be continued with --resume.")


class _listening:  # noqa: N801 - used as a function
    """A queue whose events are handed over by a thread of the driver."""

    def __init__(self, receive: Callable[[FitEvent], None]) -> None:
        self._receive = receive
        self._stop = Event()

    def __enter__(self) -> Queue:
        self._queue = Queue(actor_options={"num_cpus": 0})
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self._queue

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._queue.shutdown(force=True)

    def _listen(self) -> None:
        while True:
            stopping = self._stop.is_set()
            try:
                for event in self._queue.get(timeout=_FLUSH_SECONDS):
                    self._receive(event)
            except Empty:
                if stopping:  # asked to stop before this look, so nothing can come any more
                    return
            except ray.exceptions.RayError:
                return


def _train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    _run(ray.get(config["job"]), config["checkpoint_every"], _QueueSink(config["queue"]), reporting=True)


def _run(job: Job, checkpoint_every: int, sink: _Sink, *, reporting: bool) -> None:
    group: Group = ProcessGroup() if dist.is_initialized() and dist.get_world_size() > 1 else SingleProcess()
    device: torch.device | str = get_device() if reporting else "cpu"
    for name, task in job.fits.items():

        def on_step(record: StepRecord, name: str = name) -> None:
            if group.rank == 0:
                sink.send(FitEvent(name, record=asdict(record)))

        def on_checkpoint(step: int, folder: Path, name: str = name) -> None:
            if group.rank == 0:
                sink.send(FitEvent(name, checkpoint=str(folder)))
            if reporting:
                # The checkpoint is where it belongs already; Ray is told of it, not asked to copy it.
                ray.train.report(
                    {"fit": name, "step": step},
                    checkpoint=Checkpoint.from_directory(str(folder)),
                    checkpoint_upload_fn=lambda checkpoint, _: checkpoint,
                )

        try:
            run_fit(
                task,
                job.folder_of(name),
                job.identity,
                group,
                device,
                checkpoint_every=checkpoint_every,
                on_step=on_step,
                on_checkpoint=on_checkpoint,
            )
        except FilterError as error:
            # Every rank decides the same from the same numbers, and trying again would end the same way.
            if not reporting:
                raise
            if group.rank == 0:
                sink.send(FitEvent(name, error=str(error)))
            break
        finally:
            with suppress(Exception):
                sink.flush()
