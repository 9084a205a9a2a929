"""The command line in this process, on a few emoji written to a parquet file of their own."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.emoji import small_table

from kngd_ray import cli


@cache
def _tokenizer(name: str) -> Any:
    from open_clip.factory import get_tokenizer

    return get_tokenizer(name)


@pytest.fixture(scope="module", autouse=True)
def _in_brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Without the greater part of so short a run: drawing its figures, and a vocabulary read at every command.

    The first figure of each kind is put together and saved, but stays blank; later ones of a run are copies of it.
    """
    from matplotlib.figure import Figure

    from kngd_ray.experiment import method_run

    whole: dict[str, Any] = {"matplotlib.figure.Figure.draw": Figure.draw}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda self, renderer: None)
        patch.setattr("open_clip.get_tokenizer", _tokenizer)
        for kind in ("reliability_diagram", "learning_curve", "stream_curve"):
            drawing = getattr(method_run, kind)
            whole[f"kngd_ray.experiment.method_run.{kind}"] = drawing
            patch.setattr(method_run, kind, _drawn_once(drawing, tmp_path_factory.mktemp("figures") / f"{kind}.png"))
        yield whole


def _drawn_once(drawing: Callable[..., Any], kept: Path) -> Callable[..., None]:
    def draw(content: Any, path: Path, *options: Any) -> None:
        if kept.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, path)
        else:
            drawing(content, path, *options)
            shutil.copy(path, kept)

    return draw


@pytest.fixture
def painted(_in_brief: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose figures are to be drawn and painted too."""
    for name, drawing in _in_brief.items():
        monkeypatch.setattr(name, drawing)


@dataclass
class Outcome:
    """What one command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one line of standard output."""
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def sentence(self) -> str:
        """The last line of standard error, without the program's name; there is no traceback above it."""
        assert "Traceback" not in self.err, self.err
        last = self.err.splitlines()[-1]
        assert last.startswith("kngd-ray: "), self.err
        assert sum(line.startswith("kngd-ray: ") for line in self.err.splitlines()) == 1
        assert last.endswith("."), last
        return last.removeprefix("kngd-ray: ")


@dataclass
class CommandLine:
    """Runs commands where every path is in a folder of the test's own."""

    folder: Path
    cache: Path
    read: Callable[[], tuple[str, str]]
    monkeypatch: pytest.MonkeyPatch
    data: Path
    defaults: list[str] = field(default_factory=list)
    nine_steps = ("epochs=3", "batch_size=4")  # for tests of what happens between steps

    def __call__(self, *arguments: Any) -> Outcome:
        self.read()  # what an earlier command printed is its own
        self.monkeypatch.setattr(sys, "argv", ["kngd-ray", *(str(a) for a in arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *self.read())

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def settings(self, *settings: str, data: Path | str | None = None) -> list[str]:
        """Settings of a run of half a second: no Ray, no MLflow, four shots, the default's one step; later ones win."""
        return [
            f"data.path={data or self.data}",
            "data.train_domain=noto",
            "data.shots=4",
            f"data.cache_dir={self.cache}",
            "trainer.num_workers=0",
            f"trainer.storage_path={self.runs}",
            "tracking.enabled=false",
            f"tracking.uri=sqlite:///{self.folder}/mlflow.db",
            "posterior.folds=2",
            *settings,
        ]

    def train(self, *settings: str, data: Path | str | None = None) -> Outcome:
        return self("train", *self.settings(*settings, data=data))

    def run(self, name: str) -> Path:
        return self.runs / name


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.parquet"
    pq.write_table(small_table(), path)
    return path


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features outlive tests, and are those of all workers of pytest-xdist: pictures are encoded once."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "features"


@pytest.fixture
def command(
    tmp_path: Path,
    shared_cache: Path,
    small_data: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> CommandLine:
    monkeypatch.chdir(tmp_path)

    def read() -> tuple[str, str]:
        captured = capfd.readouterr()
        return captured.out, captured.err

    return CommandLine(tmp_path, shared_cache, read, monkeypatch, small_data)
