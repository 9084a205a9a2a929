"""``kngd-ray submit`` without a cluster: what is refused before anything is sent, and how servers are misread."""

import asyncio
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from aiohttp import web

from kngd_ray import __version__
from kngd_ray.cluster import preflight, submission
from kngd_ray.cluster.bundle import Bundle
from kngd_ray.cluster.doctor import checks as doctor_checks
from kngd_ray.cluster.doctor.needs import needs_of_run
from kngd_ray.cluster.doctor.node_checks import NodeAnswer, unreadable
from kngd_ray.cluster.doctor.node_checks import versions as node_versions
from kngd_ray.cluster.submission import DEFAULT_ADDRESS, JobState, dashboard_address, package_limit
from kngd_ray.config import TrackingConfig, TrainerConfig, load_config
from kngd_ray.console import Display
from kngd_ray.errors import KngdError, UsageError

FAILED, USAGE = 1, 2
RENAMED = {
    "--address": "address=",
    "--working-dir": "working_dir=",
    "--include": "include=[",
    "--dry-run": "dry_run=true",
    "--no-follow": "follow=false",
    "--no-check": "check=false",
    "--status": "status=",
    "--logs": "logs=",
    "--stop": "stop=",
}
SECRET = "planted-5e0b77aa"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "KNGD_STORAGE_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / "run.yaml").write_text("data.shots: 4\n")
    (folder / "shots.parquet").write_text(SECRET)
    (folder / ".env").write_text(SECRET)
    return folder


def refused(outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in outcome.sentence


def test_a_dry_run_shows_what_would_be_sent_and_contacts_nobody(command, project, monkeypatch) -> None:
    def contacted(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(socket, "create_connection", contacted)
    monkeypatch.setattr(socket.socket, "connect", contacted)
    arguments = ["submit", f"working_dir={project}", "dry_run=true", "address=http://nowhere.example.org:8265"]
    outcome = command(*arguments, "--json", "--", "train", "run.yaml", "data.path=/shared/a b.parquet")
    assert outcome.code == 0
    entrypoint = "python -m kngd_ray.cli train run.yaml 'data.path=/shared/a b.parquet'"
    unsent = {"job_id": None, "status": "NOT SENT", "exit_code": None, "files": 1, "bytes": 14}
    assert outcome.json == unsent | {"entrypoint": entrypoint, "sent": ["run.yaml"]}
    assert f"would run on http://nowhere.example.org:8265: {entrypoint}" in outcome.err
    assert "left out by suffix (include=PATH sends it): shots.parquet" in outcome.err
    assert "left out as possible credentials (rename false positives): .env" in outcome.err
    assert "kngd_ray itself is not sent" in outcome.err
    assert SECRET not in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["one of -- COMMAND, status=JOB, logs=JOB and stop=JOB", "there is none"]),
        (["status=a", "stop=b"], ["there are status= and stop="]),
        (["logs=a", "--", "train"], ["there are logs= and a command"]),
        (["--", "trian"], ["no command 'trian'", "did you mean train?"]),
        (["--", "submit"], ["no command 'submit'"]),
        (["working_dir=gone", "--", "train"], ["working_dir=gone", "no such folder"]),
        (
            ["dry_run=true", "--", "train", "rnu.yaml"],
            ["rnu.yaml is not among the files sent", "did you mean run.yaml?"],
        ),
        (["dry_run=true", "address=ray://head:10001", "--", "train"], ["'ray://head:10001'", "http://HOST:8265"]),
        (["dry_run=true", "address=head:port", "--", "train"], ["http://HOST:8265"]),
        (["dry_run=perhaps", "--", "train"], ["dry_run='perhaps'", "true or false"]),
        (["dryrun=true", "--", "train"], ["unknown key 'dryrun'; did you mean dry_run?"]),
        (["data.shots=4", "--", "train"], ["data.shots=4 is a setting of a run", "submit -- train data.shots=4"]),
        (["--addres", "x", "--", "train"], ["there is no option --addres; did you mean --address?"]),
        *(
            ([option, "x", "--", "train"], [f"{option} is a setting now: write {setting}"])
            for option, setting in RENAMED.items()
        ),
    ],
)
def test_wrong_usage(command, project, monkeypatch, arguments: list[str], words: list[str]) -> None:
    monkeypatch.chdir(project)
    refused(command("submit", *arguments), USAGE, *words)


