"""The outbox on disk: order, resuming, torn writes, full disks."""

import errno
import json
import subprocess
import sys
import threading

import pytest

from kngd_ray.errors import StorageError
from kngd_ray.tracking import Record


def lines(record: Record) -> list[dict]:
    return [json.loads(line) for line in (record.folder / "steps.jsonl").read_text().splitlines()]


def meta(record: Record) -> dict:
    return json.loads((record.folder / "meta.json").read_text())


def test_import_is_cheap():
    code = "import sys, kngd_ray.tracking; print([m for m in ('mlflow', 'ray', 'torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_record_writes_what_it_is_told(open_record):
    record = open_record(name="kalman", params={"epochs": 5}, tags={"preset": "kalman"}, parent="search")
    record.log_step(1, {"train/nll": 0.5})
    record.log_metrics({"id/accuracy": 0.9})
    record.log_metrics({"id/nll": 0.3})
    record.finish()
    written = meta(record)
    assert (written["name"], written["parent"], written["status"]) == ("kalman", "search", "FINISHED")
    assert (written["params"], written["tags"]) == ({"epochs": "5"}, {"preset": "kalman"})
    assert written["end"] >= written["start"]
    assert json.loads((record.folder / "metrics.json").read_text()) == {"id/accuracy": 0.9, "id/nll": 0.3}
    assert [(line["step"], line["metrics"]) for line in lines(record)] == [(1, {"train/nll": 0.5})]


def test_steps_are_buffered_until_flushed(open_record):
    record = open_record()
    record.log_step(1, {"a": 1})
    assert not (record.folder / "steps.jsonl").exists()
    record.flush()
    assert len(lines(record)) == 1
    for step in range(2, 1002):
        record.log_step(step, {"a": 1})
    assert len(lines(record)) == 1001


def test_resume_keeps_start_and_drops_repeated_steps(open_record):
    first = open_record(params={"epochs": 5, "workers": 1})
    for step in range(1, 26):
        first.log_step(step, {"a": float(step)})
    first.finish("KILLED")
    start = meta(first)["start"]
    second = open_record(params={"epochs": 5, "workers": 4, "new": 1}, tags={"resumed": "yes"})
    assert second.status == "RUNNING"
    for step in range(21, 41):  # from the checkpoint at 20
        second.log_step(step, {"a": float(step)})
    second.flush()
    assert [line["step"] for line in lines(second)] == list(range(1, 41))
    assert meta(second)["start"] == start
    assert meta(second)["end"] is None
    assert meta(second)["params"] == {"epochs": "5", "workers": "1", "new": "1"}
    assert second.steps()[-1] == {"step": 40, "a": 40.0}


def test_torn_last_line_is_written_anew(open_record):
    first = open_record()
    first.log_step(1, {"a": 1})
    first.log_step(2, {"a": 2})
    first.flush()
    path = first.folder / "steps.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    second = open_record()
    second.log_step(2, {"a": 2})
    second.flush()
    assert [line["step"] for line in lines(second)] == [1, 2]


def test_values_that_are_not_finite_are_strings(open_record):
    record = open_record()
    record.log_step(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 1})
    record.log_metrics({"a": float("nan")})
    record.flush()
    assert lines(record)[0]["metrics"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    assert record.steps()[0]["b"] == float("inf")
    assert json.loads((record.folder / "metrics.json").read_text()) == {"a": "NaN"}


def test_full_disk_is_a_storage_error_and_loses_nothing(open_record, monkeypatch):
    record = open_record()
    record.log_step(1, {"a": 1})
    record.flush()
    record.log_step(2, {"a": 2})
    whole = type(record.folder).open

    class Full:
        """Writes five bytes, then the disk is full."""

        def __init__(self, file):
            self.file, self.left = file, 5

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.left = self.file.write(data[: self.left]), 0
            return written

        def truncate(self, size):
            self.file.truncate(size)

    def full_open(path, mode="r", *args, **options):
        file = whole(path, mode, *args, **options)
        return Full(file) if mode == "ab" else file

    with monkeypatch.context() as patch:
        patch.setattr(type(record.folder), "open", full_open)
        with pytest.raises(StorageError, match="no space left"):
            record.flush()
    assert len(lines(record)) == 1
    record.flush()
    assert [line["step"] for line in lines(record)] == [1, 2]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Record.open(tmp_path / "file", "a", name="a", params={}, tags={})


@pytest.mark.parametrize("id", ["", "../up", "a/b", ".hidden"])
def test_id_names_a_folder(tmp_path, id):
    with pytest.raises(ValueError, match="record id"):
        Record.open(tmp_path, id, name="a", params={}, tags={})


def test_readers_see_whole_files_while_a_writer_writes(open_record):
    record = open_record()
    stop = threading.Event()

    def write():
        step = 0
        while not stop.is_set():
            step += 1
            record.log_step(step, {"a": step})
            record.log_metrics({"a": step})

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while not (record.folder / "metrics.json").exists():
            pass
        for _ in range(300):
            assert "a" in json.loads((record.folder / "metrics.json").read_text())
    finally:
        stop.set()
        thread.join()
