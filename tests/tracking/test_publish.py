"""Publishing to a SQLite store: complete, incremental, and without a trace in the process."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest

from kngd_ray.tracking import Publisher, publish


@pytest.fixture
def calls(monkeypatch):
    """What is sent, by method of MLflow's client."""
    from mlflow import MlflowClient

    made: list[tuple[str, int]] = []

    def count(name):
        whole = getattr(MlflowClient, name)

        def counted(self, *args, **options):
            made.append((name, len(options.get("metrics") or options.get("params") or ())))
            return whole(self, *args, **options)

        monkeypatch.setattr(MlflowClient, name, counted)

    for name in ("create_run", "log_batch", "log_artifact", "set_terminated", "create_logged_model"):
        count(name)
    return made


def test_parent_and_child_arrive_whole(open_record, run_folder, store, experiment, client):
    child = open_record("a-child", parent="z-parent", params={"epochs": 5}, tags={"preset": "kalman"})
    parent = open_record("z-parent", name="search")
    for step in (1, 2, 3):
        child.log_step(step, {"train/nll": 1 / step})
    child.log_metrics({"id/accuracy": 0.9})
    (child.artifacts / "figures").mkdir()
    (child.artifacts / "figures" / "curve.txt").write_text("curve")
    (child.artifacts / "config.yaml").write_text("a: 1")
    child.finish()
    parent.finish("FAILED")
    ids = publish(run_folder, store, experiment)
    got = client.get_run(ids["a-child"])
    assert got.data.tags["mlflow.parentRunId"] == ids["z-parent"]
    assert got.data.tags["preset"] == "kalman"
    assert got.data.params == {"epochs": "5"}
    assert got.data.metrics == {"train/nll": 1 / 3, "id/accuracy": 0.9}
    assert (got.info.status, client.get_run(ids["z-parent"]).info.status) == ("FINISHED", "FAILED")
    meta = json.loads((child.folder / "meta.json").read_text())
    assert (got.info.start_time, got.info.end_time) == (meta["start"], meta["end"])
    history = client.get_metric_history(ids["a-child"], "train/nll")
    times = [json.loads(line)["time"] for line in (child.folder / "steps.jsonl").read_text().splitlines()]
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (s, 1 / s, t) for s, t in zip((1, 2, 3), times, strict=True)
    ]
    assert [a.path for a in client.list_artifacts(ids["a-child"])] == ["config.yaml", "figures"]
    assert client.list_artifacts(ids["a-child"], "figures")[0].path == "figures/curve.txt"


def test_runs_on_the_same_data_share_an_input(open_record, run_folder, store, experiment, client):
    """And a run that is resumed, or sent again, has it once."""
    for id in ("one", "other"):
        record = open_record(id)
        record.log_input("pacs", "0123456789abcdef" * 2, "data/pacs.parquet", {"classes": 7})
        record.finish()
    ids = publish(run_folder, store, experiment)
    open_record("one").log_input("pacs", "0123456789abcdef" * 2, "data/pacs.parquet", {"classes": 7})
    assert publish(run_folder, store, experiment) == ids
    inputs = [client.get_run(run).inputs.dataset_inputs for run in ids.values()]
    assert [len(each) for each in inputs] == [1, 1]
    one, other = (each[0].dataset for each in inputs)
    assert (one.name, one.digest, one.profile) == (other.name, other.digest, other.profile) != (None, None, None)
    assert json.loads(one.source) == {"uri": "data/pacs.parquet"}
    assert [(tag.key, tag.value) for tag in inputs[0][0].tags] == [("mlflow.data.context", "training")]


def test_batches_stay_within_the_limits(open_record, run_folder, store, experiment, client, calls):
    record = open_record(params={f"p{n}": n for n in range(230)} | {"long": "x" * 9000})
    for step in range(1, 701):
        record.log_step(step, {"a": step, "b": step, "c": step})
    record.log_step(701, {f"m{n}": n for n in range(2300)})
    record.finish()
    ids = publish(run_folder, store, experiment)
    assert [n for name, n in calls if name == "log_batch"] == [100, 100, 31, 999, 999, 102, 1000, 1000, 300]
    run = client.get_run(ids["seed-0"])
    assert len(run.data.params) == 231
    assert len(run.data.params["long"]) == 6000
    assert len(client.get_metric_history(ids["seed-0"], "b")) == 700


