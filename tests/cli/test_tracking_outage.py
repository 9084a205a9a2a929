"""An MLflow server that is killed in the middle of a run, and comes back in time or only after it."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile import program
from helpers.mlflow_server import ENVIRONMENT, Server

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    yield server
    server.kill()


def begun(server: Server, data: Path, cache: Path, storage: Path, epochs: int) -> "subprocess.Popen[str]":
    """A run that logs to the server, as soon as the server has some of it."""
    arguments = [
        f"data.path={data}",
        "data.train_domain=noto",
        "data.shots=4",
        f"data.cache_dir={cache}",
        "trainer.num_workers=0",
        f"trainer.storage_path={storage}",
        "trainer.name=run",
        f"tracking.uri={server.uri}",
        "tracking.log_model=false",
        f"epochs={epochs}",
        "batch_size=4",
        "posterior.folds=0",
    ]
    process = subprocess.Popen(
        program("train", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 300
    while not logged(server, "train/nll"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


def client(server: Server) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.uri)


def logged(server: Server, name: str) -> list[int]:
    """Steps at which the only run's metric is in the store."""
    mlflow = client(server)
    experiment = mlflow.get_experiment_by_name("kngd_ray")
    runs = [] if experiment is None else mlflow.search_runs([experiment.experiment_id])
    assert len(runs) <= 1, "the run was made twice"
    return sorted(point.step for run in runs for point in mlflow.get_metric_history(run.info.run_id, name))


def finished(process: "subprocess.Popen[str]") -> str:
    _, stderr = process.communicate(timeout=550)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr, stderr
    return stderr


def sync(storage: Path) -> None:
    done = subprocess.run(
        program("sync", storage / "run"), capture_output=True, text=True, timeout=500, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr


def nothing_is_missing(server: Server, steps: int) -> None:
    for name in ("train/nll", "time/step_ms", "train/refused"):
        assert logged(server, name) == list(range(1, steps + 1)), name
    assert logged(server, "id/accuracy") == [0]
    mlflow = client(server)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("kngd_ray").experiment_id])
    assert run.info.status == "FINISHED"
    assert {file.path for file in mlflow.list_artifacts(run.info.run_id)} >= {"config.yaml", "figures"}


def test_a_server_that_is_gone_for_a_minute(
    server: Server, small_data: Path, shared_cache: Path, tmp_path: Path
) -> None:
    process = begun(server, small_data, shared_cache, tmp_path / "runs", epochs=1500)
    server.kill()
    time.sleep(60)
    server.start()
    stderr = finished(process)
    assert stderr.count("does not respond") <= 1, "an outage is told of once"
    if "kngd-ray sync" in stderr:  # the run was faster than the minute
        sync(tmp_path / "runs")
    nothing_is_missing(server, 3 * 1500)


def test_a_server_that_stays_away_until_sync(
    server: Server, small_data: Path, shared_cache: Path, tmp_path: Path
) -> None:
    process = begun(server, small_data, shared_cache, tmp_path / "runs", epochs=400)
    server.kill()
    stderr = finished(process)
    assert "does not respond" in stderr
    assert "kngd-ray sync" in stderr
    refused = subprocess.run(
        program("sync", tmp_path / "runs" / "run"), capture_output=True, text=True, timeout=500, check=False
    )
    assert refused.returncode == 1
    assert "does not respond" in refused.stderr
    server.start()
    for _ in range(2):
        sync(tmp_path / "runs")
    nothing_is_missing(server, 3 * 400)
