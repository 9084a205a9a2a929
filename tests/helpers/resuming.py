"""What ranks run for the checkpoint tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from helpers.cases import FAMILIES, make_options, make_task
from helpers.compare import covariance_of
from helpers.cones import as_shipped
from torch import Tensor

from kngd_ray.sharding import Group
from kngd_ray.training import checkpoint
from kngd_ray.training.fit import FitTask, StepRecord, build_head
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.resumable import run_fit

IDENTITY = {"model": "tiny", "class_names": ["a", "b", "c", "d"]}

# Every family, with noise that moves, rows that are drawn and a mean that is pulled back to where the fit began; a
# head of several layers, so that slices cut them.
KALMAN = {
    family: {
        "family": family,
        "observation": observation,
        "adapter": "bottleneck+linear+class_residual",
        "noise": noise,
        "process": process,
        "iterations": 1 + n % 2,
    }
    for n, (family, observation, noise, process) in enumerate(
        zip(
            FAMILIES,
            cycle(("categorical-sampled", "all", "log_likelihood+cosine")),
            cycle(("ema-full", "ema-diagonal", "ema-scalar", "fixed")),
            cycle(("ornstein_uhlenbeck", "forgetting")),
            strict=False,
        )
    )
}


SHIPPED = "default"  # the default's fit where real ones happen
RANKED = (*KALMAN, SHIPPED)


class Killed(Exception):
    """Stands for whatever ends a run from outside."""


def kill_after(step: int):
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    return on_step


@contextmanager
def float64() -> Iterator[None]:
    """Adapters are built in torch's default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def kalman_task(family: str) -> FitTask:
    """A float64 fit of six steps; to be built and run in :func:`float64`."""
    if family == SHIPPED:
        return as_shipped(1, "epochs=2", "batch_size=7")
    return make_task(make_options(**KALMAN[family]), dtype=torch.float64)  # type: ignore[arg-type]


def everything_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by a name that says where they are from."""
    state = checkpoint.load(folder).state
    found = {f"weights/{k}": v for k, v in state.weights.items()}
    found |= {f"state/{k}": v for k, v in state.replicated.items()}
    return found | {f"covariance/{k}": v for k, v in state.covariance.items()}


def stands_for(folder: Path, family: str) -> dict[str, Tensor]:
    """What the tensors of a checkpoint mean: families may write one covariance as different numbers."""
    with float64():
        task = kalman_task(family)
        method = KalmanNGD(build_head(task), task.options)
    method.load(checkpoint.load(folder).state)
    return {"mu": method.belief.mu, "noise": method.noise, "covariance": covariance_of(method)}


def run_all(group: Group, folder: Path, kill: int | None) -> dict[str, Any]:
    """Run every Kalman fit in a folder, or what is left of it; ends early after step `kill`."""
    ends = {}
    with float64():
        for family in RANKED:
            try:
                ends[family] = run_fit(
                    kalman_task(family),
                    folder / family,
                    IDENTITY,
                    group,
                    "cpu",
                    checkpoint_every=2,
                    on_step=None if kill is None else kill_after(kill),
                )
            except Killed:
                continue
    return ends
