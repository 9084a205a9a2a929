"""Shared by all tests; its place also puts ``tests/`` on the import path, so that they can import :mod:`helpers`."""

import pytest
import torch

# The tensors here are tiny: more threads would only contend, and sums could depend on the machine's cores.
torch.set_num_threads(1)


def _starts_ray(item: pytest.Item) -> bool:
    return item.get_closest_marker("ray") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (pytest-xdist) go the files; those that start Ray, the longest, go first and one after another.

    Two Ray instances would fight over ports and cores, and a file's fixtures are shared by its tests.
    """
    items.sort(key=lambda item: not _starts_ray(item))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if _starts_ray(item) else item.nodeid.partition("::")[0]))
