"""One SQLite store for all tests here, since making one takes seconds; each test has its own experiment."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kngd_ray.tracking import Record, publish

_numbers = itertools.count()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a store with its tables made."""
    folder = tmp_path_factory.mktemp("store")
    Record.open(folder / "run", "first", name="first", params={}, tags={}).finish()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    publish(folder / "run", uri, "first")
    return uri


@pytest.fixture
def own_store(store: str, tmp_path: Path) -> str:
    """Address of a copy that a test may harm."""
    copy = tmp_path / "store" / "mlflow.db"
    copy.parent.mkdir()
    shutil.copy(store.removeprefix("sqlite:///"), copy)
    return f"sqlite:///{copy}"


@pytest.fixture
def client(store: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store)


@pytest.fixture
def experiment() -> str:
    return f"experiment {next(_numbers)}"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


OpenRecord = Callable[..., Record]


@pytest.fixture
def open_record(run_folder: Path) -> OpenRecord:
    """Open a record of this test's run, `seed-0` unless it is told otherwise."""

    def make(id: str = "seed-0", **options: Any) -> Record:
        return Record.open(run_folder, id, **{"name": id, "params": {}, "tags": {}, **options})

    return make
