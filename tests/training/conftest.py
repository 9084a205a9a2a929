"""Shared by the tests of training."""

from collections.abc import Iterator

import pytest
from helpers.resuming import float64


@pytest.fixture
def double() -> Iterator[None]:
    """Adapters in float64, as torch's default dtype says."""
    with float64():
        yield