@pytest.mark.parametrize(
    "argument",
    [
        f"tracking.uri=postgresql://me:{SECRET}@db.example.org/mlflow",
        f"tracking.uri=https://{SECRET}@tracking.example.org",
        f"tracking.uri=https://tracking.example.org?token={SECRET}",
    ],
)
def test_a_secret_among_the_arguments_is_refused_and_not_repeated(command, project, argument: str) -> None:
    outcome = command("submit", f"working_dir={project}", "dry_run=true", "--", "train", argument)
    refused(outcome, USAGE, "tracking.uri=", "dashboard", "MLFLOW_TRACKING_PASSWORD")
    assert SECRET not in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (["train", "data.shot=3"], ["unknown key 'data.shot'; did you mean data.shots?"]),
        (["train", "run.yaml", "data.shots=x"], ["data.shots='x': input should be a valid integer"]),
        (["train", "kalman", "epochs=-1"], ["epochs is -1"]),
        (["tune", "smoke", "search.num_sample=3"], ["search: unknown key 'num_sample'; did you mean num_samples?"]),
        (["tune"], ["name a search"]),
    ],
)
def test_settings_are_checked_before_anything_is_sent(command, project, job, words) -> None:
    refused = command("submit", f"working_dir={project}", "dry_run=true", "--", *job)
    assert refused.code == USAGE
    assert all(word in refused.sentence for word in words), refused.sentence
    unchecked = command("submit", f"working_dir={project}", "dry_run=true", "check=false", "--", *job)
    assert unchecked.code == 0, "a cluster may know settings that are not known here, of a package of its own"
    assert "(check=false sends the command as it is)." in refused.sentence


def test_a_misspelt_preset_is_named_here(command, project) -> None:
    outcome = command("submit", f"working_dir={project}", "--", "train", "kalmann")
    assert "there is no preset 'kalmann'; did you mean kalman?" in outcome.sentence


@pytest.mark.parametrize(
    "job",
    [
        ["train", "preset=/shared/mine.yaml", "data.shots=4"],
        ["tune", "smoke", "search.start=[kalman,/shared/mine.yaml]"],
        ["train", "/shared/mine.yaml"],
    ],
)
def test_settings_over_files_of_the_cluster_are_left_to_it(command, project, job) -> None:
    assert command("submit", f"working_dir={project}", "dry_run=true", "--", *job).code == 0


def test_a_settings_file_that_is_left_out_is_refused(command, project) -> None:
    (project / "run.yaml").write_text(f"tracking.uri: postgresql://me:{SECRET}@db/mlflow\n")
    (project / "main.py").touch()
    outcome = command("submit", f"working_dir={project}", "dry_run=true", "--", "train", "run.yaml")
    refused(outcome, USAGE, "run.yaml is not sent", "credential")
    assert SECRET not in outcome.out + outcome.err


def test_a_settings_file_that_git_does_not_list_is_named(command, project) -> None:
    (project / ".gitignore").write_text("own*\n")
    (project / "own.yaml").touch()
    (project / "own.txt").touch()
    dry = ["submit", f"working_dir={project}", "dry_run=true"]
    outcome = command(*dry, "--", "train", "own.yaml")
    refused(outcome, USAGE, "own.yaml is not sent because git or .rayignore ignores it", "include=own.yaml")
    outcome = command(*dry, "--json", "include=own.*", "include=shots.parquet", "--", "train", "own.yaml")
    assert outcome.json["sent"] == ["own.txt", "own.yaml", "run.yaml", "shots.parquet"]


def test_what_goes_before_what_is_installed_is_said(command, project) -> None:
    (project / "torch.py").touch()
    (project / "json").mkdir()
    (project / "json" / "__init__.py").touch()
    (project / "mine.py").touch()
    outcome = command("submit", f"working_dir={project}", "dry_run=true", "--", "train")
    assert "shadows what is installed on the cluster: torch.py, json/\n" in outcome.err


def test_too_much_is_refused_by_the_limit_of_ray(command, project, monkeypatch) -> None:
    assert package_limit() == 100 * 2**20
    with (project / "dump.py").open("wb") as file:
        file.truncate(package_limit())
    outcome = command("submit", f"working_dir={project}", "dry_run=true", "--", "train")
    refused(outcome, USAGE, "Ray takes less than 100.0 MiB", ".rayignore", "/dump.py (100.0 MiB)")
    (project / ".rayignore").write_text("/dump.py\n")
    assert command("submit", f"working_dir={project}", "dry_run=true", "--", "train").code == 0


