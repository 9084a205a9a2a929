"""Help answers at once: it loads nothing that takes long."""

import subprocess
import sys

import pytest

from kngd_ray.cli.app import app

HEAVY = {"torch", "ray", "mlflow", "open_clip", "pyarrow", "numpy", "matplotlib", "yaml"}
LIBRARY_OF_TYPER = {"pydantic"}  # typer's own choice once it builds a command's options

LIST_IMPORTS = """
import sys
from kngd_ray.cli import main
sys.argv = ["kngd-ray", *{arguments!r}]
try:
    main()
finally:
    print("loaded:", *sorted({{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
"""


def run(*arguments: str) -> tuple[str, set[str]]:
    """Standard output, and the top-level modules that answering took."""
    code = LIST_IMPORTS.format(arguments=list(arguments))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.split("loaded:")[1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in ("train", "evaluate", "predict", "encode", "sync")),
    ],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    shown, loaded = run(*arguments)
    assert shown.strip()
    assert not loaded & HEAVY
    if arguments == ["--help"]:
        assert not loaded & LIBRARY_OF_TYPER


def test_help_names_every_command() -> None:
    shown, _ = run("--help")
    for command in ("train", "evaluate", "predict", "encode", "sync"):
        assert command in shown
    shown, _ = run("train", "-h")
    assert "--resume" in shown
    assert "--print-config" in shown
    assert "KEY=VALUE" in shown


def test_wrong_usage_is_exit_code_2_and_a_sentence() -> None:
    for arguments in (["trian"], ["train", "--resum", "x"], ["predict"]):
        command = [sys.executable, "-m", "kngd_ray", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["submit", "wor"], ["working_dir="]),
        (["submit", "check=false", "tr"], ["train"]),
        (["submit", "check=false", "train", "data.sh"], ["data.shots="]),
        (["submit", "tune", "noise_p"], ["noise_priors"]),
        (["doctor", "trainer.addr"], ["trainer.address="]),
        (["train", "kf_"], ["kf_clip"]),
    ],
    ids=" ".join,
)
def test_shells_complete_settings(typed: list[str], offered: list[str], monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setenv("COMP_WORDS", " ".join(["kngd-ray", *typed]))
    monkeypatch.setenv("COMP_CWORD", str(len(typed)))
    monkeypatch.setenv("_KNGD_RAY_COMPLETE", "complete_bash")
    with pytest.raises(SystemExit):
        app(prog_name="kngd-ray")
    assert capfd.readouterr().out.split() == offered
