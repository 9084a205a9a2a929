"""``kngd-ray submit`` to a real head with token authentication, from processes of their own."""

import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import psutil
import pytest

import kngd_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKEN = "c0ffee00" * 6
SECRET = "planted-90d1e4b2"
PATIENCE = 400.0  # of a machine that does other things too


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@dataclass
class Head:
    """A head in a folder of its own, and the command line beside it."""

    folder: Path
    address: str
    environment: dict[str, str]
    data: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, folder: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "kngd_ray.cli", "submit", f"address={self.address}", *arguments],
            cwd=folder or self.folder / "project",
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def submit(self, *arguments: str, **options: object) -> tuple[int, str, str]:
        process = self.start(*arguments, **options)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def jobs(self) -> list[dict[str, object]]:
        """What the dashboard knows of jobs that are no check, asked with the token."""
        listed = "import json; from ray.job_submission import JobSubmissionClient as C; import sys; "
        listed += "print(json.dumps([j.dict() for j in C(sys.argv[1]).list_jobs()], default=str))"
        done = subprocess.run(
            [sys.executable, "-c", listed, self.address],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        jobs = json.loads(done.stdout.splitlines()[-1])
        return [job for job in jobs if not str(job["submission_id"]).startswith("check-")]

    def train(self, *settings: str) -> list[str]:
        return [
            "train",
            "run.yaml",
            f"trainer.storage_path={self.folder / 'runs'}",
            f"tracking.uri=sqlite:///{self.folder / 'mlflow.db'}",
            f"data.path={self.data}",
            "data.train_domain=noto",
            f"data.cache_dir={self.folder / 'features'}",
            *settings,
        ]

    def until_running(self, job_id: str, said: str) -> None:
        """Wait until a job has said something."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for log in Path(self.environment["RAY_TMPDIR"]).glob(f"ray/session_*/logs/job-driver-{job_id}.log"):
                if said in log.read_text():
                    return
            time.sleep(0.5)
        raise AssertionError(f"{job_id} never said {said}")


def end(process: subprocess.Popen[Any]) -> None:
    """Stop a process and all that it has started."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=60)
    for member in alive:
        member.kill()
    process.wait()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("submit")
    short = Path(tempfile.mkdtemp(prefix="kr"))  # the paths of sockets are limited
    (folder / "token").write_text(TOKEN)
    project = folder / "project"
    project.mkdir()
    subprocess.run(["git", "init", "-q", project], check=True)
    (project / "run.yaml").write_text(
        "data.shots: 4\nepochs: 1\nposterior: {folds: 2, draws: 4}\ntracking.log_model: false\n"
    )
    (project / ".env").write_text(SECRET)
    (project / "shots.parquet").write_text(SECRET)
    gcs, dashboard, agent, client = free_ports(4)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "KNGD_"))
    }
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(short),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),  # no token of the user's
    }
    with (folder / "head.log").open("w") as log:
        ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        process = subprocess.Popen(
            [
                *(Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=2"),
                *("--dashboard-host=127.0.0.1", "--object-store-memory=200000000"),
                *ports,
                *(f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    up = Head(folder, f"http://127.0.0.1:{dashboard}", environment, small_data)
    try:
        deadline = time.monotonic() + PATIENCE
        while "no job a at" not in up.submit("status=a")[2]:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
        yield up
    finally:
        for started in up.started:
            end(started)
        end(process)
        shutil.rmtree(short, ignore_errors=True)


def test_a_run_on_the_cluster(head: Head) -> None:
    code, out, err = head.submit("--json", "--", *head.train("trainer.num_workers=1", "trainer.name=one"))
    assert code == 0, err
    report = json.loads(out)
    assert report["status"] == "SUCCEEDED"
    assert report["exit_code"] == 0
    assert (report["files"], report["bytes"]) == (1, (head.folder / "project" / "run.yaml").stat().st_size)
    assert "kalman-seed0: step 1 of 1, innovation RMS" in err, "the same progress lines"
    assert "job_manager.py" not in err
    assert (head.folder / "runs" / "one" / "results.json").is_file()
    (job,) = head.jobs()
    assert job["submission_id"] == report["job_id"]
    assert job["job_id"] is not None, "the run joined the cluster instead of starting Ray of its own"

    code, out, err = head.submit(f"logs={report['job_id']}")
    assert code == 0
    assert "kalman-seed0: step 1 of 1, innovation RMS" in out
    assert "supervisor" not in out
    code, out, _ = head.submit("--json", f"status={report['job_id']}")
    assert code == 0
    assert json.loads(out)["status"] == "SUCCEEDED"
    assert "had already ended: SUCCEEDED" in head.submit(f"stop={report['job_id']}")[2]
    code, _, err = head.submit(f"status={report['job_id'][:-1]}")
    assert code == 2
    assert f"did you mean {report['job_id']}?" in err

    # what arrived is what was shown
    arrived = list(Path(head.environment["RAY_TMPDIR"]).rglob("_ray_pkg_*"))
    files = {path.name: path.read_bytes() for folder in arrived for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {"run.yaml"}
    written = [p for p in head.folder.rglob("*") if p.is_file() and "project" not in p.parts]
    logs = [p for p in Path(head.environment["RAY_TMPDIR"]).rglob("logs/**/*") if p.is_file()]
    for path in (*written, *logs):
        assert SECRET.encode() not in path.read_bytes()
        assert path.name == "token" or TOKEN.encode() not in path.read_bytes(), path


def test_the_exit_code_is_that_of_the_job(head: Head) -> None:
    (head.folder / "runs" / "taken").mkdir(parents=True, exist_ok=True)
    (head.folder / "runs" / "taken" / "config.yaml").touch()
    code, out, err = head.submit("check=false", "--", *head.train("trainer.num_workers=0", "trainer.name=taken"))
    assert code == 2, err
    assert "the run taken exists" in out
    assert "FAILED, exit code 2" in err


@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("data.path=/gone.parquet", 1, "data.path=/gone.parquet cannot be read (No such file or directory)"),
        (
            "trainer.storage_path=runs",
            2,
            "trainer.storage_path=runs (or $KNGD_STORAGE_PATH on the cluster) would be written to the job's working",
        ),
        ("data.shot=4", 2, "did you mean data.shots?"),
    ],
)
def test_what_the_cluster_cannot_reach_is_not_sent(head: Head, setting: str, code: int, words: str) -> None:
    before = {job["submission_id"] for job in head.jobs()}
    found, out, err = head.submit("--", *head.train("trainer.num_workers=1", setting))
    assert found == code, err
    assert words in err
    assert out == ""
    assert {job["submission_id"] for job in head.jobs()} == before, "whose order and figures are for Ray to say"


def test_nobody_without_the_token(head: Head) -> None:
    (head.folder / "wrong").write_text("0" * 48)
    code, _, err = head.submit("--", *head.train(), RAY_AUTH_TOKEN_PATH=str(head.folder / "wrong"))
    assert code == 1
    assert "does not accept this token" in err
    nothing = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}
    code, _, err = head.submit("--", *head.train(), **nothing)
    assert code == 1
    assert "requires a token, and none was sent" in err
    assert "RAY_AUTH_MODE=token" in err


def long_run(head: Head, name: str) -> list[str]:
    return head.train(
        "trainer.num_workers=0", f"trainer.name={name}", "epochs=100000", "trainer.checkpoint_every=100000"
    )


def job_of(err: str) -> str:
    return next(line.split()[1] for line in err.splitlines() if line.startswith("job "))


def test_a_job_is_left_running_and_stopped_by_name(head: Head) -> None:
    code, _, err = head.submit("follow=false", "check=false", "--", *long_run(head, "stopped"))
    assert code == 0, err
    job_id = job_of(err)
    head.until_running(job_id, "step 1 of")
    assert "RUNNING" in head.submit(f"status={job_id}")[1]

    following = head.start(f"logs={job_id}")
    assert following.stdout is not None
    assert select.select([following.stdout], [], [], PATIENCE)[0], "it shows nothing"
    first = list(takewhile(lambda line: "run stopped in" not in line, islice(following.stdout, 12)))
    assert len(first) < 12, first  # what the data was read as, and its encoding, come before
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=PATIENCE)
    assert following.returncode == 130
    assert f"job {job_id} is still running: kngd-ray submit logs={job_id}" in err
    assert "RUNNING" in head.submit(f"status={job_id}")[1], "without a terminal nobody can be asked"

    code, out, err = head.submit("--json", f"stop={job_id}")
    assert code == 0, err
    assert json.loads(out) == {"job_id": job_id, "status": "STOPPED", "exit_code": 130}
    log = head.submit(f"logs={job_id}")
    assert log[0] == 130
    assert "interrupted; finished work is kept" in log[1], "as by Ctrl-C, not killed"


def on_a_terminal(
    head: Head, arguments: list[str], act: Callable[[int, subprocess.Popen[bytes], str], None]
) -> tuple[int, str]:
    """Run submit on a terminal; `act` is told what it has shown so far, until it has done its part."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kngd_ray.cli", "submit", f"address={head.address}", *arguments],
        cwd=head.folder / "project",
        env=head.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown, deadline = "", time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.5)[0]:
                try:
                    shown += os.read(ours, 4096).decode(errors="replace")
                except OSError:  # it has ended
                    break
            act(ours, process, shown)
        return process.wait(timeout=60), shown
    finally:
        end(process)
        os.close(ours)


def test_ctrl_c_on_a_terminal_asks(head: Head) -> None:
    done: list[str] = []

    def act(terminal: int, process: subprocess.Popen[bytes], shown: str) -> None:
        if "step 1 of" in shown and not done:
            done.append("interrupted")
            process.send_signal(signal.SIGINT)
        if "stop the job?" in shown and len(done) == 1:
            done.append("answered")
            os.write(terminal, b"y\n")

    code, shown = on_a_terminal(head, ["check=false", "--", *long_run(head, "asked")], act)
    assert done == ["interrupted", "answered"], shown
    assert code == 130
    assert "STOPPED" in shown
    (job,) = [job for job in head.jobs() if "trainer.name=asked" in str(job["entrypoint"])]
    assert "STOPPED" in str(job["status"])


def test_a_second_ctrl_c_leaves_at_once(head: Head) -> None:
    sent: list[str] = []

    def act(_: int, process: subprocess.Popen[bytes], shown: str) -> None:
        if ("step 1 of" in shown and not sent) or ("stop the job?" in shown and len(sent) == 1):
            sent.append("Ctrl-C")
            process.send_signal(signal.SIGINT)

    code, shown = on_a_terminal(head, ["check=false", "--", *long_run(head, "left")], act)
    assert code == 130, shown
    assert "stop=" in shown
    (job,) = [job for job in head.jobs() if "trainer.name=left" in str(job["entrypoint"])]
    assert "RUNNING" in str(job["status"])
    assert head.submit(f"stop={job['submission_id']}")[0] == 0


def test_code_that_is_sent_wins_over_what_is_installed(head: Head, tmp_path: Path) -> None:
    package = Path(kngd_ray.__file__).parent
    shutil.copytree(package, tmp_path / "kngd_ray", ignore=shutil.ignore_patterns("__pycache__"))
    config = tmp_path / "kngd_ray" / "config.py"
    config.write_text(config.read_text().replace('experiment: str = "kngd_ray"', 'experiment: str = "own_experiment"'))
    code, out, err = head.submit("check=false", "include=kngd_ray", "--", "train", "--print-config", folder=tmp_path)
    assert code == 0, err
    assert "experiment: own_experiment" in out
    assert "is not sent" not in err


def test_the_cluster_sets_where_results_go(head: Head, tmp_path: Path) -> None:
    """What the environment here says stays here."""
    (tmp_path / "run.yaml").touch()
    here = {"KNGD_STORAGE_PATH": "/here", "MLFLOW_TRACKING_URI": "http://here:5000", "SOME_PASSWORD": SECRET}
    code, out, err = head.submit(
        "check=false", "include=run.yaml", "--", "train", "--print-config", folder=tmp_path, **here
    )
    assert code == 0, err
    assert "storage_path: kngd_runs" in out
    assert "here" not in out
