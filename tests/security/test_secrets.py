"""Secrets planted wherever a user keeps them are looked for in all that a run leaves behind."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.emoji import small_table
from helpers.hostile import png, program

from kngd_ray import cli

PLANTED = {
    "MLFLOW_TRACKING_PASSWORD": "mlflow-password-5d1f",
    "MLFLOW_TRACKING_TOKEN": "mlflow-token-91aa",
    "HF_TOKEN": "hf_token-77c2",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-e0b4",
    "AWS_SESSION_TOKEN": "aws-session-3c3c",
    "PGPASSWORD": "pg-password-8a8a",
    "WANDB_API_KEY": "wandb-key-1234abcd",
}
IN_URI = "uri-password-42f6"
IN_TOKEN_FILE = "ray-token-" + "b7" * 16
SECRETS = [*PLANTED.values(), IN_URI, IN_TOKEN_FILE]


def environment(folder: Path) -> dict[str, str]:
    token = folder / "token"
    token.write_text(IN_TOKEN_FILE)
    token.chmod(0o600)
    user = {"MLFLOW_TRACKING_USERNAME": "bob", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
    return os.environ | PLANTED | user


def settings(folder: Path, name: str, *more: str) -> list[str]:
    return [
        f"data.path={folder}/small.parquet",
        "data.train_domain=noto",
        "data.shots=2",
        f"data.cache_dir={folder}/cache",
        "trainer.num_workers=0",
        f"trainer.storage_path={folder}/runs",
        f"trainer.name={name}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "epochs=2",
        "batch_size=4",
        "posterior.folds=0",
        "posterior.draws=4",
        *more,
    ]


def run(folder: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and all that was printed."""
    done = subprocess.run(
        program(*arguments),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=folder,
        env=environment(folder),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def found(where: str | Path) -> list[str]:
    """Where secrets are: the texts, or files below a folder, that hold one."""
    if isinstance(where, str):
        return [secret for secret in SECRETS if secret in where]
    files = [path for path in where.rglob("*") if path.is_file() and not path.is_symlink()]
    return [f"{secret} in {path}" for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with data, and nothing else in it."""
    pq.write_table(small_table(), tmp_path / "small.parquet")
    (tmp_path / "x.png").write_bytes(png(32, 32))
    return tmp_path


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\0\xff" + IN_URI.encode() + b"\n")
    assert found(tmp_path) == [f"{IN_URI} in {tmp_path / 'log'}"]
    assert found(f"x{IN_URI}") == [IN_URI]


@pytest.mark.slow
def test_no_secret_is_in_what_runs_leave_behind(folder: Path) -> None:
    """A run that ends well with its model, a comparison and a prediction."""
    printed = []
    for code, arguments in (
        (0, ["train", *settings(folder, "good")]),
        (0, ["compare", "kngd_ray", "--uri", f"sqlite:///{folder}/mlflow.db", "--out", folder / "page.html"]),
        (0, ["predict", "good", folder / "x.png", "--storage-path", folder / "runs", "--json"]),
        (2, ["train", *settings(folder, "bad", "epochs=many")]),
        (1, ["train", *settings(folder, "bad", "data.path=nothing.parquet")]),
        (1, ["predict", "goood", folder / "x.png", "--storage-path", folder / "runs"]),
    ):
        returned, text = run(folder, *arguments)
        assert returned == code, text
        printed.append(text)
    assert found("".join(printed)) == []
    (folder / "token").unlink()
    assert found(folder) == []
    assert (folder / "mlflow.db").stat().st_size > 0
    assert (folder / "page.html").is_file()


@pytest.mark.slow
def test_a_password_in_the_address_is_kept_for_its_owner_alone(folder: Path) -> None:
    """``--resume`` and ``sync`` need it again; what else the run leaves has the address without it."""
    uri = f"http://bob:{IN_URI}@127.0.0.1:9"
    returned, printed = run(folder, "train", *settings(folder, "far", f"tracking.uri={uri}"))
    assert returned == 0, printed
    assert "http://***@127.0.0.1:9" in printed
    returned, more = run(folder, "sync", folder / "runs" / "far")
    assert returned == 1
    returned, bad = run(folder, "train", *settings(folder, "x", f"tracking.uri=ftp://bob:{IN_URI}@host"))
    assert returned == 1
    returned, compared = run(folder, "compare", "kngd_ray", "--uri", uri)
    assert returned == 1
    assert found(printed + more + bad + compared) == []
    (folder / "token").unlink()
    kept = folder / "runs" / "far" / "config.yaml"
    assert found(folder) == [f"{IN_URI} in {kept}"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.ray
@pytest.mark.slow
def test_no_secret_is_in_the_logs_of_ray(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers inherit the environment, and Ray writes much: none of it is in what it writes."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ks") as short:  # its sockets have paths of at most 107 characters
        code = (
            "import os, sys; os.environ['RAY_TMPDIR'] = sys.argv[1]\n"
            "from kngd_ray import cli\nsys.argv = ['kngd-ray', *sys.argv[2:]]\ncli.main()"
        )
        uri = f"http://bob:{IN_URI}@127.0.0.1:9"
        arguments = ["train", *settings(folder, "ray", "trainer.num_workers=1", f"tracking.uri={uri}")]
        done = subprocess.run(
            [sys.executable, "-c", code, short, *arguments],
            capture_output=True,
            text=True,
            timeout=590,
            check=False,
            cwd=folder,
            env=environment(folder) | {"RAY_TMPDIR": short},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert found(done.stdout + done.stderr) == []
        logs = [path for path in Path(short).rglob("*") if path.is_file() and path.suffix in {".log", ".out", ".err"}]
        assert len(logs) > 5, "Ray wrote its logs elsewhere"
        told = [f"{secret} in {path}" for path in logs for secret in SECRETS if secret.encode() in path.read_bytes()]
        assert told == []
    (folder / "token").unlink()
    assert found(folder) == [f"{IN_URI} in {folder / 'runs' / 'ray' / 'config.yaml'}"]
    assert json.loads((folder / "runs" / "ray" / "results.json").read_text())["method"] == "kalman"


NASTY = "a\x1b]0;owned\x07\x1b[31m\u202eb\nkngd-ray: forged\r"


def test_no_name_writes_on_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a line, nor in a table, a title, a bar or a warning."""
    from rich.markup import escape
    from rich.table import Table

    from kngd_ray.console import Display

    display = Display()
    display.say(f"{NASTY}: 1 file")
    display.out.print(f"{NASTY}: a class", markup=False, highlight=False)
    table = Table(title=escape(NASTY))
    table.add_column(escape(NASTY))
    table.add_row(escape(NASTY))
    display.out.print(table)
    with display.steps({NASTY: 1}) as advance:
        advance(NASTY, {"step": 1, "steps": 1, "stats": None, "refused": NASTY, "milliseconds": 1.0})
    shown = capfd.readouterr()
    for text in (shown.out, shown.err):
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
        assert "\\x1b" in text
    assert "\nkngd-ray: forged" not in shown.err
    (tmp_path / NASTY.replace("/", "")).with_suffix(".png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    for arguments in (["train", f"data.path={NASTY}"], ["train", f"trainer.name={NASTY}"], ["predict", NASTY, "x.png"]):
        monkeypatch.setattr(sys, "argv", ["kngd-ray", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        text = "".join(capfd.readouterr())
        assert end.value.code in {1, 2}
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
        assert "\nkngd-ray: forged" not in text


def test_a_warning_is_shown_like_a_sentence() -> None:
    code = "import logging, sys; from kngd_ray import cli; sys.argv = ['kngd-ray', '--version']\n"
    code += "try: cli.main()\nexcept SystemExit: pass\nlogging.getLogger('kngd_ray.x').warning('%s', sys.stdin.read())"
    text = f"{NASTY} https://a/?sig={IN_URI}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, timeout=100, check=True
    )
    assert "\\x1b" in done.stderr
    assert not {"\x1b", "\r", "\u202e"} & set(done.stderr)
    assert IN_URI not in done.stderr
