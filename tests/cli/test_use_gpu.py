"""Where a GPU is there it is used without being asked for, and where none is, all cores."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from kngd_ray.cluster.backend import RayBackend
from kngd_ray.config import TrainerConfig, load_config
from kngd_ray.errors import UsageError


@pytest.mark.parametrize("there", [True, False])
def test_a_run_without_ray_takes_what_this_machine_has(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert RayBackend().with_gpus(TrainerConfig(num_workers=0)).use_gpu is there
    assert RayBackend().with_gpus(TrainerConfig(num_workers=0, use_gpu=False)).use_gpu is False
    if there:
        assert RayBackend().with_gpus(TrainerConfig(num_workers=0, use_gpu=True)).use_gpu is True
    else:
        with pytest.raises(UsageError, match="no usable GPU"):
            RayBackend().with_gpus(TrainerConfig(num_workers=0, use_gpu=True))


@pytest.mark.parametrize(
    ("gpus", "workers", "ranks"),
    [(0, 2, None), (1, 2, 1), (2, 2, 2), (4, 2, 2), (2, [1, 4], (1, 2)), (1, [1, 4], 1), (2, [3, 4], 2)],
)
def test_as_many_ranks_as_gpus_take_one_each(monkeypatch, gpus, workers, ranks):
    cluster = ModuleType("kngd_ray.cluster")
    cluster.gpus_of_cluster = lambda: gpus
    monkeypatch.setitem(sys.modules, "kngd_ray.cluster", cluster)
    asked = TrainerConfig(num_workers=workers)
    found = RayBackend().with_gpus(asked)
    assert found.use_gpu is (ranks is not None)
    assert found.num_workers == (ranks or asked.num_workers)
    for choice in (True, False):
        assert RayBackend().with_gpus(replace(asked, use_gpu=choice)) == replace(asked, use_gpu=choice), (
            "what was chosen is kept"
        )


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_the_option_is_auto_or_a_choice(text, value):
    assert load_config(overrides=[f"trainer.use_gpu={text}"]).trainer.use_gpu == value
    assert load_config().trainer.use_gpu == "auto"


def test_anything_else_is_refused():
    with pytest.raises(UsageError, match="use_gpu"):
        load_config(overrides=["trainer.use_gpu=perhaps"])
