"""The cluster files and the lock: valid by Ray's own schema, closed to strangers, and of one mind about versions."""

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster.yaml"
RAYJOB = ROOT / "rayjob.yaml"
LOCK = ROOT / ".ci" / "requirements.lock"
DOCS_LOCK = ROOT / ".ci" / "docs.lock"
SECRETS = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:password|secret|token)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{16,}")


def pins(lock: Path = LOCK) -> dict[str, str]:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split(" ")[0].split("==") for line in lines)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """cluster.yaml as Ray's launcher sees it, filled up and validated."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(yaml.safe_load(CLUSTER.read_text()))
    validate_config(prepared)
    return prepared


def test_ray_refuses_a_misspelt_setting() -> None:
    """So that the fixture's silence means something."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    broken = yaml.safe_load(CLUSTER.read_text()) | {"idle_timeout": 5}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(broken))


def test_the_cluster_shrinks_to_its_head_and_has_limits(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}
    assert {"cpu", "gpu"} == set(workers)
    assert all(kind["min_workers"] == 0 for kind in types.values())
    assert all(0 < kind["max_workers"] <= cluster["max_workers"] for kind in workers.values())
    assert cluster["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    assert types["head"]["max_workers"] == 0
    assert types["head"]["resources"] == {"CPU": 0}
    assert workers["gpu"]["resources"]["GPU"] == 1
    assert 0 < cluster["idle_timeout_minutes"] <= 10
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_workers_are_spot_and_the_head_is_not(cluster: dict[str, Any]) -> None:
    for name, kind in cluster["available_node_types"].items():
        market = kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert market == (None if name == "head" else "spot"), name


def test_nobody_is_let_in(cluster: dict[str, Any]) -> None:
    head = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "--ray-client-server-port=0" in head
    assert "mlflow server --host 127.0.0.1" in head
    assert "0.0.0.0" not in CLUSTER.read_text()
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in command for command in cluster["setup_commands"])
    for name, kind in cluster["available_node_types"].items():  # without a group Ray opens port 22 to everybody
        assert kind["node_config"]["SecurityGroupIds"], name
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required", name
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"]), name


