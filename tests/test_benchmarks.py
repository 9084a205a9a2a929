"""Every benchmark can be started: what it imports of the package is there under that name."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("kngd_ray", "benchmarks")


def test_every_benchmark_imports(subtests: pytest.Subtests) -> None:
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        with subtests.test(name):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:  # of the extra `bench`
                if str(error.name).startswith(OURS):
                    raise