# The address, and who answers there


@pytest.mark.parametrize(
    ("given", "variables", "address"),
    [
        (None, {}, DEFAULT_ADDRESS),
        ("http://head:8265/", {"RAY_API_SERVER_ADDRESS": "http://other:1"}, "http://head:8265"),
        ("head:8265", {}, "http://head:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://head", "RAY_ADDRESS": "http://other:1"}, "https://head"),
        (None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "10.0.0.5:6379"}, DEFAULT_ADDRESS),
    ],
)
def test_where_the_dashboard_is(monkeypatch, given: str | None, variables: dict[str, str], address: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dashboard_address(given) == address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Serve = Callable[[Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a small web server that answers as a function says; returns its address."""
    servers = []

    def start(answer: Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body = answer(self)
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_nobody_listens(command, project) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    outcome = command("submit", f"address={address}", f"working_dir={project}", "--", "train")
    refused(outcome, FAILED, f"nothing responds at {address} (Connection refused)", "address=")


def test_the_address_given_wins_over_the_environment(command, monkeypatch) -> None:
    """Ray's own client takes the variables first."""
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    refused(command("submit", f"address={address}", "status=a"), FAILED, address)
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


def test_a_port_that_does_not_speak_http(command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00")  # how HTTP/2, and so gRPC, begins
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        outcome = command("submit", f"address={address}", "status=a")
        server.shutdown(socket.SHUT_RDWR)
    refused(outcome, FAILED, f"what listens at {address} is not a web server", "not Ray's own port (6379)")


@pytest.mark.parametrize(
    ("code", "words"),
    [(401, ["requires a token, and none was sent"]), (403, ["does not accept this token"])],
)
def test_tokens(command, serve: Serve, code: int, words: list[str]) -> None:
    address = serve(lambda _: (code, b"no"))
    outcome = command("submit", f"address={address}", "status=a")
    refused(outcome, FAILED, *words, "RAY_AUTH_MODE=token", "~/.ray/auth_token", "RAY_AUTH_TOKEN_PATH")


@pytest.mark.parametrize(("code", "body"), [(404, b"?"), (200, b"<html>"), (200, b"{}"), (500, b"oops")])
def test_another_web_server(command, serve: Serve, code: int, body: bytes) -> None:
    outcome = command("submit", f"address={serve(lambda _: (code, body))}", "status=a")
    refused(outcome, FAILED, "is not a Ray dashboard", "http://HOST:8265")


def test_another_version_of_ray(command, project, serve: Serve) -> None:
    answer = json.dumps({"version": "4", "ray_version": "2.9.3", "ray_commit": "", "session_name": ""}).encode()
    address = serve(lambda _: (200, answer))
    outcome = command("submit", f"address={address}", f"working_dir={project}", "--", "train")
    refused(outcome, FAILED, "runs Ray 2.9.3", f"this machine has {ray.__version__}", "check=false")


def test_an_unknown_job_names_the_recent_ones(command, serve: Serve) -> None:
    jobs = [
        {
            "type": "SUBMISSION",
            "submission_id": f"train-2026-{n}",
            "status": "SUCCEEDED",
            "entrypoint": "python",
            "start_time": n,
        }
        for n in range(8)
    ]

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        if request.path == "/api/version":
            return 200, json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": ""}).encode()
        if request.path == "/api/jobs/":
            return 200, json.dumps(jobs).encode()
        return 404, b"Job does not exist."

    address = serve(answer)
    for option in ("status", "logs", "stop"):
        outcome = command("submit", f"address={address}", f"{option}=train-2026-70")
        refused(outcome, USAGE, "there is no job train-2026-70", "did you mean train-2026-7?", "train-2026-3")
        assert "train-2026-2" not in outcome.sentence
    jobs.clear()
    refused(command("submit", f"address={address}", "status=a"), USAGE, "which has run none yet")


# The check, as it runs on the cluster: doctor, without Ray where the command needs none


@pytest.fixture
def faults(command, monkeypatch) -> Callable[..., list[str]]:
    """What doctor refuses of a command that a job runs; a wrong setting is its one sentence."""
    monkeypatch.setenv("KNGD_SUBMITTED", "1")

    def find(*words: str) -> list[str]:
        outcome = command("doctor", "--json", "--", *words)
        if outcome.code == USAGE or not outcome.out:
            return [outcome.sentence]
        assert (outcome.code == 0) == outcome.json["ok"]
        failed = [check for check in outcome.json["checks"] if check["state"] == "failed"]
        return [f"{check['found']}: {check['advice']}" for check in failed if check["check"] not in preflight._ACCESS]

    return find


def test_wrong_options_are_refused_before_anything_is_sent(command) -> None:
    for words in (["train", "--jsn"], ["evaluate"], ["export", "run", "--out"]):
        for outer in (["submit", "dry_run=true"], ["doctor"]):
            said = command(*outer, "--", *words)
            assert said.code == 2
            assert "Usage: " in said.err


def test_nothing_is_wrong_and_nothing_stays_behind(command, faults) -> None:
    assert faults("train", *command.settings()) == []
    assert not command.runs.exists()
    command.runs.mkdir()
    assert faults("train", *command.settings()) == []
    assert list(command.runs.iterdir()) == []


def test_a_preset_before_the_settings_is_known_there_too(command, faults) -> None:
    assert faults("train", "kf_clip", *command.settings()) == []
    assert "did you mean kf_clip?" in faults("train", "kf_clp", *command.settings())[0]


def test_the_line_that_the_job_prints(command, monkeypatch) -> None:
    monkeypatch.setenv("KNGD_SUBMITTED", "1")
    found = command("doctor", "--json", "--", "train", *command.settings("data.path=/gone.parquet")).json
    assert set(found) == {"ok", "versions", "checks"}
    assert found["versions"]["ray"] == ray.__version__
    assert preflight._report(["noise", json.dumps(found), "[1]", "more noise"]) == found


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.path=gone.parquet", ["data.path=gone.parquet cannot be read", "give its absolute path"]),
        ("data.path=/gone.parquet", ["cannot be read (No such file or directory)", "all nodes"]),
        ("data.path=/gone/*.parquet", ["/gone/*.parquet is a pattern, and there is no folder /gone"]),
        ("model.pretrained=/gone.safetensors", ["model.pretrained=/gone.safetensors cannot be read"]),
        ("model.class_embeddings=/gone.npy", ["model.class_embeddings=/gone.npy cannot be read"]),
        ("data.cache_dir=/proc/features", ["feature cache /proc/features cannot be written", "set data.cache_dir"]),
        ("trainer.storage_path=/proc/runs", ["/proc/runs", "user may write to it"]),
        ("trainer.storage_path=kngd_runs", ["trainer.storage_path=kngd_runs", "KNGD_STORAGE_PATH"]),
        ("prior=monday", ["there is no run monday"]),
        ("data.shot=4", ["did you mean data.shots?"]),
    ],
)
def test_what_the_check_finds(command, faults, setting: str, words: list[str]) -> None:
    model = {"model.pretrained": ["model.name=ViT-B-32"], "model.class_embeddings": ["model.name=precomputed"]}
    found = faults("train", *command.settings(setting, *model.get(setting.partition("=")[0], [])))
    assert len(found) == 1
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:///mlflow.db", ["tracking.uri=sqlite:///mlflow.db", "MLFLOW_TRACKING_URI"]),
        ("http://127.0.0.1:9", ["the tracking store http://127.0.0.1:9"]),
        ("ftp://a", ["not an MLflow store"]),
    ],
)
def test_tracking_is_checked(command, faults, uri: str, words: list[str]) -> None:
    (found,) = faults("train", *command.settings("tracking.enabled=true", f"tracking.uri={uri}"))
    for word in words:
        assert word in found