def test_every_node_has_the_package_and_the_settings(cluster: dict[str, Any]) -> None:
    for commands in (cluster["head_setup_commands"], cluster["worker_setup_commands"]):
        assert any("--require-hashes --no-deps -r ~/kngd_ray/.ci/requirements.lock" in c for c in commands)
        assert any(c.endswith("--no-deps ~/kngd_ray") for c in commands)
    environment = dict(o.removeprefix("-e ").split("=", 1) for o in cluster["docker"]["run_options"] if o[:2] == "-e")
    mounted = next(o.split(":")[-1] for o in cluster["docker"]["run_options"] if o.startswith("-v "))
    assert environment["KNGD_STORAGE_PATH"].startswith(f"{mounted}/")
    assert environment["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert any("mount -t nfs4" in c and mounted in c for c in cluster["initialization_commands"])


def test_images_have_the_ray_of_the_lock(cluster: dict[str, Any]) -> None:
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{pins()['ray']}-py311-"), image
    (job,) = (d for d in yaml.safe_load_all(RAYJOB.read_text()) if d["kind"] == "RayJob")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins()["ray"]


@pytest.mark.parametrize("path", [CLUSTER, RAYJOB, LOCK, DOCS_LOCK], ids=lambda path: path.name)
def test_no_secrets_and_no_hosts_of_ours(path: Path) -> None:
    text = path.read_text()
    assert not SECRETS.search(text)
    if path in (LOCK, DOCS_LOCK):
        assert "://" not in text


# The fields of KubeRay's ray.io/v1 that a run may need, with their types; others are refused, and so misspelt ones.
# {} is any mapping; a list of one is a list of such; a trailing ! is required.
OBJECT: dict[str, Any] = {}
RESOURCES = {"requests": OBJECT, "limits": OBJECT}
CONTAINER = {
    "name!": str,
    "image!": str,
    "imagePullPolicy": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str, "valueFrom": {"secretKeyRef": OBJECT, "fieldRef": OBJECT}}],
    "envFrom": [OBJECT],
    "ports": [OBJECT],
    "resources": RESOURCES,
    "securityContext": OBJECT,
    "volumeMounts": [{"name!": str, "mountPath!": str, "subPath": str, "readOnly": bool}],
    "lifecycle": OBJECT,
}
POD = {
    "metadata": {"labels": OBJECT, "annotations": OBJECT},
    "spec!": {
        "restartPolicy": str,
        "automountServiceAccountToken": bool,
        "serviceAccountName": str,
        "nodeSelector": OBJECT,
        "tolerations": [OBJECT],
        "affinity": OBJECT,
        "imagePullSecrets": [OBJECT],
        "securityContext": OBJECT,
        "initContainers": [CONTAINER],
        "containers!": [CONTAINER],
        "volumes": [{"name!": str, "persistentVolumeClaim": OBJECT, "emptyDir": OBJECT, "secret": OBJECT}],
    },
}
RAY_CLUSTER = {
    "rayVersion": str,
    "suspend": bool,
    "enableInTreeAutoscaling": bool,
    "authOptions": {"mode!": str},
    "autoscalerOptions": {
        "version": str,
        "idleTimeoutSeconds": int,
        "upscalingMode": str,
        "imagePullPolicy": str,
        "image": str,
        "env": [OBJECT],
        "envFrom": [OBJECT],
        "resources": RESOURCES,
        "securityContext": OBJECT,
        "volumeMounts": [OBJECT],
    },
    "gcsFaultToleranceOptions": OBJECT,
    "headServiceAnnotations": OBJECT,
    "headGroupSpec!": {
        "serviceType": str,
        "enableIngress": bool,
        "headService": OBJECT,
        "resources": OBJECT,
        "labels": OBJECT,
        "rayStartParams": OBJECT,
        "template!": POD,
    },
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "numOfHosts": int,
            "idleTimeoutSeconds": int,
            "suspend": bool,
            "resources": OBJECT,
            "labels": OBJECT,
            "rayStartParams": OBJECT,
            "scaleStrategy": OBJECT,
            "template!": POD,
        }
    ],
}
RAY_JOB = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "namespace": str, "labels": OBJECT, "annotations": OBJECT},
    "spec!": {
        "entrypoint!": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "entrypointResources": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "metadata": OBJECT,
        "submissionMode": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "suspend": bool,
        "clusterSelector": OBJECT,
        "submitterConfig": {"backoffLimit": int},
        "submitterPodTemplate": POD,
        "managedBy": str,
        "deletionStrategy": OBJECT,
        "rayClusterSpec": RAY_CLUSTER,
    },
}


def faults(value: Any, schema: Any, path: str) -> list[str]:
    """Where a document departs from a schema of the kind above."""
    if isinstance(schema, type):
        good = isinstance(value, schema) and not (schema is int and isinstance(value, bool))
        return [] if good else [f"{path} is {value!r}, no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [fault for n, item in enumerate(value) for fault in faults(item, schema[0], f"{path}[{n}]")]
    if not isinstance(value, dict):
        return [f"{path} is no mapping"]
    if not schema:
        return []
    known = {key.rstrip("!"): inner for key, inner in schema.items()}
    missing = [f"{path}.{key[:-1]} is missing" for key in schema if key.endswith("!") and key[:-1] not in value]
    unknown = [f"{path}.{key} is no field" for key in value if key not in known]
    below = [fault for key in value if key in known for fault in faults(value[key], known[key], f"{path}.{key}")]
    return missing + unknown + below


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(RAYJOB.read_text())}