def test_second_publish_sends_only_what_is_new(open_record, run_folder, store, experiment, client, calls):
    record = open_record(params={"a": 1})
    for step in range(1, 11):
        record.log_step(step, {"nll": step})
    record.flush()
    (record.artifacts / "a.txt").write_text("a")
    first = publish(run_folder, store, experiment)
    assert client.get_run(first["seed-0"]).info.status == "RUNNING"
    calls.clear()
    assert publish(run_folder, store, experiment) == first
    assert calls == []
    record.log_step(11, {"nll": 11})
    (record.artifacts / "b.txt").write_text("b")
    record.finish()
    assert publish(run_folder, store, experiment) == first
    assert calls == [("log_batch", 1), ("log_artifact", 0), ("set_terminated", 0)]
    (record.artifacts / "a.txt").write_text("changed")
    (record.artifacts / ".c.txt.tmp").write_text("being written")
    calls.clear()
    publish(run_folder, store, experiment)
    assert calls == [("log_artifact", 0)]


def test_resumed_record_goes_on_in_the_same_run(open_record, run_folder, store, experiment, client):
    record = open_record(params={"workers": 1})
    for step in range(1, 8):
        record.log_step(step, {"nll": step})
    record.finish("KILLED")
    first = publish(run_folder, store, experiment)
    assert client.get_run(first["seed-0"]).info.status == "KILLED"
    record = open_record(params={"workers": 2, "new": 1})
    for step in range(6, 11):
        record.log_step(step, {"nll": step})
    record.flush()
    assert publish(run_folder, store, experiment) == first
    assert client.get_run(first["seed-0"]).info.status == "RUNNING"
    record.finish()
    assert publish(run_folder, store, experiment) == first
    run = client.get_run(first["seed-0"])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"workers": "1", "new": "1"}
    assert [m.step for m in client.get_metric_history(first["seed-0"], "nll")] == list(range(1, 11))


def test_damaged_memory_finds_the_same_run(open_record, run_folder, store, experiment, client):
    record = open_record(params={"a": 1})
    record.log_step(1, {"nll": 1})
    record.log_metrics({"acc": 1})
    record.finish()
    first = publish(run_folder, store, experiment)
    (run_folder / "tracking.json").write_text("{ damaged")
    assert publish(run_folder, store, experiment) == first
    assert len(client.get_metric_history(first["seed-0"], "nll")) == 1


def test_values_that_are_not_finite_are_not_sent(open_record, run_folder, store, experiment, client):
    record = open_record()
    record.log_step(1, {"nll": float("nan"), "acc": 1})
    record.log_step(2, {"nll": float("inf")})
    record.log_metrics({"id/nll": float("nan"), "ood/art(1)/nll": 2})
    record.finish()
    ids = publish(run_folder, store, experiment)
    assert client.get_run(ids["seed-0"]).data.metrics == {"acc": 1.0, "ood/art_1_/nll": 2.0}


def test_names_that_mlflow_would_call_the_same_are_told_apart(open_record, run_folder, store, experiment, client):
    """Names of domains are the user's: the figures of one must not take the place of another's."""
    long = "d" * 300
    figures = {"ood/a+b/nll": 1.0, "ood/a*b/nll": 2.0, "ood/a_b/nll": 3.0, "ood/c+d/nll": 4.0}
    record = open_record()
    record.log_metrics({**figures, f"{long}1": 5.0, f"{long}2": 6.0})
    record.finish()
    run = publish(run_folder, store, experiment)["seed-0"]
    found = client.get_run(run).data.metrics
    assert sorted(found.values()) == [1, 2, 3, 4, 5, 6]
    assert found["ood/a_b/nll"] == 3
    assert found["ood/c_d/nll"] == 4
    assert len(found) == 6


