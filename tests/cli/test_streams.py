"""Standard output and error that are full, closed, left by their reader or short of characters change no result."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers.hostile import program

SAYS = """
import sys
from kngd_ray._streams import lasting_streams
with lasting_streams():
    print("48.7±2.4 of \\udce9 " + "x" * int(sys.argv[1]), flush=True)
    print("on", file=sys.stderr)
    open("kept", "w").write("kept")
    print("the end")
    sys.exit(int(sys.argv[2]))
"""
FULL = "standard output cannot be written (No space left on device)"


def said(shell: str, *, code: int = 0, length: int = 3, **environment: str) -> tuple[int, str, str, bool]:
    """Exit code, standard output and error of what the shell makes of a program, and whether it came to its end."""
    Path("kept").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; python() {{ "$@"; }}; {shell}', "-", *_command(length, code)],
        capture_output=True,
        text=True,
        errors="replace",  # one of them speaks Latin-1
        timeout=100,
        check=False,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout, done.stderr, Path("kept").exists()


def _command(length: int, code: int) -> list[str]:
    return [program()[0], "-c", SAYS, str(length), str(code)]


def test_a_program_comes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    monkeypatch.chdir(tmp_path)
    whole = {"code": 0, "out": "", "err": "on\n"}
    for shell, options, expected in [
        ('"$@"', {}, whole | {"out": "48.7±2.4 of ? xxx\nthe end\n"}),
        ('"$@"', {"PYTHONIOENCODING": "ascii"}, whole | {"out": "48.7+-2.4 of ? xxx\nthe end\n"}),
        ('"$@"', {"PYTHONIOENCODING": "latin-1", "code": 3}, whole | {"code": 3}),
        ('"$@" | true', {"length": 1_000_000}, whole),
        ('"$@" >&-', {}, whole),
        ('"$@" 2>&-', {}, whole | {"err": "", "out": "48.7±2.4 of ? xxx\nthe end\n"}),
        ('"$@" <&- >&- 2>&-', {}, whole | {"err": ""}),
        ('"$@" >/dev/full', {}, whole | {"code": 1, "err": FULL}),
        ('"$@" >/dev/full', {"code": 2}, whole | {"code": 2}),
        ('"$@" 2>/dev/full', {}, whole | {"err": "", "out": "48.7±2.4 of ? xxx\nthe end\n"}),
    ]:
        with subtests.test(f"{shell} {options}"):
            code, out, err, kept = said(shell, **options)  # type: ignore[arg-type]
            assert kept
            assert code == expected["code"]
            assert "Traceback" not in err
            if expected["err"] == FULL:
                assert FULL in err
                assert err.startswith("on\n")
            else:
                assert err == expected["err"]
            if expected["out"]:
                assert out == expected["out"]


@pytest.mark.slow
def test_a_run_keeps_its_results_whatever_becomes_of_its_output(command) -> None:
    settings = command.settings("trainer.name=kept")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            program("train", *settings, "--json"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        )
    assert "Traceback" not in done.stderr, done.stderr
    assert "seeds 0; one seed, no interval" in done.stderr
    assert done.returncode == 1
    assert FULL in done.stderr
    assert json.loads((command.run("kept") / "results.json").read_text())["seeds"] == [0]
