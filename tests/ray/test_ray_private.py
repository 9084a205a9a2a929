"""What this package takes of Ray that Ray does not promise: in one module, there in this version, and in the next."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import ray

import kngd_ray
from kngd_ray.cluster import _ray_private

PACKAGE = Path(kngd_ray.__file__).resolve().parent
ROOT = PACKAGE.parent
# of Ray's modules, those that its documentation describes, and what they hold
PUBLIC = {
    *("ray", "ray.cloudpickle", "ray.data", "ray.data.block", "ray.data.datasource", "ray.exceptions"),
    *("ray.job_config", "ray.job_submission", "ray.train", "ray.train.torch", "ray.tune", "ray.tune.schedulers"),
    *("ray.tune.search", "ray.util.queue", "ray.util.scheduling_strategies"),
}
CAPPED = ("ray", "optuna", "mlflow")


def test_only_one_module_knows_what_is_not_public(subtests: pytest.Subtests) -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "_ray_private.py":
            continue
        with subtests.test(path.relative_to(PACKAGE).as_posix()):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert {name for name in names if name.partition(".")[0] == "ray"} <= PUBLIC


def test_each_of_its_names_does_something() -> None:
    assert _ray_private.address_file().name == "ray_current_cluster"
    assert _ray_private.own_address()
    assert _ray_private.package_limit() > 2**20
    assert _ray_private.most_resources() == {} or not ray.is_initialized()
    _ray_private.forget_token()
    before = os.environ.get(_ray_private._CLUSTERS_VARIABLE)
    with _ray_private.loopback():
        assert os.environ[_ray_private._CLUSTERS_VARIABLE] == "0"
        assert not _ray_private.ray_constants.ENABLE_RAY_CLUSTER
    assert os.environ.get(_ray_private._CLUSTERS_VARIABLE) == before


@pytest.mark.slow  # Ray takes its time to give up
def test_a_head_that_is_not_there_is_an_error() -> None:
    with pytest.raises((RuntimeError, ray.exceptions.RayError)):
        _ray_private.ask_head("127.0.0.1:1", 0.1)


def test_a_ray_that_lacks_something_is_one_sentence() -> None:
    code = (
        "import sys; import ray._private.services as s; del s.get_node_ip_address\n"
        "from kngd_ray.errors import KngdError\n"
        "try: import kngd_ray.cluster.session\nexcept KngdError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.startswith(
        f"Ray {ray.__version__} lacks what this version of kngd_ray uses of it (cannot import"
    )
    assert "install ray>=" in done.stdout


def test_the_next_minor_version_is_not_installed_unseen() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in CAPPED:
        (line,) = (line for line in dependencies if line.split("[")[0].split(">")[0] == name)
        assert ",<" in line, line


@pytest.mark.next_minor
@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "code"),
    [
        (
            ["ray"],
            "from ray.train import TrainingFailedError; from kngd_ray.cluster import _ray_private as p; "
            "from kngd_ray.cluster import encode_job, nodes, session, submission, train_job, tune_job; "
            "assert list(p.job_config(['/a'])._get_proto_job_config().py_driver_sys_path) == ['/a']",
        ),
        (["optuna"], "from kngd_ray.tuning import driver, samplers, study"),
        (["mlflow", "mlflow-skinny", "mlflow-tracing"], "import mlflow.pyfunc, kngd_ray.tracking._server"),
    ],
    ids=CAPPED,
)
def test_the_next_minor_version_has_what_is_used(packages: list[str], code: str, tmp_path: Path) -> None:
    """A failure says what to look at before the bound in pyproject.toml is moved."""
    major, minor = map(int, version(packages[0]).split(".")[:2])
    wanted = [f"{name}>={major}.{minor + 1},<{major}.{minor + 2}" for name in packages]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=0", "--timeout=20"]
    got = subprocess.run(
        [*pip, "--target", tmp_path, *wanted], capture_output=True, text=True, timeout=500, check=False
    )
    if got.returncode:
        pytest.skip(f"{wanted[0]} is not to be had: {(got.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import {packages[0]} as found; print(found.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{major}.{minor + 1}.")
