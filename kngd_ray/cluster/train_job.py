"""A job of fits as one Ray Train job, its events sent to the driver."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kngd_ray._option import option
from kngd_ray.cluster.event_queue import Cluster, EventQueue
from kngd_ray.cluster.same_code import compared
from kngd_ray.config import TrainerConfig
from kngd_ray.errors import FilterError, KngdError, StorageError
from kngd_ray.sharding import Group, ProcessGroup, SingleProcess
from kngd_ray.storage import storage_errors, write_text
from kngd_ray.training.fit import FitTask, StepRecord
from kngd_ray.training.job import FitEvent, Job, run_fits
from kngd_ray.tuning import Fitted, fitted_from

_FLUSH_SECONDS = 0.2
_DRIVER = "driver"  # file beside Ray's own: the job whose workers may write checkpoints
_NOBODY = "none"


def run_job(job: Job, trainer: TrainerConfig, on_event: Callable[[FitEvent], None]) -> None:
    """Run a job to its end on the workers of a Ray Train job; Ray must be up.

    Workers that a driver has left behind write no checkpoint once it was interrupted, or another has taken over.

    Args:
        job: the fits.
        trainer: workers, resources and fault tolerance.
        on_event: called with each step, in this thread.

    Raises:
        KngdError: a worker failed more often than is allowed, or the cluster has gone; what was finished is kept.
    """
    # Ray Data leaves the actors of an execution that failed to the garbage collector, and their cores would be missing
    # to the workers of this job, which would wait for them without end.
    gc.collect()
    name = f"job-{uuid4().hex[:8]}"
    records = job.folder / "ray"
    with storage_errors(records):
        records.mkdir(parents=True, exist_ok=True)
    write_text(records / _DRIVER, name)
    # on this node, not on one that may be lost while the job goes on elsewhere
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # asked several times a second: Ray would keep a record of each call, for as long as the cluster lives
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here, "enable_task_events": False})
    torch_trainer = TorchTrainer(
        compared(__name__, _train_loop.__name__),
        # The job travels through the object store: once, however many workers there are.
        train_loop_config={"job": ray.put(job), "queue": queue, "driver": name},
        scaling_config=ScalingConfig(
            num_workers=trainer.num_workers,
            use_gpu=trainer.use_gpu is True,
            resources_per_worker={"CPU": trainer.cpus_per_worker, **({"GPU": 1} if trainer.use_gpu is True else {})},
        ),
        # Checkpoints are ours, in the run's folder: Ray is not asked to copy or to choose them (a report of one
        # costs seconds), and since it resumes a name that it has seen by its own records, each job is new to it.
        run_config=RunConfig(
            name=name,
            storage_path=str(records),
            failure_config=FailureConfig(max_failures=trainer.max_failures),
        ),
    )
    incoming = EventQueue(queue, Cluster(trainer))
    running = _Running(torch_trainer)
    try:
        while True:
            ended = not running.is_alive()  # asked before the look: what an ended job has sent is there
            events = incoming.wait()
            for event in events:
                on_event(event)
            if ended and not events:
                break
    except BaseException:
        _leave(records / _DRIVER, name)
        raise
    queue.shutdown(force=True)
    if isinstance(running.error, TrainingFailedError):
        reason = _explained(running.error)
        raise reason from running.error
    if running.error is not None:
        raise running.error


def _leave(place: Path, name: str) -> None:
    """End a job's workers at their next checkpoint: in a Ray that outlives this process they would go on."""
    with suppress(OSError, StorageError):
        if place.read_text() == name:  # and no other driver has taken over
            write_text(place, _NOBODY)


