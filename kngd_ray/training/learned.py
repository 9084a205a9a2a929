"""Which pictures a fit has learned from, so that none of them is tested on later, or learned from again unnoticed.

A checkpoint's manifest keeps the first digits of their hashes, and of those of the fits that it continues::

    "learned": {"shots": "0f3a…", "earlier": "", "complete": true, "numbered": false}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kngd_ray.errors import CheckpointError

LEARNED = "learned"  # entry of a manifest; those of earlier versions, and of data in memory, lack it
MOST = 1 << 18  # pictures that are kept: with more, a manifest would outgrow what is read of one
DIGITS = 16  # kept of a hash: of a billion pictures, two that share them are as likely as one in forty


@dataclass(frozen=True)
class Learned:
    """What a fit has learned from, itself and through its prior.

    Attributes:
        shots: beginnings of the hashes of its own pictures, hexadecimal.
        earlier: of those of the fits that it continues, one after another.
        complete: whether all of these keep what they have learned from.
        numbered: whether its data had bare numbers for labels, which ``data.classes`` named.
        tested: digest of the test pictures of its data, none of which it has learned from; None of earlier versions.
    """

    shots: frozenset[str]
    earlier: frozenset[str] = field(default_factory=frozenset)
    complete: bool = True
    numbered: bool = False
    tested: str | None = None

    @property
    def all(self) -> frozenset[str]:
        """Beginnings of the hashes of all pictures that shaped the fit."""
        return self.shots | self.earlier

    def entry(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {
            "shots": "".join(sorted(self.shots)),
            "earlier": "".join(sorted(self.earlier)),
            "complete": self.complete,
            "numbered": self.numbered,
            "tested": self.tested,
        }


def read_learned(manifest: Mapping[str, Any]) -> Learned | None:
    """What a fit has learned from.

    Args:
        manifest: of one of its checkpoints.

    Returns:
        The same; None if it was not kept.

    Raises:
        CheckpointError: the entry is malformed.
    """
    entry = manifest.get(LEARNED)
    if entry is None:
        return None
    try:
        return Learned(
            _cut(entry["shots"]),
            _cut(entry["earlier"]),
            entry["complete"] is True,
            entry["numbered"] is True,
            entry.get("tested"),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the {LEARNED} of a fit's manifest is damaged: use another checkpoint.") from error


def _cut(text: Any) -> frozenset[str]:
    """The beginnings of hashes that an entry holds.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(text, str) or len(text) % DIGITS or set(text) - set("0123456789abcdef"):
        raise ValueError("it is not made of hashes")
    return frozenset(text[n : n + DIGITS] for n in range(0, len(text), DIGITS))
