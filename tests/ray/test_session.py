"""Who a Ray instance of ours listens to, and what joining says when it goes wrong."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
import ray
from helpers.heads import Head, ray_head

from kngd_ray.cluster import _ray_private, connection, session
from kngd_ray.cluster.auth_token import ensure_token, restore_token
from kngd_ray.cluster.doctor import node_checks
from kngd_ray.cluster.nodes import ask_nodes, cluster_facts
from kngd_ray.cluster.session import ray_session
from kngd_ray.errors import KngdError

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

JOIN = """
import sys
from kngd_ray.errors import KngdError
from kngd_ray.cluster.nodes import cluster_facts
from kngd_ray.cluster.session import ray_session
try:
    with ray_session(sys.argv[1] if len(sys.argv) > 1 else None, cpus=1):
        print(cluster_facts().address)
except KngdError as error:
    print("refused:", error)
"""

PRETEND_OTHER_VERSIONS = """
import json, sys
from kngd_ray.cluster._ray_private import GcsClient
client, key = GcsClient(address=sys.argv[1]), b"CLUSTER_METADATA"
told = json.loads(client.internal_kv_get(key, namespace=b"cluster"))
client.internal_kv_put(key, json.dumps({**told, "ray_version": "2.9.0"}).encode(), True, b"cluster")
"""


def run(code: str, *arguments: str, environment: dict[str, str | None]) -> str:
    """What a process of its own prints: tokens and addresses are read once in each."""
    kept = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=kept, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    """An instance that ray_session has started, with its dashboard; the address of its head."""
    with ray_session("local", cpus=2, dashboard=True):
        yield cluster_facts().address


@pytest.mark.ray
def test_our_instance_listens_on_loopback_only(ours: str) -> None:
    ask_nodes(node_checks.versions)  # a worker, which listens too
    listening = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for opened in process.net_connections(kind="inet"):
            if opened.status == psutil.CONN_LISTEN:
                listening[opened.laddr] = process.name()
    assert len(listening) >= 8  # gcs, raylet, agents, dashboard, driver, worker
    outside = {place: name for place, name in listening.items() if place.ip not in LOOPBACK}
    assert not outside


@pytest.mark.ray
@pytest.mark.parametrize("token", [None, "wrong"])
def test_our_instance_refuses_a_client_without_the_token(ours: str, token: str | None) -> None:
    changed: dict[str, str | None] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if token is None:
        changed = {"RAY_AUTH_MODE": "disabled"}
    said = run(JOIN, ours, environment={**os.environ, **changed})
    assert said.startswith("refused: the Ray cluster at"), said
    assert "refuses access: set RAY_AUTH_MODE=token" in said


@pytest.mark.ray
def test_our_dashboard_refuses_jobs_without_the_token(ours: str) -> None:
    dashboard = cluster_facts().dashboard
    assert dashboard.startswith("127.0.0.1:")
    body = json.dumps({"entrypoint": "touch /tmp/owned"}).encode()
    request = Request(f"http://{dashboard}/api/jobs/", body, {"Content-Type": "application/json"})
    with pytest.raises(HTTPError) as refusal:
        urlopen(request, timeout=30)
    assert refusal.value.code == 401


@pytest.mark.ray
def test_a_session_inside_a_session_uses_it(ours: str) -> None:
    with ray_session("127.0.0.1:1", cpus=1):
        assert cluster_facts().address == ours
    assert ray.is_initialized()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("token") / "auth_token") as running:
        yield running


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_is_joined_by_address_or_variable_or_where_it_runs_here(head: Head, tmp_path: Path) -> None:
    here = tmp_path / "ray"
    here.mkdir()
    (here / "ray_current_cluster").write_text(head.address)
    port = head.address.rpartition(":")[2]
    assert run(JOIN, head.address, environment=head.environment) == head.address
    assert run(JOIN, environment={**head.environment, "RAY_ADDRESS": head.address}) == head.address
    # nobody said RAY_AUTH_MODE=token, but the cluster is on this machine, and there is a token
    quiet: dict[str, str | None] = {**head.environment, "RAY_AUTH_MODE": None}
    assert run(JOIN, environment={**quiet, "RAY_TMPDIR": str(tmp_path)}) == head.address
    assert run(JOIN, f"127.0.0.1:{port}", environment=quiet).endswith(f":{port}")


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_asks_for_no_token_is_sent_none(tmp_path: Path) -> None:
    """Else its workers would be asked for one, and no actor of ours would ever answer."""
    code = """
import sys
from ray.util.queue import Queue
from kngd_ray.cluster.session import ray_session
with ray_session(sys.argv[1]):
    queue = Queue(actor_options={"num_cpus": 0})
    queue.put("answered")
    print(queue.get(timeout=120))
