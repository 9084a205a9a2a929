"""The whole command: its driver killed, interrupted, helped by a second one, and run on a cluster of two nodes."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from kngd_ray.tuning import JOURNAL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# 24 trials of a second: slow enough to be caught in the middle.
SEARCH: dict[str, Any] = {
    "preset": "kalman_diagonal",
    "filter": {"covariance": "kronecker", "iterations": 6},
    "epochs": 6,
    "batch_size": 8,
    "adapter": "linear",
    "posterior": {"folds": 2, "draws": 4},
    "search": {"num_samples": 24, "batch": 6, "seeds": [0, 1], "sampler": "tpe", "refit": False},
    "space": {
        "filter.p0": {"low": 0.001, "high": 1.0, "log": True},
        "observation.0.r0": {"low": 0.1, "high": 10.0, "log": True},
    },
}


@pytest.fixture
def search(tmp_path: Path, settings: Callable[..., list[str]]) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the command in a process of its own; whatever is left of it at the end is killed."""
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(SEARCH))
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *more: str, resume: bool = False, workers: int = 2) -> "subprocess.Popen[str]":
        given = [f"trainer.storage_path={tmp_path / 'runs'}", "--resume", name]
        what = given if resume else [str(file), *settings(name, workers)]
        arguments = [sys.executable, "-m", "kngd_ray.cli", "tune", *what, *more, "--json"]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            end(process, signal.SIGKILL)


def report(process: "subprocess.Popen[str]", seconds: float = 300) -> Any:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return json.loads(out)


def lines(folder: Path) -> list[dict[str, Any]]:
    """What is in the journal of a search, the half of a line at its end left out."""
    path = folder / JOURNAL
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def finished(folder: Path) -> int:
    return sum(line.get("state") == TrialState.COMPLETE for line in lines(folder))


def wait_for(process: "subprocess.Popen[str]", true: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(process: "subprocess.Popen[str]", number: int) -> list[psutil.Process]:
    """Send a signal; SIGKILL to all of its family, as a machine that goes down takes all its processes along."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    for child in family if number == signal.SIGKILL else ():
        if child.is_running():
            child.kill()
    return family


def history(folder: Path) -> list[tuple[Any, ...]]:
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    trials = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    return [(trial.number, trial.state, trial.params, trial.values) for trial in trials]


def starts(folder: Path) -> Counter[int]:
    """How often each trial was taken up by a driver."""
    return Counter(line["trial_id"] for line in lines(folder) if "driver" in (line.get("user_attr") or {}))


def statuses(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in folder.glob("records/*/meta.json")}


def in_mlflow(folder: Path) -> dict[str, str]:
    """The status of every run in a store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {run.info.run_id: run.info.status for run in runs}


def test_a_killed_driver_is_resumed_and_nothing_is_lost(search, tmp_path: Path) -> None:
    """SIGKILL in the middle of 24 trials; the same on fresh processes, and the same best as if nothing had happened."""
    folder, whole = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    off, mode = "tracking.enabled=false", "search.trial=local"
    expected = report(search("whole", off, mode, workers=0))
    driver = search("killed", mode)
    wait_for(driver, lambda: finished(folder) >= 8)
    family = end(driver, signal.SIGKILL)
    driver.wait(timeout=30)
    psutil.wait_procs(family, timeout=30)
    before = {line["trial_id"] for line in lines(folder) if line.get("state") == TrialState.COMPLETE}
    assert 8 <= len(before) < 24
    found = report(search("killed", resume=True))
    assert found["trials"] == {"finished": 24, "failed": 0, "stopped": 0}
    counts = starts(folder)
    assert {trial for trial, times in counts.items() if times > 1}.isdisjoint(before), (
        "none that was finished ran again"
    )
    assert sum(counts.values()) - 24 <= 2, "at most the two that ran when it was killed"
    assert history(folder) == history(whole)
    assert found["best"] == expected["best"]
    assert Counter(statuses(folder).values()) == {"FINISHED": 25} == Counter(in_mlflow(tmp_path).values())


def test_ctrl_c_ends_it_and_it_can_be_continued(search, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "cut"
    driver = search("cut", "search.trial=local")
    wait_for(driver, lambda: finished(folder) >= 3)
    family = end(driver, signal.SIGINT)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 130, err
    assert "kngd-ray tune --resume cut" in err
    assert "Traceback" not in err
    _, left = psutil.wait_procs(family, timeout=60)
    assert not left
    assert "RUNNING" not in statuses(folder).values()
    runs = in_mlflow(tmp_path)
    assert len(runs) >= 4
    assert set(runs.values()) <= {"FINISHED", "KILLED"}
    found = report(search("cut", "tracking.enabled=false", "search.num_samples=12", resume=True))
    assert found["trials"]["finished"] >= 12


def test_two_commands_share_a_search(search, tmp_path: Path) -> None:
    """Whoever comes last to the end makes the report; nobody runs a trial twice, and the history is that of one."""
    folder, whole = tmp_path / "runs" / "two", tmp_path / "runs" / "one"
    off, mode = "tracking.enabled=false", "search.trial=local"
    first = search("two", off, mode, workers=0)
    wait_for(first, lambda: bool(lines(folder)))
    second = search("two", off, resume=True)
    reports = [report(process) for process in (first, second)]
    report(search("one", off, mode, workers=0))
    for found in reports:
        assert found["trials"] == {"finished": 24, "failed": 0, "stopped": 0}
    assert set(starts(folder).values()) == {1}
    assert history(folder) == history(whole)
    drivers = {line["user_attr"]["driver"] for line in lines(folder) if "driver" in (line.get("user_attr") or {})}
    assert len(drivers) == 2, "both had a share"
    assert set(statuses(folder).values()) == {"FINISHED"}


CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_trials_run_on_both_nodes_of_a_cluster(search, tmp_path: Path) -> None:
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert cluster.stdout is not None
    try:
        address = cluster.stdout.readline().strip()
        process = search(
            "spread",
            f"trainer.address={address}",
            "search.trial=local",
            "tracking.enabled=false",
            "search.num_samples=12",
        )
        nodes: set[str] = set()
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            for child in psutil.process_iter(["cmdline"]):
                command = " ".join(child.info["cmdline"] or [])
                if "default_worker.py" in command and f"--gcs-address={address}" in command:
                    nodes |= {word for word in command.split() if word.startswith("--raylet-name=")}
            time.sleep(0.2)
        assert report(process)["trials"]["finished"] == 12
        assert len(nodes) == 2, nodes
    finally:
        cluster.communicate("", timeout=60)
