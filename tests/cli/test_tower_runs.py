"""Runs that train towers on pictures, end to end: what they leave is what they tested, and nobody used a feature."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import CLASSES, CommandLine, Outcome, small_table
from PIL import Image

from kngd_ray.commands.display import Display
from kngd_ray.commands.prepare import PICTURES
from kngd_ray.commands.train import train
from kngd_ray.config import load_config
from kngd_ray.training import checkpoint
from kngd_ray.training.batches import Support
from kngd_ray.training.classifier import Classifier, open_fit
from kngd_ray.training.feed import fed
from kngd_ray.training.pictures import Pictures

TINY = ("data.shots=2", "epochs=2", "batch_size=4", "data.classes=[flower,bird]")
RUNS: dict[str, tuple[str, ...]] = {
    "kalman-full": ("tune.parameters=full", "filter.p0=1e-3", "baselines=adamw", "trainer.checkpoint_every=1"),
    "kalman-lora": ("tune.parameters=lora", "filter.p0=1e-2"),
    "kalman-cite": ("preset=kalman_cite", "filter.p0=1e-3"),
    "adamw-cite": ("method=adamw", "preset=clip_cite", "optimizer.lr=1e-4"),
    "adamw-lora": ("method=adamw", "preset=clip_lora", "optimizer.lr=1e-2"),
}


class Runs:
    """The runs of this module, each trained once."""

    def __init__(self, folder: Path, data: Path, cache: Path) -> None:
        self.folder = folder
        self.settings = [
            f"data.path={data}",
            f"data.cache_dir={cache}",
            "data.train_domain=noto",
            "trainer.num_workers=0",
            f"trainer.storage_path={folder}",
            "tracking.enabled=false",
            "tracking.log_model=false",
        ]
        self.reports: dict[str, Any] = {}

    def report(self, name: str) -> Any:
        if name not in self.reports:
            settings = [*self.settings, *TINY, *RUNS[name], f"trainer.name={name}"]
            self.reports[name] = train(load_config(None, settings), Display(quiet_stdout=True))
        return self.reports[name]

    def run(self, name: str) -> Path:
        self.report(name)
        return self.folder / name

    def fit(self, name: str) -> Path:
        return self.run(name) / "fits" / f"{name.split('-')[0]}-seed0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_data, shared_cache) -> Runs:
    torch.set_num_threads(1)
    return Runs(tmp_path_factory.mktemp("runs"), small_data, shared_cache)


def emoji(path: Path) -> list[bytes]:
    table = pq.read_table(path)
    return [table["image"][row].as_py() for row in (0, 7, 30)]


@pytest.fixture
def pictures(tmp_path, small_data) -> list[Path]:
    found = []
    for n, blob in enumerate(emoji(small_data)):
        path = tmp_path / f"{n}.png"
        path.write_bytes(blob)
        found.append(path)
    return found


def assert_figures(found: Any, expected: Any) -> None:
    """Every figure of the expected report is in the one found."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_figures(found[key], value)
        else:
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_evaluated_and_predicts_as_it_was_tested(runs, command, pictures, name) -> None:
    report = runs.report(name)
    fit = runs.fit(name)
    (folder,) = fit.glob("step-*")
    state = checkpoint.load(folder).state
    assert state.weights
    assert bool(state.covariance) == name.startswith("kalman")
    pretrained = dict(Classifier.load(fit).model.network.named_parameters())
    assert all(torch.isfinite(weight).all() for weight in state.weights.values())
    moved = [
        name.startswith("clip.") and not torch.equal(weight, pretrained[name.removeprefix("clip.")])
        for name, weight in state.weights.items()
        if name.removeprefix("clip.") in pretrained
    ]
    assert all(("lora" in name) != bool(moved) for _ in [0])
    assert not moved or np.mean(moved) > 0.5

    outcome = command("evaluate", runs.run(name), "--json")
    assert outcome.code == 0, outcome.err
    assert_figures(outcome.json, {key: report[key] for key in ("id", "ood")})

    outcome = command("predict", runs.run(name), *pictures, "--json")
    assert outcome.code == 0, outcome.err
    classifier = Classifier.load(fit)
    with Image.open(pictures[0]) as picture:
        assert picture.mode
    found = torch.tensor([[row["probabilities"][c] for c in ("flower", "bird")] for row in outcome.json])
    expected = classifier.predict([_rgb(path) for path in pictures]).probabilities
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _rgb(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
