"""``kngd-ray doctor``: each check on what is well and on what is not, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.heads import ray_head
from huggingface_hub import constants as hub_settings

import kngd_ray
from kngd_ray.cluster.doctor import checks as doctor_checks
from kngd_ray.cluster.doctor import node_checks
from kngd_ray.cluster.doctor import run as orchestra
from kngd_ray.cluster.doctor.node_checks import NodeAnswer, token_file, unseen, write

Doctor = Callable[..., tuple[int, dict[tuple[str, str], dict[str, str]]]]


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token file of the test's own."""
    path = tmp_path / "own" / "auth_token"
    path.parent.mkdir()
    path.write_text("a" * 64)
    path.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return path


@pytest.fixture
def doctor(command: Any, token: Path) -> Doctor:
    """Its exit code, and its findings by check and place, without Ray."""

    def examine(*arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
        outcome = command("doctor", "--json", *command.settings("tracking.enabled=true", *arguments))
        assert "Traceback" not in outcome.err
        report = outcome.json
        assert report["ok"] == (outcome.code == 0)
        return outcome.code, {(finding["check"], finding["where"]): finding for finding in report["checks"]}

    return examine


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_all_is_well_and_nothing_is_left(doctor: Doctor, command: Any) -> None:
    before = files(command.folder)
    code, found = doctor()
    assert code == 0
    assert {check: finding["state"] for (check, _), finding in found.items()} == {
        "versions": "ok",
        "ray": "skipped",
        "token": "ok",
        "disk": found["disk", "here"]["state"],
        "storage": "ok",
        "inputs": "ok",
        "cache": "ok",
        "tracking": "ok",
        "model": "ok",
    }
    assert found["storage", "here"]["found"] == f"{command.runs}: written, read, deleted"
    assert "does not exist yet" in found["tracking", "here"]["found"]
    assert "embedded loads" in found["model", "here"]["found"]
    assert files(command.folder) == before


def test_plain_lines_say_the_same(command: Any, token: Path) -> None:
    token.chmod(0o644)
    outcome = command("doctor", *command.settings())
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines if line.split()[1] == "token"] == ["failed"]
    assert any(f"{token} can be read by others (mode 644): run chmod 600 {token}" in line for line in lines)
    assert "1 failed" in outcome.err.splitlines()[-1]


def test_a_storage_path_that_cannot_be_written(doctor: Doctor, command: Any) -> None:
    command.runs.write_text("a file in its place")
    code, found = doctor()
    assert code == 1
    assert found["storage", "here"]["state"] == "failed"
    assert str(command.runs) in found["storage", "here"]["found"]
    assert found["model", "here"]["state"] == "ok"


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        (["--address", "head:6379"], "trainer.address=HOST:PORT"),
        (["--storage-path=/shared"], "trainer.storage_path=FOLDER"),
        (["--uri", "sqlite:///a.db"], "tracking.uri=URI"),
        (["--no-ray"], "trainer.num_workers=0"),
    ],
)
def test_a_former_option_names_the_setting(command: Any, option: list[str], setting: str) -> None:
    said = command("doctor", *option, *command.settings())
    assert said.code == 2
    assert said.sentence == f"{option[0].partition('=')[0]} is a setting now: write {setting}."
    assert "no option --adress" in command("doctor", "data.shots=4", "--adress", "x").sentence


def test_doctor_from_python(command: Any, token: Path) -> None:
    found = kngd_ray.doctor(
        data="/gone.parquet", tracking=False, storage_path=command.runs, cache_dir=command.cache, quiet=True
    )
    assert list(found.columns) == ["check", "where", "state", "found", "advice"]
    ((_, failed),) = found.query("state == 'failed'")[["found", "advice"]].iterrows()
    assert failed["found"] == "data.path=/gone.parquet cannot be read (No such file or directory)"
    assert failed["advice"] == "correct the path"  # on a cluster it is to be on storage that all nodes share
    assert set(found.query("check == 'ray'")["state"]) == {"skipped"}


