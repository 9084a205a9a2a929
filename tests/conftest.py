"""Shared by all tests; its place also puts ``tests/`` on the import path, so that they can import :mod:`helpers`."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

# The tensors here are tiny: more threads would only contend, and sums could depend on the machine's cores. Runs and
# searches in this process take no more than these.
torch.set_num_threads(1)

# And in a command that is run as a program, with a thread a core: those that wait do not take the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Freed memory is kept for the next tensor. Given back to the system and taken again, page by page, it may cost as much
# as the encoding of pictures that it is for. The C library reads this as a process starts: that of xdist, or a command.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
for _name, _bytes in _KEEP_MEMORY.items():
    os.environ.setdefault(_name, _bytes)

# Ray's workers are nice to others by default (15): beside tests that keep all cores busy they would hardly move.
os.environ.setdefault("RAY_worker_niceness", "0")

# No test needs a model hub: a client that cannot reach one would try again and again.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A cluster that somebody runs on this machine is not ours to use: its cores are taken, and it may end at any time.
os.environ["RAY_ADDRESS"] = "local"


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """What this process writes need not outlast a power cut, which no test sees: it would wait thousands of times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


# Half a minute and more each: were one of them the last, a process would end long after the others.
_LONG = frozenset(
    f"test_{name}.py"
    for name in (
        "compare",
        "estimator",
        "examples",
        "few_shot_bench",
        "hostile_files",
        "model",
        "on_a_device",
        "readme",
        "sharded_filter",
        "study",
        "tower_runs",
        "trial_scores",
        "tune",
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start Ray, the longest, go first, then those that start ranks and the other long files."""
    order = {"ray": 0, "ranks": 1, "": 2}
    items.sort(key=lambda item: (order[_starts(item.path)], item.path.name not in _LONG))


class _ByFile(LoadScopeScheduling):
    """Side by side (pytest-xdist) go the files, whose tests share fixtures; those that start Ray one after another.

    Two Ray instances would fight over ports and cores. So do the files that start gloo ranks: each process that does
    has a fork server with all imports behind it. A class of our own, since the groups of ``--dist loadgroup`` are
    written into an attribute that pytest 9.2 does not read: tests would be dealt out one by one.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = nodeid.partition("::")[0]
        return _starts(self.config.rootpath / file) or file


@cache
def _starts(path: Path) -> str:
    """What the tests of a file start, if anything."""
    text = path.read_text(encoding="utf-8")
    return "ray" if "mark.ray" in text else "ranks" if "run_ranks" in text else ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """How they are dealt out."""
    return _ByFile(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One a core, by what this process may use of them: one more would have all imports to do, and time for no test."""
    return None if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else len(os.sched_getaffinity(0))