def test_the_files_of_a_pattern_are_what_nodes_are_asked_for(command, faults) -> None:
    pattern = command.data.with_name("*.parquet")
    settings = command.settings(f"data.path={pattern}")
    assert faults("train", *settings) == []
    assert needs_of_run(load_config(None, settings)).inputs == {str(command.data): "data.path"}


def test_other_commands_are_checked(command, faults) -> None:
    assert "there is no run monday" in faults("evaluate", "monday", "--storage-path", str(command.runs))[0]
    assert "--out here would be" in faults("export", "monday", "--out", "here", "--storage-path", str(command.runs))[0]
    assert "--html g.html would be" in faults("predict", "monday", "/x.jpg", "--html", "g.html")[0]
    assert not any("--html" in fault for fault in faults("predict", "monday", "/x.jpg", "--html=/shared/g.html"))
    assert faults("compare", "kngd_ray") == [
        "the output of compare without --out would be written to the job's working folder, which the cluster deletes: "
        "give an absolute path on storage that all nodes share."
    ]
    for dataset in ("gone", "data.path=gone"):  # as encode itself takes it
        assert "data.path=gone cannot be read" in faults("encode", dataset, "trainer.num_workers=0")[0]
    assert faults("tune") == ["name a search, such as noise_priors or a YAML file, or --resume SEARCH."]
    assert faults("sync", "/shared/run") == faults("doctor") == []