def job_fitter(trainer: TrainerConfig, folder: Path) -> Callable[[Sequence[FitTask]], list[Fitted | FilterError]]:
    """Run all fits of a trial as one Ray Train job.

    Args:
        trainer: workers and resources.
        folder: for their checkpoints, on storage that all nodes share.

    Returns:
        A function of fits that gives for each the fit, or the error that ended it.
    """

    def fitter(tasks: Sequence[FitTask]) -> list[Fitted | FilterError]:
        fits = {f"fit-{number:04d}": task for number, task in enumerate(tasks)}
        errors: dict[str, FilterError] = {}
        records: dict[str, dict[int, StepRecord]] = {name: {} for name in fits}

        def on_event(event: FitEvent) -> None:
            if event.error is not None:
                errors[event.fit] = FilterError(event.error)
            if event.record is not None:  # a job that was started again sends some steps twice
                record = StepRecord.of(event.record)
                records[event.fit][record.step] = record

        job = Job(fits, {}, folder / uuid4().hex[:8])
        run_job(job, trainer, on_event)
        return [
            errors.get(name) or fitted_from(task, job.folder / "fits" / name, list(records[name].values()))
            for name, task in fits.items()
        ]

    return fitter


class _Running(Thread):
    """The blocking call of a trainer, away from the main thread: there Ray would take Ctrl-C for itself."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray train")
        self._trainer = trainer
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # handed to the thread that waits
            self.error = error


@dataclass
class _EventSender:
    """Sends events to the driver through an actor, a few times a second: a step is shorter than a call.

    As plain dictionaries: for a class of ours the actor would import torch, and keep half a gigabyte.
    """

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
            self.queue.put([vars(event) for event in pending])


def _train_loop(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    job: Job = ray.get(config["job"])
    sender = _EventSender(config["queue"])
    group: Group = ProcessGroup() if dist.is_initialized() and dist.get_world_size() > 1 else SingleProcess()

    def before_checkpoint() -> None:
        _still_driven(job.folder, config["driver"])
        sender.flush()  # a job that resumes from the checkpoint does not send its steps again

    try:
        run_fits(job, sender.send, group=group, device=get_device(), before_checkpoint=before_checkpoint)
    finally:
        sender.flush()


def _still_driven(folder: Path, name: str) -> None:
    """Refuse to write for nobody, or beside the workers of another driver.

    Raises:
        KngdError: the driver was interrupted, or another one has taken over.
        StorageError: the storage is not what it was.
    """
    place = folder / "ray" / _DRIVER
    try:
        driver = place.read_text()
    except OSError as error:
        raise StorageError(f"cannot read {place} ({error}): it must be on storage that all nodes share.") from error
    if driver != name:
        over = "has no driver any more" if driver == _NOBODY else "was taken over by another process"
        raise KngdError(f"{folder.name} {over}: this worker ends.")


def _explained(error: TrainingFailedError) -> KngdError:
    """One sentence with the rank that failed by its own fault and its reason."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    failed = {rank: getattr(cause, "cause", None) or cause for rank, cause in failures.items()}
    for rank, cause in sorted(failed.items(), key=lambda item: _lost_another(item[1])):
        if isinstance(cause, KngdError):
            return type(cause)(f"worker {rank} failed: {cause}")
        if getattr(cause, "health_check_failure", None) is not None:
            reason = "its process died or stopped answering (out of memory, killed, or its node is gone)"
        elif _lost_another(cause):
            reason = f"it lost the connection to another worker, which must have died ({_last_line(cause)})"
        else:
            reason = _last_line(cause)
        return KngdError(f"worker {rank} failed: {reason}; the run can be continued with {option('resume')}.")
    if isinstance(getattr(error, "controller_failure", None), RayActorError):  # Ray Train does not start these again
        return KngdError(
            "a worker died while it was handed its work (out of memory, killed, or its node is gone); the run can be "
            f"continued with {option('resume')}."
        )
    return KngdError(
        f"the Ray Train job failed: {_last_line(error)}; the run can be continued with {option('resume')}."
    )


def _lost_another(error: BaseException) -> bool:
    """Whether an error is a collective's, from a rank whose peer is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].rstrip(".") if lines else type(error).__name__