def test_the_ray_job_has_only_fields_that_kuberay_knows(documents: dict[str, dict[str, Any]]) -> None:
    assert list(documents) == ["RayJob", "PersistentVolumeClaim", "NetworkPolicy"]
    job = documents["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert faults(job, RAY_JOB, "RayJob") == []
    job = {**job, "spec": {**job["spec"], "entryPoint": "x", "backoffLimit": "0"}}
    assert faults(job, RAY_JOB, "RayJob") == [
        "RayJob.spec.entryPoint is no field",
        "RayJob.spec.backoffLimit is '0', no int",
    ]


def test_the_ray_job_ends_and_shrinks(documents: dict[str, dict[str, Any]]) -> None:
    spec = documents["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] in {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0
        assert group["maxReplicas"] > 0
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert any(pod["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods)
    policy = documents["NetworkPolicy"]["spec"]
    labels = policy["podSelector"]["matchLabels"].items()
    templates = [pod["template"] for pod in pods] + [spec["submitterPodTemplate"]]
    for template in templates:
        assert labels <= template["metadata"]["labels"].items()
    for pod in pods:
        (claim,) = (v for v in pod["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v)
        assert claim["persistentVolumeClaim"]["claimName"] == documents["PersistentVolumeClaim"]["metadata"]["name"]
        assert pod["rayStartParams"] is not None
        assert all(isinstance(value, str) for value in pod["rayStartParams"].values())
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    (mount,) = {m["mountPath"] for p in pods for m in p["template"]["spec"]["containers"][0]["volumeMounts"]} - {
        "/dev/shm"
    }
    assert environment["KNGD_STORAGE_PATH"].startswith(f"{mount}/")


@pytest.mark.parametrize("source", ["cluster.yaml", "rayjob.yaml"])
def test_commands_of_the_files_are_ours(source: str) -> None:
    from kngd_ray.cli.app import app
    from kngd_ray.config import load_config

    text = (ROOT / source).read_text()
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    for line in re.findall(r"(?:kngd-ray|kngd_ray\.cli)((?: [a-z_.\-=0-9]+)+)", text):
        words = [word for word in line.split() if word not in {"submit", "--", "for"}]
        if not words or words[0] not in known:
            continue
        load_config(None, [word for word in words[1:] if "=" in word])


def test_the_lock_pins_every_dependency_with_a_hash() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = ("test", "export", "docs")
    wanted = [Requirement(line) for line in [*project["dependencies"], *(line for n in names for line in extras[n])]]
    assert not pins().keys() & pins(DOCS_LOCK).keys(), "the documentation's lock goes beside the tests'"
    locked = pins() | pins(DOCS_LOCK)
    for requirement in wanted:
        name = canonical(requirement.name)
        if name == "kngd-ray":
            continue
        assert name in locked, f"{name} is not in the lock: run make lock"
        assert requirement.specifier.contains(locked[name], prereleases=True), f"{requirement}: {locked[name]}"
    for line in [*LOCK.read_text().splitlines(), *DOCS_LOCK.read_text().splitlines()]:
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line), line


def test_every_version_of_python_that_is_claimed_has_a_session() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [line.rpartition(" ")[2] for line in settings["project"]["classifiers"] if ":: 3." in line]
    assert settings["tool"]["tox"]["env_list"] == named
    assert set(settings["tool"]["tox"]["env_run_base"]["extras"]) <= set(settings["project"]["optional-dependencies"])


def test_the_lock_can_build_the_package_without_asking_an_index() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in map(Requirement, build):
        assert requirement.specifier.contains(Version(pins()[canonical(requirement.name)]))


@pytest.mark.parametrize(
    ("answers", "code", "says"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 of 1 packages checked, 0 with"),
        (
            [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}],
            1,
            "a 1: CVE-1, fixed in 2",
        ),
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "unknown"}], 2, "does not know b"),
        ([{"name": "b", "skip_reason": "unknown"}], 2, "nothing was checked"),  # for which pip-audit itself says 0
    ],
)
def test_an_audit_that_asked_nobody_does_not_pass(answers: list[dict[str, Any]], code: int, says: str) -> None:
    verdict = runpy.run_path(str(ROOT / ".ci" / "audit"))["verdict"]
    found, lines = verdict(answers)
    assert found == code
    assert says in " ".join(lines)
