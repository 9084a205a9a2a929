"""A fit whose process is killed at a chosen point of writing a checkpoint."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.resuming import IDENTITY, float64, kalman_task

from kngd_ray import storage
from kngd_ray.sharding import Group
from kngd_ray.training import checkpoint, resumable

FAMILY = "diagonal_low_rank"
EVERY = 2  # steps between checkpoints, of six

# point: rank that dies there, the step whose checkpoint is then the newest sound one
POINTS = {
    "before weights": (0, 2),
    "half of weights": (0, 2),
    "after weights": (0, 2),
    "half of state": (0, 2),
    "after state": (0, 2),
    "half of covariance": (-1, 2),
    "after covariance": (-1, 2),
    "before manifest": (0, 2),
    "half of manifest": (0, 2),
    "before rename": (0, 2),
    "after rename": (0, 4),
    "while pruning": (0, 6),
}


def fit_or_die(group: Group, folder: Path, point: str | None) -> None:
    """Run a fit of six steps, or what is left of it; this rank may die in its second checkpoint.

    Args:
        group: the ranks.
        folder: of the fit.
        point: one of `POINTS`; None is none.
    """
    if point is not None and group.rank == POINTS[point][0] % group.world_size:
        _arm(point)
    with float64():
        resumable.run_fit(kalman_task(FAMILY), folder, IDENTITY, group, "cpu", checkpoint_every=EVERY)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(point: str) -> None:
    when, _, what = point.partition(" ")
    what = what.removeprefix("of ")
    save_file, write_text, rmtree = checkpoint.save_file, checkpoint.write_text, shutil.rmtree
    second = f"step-{2 * EVERY:08d}"

    def save(tensors: Any, path: Path) -> None:
        due = second in str(path) and path.name.startswith(what)
        if due and when == "before":
            _die()
        save_file(tensors, path)
        if due and when == "half":
            os.truncate(path, path.stat().st_size // 2)
        if due:
            _die()

    def manifest(path: Path, text: str) -> None:
        if second in str(path):
            if point == "before manifest":
                _die()
            if point == "half of manifest":
                storage.temporary_beside(path).write_text(text[: len(text) // 2])
                _die()
            if point == "before rename":
                storage.os.fsync = _then_die(storage.os.fsync)
        write_text(path, text)
        if second in str(path) and point == "after rename":
            _die()

    def prune(path: Path, **options: Any) -> None:
        next(file for file in sorted(path.iterdir()) if file.name != checkpoint.MANIFEST).unlink()
        _die()
        rmtree(path, **options)

    checkpoint.save_file, checkpoint.write_text = save, manifest
    if point == "while pruning":
        resumable.shutil.rmtree = prune  # type: ignore[assignment]


def _then_die(call: Callable[[int], None]) -> Callable[[int], None]:
    def wrapped(descriptor: int) -> None:
        call(descriptor)
        _die()

    return wrapped
