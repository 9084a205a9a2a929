"""Workers import what the driver imports, whatever lies in the current folder, and no other copy of the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.heads import ray_head

import kngd_ray
from kngd_ray.cluster import _ray_private, same_code
from kngd_ray.cluster.nodes import NodeAnswer
from kngd_ray.errors import KngdError

HOME = Path(kngd_ray.__file__).resolve().parents[1]
HOSTILE = ("torch.py", "numpy/__init__.py", "kngd_ray/__init__.py", "open_clip.py", "sitecustomize.py")

JOIN = """
import json, sys
from kngd_ray.errors import KngdError
from kngd_ray.cluster.nodes import ask_nodes
from kngd_ray.cluster.session import ray_session
def asker():
    def ask():
        from importlib.util import find_spec
        return [find_spec(name).origin for name in ("torch", "numpy", "open_clip", "kngd_ray")]
    return ask
try:
    with ray_session(sys.argv[1], cpus=1):
        print(json.dumps([asker()(), *(said.answer for said in ask_nodes(asker()))]))
except KngdError as error:
    print("refused:", error)
"""


def planted(folder: Path) -> Path:
    """A folder of modules with the names of what a run imports; whoever imports one leaves a file in it."""
    for name in HOSTILE:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    return folder


def run_in(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """What a program says that has the folder as its current one, but not on its path, as a console script."""
    environment = environment | {"PYTHONPATH": str(HOME)}
    command = [sys.executable, "-P", "-c", JOIN, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.ray
@pytest.mark.slow
def test_workers_import_nothing_from_the_current_folder(tmp_path: Path) -> None:
    folder = planted(tmp_path)
    driver, worker = json.loads(run_in(folder, dict(os.environ), "local"))
    assert worker == driver
    assert not (folder / "ran").exists(), (folder / "ran").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_another_copy_on_a_cluster_is_refused(tmp_path: Path) -> None:
    """It has the same version, and would train in silence."""
    stale = tmp_path / "stale"
    shutil.copytree(HOME / "kngd_ray", stale / "kngd_ray", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    with (stale / "kngd_ray" / "training" / "ekf.py").open("a") as file:
        file.write("# an older one\n")
    with ray_head(tmp_path / "token", changed={"PYTHONPATH": str(stale)}) as head:
        said = run_in(tmp_path, head.environment, head.address)
    assert said.startswith("refused: "), said
    assert " has other sources of kngd_ray" in said
    assert str(stale / "kngd_ray") in said
    assert "kngd-ray submit" in said


def test_the_driver_s_package_is_passed_along_where_workers_would_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    assert same_code.folders_to_pass() == []
    (tmp_path / "kngd_ray").mkdir()
    (tmp_path / "kngd_ray" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # another one comes first
    assert same_code.folders_to_pass() == [str(HOME)]


def test_ray_adds_no_folder() -> None:
    config = _ray_private.job_config(["/wanted"])
    config._py_driver_sys_path.extend(["/current"])
    assert list(config._get_proto_job_config().py_driver_sys_path) == ["/wanted"]


def test_another_copy_is_told_from_this_one(monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests) -> None:
    version, digest, place = same_code._looker()()
    assert (version, place) == (kngd_ray.__version__, str(HOME / "kngd_ray"))
    cases = {
        "older": (("0.0.9", "x", "/there"), f"n has kngd_ray 0.0.9 in /there, and this process runs {version}"),
        "changed": ((version, "x", "/there"), f"n has other sources of kngd_ray {version} in /there than {place}"),
        "none": (("", "", ""), "n has no kngd_ray"),
    }
    for name, (answer, words) in cases.items():
        with subtests.test(name):
            monkeypatch.setattr(same_code, "ask_nodes", lambda *_, a=answer, **__: [NodeAnswer("n", a)])
            with pytest.raises(KngdError) as refusal:
                same_code.refuse_other_code()
            assert words in str(refusal.value)
    same = NodeAnswer("n", (version, digest, "/elsewhere"))
    monkeypatch.setattr(same_code, "ask_nodes", lambda *_, **__: [same, NodeAnswer("m", error="busy")])
    same_code.refuse_other_code()
    monkeypatch.setattr(same_code, "ask_nodes", lambda *_, **__: [NodeAnswer("m", error="no answer within 60 s")])
    with pytest.raises(KngdError, match=r"Ray could not start a worker \(no answer within 60 s\)"):
        same_code.refuse_other_code()


def test_a_function_is_compared_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = same_code.compared("builtins", "dict")
    assert run({"a": 1}, b=2) == {"a": 1, "b": 2}
    monkeypatch.setattr(same_code, "_looker", lambda: iter([("0", "x", "/a"), ("1", "y", "/b")]).__next__)
    with pytest.raises(RuntimeError, match="/b there has kngd_ray 1 and the driver runs 0"):
        same_code.compared("builtins", "dict")({})