def test_doctor_leaves_the_hub_as_it_was(command: Any, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads a model without fetching it; what comes after in the same process may fetch one."""
    seen = []
    load = doctor_checks.load_model
    monkeypatch.setattr(
        doctor_checks, "load_model", lambda config: seen.append(hub_settings.HF_HUB_OFFLINE) or load(config)
    )
    monkeypatch.setattr(hub_settings, "HF_HUB_OFFLINE", False)
    kngd_ray.doctor(data=command.data, tracking=False, storage_path=command.runs, cache_dir=command.cache, quiet=True)
    assert seen == [True]
    assert not hub_settings.HF_HUB_OFFLINE


def test_an_address_is_no_folder(command: Any, token: Path) -> None:
    outcome = command("doctor", "--json", *command.settings("trainer.storage_path=s3://bucket/runs"))
    (storage,) = (finding for finding in outcome.json["checks"] if finding["check"] == "storage")
    assert storage["state"] == "failed"
    assert storage["found"] == "s3://bucket/runs is an address, and runs need a folder"


def test_a_storage_folder_in_use_keeps_what_it_has(doctor: Doctor, command: Any) -> None:
    command.runs.mkdir()
    (command.runs / "run").mkdir()
    assert doctor()[0] == 0
    assert [path.name for path in command.runs.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.chmod(0o640), "can be read by others (mode 640)"),
        (lambda path: path.unlink(), "there is no"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: os.chown(path, 12345, 12345), "belongs to another user (id 12345)"),
    ],
    ids=["mode", "absent", "empty", "folder", "owner"],
)
def test_a_token_file_that_is_not_well(token: Path, spoil: Callable[[Path], Any], says: str) -> None:
    assert doctor_checks.token("here", token_file()).state == "ok"
    try:
        spoil(token)
    except PermissionError:
        pytest.skip("only root gives files away")
    finding = doctor_checks.token("here", token_file())
    assert finding.state == "failed"
    assert says in finding.found
    assert finding.advice


def test_tokens_are_never_shown(doctor: Doctor, token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token.chmod(0o644)
    assert "aaaa" not in json.dumps([*doctor()[1].values()])
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    assert "bbbb" not in json.dumps(token_file())


def test_a_first_start_needs_no_token_and_disabling_it_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor_checks.token("here", token_file()).state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor_checks.token("here", token_file()).state == "warning"


def test_little_room_is_a_warning_that_names_the_folder(
    doctor: Doctor, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "_LOW_DISK", 1 << 60)
    code, found = doctor()
    assert code == 0
    assert found["disk", "here"]["state"] == "warning"
    assert f"storage ({command.runs})" in found["disk", "here"]["advice"]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:9", "does not respond (connection refused)"),
        ("sqlite:////dev/null/mlflow.db", "cannot be made"),
        ("gopher://x", "which is not an MLflow store"),
        ("http://user:hunter2secret@127.0.0.1:9", "://***@127.0.0.1:9"),
    ],
)
def test_a_tracking_store_that_does_not_answer(doctor: Doctor, uri: str, says: str) -> None:
    began = time.monotonic()
    code, found = doctor(f"tracking.uri={uri}")
    assert code == 1
    assert found["tracking", "here"]["state"] == "failed"
    assert says in found["tracking", "here"]["found"]
    assert "kngd-ray sync" not in found["tracking", "here"]["found"]
    assert "hunter2secret" not in json.dumps([*found.values()])
    assert time.monotonic() - began < 100


def test_a_database_that_is_none_of_mlflow_s_is_left_alone(doctor: Doctor, command: Any) -> None:
    path = command.folder / "own.db"
    path.write_bytes(b"not a database" * 100)
    _, found = doctor(f"tracking.uri=sqlite:///{path}")
    assert "is not a SQLite database" in found["tracking", "here"]["found"]
    path.write_bytes(b"")
    _, found = doctor(f"tracking.uri=sqlite:///{path}")
    assert found["tracking", "here"]["state"] == "ok"
    assert "is empty, the first run creates MLflow's tables" in found["tracking", "here"]["found"]
    assert path.read_bytes() == b""


def test_a_model_that_cannot_be_loaded(doctor: Doctor, command: Any) -> None:
    code, found = doctor("model.name=ViT-B-32", f"model.pretrained={command.folder}/absent.safetensors")
    assert code == 1
    assert found["model", "here"]["state"] == "failed"
    assert "absent.safetensors" in found["model", "here"]["found"]


DOCTOR_AND_TRAIN = """
import sys
from kngd_ray.cli import main
settings = sys.argv[1:]
for command in (["doctor", "--json"], ["train"]):
    sys.argv = ["kngd-ray", *command, *settings]
    try:
        main()
    except SystemExit as end:
        code = end.code
sys.exit(code)
"""


FIT = """
import sys
import kngd_ray
from kngd_ray.errors import KngdError
try:
    kngd_ray.KalmanCLIP().fit(["a.png", "b.png"], ["a", "b"])
except KngdError as error:
    sys.exit(f"kngd-ray: {error}")
"""


@pytest.mark.slow  # two processes that import all there is
def test_a_torchvision_for_another_torch_is_the_same_sentence_everywhere(command: Any, token: Path) -> None:
    package = command.folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    path = os.pathsep.join([str(command.folder), str(Path(kngd_ray.__file__).parents[1])])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, *words]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)

    settings = command.settings()
    looked = run("-c", DOCTOR_AND_TRAIN, *settings)
    (found,) = (check["found"] for check in json.loads(looked.stdout)["checks"] if check["check"] == "model")
    assert found.startswith("torchvision was built for another torch than ")
    assert "(operator torchvision::nms does not exist): install both again" in found
    for done in (looked, run("-c", FIT)):
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"kngd-ray: {found}"
        assert "Traceback" not in done.stderr


def test_a_check_that_hangs_or_breaks_ends_no_other(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "write", lambda *_: time.sleep(600))
    monkeypatch.setattr(doctor_checks, "_NODE_SECONDS", 0.5)
    monkeypatch.setattr(doctor_checks, "check_store", lambda _: 1 / 0)
    monkeypatch.setattr(orchestra, "_MODEL_SECONDS", 0.2)
    monkeypatch.setattr(doctor_checks, "load_model", lambda _: time.sleep(600))
    code, found = doctor()
    assert code == 1
    assert found["storage", "here"]["found"].endswith("no answer within 0.5 s")
    assert found["tracking", "here"]["found"] == "ZeroDivisionError: division by zero"
    assert found["model", "here"]["found"] == "no answer within 0.2 s"
    assert found["disk", "here"]["state"] in {"ok", "warning"}


def nodes_at(*folders: Path) -> Callable[..., Sequence[NodeAnswer]]:
    """Nodes that each see another folder at the path that they are asked about."""

    def ask(question: Callable[..., Any], _: str, *arguments: Any, timeout_s: float) -> list[NodeAnswer]:
        names = [f"node{number}" for number in range(len(folders))]
        return [NodeAnswer(name, question(str(at), *arguments)) for name, at in zip(names, folders, strict=True)]

    return ask


def test_nodes_that_do_not_share_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "_UNSEEN_SECONDS", 0.1)
    one, other = tmp_path / "one" / "runs", tmp_path / "other" / "runs"
    findings = doctor_checks.storage("/shared", nodes_at(one, other, one))
    assert {finding.where: finding.state for finding in findings} == dict.fromkeys(
        ("node0", "node1", "node2"), "failed"
    )
    assert "not what node1 wrote there" in findings[0].found
    assert "not what node0, node2 wrote there" in findings[1].found
    assert "one folder that all nodes share" in findings[0].advice
    assert not files(tmp_path)
    shared = doctor_checks.storage("/shared", nodes_at(one, one))
    assert [finding.state for finding in shared] == ["ok", "ok"]
    assert not files(tmp_path)


def test_a_file_that_comes_into_sight_late_is_seen(tmp_path: Path) -> None:
    name = write(str(tmp_path), "x", "text")["name"]
    hidden = tmp_path / "hidden"
    shutil.move(tmp_path / name, hidden)
    later = subprocess.Popen(["sh", "-c", f"sleep 0.6; mv '{hidden}' '{tmp_path / name}'"])
    assert unseen(str(tmp_path), [name], "text", 60.0) == []
    later.wait(10)
    assert unseen(str(tmp_path), [name], "other text", 0.0) == [name]


@pytest.mark.parametrize(
    ("there", "differs"),
    [
        ({}, ""),
        ({"python": "3.11.99"}, ""),
        ({"python": "3.12.1"}, "python 3.12.1 (here 3.11.7)"),
        ({"torch": "2.15.0+cu130"}, ""),
        ({"torch": "2.14.1"}, "torch 2.14.1 (here 2.15.0)"),
        ({"ray": "2.59.0", "kngd_ray": "missing"}, "kngd_ray missing (here 0.1.0), ray 2.59.0 (here 2.60.0)"),
    ],
)
def test_versions_that_differ_are_named(there: dict[str, str], differs: str) -> None:
    here = {"python": "3.11.7", "kngd_ray": "0.1.0", "ray": "2.60.0", "torch": "2.15.0"}
    finding = doctor_checks._versions("node", here, here | there)
    assert finding.state == ("failed" if differs else "ok")
    assert not differs or finding.found == differs


@pytest.mark.parametrize(
    ("names", "claimed", "state"),
    [([], 0, "ok"), (["A10G"], 1, "ok"), (["A10G"], 2, "failed"), ("no driver", 1, "failed"), ("no driver", 0, "ok")],
)
def test_gpus_that_are_offered_must_be_usable(names: list[str] | str, claimed: float, state: str) -> None:
    assert doctor_checks._gpus("node", names, claimed).state == state


@pytest.mark.parametrize(
    ("dashboard", "asks", "states"),
    [
        ("", True, ["ok", "ok"]),
        ("127.0.0.1:9", True, ["ok", "ok"]),
        ("127.0.0.1:9", False, ["ok", "warning"]),
        ("10.1.2.3:8265", False, ["warning", "failed"]),
    ],
)
def test_who_is_let_in(dashboard: str, asks: bool, states: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token" if asks else "")
    assert [finding.state for finding in orchestra._access(dashboard, ours=False)] == states


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head and a second node on this machine."""
    with ray_head(tmp_path / "auth_token", cpus=1) as head:
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head.address}", "--num-cpus=1"]
        environment = {**head.environment, "KNGD_TEST_HEAD": head.mark}  # by which it is ended with the head
        node = subprocess.Popen([*start, "--block"], env=environment, stdout=subprocess.DEVNULL)
        yield head.address, head.environment
        head.kill()
        node.wait(timeout=60)


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_are_examined(two_nodes: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = two_nodes
    runs, store = tmp_path / "runs", f"sqlite:///{tmp_path}/mlflow.db"
    settings = [f"trainer.storage_path={runs}", f"tracking.uri={store}"]
    command = [sys.executable, "-m", "kngd_ray.cli", "doctor", "--json", *settings]
    deadline = time.monotonic() + 200
    while True:
        done = subprocess.run(
            [*command, f"trainer.address={address}"], env=environment, capture_output=True, text=True, timeout=300
        )
        assert "Traceback" not in done.stderr, done.stderr
        report = json.loads(done.stdout)
        (joined,) = (finding["found"] for finding in report["checks"] if finding["check"] == "ray")
        if "2 nodes" in joined or time.monotonic() > deadline:  # the second may come later than the question
            break
    assert done.returncode == 0, done.stderr
    found = {(finding["check"], finding["where"][-2:]): finding for finding in report["checks"]}
    for check in ("versions", "/dev/shm", "disk", "storage"):
        assert found[check, "#1"]["state"] in {"ok", "warning"}, check
        assert found[check, "#2"]["state"] in {"ok", "warning"}, check
    assert found["storage", "#2"]["found"] == f"{runs}: written, read, and what every other node wrote, deleted"
    assert found["ray", "re"]["found"].startswith(f"joined {address}")
    assert "2 nodes, 2 CPUs" in found["ray", "re"]["found"]
    assert found["access", "re"]["state"] == "ok"
    assert not runs.exists()
    assert not (tmp_path / "mlflow.db").exists()

    wrong = {**environment, "RAY_AUTH_TOKEN": "f" * 64}
    done = subprocess.run(
        [*command, f"trainer.address={address}"], env=wrong, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    states = {finding["check"]: finding["state"] for finding in json.loads(done.stdout)["checks"]}
    assert states["ray"] == "failed"
    assert states["storage"] == states["model"] == "ok"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_is_started_as_train_would_and_taken_away(command: Any, token: Path, tmp_path: Path) -> None:
    """In a process of its own, with a temporary folder of its own."""
    temporary = Path("/tmp") / f"kd{os.getpid()}"
    temporary.mkdir()
    try:
        environment = {**os.environ, "RAY_TMPDIR": str(temporary)}
        environment.pop("RAY_ADDRESS", None)
        settings = [s for s in command.settings("trainer.cpus_per_worker=0.5") if "num_workers" not in s]
        done = subprocess.run(
            [sys.executable, "-m", "kngd_ray.cli", "doctor", "--json", *settings, "trainer.num_workers=2"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        found = {(finding["check"], finding["where"]): finding for finding in json.loads(done.stdout)["checks"]}
        assert found["ray", "here"]["found"].startswith("started here for this check")
        assert found["access", "here"]["state"] == "ok"
        assert found["dashboard", "here"]["found"] == "none; Ray listens on loopback only"
        assert found["storage", "127.0.0.1"]["state"] == "ok"
        assert found["versions", "127.0.0.1"]["found"] == "the same as here"
        assert not files(temporary)
    finally:
        shutil.rmtree(temporary)
