"""Who may import whom, what the package promises to others, and habits that no module may take up."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import typer.main

import kngd_ray
from kngd_ray.cli.app import app

PACKAGE = Path(kngd_ray.__file__).parent
ROOT = PACKAGE.parent

# Arrows only point to the left.
LAYERS = (
    "filters",
    "observations",
    "sharding",
    "clip",
    "data",
    "training",
    "estimator",
    "tracking",
    "console",
    "experiment",
    "tuning",
    "comparison",
    "cluster",
    "results",
    "api",
    "cli",
    "__main__",
)
SHARED = {
    "_allocator",
    "_deferred",
    "_plugins",
    "_keywords",
    "_option",
    "_run_layout",
    "config",
    "configs",
    "_layered",
    "_rgb",
    "_streams",
    "_vectors",
    "_yaml",
    "errors",
    "storage",
    "__init__",
}
STANDARD_ONLY = ("_allocator", "_option", "_plugins", "_run_layout", "_streams", "errors", "storage")

# Third-party packages that only some layers may import; what is not named here is free for all.
ONLY_IN = {
    "ray": {"cluster"},
    "mlflow": {"tracking"},
    "sqlalchemy": {"tracking"},
    "pandas": {"tracking", "results", "api"},
    "matplotlib": {"tracking", "comparison", "results"},
    "jinja2": {"experiment"},
    "markupsafe": {"comparison"},
    "open_clip": {"clip"},
    "huggingface_hub": {"cluster", "experiment"},
    "pydantic": {"_layered"},
    "yaml": {"config", "configs", "_yaml"},
    "sklearn": {"estimator"},
    "typer": {"cli"},
    "rich": {"console", "experiment", "comparison", "cluster"},
    "pyarrow": {"data", "cluster"},
    "optuna": {"tuning", "results"},
}
# Types of MLflow's own interface: it takes data frames and raises SQLAlchemy's errors. They come with it.
COME_WITH_MLFLOW = {"pandas", "sqlalchemy"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch", "sklearn": "scikit-learn"}

API = ["compare", "doctor", "encode", "ensemble", "evaluate", "export", "load", "predict", "sync", "train", "tune"]
PUBLIC = {
    "kngd_ray": ["KalmanCLIP", "__version__", *API],
    "kngd_ray.api": API,
    "kngd_ray.filters": [
        "Belief",
        "BlockDiagonal",
        "Calibrated",
        "Categorical",
        "Classified",
        "Covariance",
        "CovarianceFamily",
        "Dense",
        "Diagonal",
        "DiagonalLowRank",
        "Ema",
        "Factors",
        "Family",
        "Fixed",
        "Forgetting",
        "Gate",
        "GateModel",
        "GateResiduals",
        "HeldOut",
        "Inflate",
        "Innovation",
        "Jacobian",
        "Kronecker",
        "Layer",
        "Layered",
        "Layerwise",
        "NoGate",
        "NoiseModel",
        "ObservationNoise",
        "OrnsteinUhlenbeck",
        "Part",
        "PerLayer",
        "PriorMean",
        "PriorWithout",
        "Process",
        "ProcessModel",
        "RandomWalk",
        "Rows",
        "Seen",
        "Skip",
        "SoftmaxPosterior",
        "Transition",
        "Whitening",
        "Work",
        "ZeroShot",
        "common_offset",
        "condition_softmax",
        "innovation_covariance",
        "random_signs",
        "scaled",
        "solve_innovation",
        "spread_left_out",
        "update",
        "variances",
    ],
    "kngd_ray.observations": [
        "Categorical",
        "ClipCite",
        "Cosine",
        "Linearisation",
        "Linearizer",
        "LogLikelihood",
        "Model",
        "Observation",
        "ObservationModel",
        "Probability",
        "flatten",
        "jacobian_rows",
        "stack",
        "trainable",
        "unflatten",
    ],
    "kngd_ray.sharding": [
        "Group",
        "Observed",
        "Ownership",
        "PartitionedFilter",
        "ProcessGroup",
        "ShardedFilter",
        "ShardedUpdate",
        "SingleProcess",
        "StreamedFilter",
        "StreamedOutcome",
        "covariance_bytes",
        "exchange",
        "split_evenly",
    ],
    "kngd_ray.clip": [
        "EMBEDDED_MODEL",
        "LOGIT_SCALE",
        "PRECOMPUTED",
        "AnyModel",
        "CLIPHead",
        "CLIPNetwork",
        "ClipModel",
        "Head",
        "ModelConfig",
        "PrecomputedModel",
        "RandomResizedCrop",
        "TuneOptions",
        "augmentation_of",
        "best_device",
        "check_without_towers",
        "expand",
        "given_precomputed",
        "load_model",
        "load_precomputed",
        "public_name",
        "read_class_embeddings",
        "resolve_templates",
        "same_sentences",
        "tower_products",
        "worded",
    ],
    "kngd_ray.clip.adapters": [
        "Adapter",
        "AdapterConfig",
        "AnyAdapter",
        "Bottleneck",
        "ClassResidual",
        "ClassResidualAdapter",
        "HeadShape",
        "Linear",
        "Tower",
        "averages",
    ],
    "kngd_ray.data": [
        "EMBEDDED",
        "SUFFIXES",
        "BadImage",
        "ColumnNames",
        "Crops",
        "DataConfig",
        "EncodedBatch",
        "EncodedBy",
        "EncodedStream",
        "Encoder",
        "FeatureCache",
        "FeatureFiles",
        "GivenCrops",
        "GivenFeatures",
        "ImageSet",
        "PictureFile",
        "Split",
        "arrange",
        "by_suffix",
        "content_key",
        "data_files",
        "decode",
        "encode_batch",
        "encode_missing",
        "encoder_of",
        "file_bytes",
        "fill_cache",
        "halves",
        "of_a_system",
        "open_images",
        "picture_of",
        "read_batches",
        "read_features",
        "restrict",
        "sample_shots",
        "select",
        "select_tests",
        "unread",
        "write_features",
    ],
    "kngd_ray.tracking": [
        "LoggedRun",
        "Publisher",
        "Record",
        "Status",
        "SystemMonitor",
        "accuracy_plot",
        "artifacts_of",
        "check_store",
        "ensemble_curve",
        "learning_curve",
        "publish",
        "read_metrics",
        "read_runs",
        "redact",
        "reliability_diagram",
        "resolve_uri",
        "save_pyfunc",
        "stream_curve",
        "trial_plot",
        "without_reading",
    ],
    "kngd_ray.tuning": [
        "JOURNAL",
        "Claimed",
        "Driver",
        "Fitted",
        "Fitter",
        "Report",
        "SearchOptions",
        "SearchStudy",
        "Space",
        "TrialResult",
        "Value",
        "Workload",
        "fit_alone",
        "fit_together",
        "fitted_from",
        "load_study",
        "mode_of",
        "parse_space",
        "plain_space",
        "reason_of",
        "report_of",
        "run_here",
        "score_trials",
    ],
    "kngd_ray.cli": ["main"],
    "kngd_ray.estimator": ["FittedClassifier", "KalmanCLIP", "NotFittedError"],
    "kngd_ray.cluster": ["gpus_of_cluster", "ray_session", "ray_stream", "run_job", "run_search"],
}

COMMANDS = {
    "ensemble": ["target", "settings", "--points", "--storage-path", "--json"],
    "export": ["target", "--out", "--onnx", "--peft", "--push", "--storage-path", "--json"],
    "tune": ["settings", "--resume", "--json", "--print-config"],
    "train": ["settings", "--resume", "--json", "--print-config"],
    "evaluate": ["target", "settings", "--storage-path", "--json"],
    "predict": ["target", "images", "--html", "--csv", "--storage-path", "--json"],
    "encode": ["dataset", "settings", "--out", "--views", "--json"],
    "compare": ["experiment", "--parent", "--metric", "--baseline", "--uri", "--out", "--json"],
    "sync": ["run", "--uri", "--storage-path", "--json"],
    "doctor": ["settings", "--json"],
    "submit": ["words", "--json"],
}


@cache
def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def layer_of(module: str) -> str:
    """The second part of a dotted name inside the package; '__init__' for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[str]:
    """Absolute names that a module imports, wherever in it, types of annotations included."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            if node.module == "kngd_ray":
                yield from (f"kngd_ray.{alias.name}" for alias in node.names)


def test_imports_point_down(subtests: pytest.Subtests) -> None:
    for path in modules():
        with subtests.test(name_of(path)):
            own = layer_of(name_of(path))
            for name in imports(path):
                if not name.startswith("kngd_ray"):
                    continue
                other = layer_of(name)
                if other in SHARED or name == "kngd_ray.__version__":
                    continue
                assert own in SHARED or LAYERS.index(other) <= LAYERS.index(own), f"{path} imports {name}"


def test_commands_call_the_api_and_nothing_below_it() -> None:
    above = ("kngd_ray.api", "kngd_ray.cli", "kngd_ray.config", "kngd_ray.console", "kngd_ray.errors")
    others = {
        "kngd_ray",
        "kngd_ray.__version__",
        "kngd_ray._option",
        "kngd_ray._run_layout",
        "kngd_ray._streams",
        "kngd_ray.configs",
        "kngd_ray.tuning.file",
    }
    for path in (PACKAGE / "cli").glob("*.py"):
        # what `submit` sends is a command line, which Python programs do not have
        own = {"kngd_ray.cluster"} if path.name == "submit.py" else set()
        for name in imports(path):
            if name.startswith("kngd_ray"):
                assert name.startswith(above) or name in others | own, f"{path} imports {name}"


def test_tracking_does_not_know_the_cluster() -> None:
    for path in (PACKAGE / "tracking").glob("*.py"):
        assert not any(name.startswith("kngd_ray.cluster") for name in imports(path)), path


def test_third_party_packages_stay_in_their_layers(subtests: pytest.Subtests) -> None:
    for path in modules():
        with subtests.test(name_of(path)):
            own = layer_of(name_of(path))
            for name in imports(path):
                allowed = ONLY_IN.get(name.partition(".")[0])
                assert allowed is None or own in allowed, f"{path} imports {name}"


def test_filters_are_maths_on_tensors() -> None:
    for path in (PACKAGE / "filters").glob("*.py"):
        for name in imports(path):
            first = name.partition(".")[0]
            ours = name.startswith("kngd_ray.filters") or name in {
                "kngd_ray.errors",
                "kngd_ray._deferred",
                "kngd_ray._plugins",
            }
            assert first in sys.stdlib_module_names | {"torch"} or ours, f"{path} imports {name}"
            assert not name.startswith("torch.distributed"), f"{path} imports {name}"


def test_only_sharding_and_the_cluster_know_ranks() -> None:
    for path in modules():
        if any(name.startswith("torch.distributed") for name in imports(path)):
            assert layer_of(name_of(path)) in {"sharding", "cluster"}, path


def test_data_needs_no_torch() -> None:
    for path in (PACKAGE / "data").glob("*.py"):
        for name in imports(path):
            assert name.partition(".")[0] not in {"torch", "torchvision"}, f"{path} imports {name}"


@pytest.mark.parametrize("name", STANDARD_ONLY)
def test_errors_and_storage_need_only_the_standard_library(name: str) -> None:
    for imported in imports(PACKAGE / f"{name}.py"):
        assert imported.partition(".")[0] in sys.stdlib_module_names or imported in {
            "kngd_ray.errors",
            "kngd_ray._option",
        }


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["sklearn"]]
    declared = {re.split(r"[\[<>=! ]", line)[0].lower() for line in lines} | COME_WITH_MLFLOW
    for path in modules():
        for name in imports(path):
            first = name.partition(".")[0]
            if first not in sys.stdlib_module_names | {"kngd_ray"}:
                assert DISTRIBUTIONS.get(first, first).lower() in declared, f"{path} imports {name}"


def test_nothing_is_unpickled_or_evaluated(subtests: pytest.Subtests) -> None:
    for path in modules():
        with subtests.test(name_of(path)):
            check_calls(path)


def check_calls(path: Path) -> None:
    for node in nodes_of(path):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            for name in names:
                assert name.partition(".")[0] not in {"pickle", "cloudpickle", "dill", "joblib", "shelve"}, path
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}, path
        for keyword in node.keywords:
            shell = keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
            assert not (shell and called.startswith("subprocess.")), path
        if called in {"torch.load", "open_clip.load_checkpoint"}:
            assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True", path


def test_modules_stay_readable() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in modules()}
    assert {name: count for name, count in lines.items() if count >= 450} == {}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_frozen(package: str) -> None:
    module = import_module(package)
    assert list(module.__all__) == PUBLIC[package], "a public name changed: say so in the release notes"
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_package_with_public_names_is_frozen() -> None:
    found = {name_of(path.parent) for path in modules() if path.name == "__init__.py" and "__all__" in path.read_text()}
    assert found - {""} == set(PUBLIC)


def test_commands_and_options_are_frozen() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {}
    for name, command in commands.items():
        options = [p.opts[-1] if p.param_type_name == "option" else p.name for p in command.params]
        found[name] = [option for option in options if option != "--help"]
    assert found == COMMANDS, "the command line changed: say so in the README"


BLOCK = """
import importlib, sys
blocked = set()
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{{name}} is not installed here")
sys.meta_path.insert(0, Blocked())
for without, names in {stages!r}:
    blocked = without
    for name in names:
        importlib.import_module(name)
