"""Memory that tensors free on the CPU stays with the process, unless somebody tunes the allocator himself."""

import ctypes
import os

import pytest

from kngd_ray import _allocator
from kngd_ray._allocator import keep_freed_memory


class Library:
    """A C library that notes what it is told."""

    def __init__(self) -> None:
        self.told: dict[int, int] = {}

    def mallopt(self, what: int, value: int) -> int:
        self.told[what] = value
        return 1


@pytest.fixture
def untuned(monkeypatch):
    for name in _allocator._ASKED:
        monkeypatch.delenv(name, raising=False)
    keep_freed_memory.cache_clear()
    yield
    keep_freed_memory.cache_clear()


def test_it_is_told_once(untuned, monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory()
    assert library.told == {-1: 1 << 30, -3: 1 << 30}
    library.told.clear()
    assert keep_freed_memory()
    assert not library.told


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_goes_first(untuned, monkeypatch, name):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("it is told all the same"))
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_another_c_library(untuned, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()


def test_glibc_takes_it(untuned):
    assert keep_freed_memory() == ("glibc" in os.confstr("CS_GNU_LIBC_VERSION"))