def test_a_fit_is_checked_by_what_the_command_reads(command, faults) -> None:
    assert command.train("trainer.name=first", "epochs=1").code == 0
    runs = ["--storage-path", str(command.runs)]
    assert faults("predict", "first", "/gone.jpg", *runs) == [
        "IMAGE=/gone.jpg cannot be read (No such file or directory): put it on storage that all nodes share"
    ]
    assert faults("export", "first", "--out", "/shared/out", *runs) == []
    assert "data.path=/new cannot" in faults("evaluate", "first", "data.path=/new", *runs)[0]


def test_results_that_would_go_with_the_job_are_a_matter_of_settings(command, faults) -> None:
    both = ["trainer.storage_path=a", "tracking.enabled=true", "tracking.uri=sqlite:///a.db"]
    for settings in (both[:1], both[1:], both):
        (found,) = faults("train", *command.settings(*settings))
        assert "the job's working folder, which the cluster deletes" in found
        assert command("doctor", "--", "train", *command.settings(*settings)).code == USAGE
        assert ("trainer.storage_path=a " in found, "sqlite:///a.db " in found) == (
            "trainer.storage_path=a" in settings,
            "tracking.enabled=true" in settings,
        )


def test_nodes_with_another_version_or_without_the_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    paths = {str(tmp_path / "a.parquet"): "data.path", "/data/b.parquet": "targets"}

    def ask(question: Callable[..., object], *arguments: object, timeout_s: float) -> list[NodeAnswer]:
        assert question is unreadable
        lacking = unreadable(*arguments)  # type: ignore[arg-type]
        return [
            NodeAnswer("n1", {}),
            NodeAnswer("n2", lacking),
            NodeAnswer("n3", lacking),
            NodeAnswer("n4", error="it hangs"),
        ]

    findings = doctor_checks.inputs(paths, ask)
    assert [(finding.where, finding.state) for finding in findings] == [
        ("n1", "ok"),
        ("n2", "failed"),
        ("n3", "failed"),
        ("n4", "failed"),
    ]
    sentences = check(answer_of(checks=[asdict(finding) for finding in findings]), tmp_path)
    assert sentences == "the job was not submitted: 2 checks failed, see above."
    sentences = check(answer_of(checks=[asdict(finding) for finding in findings[:3]]), tmp_path)
    assert sentences is not None
    assert sentences.startswith("n2, n3: targets=/data/b.parquet cannot be read (No such file or directory): put it on")
    other = {**node_versions(), "kngd_ray": "0.0.1"}
    finding = doctor_checks._versions("n5", node_versions(), other)
    assert check(answer_of(checks=[asdict(finding)]), tmp_path) == (
        f"n5: kngd_ray 0.0.1 (here {__version__}): install the same versions on all nodes."
    )


# What is made of the check's answer


@dataclass
class Answered:
    """Stands where a cluster does: a check that has ended, and what it has printed."""

    lines: list[str]
    exit_code: int = 1
    status: str = "FAILED"

    def submit(self, *_: object) -> None:
        pass

    def wait(self, job_id: str, _: float) -> JobState:
        return JobState(job_id, self.status, "python", self.exit_code, "runtime environment failed\nmore", 1.0)

    def log(self, _: str) -> list[str]:
        return self.lines

    def stop(self, job_id: str) -> None:
        self.lines.append(f"stopped {job_id}")


