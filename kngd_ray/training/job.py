"""Several fits on one group of ranks, and the events they send.

Starting a group of workers takes seconds, a few-shot fit often less than one; so a run's fits
(seeds, baselines) share a job. A job is idempotent: finished fits are recognised by their final
checkpoints, an unfinished one resumes from its newest, and so a worker that dies, a driver that
dies and ``--resume`` are one case.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kngd_ray.errors import FilterError, KngdError
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training.fit import FitTask, StepRecord
from kngd_ray.training.options import FitOptions
from kngd_ray.training.resumable import run_fit


@dataclass(frozen=True)
class FitEvent:
    """Something that happened on rank 0 of a job.

    Attributes:
        fit: which fit of the job.
        record: a step, as the fields of a ``StepRecord``; None for other events.
        error: why the fit ended early, in one sentence; None for other events.
    """

    fit: str
    record: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """What the ranks are given.

    Attributes:
        fits: the fits by name, in the order in which they run.
        identity: what their weights belong to; see :func:`kngd_ray.training.resumable.run_fit`.
        folder: of the run, on storage that all ranks share.
        checkpoint_every: steps between checkpoints; 0 is only at the end of each fit.
    """

    fits: Mapping[str, FitTask]
    identity: Mapping[str, Any]
    folder: Path
    checkpoint_every: int = 0


def run_fits(
    job: Job,
    send: Callable[[FitEvent], None],
    *,
    group: Group | None = None,
    device: torch.device | str = "cpu",
    before_checkpoint: Callable[[], None] | None = None,
) -> None:
    """Run the fits of a job one after another; every rank calls this with the same job.

    A fit that cannot go on is reported and the next one begins: every rank decides so from the same
    numbers, and trying again would end the same way.

    Args:
        job: the fits.
        send: called with each event, on rank 0.
        group: the ranks.
        device: where to compute.
        before_checkpoint: called before each checkpoint is written, on every rank.

    Raises:
        KngdError: a step of several ranks does not fit into the memory of one.
        RuntimeError: whatever else a step raised.
        MemoryError: never; it is explained.
    """
    group = group or SingleProcess()
    for name, task in job.fits.items():

        def on_step(record: StepRecord, name: str = name) -> None:
            if group.rank == 0:
                send(FitEvent(name, record=asdict(record)))

        try:
            run_fit(
                task,
                job.folder / "fits" / name,
                job.identity,
                group,
                device,
                checkpoint_every=job.checkpoint_every,
                on_step=on_step,
                before_checkpoint=before_checkpoint,
            )
        except FilterError as error:
            if group.rank == 0:
                send(FitEvent(name, error=str(error)))
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            said = next(iter(str(error).splitlines()), "").rstrip(".")  # Python's own MemoryError says nothing
            said = f" ({said})" if said else ""
            count = task.options.batch or len(task.support)
            reason = f"step of {count} samples does not fit into memory{said}: {_thriftier(task.options)}."
            if group.world_size > 1:  # the other ranks wait for this one: the job ends
                raise KngdError(f"the fit {name}: a {reason}") from error
            send(FitEvent(name, error=f"a {reason}"))


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, for which torch has no type of error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _thriftier(options: FitOptions) -> str:
    """What to do to take less memory."""
    ways = ["lower batch_size", "raise trainer.num_workers, over which a batch is spread"]
    if options.tune.images:
        if options.tune.precision == "float32":
            ways.append("set tune.precision=bfloat16")
        if options.method != "kalman" and not options.tune.checkpointing:
            ways.append("set tune.checkpointing=true")
    if options.method == "kalman" and options.filter.covariance.kind != "diagonal":
        ways.append("set filter.covariance=diagonal")
    return f"{', '.join(ways[:-1])}, or {ways[-1]}"
