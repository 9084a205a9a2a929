"""Figures: the numbers behind them, gaps and empty cases, size, and no pyplot."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kngd_ray.errors import StorageError
from kngd_ray.tracking import learning_curve, reliability_diagram
from kngd_ray.training.metrics import Scores

LIMIT = 100_000


def predictions(samples: int, classes: int, sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(samples)
    z = 2 * torch.randn(samples, classes, generator=g)
    labels = torch.multinomial(z.softmax(1), 1, generator=g).squeeze(1)
    return (sharpness * z).softmax(1), labels


def is_small_picture(path) -> bool:
    Image.open(path).verify()
    return path.stat().st_size < LIMIT


def test_reliability_gives_the_ece_of_the_scores(tmp_path):
    curves = {"id": predictions(500, 7, 1.0), "art": predictions(2000, 7, 2.0), "sketch": predictions(3900, 7, 3.0)}
    found = reliability_diagram(curves, tmp_path / "new" / "reliability.png", "kalman")
    assert found == pytest.approx({name: Scores.of(*curve).ece for name, curve in curves.items()}, abs=1e-6)
    assert is_small_picture(tmp_path / "new" / "reliability.png")


@pytest.mark.parametrize("curves", [{}, {"id": (np.zeros((0, 3)), np.zeros(0))}, {"id": (np.eye(3), np.arange(3))}])
def test_reliability_of_little(tmp_path, curves):
    assert all(value == 0 for value in reliability_diagram(curves, tmp_path / "r.png").values())
    assert is_small_picture(tmp_path / "r.png")


@pytest.mark.parametrize(
    "names", [("accuracy", "nll"), ("accuracy", "nll", "innovation_rms", "nis_per_observation", "log_evidence"), ()]
)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_learning_curve(tmp_path, names, count):
    g = np.random.default_rng(0)
    steps = [{"step": n + 1, **{f"train/{name}": g.random() for name in names}} for n in range(count)]
    if count > 2 and names:
        steps[1] = {"step": 2}
        steps[2]["train/nll"] = float("nan")
    learning_curve(steps, tmp_path / "curve.png")
    assert is_small_picture(tmp_path / "curve.png")


def test_pyplot_stays_out(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kngd_ray.tracking import learning_curve;"
        "learning_curve([{'step': 1, 'nll': 1.0}], Path(sys.argv[1])); print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "c.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        learning_curve([], tmp_path / "file" / "c.png")


def test_names_without_a_glyph_are_boxes_and_no_warnings(tmp_path, recwarn):
    reliability_diagram({"写真": predictions(50, 3, 1.0)}, tmp_path / "r.png", "絵文字")
    assert not [each for each in recwarn if "Glyph" in str(each.message)]
