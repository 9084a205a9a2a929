"""What ranks run for the checkpoint tests."""

from pathlib import Path
from typing import Any

import torch
from helpers.cases import make_options, make_task
from torch import Tensor

from kngd_ray.sharding import Group
from kngd_ray.training import checkpoint
from kngd_ray.training.fit import FitTask, StepRecord
from kngd_ray.training.resumable import run_fit

IDENTITY = {"model": "tiny", "class_names": ["a", "b", "c", "d"]}

# Every family, with noise that moves and rows that are drawn; a head of several layers, so that slices cut them.
KALMAN = {
    family: {
        "family": family,
        "observation": observation,
        "adapter": "bottleneck+linear+class_residual",
        "noise": noise,
    }
    for family, observation, noise in (
        ("dense", "categorical-sampled", "ema-scalar"),
        ("ekf", "categorical-sampled", "ema-diagonal"),
        ("vdekf", "log_likelihood+cosine", "fixed"),
    )
}


class Killed(Exception):
    """Stands for whatever ends a run from outside."""


def kill_after(step: int):
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    return on_step


def kalman_task(family: str) -> FitTask:
    """A float64 fit of six steps; torch's default dtype must be float64 when it is built and when it runs."""
    return make_task(make_options(**KALMAN[family]), dtype=torch.float64)


def everything_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by a name that says where they are from."""
    state = checkpoint.load(folder).state
    found = {f"weights/{k}": v for k, v in state.weights.items()}
    found |= {f"state/{k}": v for k, v in state.replicated.items()}
    return found | {f"covariance/{k}": v for k, v in state.covariance.items()}


def run_all(group: Group, folder: Path, kill: int | None) -> dict[str, Any]:
    """Run every Kalman fit in a folder, or what is left of it; ends early after step `kill`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ends = {}
        for family in KALMAN:
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
    finally:
        torch.set_default_dtype(default)