print("imported")
"""


def import_without(*stages: tuple[set[str], list[str]]) -> None:
    """Import modules without some packages, in one process: each stage lacks no more than the one before."""
    assert all(later <= before for (before, _), (later, _) in pairwise(stages))
    code = BLOCK.format(stages=stages)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "imported", done.stderr


def below(layer: str) -> list[str]:
    """Every module of the layers under one."""
    own = LAYERS[: LAYERS.index(layer)]
    return [name_of(p).removesuffix(".__init__") for p in modules() if layer_of(name_of(p)) in own]


def test_layers_import_without_what_they_do_not_need() -> None:
    without = {"ray", "mlflow", "sqlalchemy", "open_clip", "typer", "rich", "optuna", "pydantic", "yaml"}
    # these read what a fit left in files, and so are the modules of training that validate
    validating = {f"kngd_ray.training.{name}" for name in ("classifier", "restoring", "settled")}
    maths = [name for name in below("estimator") if name not in validating]
    import_without(
        (without | {"torch"}, ["kngd_ray.data"]),
        (without, maths),
        (without - {"pydantic", "yaml"}, [*below("tracking"), "kngd_ray.config"]),
        (
            {"ray", "mlflow", "sqlalchemy"},
            [name for name in below("cluster") if name != "kngd_ray.tracking.model_code"],
        ),
    )


def test_settings_are_read_without_what_computes() -> None:
    """What answers a wrong setting and ``--print-config`` imports no more than that takes: half a second's worth."""
    light = ["kngd_ray.cli.app", "kngd_ray.api", "kngd_ray.config"]
    heavy = {"torch", "pyarrow", "numpy", "ray", "mlflow", "optuna", "open_clip", "matplotlib", "pandas", "PIL"}
    import_without((heavy, light), (heavy - {"numpy", "PIL"}, ["kngd_ray.tuning.file"]))