@pytest.mark.parametrize("name", ["https://a.org", "..", ".", "", "/a", "a/", "a//b", "/" * 400, "a" * 245 + "/.b"])
def test_names_that_are_no_paths_are_sent_too(open_record, run_folder, store, experiment, client, name):
    """MLflow refuses a key that is not a path in its shortest form, and with it all that comes after."""
    record = open_record()
    record.log_metrics({f"ood/{name}/nll": 1.0, "id/nll": 2.0})
    record.finish()
    run = client.get_run(publish(run_folder, store, experiment)["seed-0"])
    assert sorted(run.data.metrics.values()) == [1, 2]
    assert run.info.status == "FINISHED"


def test_two_stores_are_remembered_apart(open_record, run_folder, store, own_store, experiment, calls):
    record = open_record()
    record.finish()
    here, there = publish(run_folder, store, experiment), publish(run_folder, own_store, experiment)
    assert here != there
    calls.clear()
    assert publish(run_folder, store, experiment) == here
    assert publish(run_folder, own_store, experiment) == there
    assert calls == []


def test_store_begun_again_gets_everything(open_record, run_folder, own_store, store, experiment):
    record = open_record()
    record.log_step(1, {"nll": 1})
    record.finish()
    first = publish(run_folder, own_store, experiment)
    from mlflow import MlflowClient

    database = own_store.removeprefix("sqlite:///")
    shutil.copy(store.removeprefix("sqlite:///"), database)
    second = publish(run_folder, own_store, experiment)
    assert second != first
    assert MlflowClient(own_store).get_run(second["seed-0"]).data.metrics == {"nll": 1.0}


def test_deleted_run_is_left_alone(open_record, run_folder, store, experiment, client, caplog):
    record, other = open_record(), open_record("seed-1")
    ids = publish(run_folder, store, experiment)
    client.delete_run(ids["seed-0"])
    record.finish()
    other.finish()
    assert publish(run_folder, store, experiment) == {"seed-1": ids["seed-1"]}
    assert "was deleted in MLflow" in caplog.text
    assert client.get_run(ids["seed-1"]).info.status == "FINISHED"


def test_nothing_global_changes_and_nothing_is_printed(open_record, run_folder, tmp_path, monkeypatch, capfd):
    import mlflow

    monkeypatch.chdir(tmp_path)
    fit = run_folder / "fit"
    fit.mkdir(parents=True)
    (fit / "calibration.json").write_text("{}")
    record = open_record()
    record.set_model(fit, ["cat", "dog"])
    record.finish()
    before = (dict(os.environ), mlflow.get_tracking_uri(), logging.getLogger("mlflow").level)
    publish(run_folder, "sqlite:///new/mlflow.db", "first")  # makes its tables, which MLflow announces
    assert (dict(os.environ), mlflow.get_tracking_uri(), logging.getLogger("mlflow").level) == before
    assert mlflow.active_run() is None
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "run"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["mlflow.db", "mlruns"]
    assert json.loads((run_folder / "tracking.json").read_text())["uri"] == f"sqlite:///{tmp_path}/new/mlflow.db"


@pytest.mark.slow
def test_second_process_continues(open_record, run_folder, store, experiment, client):
    record = open_record()
    record.log_step(1, {"nll": 1})
    record.flush()
    first = publish(run_folder, store, experiment)
    record.log_step(2, {"nll": 2})
    record.finish()
    code = (
        "import json, sys; from pathlib import Path; from kngd_ray.tracking import publish;"
        "print(json.dumps(publish(Path(sys.argv[1]), sys.argv[2], sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(run_folder), store, experiment]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == first
    assert done.stderr == ""
    run = client.get_run(first["seed-0"])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"nll": 2.0})


def test_publisher_follows_a_live_run(open_record, run_folder, store, experiment, client):
    record = open_record()
    problems: list[str] = []
    with Publisher(run_folder, store, experiment, every_s=0.05, on_problem=problems.append) as publisher:
        for step in range(1, 2001):
            record.log_step(step, {"nll": step})
        record.finish()
        ids = publisher.close()
    assert ids is not None
    assert problems == []
    assert client.get_run(ids["seed-0"]).info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(ids["seed-0"], "nll")] == list(range(1, 2001))


def test_run_without_records_needs_no_store(tmp_path):
    assert publish(tmp_path, "http://127.0.0.1:9", "x") == {}
