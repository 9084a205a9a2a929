"""Small streams, and what ranks run of them."""

from dataclasses import asdict
from typing import Any

import torch
from helpers.cones import SCALE, made

from kngd_ray.config import load_config, override
from kngd_ray.sharding import Group
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask, StepRecord, fit
from kngd_ray.training.options import FitOptions
from kngd_ray.training.predict import PosteriorOptions
from kngd_ray.training.stream import Stream

DRIFT = {"noise.process.drift": 0.2}
PROCESSES = {
    "still": {},
    "drift": DRIFT,
    "relaxing": {"noise.process": "ornstein_uhlenbeck", "noise.process.gamma": 0.9},
    "forgetting": {"noise.process": "forgetting", "noise.process.factor": 0.8, "noise.process.rate": 0.9},
}
BATCH = 8


def options(*overrides: str, **settings: Any) -> FitOptions:
    given = {"protocol": "stream", "data.order": ["a", "b"], "batch_size": BATCH, **settings}
    return override(load_config(overrides=overrides), given).fit_options


def shuffled(shots: int = 4, classes: int = 4, dim: int = 12) -> tuple[Support, torch.Tensor]:
    support, texts = made(shots, classes=classes, dim=dim)
    order = torch.randperm(len(support), generator=torch.Generator().manual_seed(1))
    return support.subset(order), texts


def stream_task(how: FitOptions | None = None, support: Support | None = None, **stream: Any) -> FitTask:
    shots, texts = shuffled(5)
    posterior = PosteriorOptions(predict="linearised", tau_median=3e-4, tau_spread=1.5)
    told = Stream(posterior, **stream)
    return FitTask(how or options(), 0, shots if support is None else support, texts, SCALE, stream=told)


def ranked(group: Group) -> dict[str, Any]:
    """How a stream whose functions drift goes on some ranks."""
    found: list[StepRecord] = []
    method = fit(stream_task(options(**DRIFT)), group=group, on_step=found.append)
    return {"weights": method.state().weights, "met": [record.met and asdict(record.met) for record in found]}