def check(lines: list[str], tmp_path: Path, *, brings: bool = False, exit_code: int = 1) -> str | None:
    package = Bundle(tmp_path, {"kngd_ray/__init__.py": 1} if brings else {"run.yaml": 1})
    cluster = Answered(lines, exit_code)
    try:
        preflight.preflight(cluster, ["train"], package, tmp_path, Display(quiet_stdout=True))  # type: ignore[arg-type]
    except KngdError as error:
        return str(error)
    return None


def answer_of(version: str = __version__, *found: str, checks: list[dict[str, str]] | None = None) -> list[str]:
    checks = checks or [
        {"check": "storage", "where": "here", "state": "failed", "found": sentence, "advice": ""} for sentence in found
    ]
    report = {"ok": not checks, "versions": {"kngd_ray": version, "python": "3.9.1"}, "checks": checks}
    return ["something first", json.dumps(report)]


@pytest.mark.parametrize(
    ("lines", "exit_code", "words"),
    [
        (["python: Error while finding module", "No module named kngd_ray"], 1, "the cluster has no kngd_ray"),
        (["ModuleNotFoundError: No module named 'kngd_ray'"], 1, "the cluster has no kngd_ray"),
        (["python: No module named kngd_ray.cli"], 1, "an older kngd_ray"),
        (["ModuleNotFoundError: No module named 'open_clip'"], 1, "Python has no open_clip"),
        (["/bin/sh: 1: python: not found"], 127, "no `python` on the PATH"),
        (["Traceback", "ValueError: odd"], 1, "last line is: ValueError: odd. See kngd-ray submit logs=check-"),
        ([], 1, "last line is: runtime environment failed"),
    ],
)
def test_a_check_without_an_answer_says_why(tmp_path: Path, lines: list[str], exit_code: int, words: str) -> None:
    assert words in (check(lines, tmp_path, exit_code=exit_code) or "")


def test_a_check_that_hangs_is_stopped_and_names_what_had_failed(tmp_path: Path) -> None:
    cluster = Answered(
        ["ok       ray        here  joined", "failed   node       n3  no answer within 120 s"], 1, "RUNNING"
    )
    with pytest.raises(
        KngdError, match=r"did not end within 300 s and was stopped \(failed node n3 no answer within 120 s"
    ):
        preflight.preflight(cluster, ["train"], Bundle(tmp_path, {}), tmp_path, Display(quiet_stdout=True))  # type: ignore[arg-type]
    assert cluster.lines[-1].startswith("stopped check-")


def test_another_version_is_refused_unless_it_is_sent(tmp_path: Path) -> None:
    sentence = check(answer_of("0.0.9"), tmp_path)
    assert sentence is not None
    assert f"the cluster has kngd_ray 0.0.9 and this machine has {__version__}" in sentence
    assert check(answer_of("0.0.9"), tmp_path, brings=True) is None
    none = [line.replace(f'"kngd_ray": "{__version__}", ', "") for line in answer_of()]
    assert "the cluster has no kngd_ray installed" in (check(none, tmp_path) or "")
    assert check(none, tmp_path, brings=True) is None, "what is sent need not be installed"
    assert check(answer_of(), tmp_path) is None


def test_each_fault_is_a_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert check(answer_of(__version__, "one thing"), tmp_path) == "one thing."
    assert "2 checks failed" in (check(answer_of(__version__, "one thing", "another"), tmp_path) or "")
    assert "- one thing.\n- another.\n" in capfd.readouterr().err


def test_who_else_is_let_in_is_a_warning_and_stops_no_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_to_all = {"check": "access", "where": "here", "state": "failed", "found": "no token", "advice": "set one"}
    low = {"check": "disk", "where": "n1", "state": "warning", "found": "1 GiB", "advice": "free some"}
    assert check(answer_of(checks=[open_to_all, low]), tmp_path) is None
    said = capfd.readouterr().err
    assert "warning: no token: set one\n" in said
    assert "warning: n1: 1 GiB: free some\n" in said


@pytest.mark.parametrize(("exit_code", "kind"), [(1, KngdError), (2, UsageError)])
def test_what_doctor_refuses_is_its_own_sentence(tmp_path: Path, exit_code: int, kind: type[KngdError]) -> None:
    package = Bundle(tmp_path, {"run.yaml": 1})
    cluster = Answered(["more", "kngd-ray: unknown key 'data.shot'; did you mean data.shots?"], exit_code)
    with pytest.raises(KngdError, match=r"^unknown key 'data.shot'; did you mean data.shots\?$") as error:
        preflight.preflight(cluster, ["train"], package, tmp_path, Display(quiet_stdout=True))  # type: ignore[arg-type]
    assert type(error.value) is kind