"""
    with ray_head(tmp_path / "auth_token", mode="disabled") as open_head:
        environment: dict[str, str | None] = {**open_head.environment, "RAY_AUTH_MODE": None}
        assert run(code, open_head.address, environment=environment) == "answered"


@pytest.mark.ray
@pytest.mark.parametrize(
    "changed",
    [{"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": "/nowhere"}],
    ids=["wrong token", "no token sent", "no token file"],
)
def test_a_wrong_token_is_one_sentence(head: Head, changed: dict[str, str]) -> None:
    said = run(JOIN, head.address, environment={**head.environment, **changed})
    assert said.startswith(f"refused: the Ray cluster at {head.address} refuses access: set RAY_AUTH_MODE=token"), said
    assert len(said.splitlines()) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_another_version_is_one_sentence(head: Head) -> None:
    """The last that uses this head: it pretends to be an older one from here on."""
    run(PRETEND_OTHER_VERSIONS, head.address, environment=dict(head.environment))
    said = run(JOIN, head.address, environment=dict(head.environment))
    assert said.startswith(f"refused: the Ray cluster at {head.address} runs Ray 2.9.0 on Python"), said
    assert f"this process Ray {ray.__version__}" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `ray start` says that a cluster runs on this machine."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


def test_word_of_a_dead_cluster_or_of_another_user_is_not_taken(word: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connection.find_cluster(None) is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        alive = f"127.0.0.1:{server.getsockname()[1]}"
        word.write_text(alive)
        assert connection.find_cluster(None) == connection.find_cluster("auto") == alive
        assert connection.find_cluster("local") is None
        assert connection.find_cluster("elsewhere:6379") == "elsewhere:6379"
        if os.getuid() == 0:
            os.chown(word, 12345, 12345)
            assert connection.find_cluster(None) is None
            os.chown(word, 0, 0)
    assert connection.find_cluster(None) is None
    word.write_bytes(b"\xff\x00")
    assert connection.find_cluster(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "there:1")
    assert connection.find_cluster(None) == "there:1"


def test_nobody_at_the_address_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    said = run(JOIN, f"127.0.0.1:{port}", environment=dict(os.environ))
    assert said.startswith(f"refused: cannot reach the Ray cluster at 127.0.0.1:{port} ("), said
    assert "check trainer.address and the cluster" in said


def test_who_named_a_dead_cluster_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"127.0.0.1:{server.getsockname()[1]}"
    said = run(JOIN, environment={**os.environ, "RAY_ADDRESS": dead})
    assert said.startswith(f"refused: cannot reach the Ray cluster at {dead} ("), said
    assert "check $RAY_ADDRESS, which names it, and the cluster" in said
    assert "trainer.address" not in said


@pytest.mark.slow
def test_a_limit_of_files_is_raised_or_said(subtests: pytest.Subtests) -> None:
    code = """
import resource, sys
from kngd_ray.errors import KngdError
from kngd_ray.cluster.session import _allow_files
soft, most = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
try:
    _allow_files()
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
except KngdError as error:
    print("refused:", error)
"""
    cases = {
        (64, 64): "refused: a process may open 64 files here and Ray needs 256: raise the limit (ulimit -n 4096",
        (64, 1000): "(1000, 1000)",
        (256, 5000): "(4096, 5000)",
        (5000, 5000): "(5000, 5000)",
    }
    for limits, said in cases.items():
        with subtests.test(limits):
            assert run(code, *map(str, limits), environment=dict(os.environ)).startswith(said)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home without a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    before = {name: os.environ.pop(name, None) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")}
    yield tmp_path
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _ray_private.forget_token()


def test_the_token_is_for_its_owner_only(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    before = os.umask(0o022)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: ensure_token(), range(8)))
    finally:
        os.umask(before)
    token = path.read_text()
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["auth_token"]
    path.chmod(0o644)  # as Ray makes it
    ensure_token()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == token


def test_a_token_of_the_user_s_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = home / "token"
    own.write_text("x" * 64)
    own.chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(own))
    ensure_token()
    assert own.stat().st_mode & 0o777 == 0o640
    own.unlink()
    with pytest.raises(KngdError, match=r"RAY_AUTH_TOKEN_PATH names .*, which is not there"):
        ensure_token()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ensure_token()
    assert not (home / ".ray").exists()


def test_without_a_home_the_token_is_the_instance_s_own(home: Path) -> None:
    shutil.rmtree(home)
    home.write_text("no folder")
    ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_token_that_is_not_to_stay_is_the_instance_s_own(home: Path) -> None:
    ensure_token(leave=False)
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    restore_token(None)
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert list(home.iterdir()) == []
    ensure_token()
    path = home / ".ray" / "auth_token"
    path.chmod(0o644)
    ensure_token(leave=False)  # used as it is
    assert path.stat().st_mode & 0o777 == 0o644
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_what_an_autoscaler_can_bring_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 0.0})
    monkeypatch.setattr(_ray_private, "most_resources", lambda: {"CPU": 8, "GPU": 2})
    session._check_size(8, 2)
    with pytest.raises(KngdError, match="the run needs 9 CPUs at once and Ray has 8"):
        session._check_size(9, 0)
    monkeypatch.setattr(_ray_private, "most_resources", dict)
    with pytest.raises(KngdError, match="the run needs 1 CPUs at once and Ray has 0"):
        session._check_size(1, 0)
