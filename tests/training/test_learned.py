"""What a fit has learned from, as its manifest keeps it."""

from typing import Any

import pytest

from kngd_ray.errors import CheckpointError
from kngd_ray.training.learned import LEARNED, Learned, read_learned

ONE, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.mark.parametrize(
    "learned",
    [
        Learned(frozenset({ONE, OTHER})),
        Learned(frozenset({ONE}), frozenset({OTHER}), complete=False, numbered=True),
        Learned(frozenset()),
    ],
)
def test_it_is_read_as_it_was_written(learned: Learned) -> None:
    assert read_learned({LEARNED: learned.entry()}) == learned
    assert learned.all == learned.shots | learned.earlier


def test_earlier_versions_kept_nothing() -> None:
    assert read_learned({}) is None


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"shots": ONE},
        {"shots": [ONE], "earlier": "", "complete": True, "numbered": False},
        {"shots": ONE[1:], "earlier": "", "complete": True, "numbered": False},
        {"shots": "x" * 16, "earlier": "", "complete": True, "numbered": False},
    ],
)
def test_damage_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="manifest is damaged: use another checkpoint"):
        read_learned({LEARNED: entry})