# Following a log, from a dashboard that breaks off


class Flaky:
    """A dashboard with one job, whose log it sends a piece at a time; each connection ends as it is told to."""

    def __init__(self, log: str, breaks: list[int]) -> None:
        self.log, self.breaks = log, breaks
        self.loop = asyncio.new_event_loop()
        self.port = 0
        threading.Thread(target=self.serve, daemon=True).start()
        while not self.port:
            time.sleep(0.01)
        self.address = f"http://127.0.0.1:{self.port}"

    def serve(self) -> None:
        app = web.Application()
        app.router.add_get("/api/version", self.version)
        app.router.add_get("/api/jobs/{job}", self.job)
        app.router.add_get("/api/jobs/{job}/logs/tail", self.tail)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.loop.run_until_complete(self.runner.setup())
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.port = self.runner.addresses[0][1]
        self.loop.run_forever()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(timeout=30)
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})

    async def job(self, request: web.Request) -> web.Response:
        status = "RUNNING" if self.breaks else "FAILED"
        found = {"type": "SUBMISSION", "submission_id": request.match_info["job"], "entrypoint": "python"}
        return web.json_response({**found, "status": status, "driver_exit_code": None if self.breaks else -9})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket_ = web.WebSocketResponse()
        await socket_.prepare(request)
        end = self.breaks.pop(0) if self.breaks else len(self.log)
        for start in range(0, end, 7):
            await socket_.send_str(self.log[start : min(start + 7, end)])
        if end == len(self.log):
            await socket_.close()
        elif request.transport is not None:
            request.transport.abort()
        return socket_


def test_a_log_that_breaks_off_goes_on_where_it_was(command) -> None:
    noise = "2026-11-22 13:51:15,961\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
    noise += "Running entrypoint for job train-1: python -m kngd_ray.cli train\n"
    own = [f"step {n} of 40, :key: [bold]±{n}" for n in range(40)]
    epilogue = "\nJob supervisor actor died: The actor died\n\tpid: 1\nThe actor is dead"
    server = Flaky(noise + "\n".join(own) + epilogue, [len(noise) + 30, 0, len(noise) + 400])
    outcome = command("submit", f"address={server.address}", "logs=train-1")
    server.close()
    assert outcome.out.splitlines() == own
    assert outcome.code == 137, "killed by signal 9"
    assert "job train-1 FAILED, exit code 137" in outcome.err


def test_a_connection_that_stays_lost(command, monkeypatch) -> None:
    monkeypatch.setattr(submission, "_RECONNECT_SECONDS", 1.0)
    server = Flaky("first\nsecond\nthird\n", [6] * 1000)
    timer = threading.Timer(2.0, server.close)
    timer.start()
    outcome = command("submit", f"address={server.address}", "logs=train-1")
    timer.join()
    refused(outcome, FAILED, f"the connection to {server.address} is lost", "kngd-ray submit logs=train-1")
    assert outcome.out.splitlines() == ["first"]


# Defaults from the environment


def test_defaults_that_hold_on_a_cluster(monkeypatch) -> None:
    assert load_config().trainer.storage_path == "kngd_runs"
    assert load_config().tracking.uri == "sqlite:///mlflow.db"
    monkeypatch.setenv("KNGD_STORAGE_PATH", "/shared/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert TrainerConfig().storage_path == load_config().trainer.storage_path == "/shared/runs"
    assert TrackingConfig().uri == load_config().tracking.uri == "http://tracking:5000"
    assert load_config(overrides=["trainer.storage_path=/own"]).trainer.storage_path == "/own"
    assert replace(load_config().tracking, enabled=False).uri == "http://tracking:5000"
    monkeypatch.setenv("KNGD_STORAGE_PATH", "")
    assert load_config().trainer.storage_path == "kngd_runs"


def test_the_storage_option_follows_the_environment(command, monkeypatch) -> None:
    monkeypatch.setenv("KNGD_STORAGE_PATH", str(command.folder / "elsewhere"))
    refused(command("sync", "monday"), FAILED, f"no run monday in {command.folder / 'elsewhere'}")
