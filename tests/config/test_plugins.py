"""Choices that packages add by entry points."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kngd_ray

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"
POINTS = {
    "families": "isotropic = mine:Isotropic",
    "observations": "margin = mine:Margin",
    "adapters": "gain = mine:Gain",
}
FIT = """
import numpy as np
from kngd_ray import KalmanCLIP
settings = {"filter.covariance": "isotropic", "observation": "margin", "adapter": "gain,class_residual"}
settings["posterior.folds"] = 0
X = np.eye(4)[[0, 1, 2, 3] * 2] + 0.1
clf = KalmanCLIP("precomputed", class_embeddings=np.eye(4), preset="kalman_diagonal", settings=settings)
print("fitted", clf.fit(X, [0, 1, 2, 3] * 2).score(X, [0, 1, 2, 3] * 2))
"""


def package(folder: Path, source: str, points: dict[str, str]) -> None:
    """Install a package the way that Python sees it."""
    (folder / "mine.py").write_text(source)
    told = folder / "mine-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text("".join(f"[kngd_ray.{group}]\n{point}\n" for group, point in points.items()))


def python(folder: Path, code: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


def test_what_the_documentation_shows_works_from_a_package_of_its_own(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    package(tmp_path, "\n".join(block for block in blocks if "@dataclass" in block), POINTS)
    done = python(tmp_path, FIT)
    assert done.stdout.startswith("fitted 1.0"), done.stderr


def test_what_the_documentation_shows_works_within_the_package(tmp_path: Path) -> None:
    source = Path(kngd_ray.__file__).parent
    copied = tmp_path / "kngd_ray"
    shutil.copytree(source, copied, ignore=lambda folder, names: [n for n in names if not _is_code(Path(folder, n))])
    text = DOCS.read_text()
    modules = dict(
        re.findall(
            r"`(kngd_ray/\S+\.py)`[^\n]*(?:\n[^\n]+)?\n\n```python\n(\"\"\".*?)^```", text, re.MULTILINE | re.DOTALL
        )
    )
    lines = re.findall(r"^```python\n(from \S+ import \w+)\n\n(\w+ = .*)\n```", text, re.MULTILINE)
    assert len(modules) == len(lines) == 3
    for (name, module), (imported, registry) in zip(modules.items(), lines, strict=True):
        (tmp_path / name).write_text(module)
        registered = (tmp_path / name).parent / "__init__.py"
        head = registry.partition("=")[0]
        changed = re.sub(rf"^{head}= .*$", f"{imported}\n{registry}", registered.read_text(), flags=re.MULTILINE)
        registered.write_text(changed)
    done = python(tmp_path, f"import kngd_ray; assert kngd_ray.__file__.startswith({str(tmp_path)!r})\n{FIT}")
    assert done.stdout.startswith("fitted 1.0"), done.stderr


def _is_code(path: Path) -> bool:
    return path.is_dir() or path.suffix in (".py", ".yaml")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("1 / 0", "mine:Gain, which mine adds to kngd_ray.adapters, cannot be imported (division by zero)"),
        ("class Gain: pass", "is not a dataclass with a kind: see docs/extending.md"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass Gain:\n    kind: str = 'linear'",
            "has the kind 'linear', which is taken",
        ),
    ],
)
def test_a_plugin_that_is_none_is_named(tmp_path: Path, source: str, words: str) -> None:
    package(tmp_path, source, {"adapters": POINTS["adapters"]})
    code = "import sys; sys.argv = ['kngd-ray', 'train', '--print-config']; from kngd_ray.cli import main; main()"
    done = python(tmp_path, code)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
