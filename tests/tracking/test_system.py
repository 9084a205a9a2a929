"""What a run takes of its machine: sampled into its record, and sent once."""

import json
import subprocess
import time

import pytest

from kngd_ray.experiment.environment import source_tags
from kngd_ray.tracking import SystemMonitor, publish

KNOWN = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"}


def lines_of(record) -> list[dict]:
    return [json.loads(line) for line in (record.folder / "system.jsonl").read_text().splitlines()]


def test_samples_arrive_each_once_and_go_on_after_an_interruption(open_record, run_folder, store, experiment, client):
    record = open_record()
    record.log_step(0, {"train/nll": 1.0})
    record.flush()
    with SystemMonitor(record.folder, every_s=0.01):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not (record.folder / "system.jsonl").is_file() or len(lines_of(record)) < 3
        ):
            time.sleep(0.01)
    first = lines_of(record)
    ids = publish(run_folder, store, experiment)
    with (record.folder / "system.jsonl").open("ab") as file:
        file.write(b'{"step": 9')  # of a process that was killed
    with SystemMonitor(record.folder, every_s=600):
        pass  # ends at once, with one sample
    lines = lines_of(record)
    assert len(lines) == len(first) + 1 >= 4
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert all(name.startswith("system/") for line in lines for name in line["metrics"])
    assert {f"system/{name}" for name in KNOWN} < lines[0]["metrics"].keys()
    assert all(0 <= line["metrics"]["system/system_memory_usage_percentage"] <= 100 for line in lines)
    publish(run_folder, store, experiment)
    history = client.get_metric_history(ids["seed-0"], "system/disk_usage_percentage")
    assert [metric.step for metric in history] == list(range(len(lines)))
    assert client.get_run(ids["seed-0"]).data.metrics["train/nll"] == 1.0


def test_a_record_that_is_gone_stops_nobody(tmp_path):
    with SystemMonitor(tmp_path / "nowhere", every_s=0.01):
        time.sleep(0.05)
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def checkout(tmp_path):
    """A checkout that holds the module, and one file of another's."""

    def git(*words: str) -> str:
        mine = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *mine, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / "kngd_ray"
    (package / "experiment").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git("init", "-q")
    (tmp_path / "other.txt").write_text("other")
    git("add", "other.txt")
    git("commit", "-qm", "other")
    return package, git


def test_the_commit_is_that_of_the_package_and_of_no_other_checkout(checkout, monkeypatch):
    package, git = checkout
    monkeypatch.setitem(source_tags.__wrapped__.__globals__, "__file__", str(package / "experiment" / "environment.py"))
    assert source_tags.__wrapped__() == {}, "an environment within somebody's checkout is not tracked by it"
    git("add", "kngd_ray")
    git("commit", "-qm", "ours")
    assert source_tags.__wrapped__() == {"mlflow.source.git.commit": git("rev-parse", "HEAD")}
    (package.parent / "other.txt").write_text("changed")
    assert "mlflow.git.dirty" not in source_tags.__wrapped__()
    (package / "__init__.py").write_text("changed = True")
    assert source_tags.__wrapped__()["mlflow.git.dirty"] == "true"
    monkeypatch.setenv("PATH", "/nowhere")
    assert source_tags.__wrapped__() == {}
