"""Stores that are down, refuse or lie: one sentence within seconds, no secrets, nothing lost."""

import http.server
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy
from helpers.mlflow_server import Server

from kngd_ray.errors import TrackingError
from kngd_ray.tracking import Publisher, publish, read_runs, redact, resolve_uri
from kngd_ray.tracking._quiet import FIRST_CONTACT
from kngd_ray.tracking._uri import sqlite_file

SECRET = "s3cret"


@pytest.fixture
def finished(open_record, run_folder) -> Path:
    record = open_record()
    record.log_step(1, {"nll": 1})
    record.finish()
    return run_folder


def refusal(run_folder: Path, uri: str, seconds: float = 150) -> str:
    """What publishing says, before MLflow itself would have given up: it tries again for four minutes."""
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        publish(run_folder, uri, "x")
    assert time.monotonic() - start < seconds
    message = str(caught.value)
    assert SECRET not in message
    assert "\n" not in message
    assert SECRET not in "".join(p.read_text() for p in run_folder.glob("tracking.json"))
    return message


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def answering(code: int, body: bytes = b"no") -> Iterator[str]:
    """A server that gives every request one answer; yields its HOST:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_nobody_listens(finished):
    message = refusal(finished, f"http://user:{SECRET}@127.0.0.1:{free_port()}")
    assert "does not respond (connection refused)" in message
    assert "kngd-ray sync" in message


def test_server_that_accepts_and_says_nothing(finished, monkeypatch):
    monkeypatch.setitem(FIRST_CONTACT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "timed out" in refusal(finished, f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    ("code", "body", "expected"),
    [
        (401, b"no", "refuses access: set MLFLOW_TRACKING_USERNAME"),
        (403, b"no", "refuses access"),
        (404, b"no", "does not respond like MLflow"),
        (200, b"<html>hello</html>", "does not respond like MLflow"),
        (500, b"no", "internal error"),
    ],
)
def test_server_that_refuses(finished, code, body, expected):
    with answering(code, body) as place:
        assert expected in refusal(finished, f"http://user:{SECRET}@{place}")


def test_database_server_that_is_down(finished):
    message = refusal(finished, f"postgresql://user:{SECRET}@127.0.0.1:{free_port()}/mlflow")
    assert "does not respond (connection refused)" in message


def test_locked_database(finished, own_store, monkeypatch):
    monkeypatch.setattr("kngd_ray.tracking._server._PROBE_SECONDS", 0.5)
    connection = sqlite3.connect(own_store.removeprefix("sqlite:///"))
    connection.execute("BEGIN EXCLUSIVE")
    try:
        assert "is locked by another process" in refusal(finished, own_store)
    finally:
        connection.close()


def test_read_only_database(finished, own_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow makes a folder named by the address
    path = own_store.removeprefix("sqlite:///")  # root may write any file, so its mode would prove nothing
    assert "cannot be written" in refusal(finished, f"sqlite:///file:{path}?mode=ro&uri=true")


def test_file_that_is_no_database(finished, tmp_path):
    (tmp_path / "notes.db").write_text("notes " * 500)
    assert "not a SQLite database" in refusal(finished, f"sqlite:///{tmp_path}/notes.db")


def test_database_below_a_file(finished, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(finished, f"sqlite:///{tmp_path}/file/mlflow.db")


def test_deleted_experiment(finished, store, experiment, client):
    client.delete_experiment(client.create_experiment(experiment))
    with pytest.raises(TrackingError, match=r"was deleted .* another name"):
        publish(finished, store, experiment)


@pytest.mark.parametrize("uri", ["./mlruns", "file:/tmp/mlruns", "sqlite://", "http://", f"ftp://u:{SECRET}@host"])
def test_address_that_is_no_store(uri):
    with pytest.raises(TrackingError, match=r"tracking\.uri is") as caught:
        resolve_uri(uri)
    assert SECRET not in str(caught.value)


def test_relative_database_becomes_absolute(tmp_path):
    assert resolve_uri("sqlite:///a/../mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri(f"sqlite:///{tmp_path}/m.db?timeout=3") == f"sqlite:///{tmp_path}/m.db?timeout=3"
    assert resolve_uri("https://tracking.example.org/x") == "https://tracking.example.org/x"


@pytest.mark.parametrize("name", ["a%20b", "a%", "a b", "a?b", "a#b", "é", "a@b", "a:b&c=d"])
def test_a_database_is_where_its_folder_is_whatever_it_is_called(tmp_path, monkeypatch, name):
    """SQLAlchemy decodes its addresses, and takes what follows a question mark for options."""
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    relative = resolve_uri("sqlite:///mlflow.db")
    assert sqlite_file(relative) == folder / "mlflow.db"
    assert sqlalchemy.create_engine(relative).url.database == str(folder / "mlflow.db")
    assert resolve_uri(relative) == relative
    if "?" not in name:  # which begins the options of an address that is given whole
        assert resolve_uri(f"sqlite:///{folder}/mlflow.db") == relative


def test_runs_arrive_beside_a_folder_with_an_odd_name(open_record, run_folder, own_store, tmp_path, monkeypatch):
    folder = tmp_path / "50%20? #é"
    folder.mkdir()
    sqlite_file(own_store).rename(folder / "mlflow.db")
    monkeypatch.chdir(folder)
    record = open_record("x")
    (record.artifacts / "a.txt").write_text("a")
    record.finish()
    (run,) = publish(run_folder, "sqlite:///mlflow.db", "odd").values()
    assert (folder / "mlruns" / "odd" / run / "artifacts" / "a.txt").read_text() == "a"
    assert [each.id for each in read_runs("sqlite:///mlflow.db", "odd")] == [run]
    assert not list(tmp_path.glob("50%25*")), "MLflow makes the folder of an encoded address, too"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"at http://me:{SECRET}@host:5000/a and", "at http://***@host:5000/a and"),
        (f"postgresql://me:{SECRET}@@host/db", "postgresql://***@host/db"),
        (f"postgresql://host/db?password={SECRET}&x=1", "postgresql://host/db?password=***&x=1"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_redaction(text, shown):
    assert redact(text) == shown


def test_publisher_tells_of_an_outage_once_and_sends_all_after_it(finished, store, experiment, client, monkeypatch):
    from kngd_ray.tracking import _publisher

    down = True
    attempts = []
    whole = _publisher.publish

    def flaky(*args):
        attempts.append(time.monotonic())
        if down:
            raise TrackingError("the store does not answer.")
        return whole(*args)

    monkeypatch.setattr(_publisher, "publish", flaky)
    problems: list[str] = []
    publisher = Publisher(finished, store, experiment, every_s=0.01, on_problem=problems.append)
    while len(attempts) < 6:
        time.sleep(0.01)
    down = False
    ids = publisher.close()
    assert problems == ["the store does not answer."]
    gaps = [b - a for a, b in pairwise(attempts)]
    assert gaps[3] > 4 * 0.01
    assert ids is not None
    assert client.get_run(ids["seed-0"]).info.status == "FINISHED"


def test_publisher_survives_what_nobody_expects(finished, store, monkeypatch):
    monkeypatch.setattr("kngd_ray.tracking._publisher.publish", lambda *_: 1 / 0)
    problems: list[str] = []
    assert Publisher(finished, store, "x", on_problem=problems.append).close() is None
    assert problems == ["publishing failed: ZeroDivisionError('division by zero')"]


@pytest.mark.slow
def test_server_killed_in_the_middle_and_restarted(open_record, run_folder, own_store, monkeypatch):
    from mlflow import MlflowClient

    record = open_record(params={"a": 1})
    for step in range(1, 2501):
        record.log_step(step, {"nll": step})
    (record.artifacts / "a").mkdir()
    (record.artifacts / "a" / "a.txt").write_text("a")
    record.finish()
    log_batch = MlflowClient.log_batch
    sent: list[int] = []
    server = Server(Path(own_store.removeprefix("sqlite:///")).parent)
    try:

        def fatal(self, *args, **options):
            if options["metrics"]:
                if len(sent) == 1:
                    server.kill()
                sent.append(len(options["metrics"]))
            return log_batch(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", fatal)
            message = refusal(run_folder, server.uri)
        assert "does not respond" in message
        assert sent == [1000, 1000]
        server.start()
        sent.clear()

        def counted(self, *args, **options):
            sent.append(len(options["metrics"]))
            return log_batch(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", counted)
            ids = publish(run_folder, server.uri, "x")
        assert sent == [1000, 500]  # the first thousand is not sent again
        client = MlflowClient(server.uri)
        run = client.get_run(ids["seed-0"])
        assert (run.info.status, run.data.params) == ("FINISHED", {"a": "1"})
        assert [m.step for m in client.get_metric_history(ids["seed-0"], "nll")] == list(range(1, 2501))
        assert [a.path for a in client.list_artifacts(ids["seed-0"], "a")] == ["a/a.txt"]
        assert len(client.search_runs([run.info.experiment_id])) == 1
    finally:
        server.kill()
