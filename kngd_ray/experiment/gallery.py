"""Predictions as one HTML page that needs nothing else: pictures and styles are in it, and it has no script."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kngd_ray.experiment.html import render

_SIDE = 224  # pixels of a thumbnail
_QUALITY = 82
_NEXT = 2  # classes shown below the first
_NOVEL = 0.95  # novelty percentile above which a picture is marked


@dataclass(frozen=True)
class Card:
    """One picture of the gallery.

    Attributes:
        row: what is said of it, as ``kngd-ray predict --json`` has it.
        thumbnail: a small JPEG.
    """

    row: Mapping[str, Any]
    thumbnail: bytes

    @classmethod
    def of(cls, row: Mapping[str, Any], picture: Image.Image) -> "Card":
        """Make a card.

        Args:
            row: what is said of the picture.
            picture: the picture, RGB.

        Returns:
            The card, which keeps only a thumbnail.
        """
        small = picture.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=_QUALITY)
        return cls(row, stream.getvalue())

    @property
    def doubt(self) -> tuple[float, float]:
        """Sort key of the cards: novelty, if known, then uncertainty."""
        novelty = self.row["novelty"]
        return (-1.0 if novelty is None else novelty, self.row["uncertainty"])


def gallery(title: str, cards: Sequence[Card], *, compared: bool) -> str:
    """Write the page, the most novel pictures first; every text from outside is escaped.

    Args:
        title: of the page.
        cards: the pictures.
        compared: whether their novelty is known.

    Returns:
        HTML.
    """
    ordered = sorted(cards, key=lambda card: card.doubt, reverse=True)
    order = "most novel first" if compared else "most uncertain first"
    about = f"{len(cards)} picture{'s' if len(cards) != 1 else ''}, {order}"
    if compared:
        novel = sum(_is_novel(card) for card in cards)
        about += f"; {novel} above the novelty percentile {_NOVEL:.2f} of the training pictures, marked"
    return render("gallery.html", title=title, about=about, cards=[_shown(card) for card in ordered])


def _is_novel(card: Card) -> bool:
    return (card.row["novelty"] or 0) > _NOVEL


def _shown(card: Card) -> dict[str, Any]:
    """What the template shows of a card."""
    return {
        "row": card.row,
        "thumbnail": base64.b64encode(card.thumbnail).decode(),
        "others": sorted(card.row["probabilities"].items(), key=lambda item: -item[1])[1 : 1 + _NEXT],
        "novel": _is_novel(card),
    }
