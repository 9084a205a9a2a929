"""Reading runs back: everything that was logged, page by page, and nothing created on the way."""

import os
import socket
import sqlite3
from pathlib import Path

import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag

from kngd_ray.errors import TrackingError
from kngd_ray.tracking import _runs, publish, read_runs

SECRET = "s3cret"


def database(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))


@pytest.fixture
def logged(store, experiment, open_record, run_folder) -> str:
    """An experiment with a parent and three children, of which one failed."""
    open_record("parent", name="r/kalman", params={"seeds": "0,1,2"}, tags={"kngd_ray.run": "r"}).finish()
    for seed in range(3):
        record = open_record(f"seed-{seed}", params={"seeds": seed}, parent="parent")
        record.log_step(1, {"train/nll": 2.0})
        record.log_step(2, {"train/nll": 1.0})
        record.log_metrics({"id/accuracy": 0.5 + seed / 10, "id/nll": float("nan")})
        record.finish("FAILED" if seed == 2 else "FINISHED")
    publish(run_folder, store, experiment)
    return experiment


@pytest.mark.parametrize("page", [1, 3, 1000])
def test_every_run_comes_back_as_it_was_logged(store, logged, monkeypatch, page: int) -> None:
    monkeypatch.setattr(_runs, "_PAGE", page)
    runs = {run.name: run for run in read_runs(store, logged)}
    assert set(runs) == {"r/kalman", "seed-0", "seed-1", "seed-2"}
    parent, child, failed = runs["r/kalman"], runs["seed-1"], runs["seed-2"]
    assert parent.parent is None
    assert parent.tags["kngd_ray.run"] == "r"
    assert parent.start > 0
    assert child.parent == failed.parent == parent.id
    assert child.params == {"seeds": "1"}
    assert child.metrics == {"id/accuracy": 0.6, "train/nll": 1.0}
    assert (child.status, failed.status) == ("FINISHED", "FAILED")


def test_what_a_run_learns_from_comes_back_as_its_digest(store, experiment, open_record, run_folder, client) -> None:
    for id, digest in (("one", "1" * 32), ("other", "2" * 32)):
        record = open_record(id)
        record.log_input("pets", digest, "data/pets.parquet", {"classes": 37})
        record.finish()
    open_record("silent").finish()
    ids = publish(run_folder, store, experiment)
    evaluated = DatasetInput(Dataset("test", "3" * 32, "local", "{}"), [InputTag("mlflow.data.context", "evaluation")])
    client.log_inputs(ids["one"], [evaluated])
    found = {run.name: run.data for run in read_runs(store, experiment)}
    assert found == {"one": "1" * 32, "other": "2" * 32, "silent": None}


def test_an_experiment_without_runs(own_store) -> None:
    assert read_runs(own_store, "Default") == []


def test_a_deleted_run_is_not_read(store, logged, client) -> None:
    victim = read_runs(store, logged)[-1]
    client.delete_run(victim.id)
    assert victim.id not in {run.id for run in read_runs(store, logged)}


def test_unknown_experiment_names_the_nearest_and_is_not_created(own_store, client) -> None:
    before = database(own_store).read_bytes()
    with pytest.raises(TrackingError, match=r"no experiment 'fist'.*did you mean 'first'.*Default, "):
        read_runs(own_store, "fist")
    assert database(own_store).read_bytes() == before


def test_deleted_experiment(own_store) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(own_store)
    client.delete_experiment(client.get_experiment_by_name("first").experiment_id)
    with pytest.raises(TrackingError, match="was deleted"):
        read_runs(own_store, "first")


@pytest.mark.parametrize("place", ["mlflow.db", "folder/mlflow.db"])
def test_missing_database_stays_missing(tmp_path, monkeypatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match=r"there is no tracking database .*mlflow\.db"):
        read_runs(f"sqlite:///{place}", "x")
    assert list(tmp_path.iterdir()) == []


def test_empty_file_stays_empty(tmp_path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    with pytest.raises(TrackingError, match="holds no MLflow runs"):
        read_runs(f"sqlite:///{path}", "x")
    assert path.stat().st_size == 0


def test_file_that_is_no_database(tmp_path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("not a database " * 100)
    with pytest.raises(TrackingError, match="is not a SQLite database"):
        read_runs(f"sqlite:///{path}", "x")


def test_database_of_another_version_is_not_migrated(own_store) -> None:
    with sqlite3.connect(database(own_store)) as connection:
        connection.execute("DROP TABLE assessments")
    before = database(own_store).read_bytes()
    with pytest.raises(TrackingError, match=r"another version of MLflow.*mlflow db upgrade"):
        read_runs(own_store, "first")
    assert database(own_store).read_bytes() == before


def test_reading_leaves_database_and_folder_alone(own_store, tmp_path, monkeypatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = database(own_store)
    before = path.read_bytes()
    os.chmod(path, 0o444)
    assert [run.name for run in read_runs(own_store, "first")] == ["first"]
    assert path.read_bytes() == before
    assert list(elsewhere.iterdir()) == []


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TrackingError, match="does not respond") as caught:
        read_runs(f"http://user:{SECRET}@127.0.0.1:{port}", "x")
    assert SECRET not in str(caught.value)
    assert "sync" not in str(caught.value), "there is nothing to send"


def test_unknown_kind_of_store() -> None:
    with pytest.raises(TrackingError, match="not an MLflow store"):
        read_runs("gopher://x", "x")
