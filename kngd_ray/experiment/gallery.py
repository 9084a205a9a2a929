"""Predictions as one HTML page that needs nothing else: pictures and styles are in it, and it has no script."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any

from PIL import Image

MARK = '<meta name="generator" content="kngd-ray predict">'
"""What tells a page of ours from another file."""

_SIDE = 224  # pixels of a thumbnail
_QUALITY = 82
_NEXT = 2  # classes shown below the first
_STRANGE = 0.95  # of the shots that are surer: such a picture is marked


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
        """What the cards are sorted by: how unlike the shots, if that is known, then the uncertainty."""
        unlike = self.row["unlike"]
        return (-1.0 if unlike is None else unlike, self.row["uncertainty"])


def gallery(title: str, cards: Sequence[Card], *, compared: bool) -> str:
    """Write the page, the least certain pictures first; every text from outside is escaped.

    Args:
        title: of the page.
        cards: the pictures.
        compared: whether it is known how unlike the shots they are.

    Returns:
        HTML.
    """
    template = (resources.files("kngd_ray") / "assets" / "gallery.html").read_text(encoding="utf-8")
    ordered = sorted(cards, key=lambda card: card.doubt, reverse=True)
    strange = sum(1 for card in cards if (card.row["unlike"] or 0) > _STRANGE)
    order = "the most unlike the training pictures first" if compared else "the largest uncertainty first"
    about = f"{len(cards)} picture{'s' if len(cards) != 1 else ''}, {order}"
    if compared:
        about += f"; {strange} of them more unlike the training pictures than {_STRANGE:.0%} of these are, marked"
    body = "\n".join(_card(card) for card in ordered)
    return Template(template).substitute(title=escape(title), about=escape(about), body=body)


def _card(card: Card) -> str:
    row = card.row
    source = f"data:image/jpeg;base64,{base64.b64encode(card.thumbnail).decode()}"
    p, low, high, unlike = (row[key] for key in ("probability", "probability_low", "probability_high", "unlike"))
    whisker = spread = ""
    if low is not None:
        whisker = f'<i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
        spread = f" <small>90 %: {low:.3f} to {high:.3f}</small>"
    others = sorted(row["probabilities"].items(), key=lambda item: -item[1])[1 : 1 + _NEXT]
    rest = ", ".join(f"{escape(name)} {share:.3f}" for name, share in others)
    far = unlike is not None and unlike > _STRANGE
    likeness = "" if unlike is None else f'<p class="unlike">unlike the training pictures: <b>{unlike:.2f}</b></p>'
    name = escape(row["image"])
    return (
        f'<figure{" class=far" if far else ""}><img src="{source}" alt="{name}"><figcaption>'
        f"<h2>{escape(row['class'])}</h2>"
        f'<div class="bar"><b style="width:{100 * p:.2f}%"></b>{whisker}</div><p>{p:.3f}{spread}</p>'
        f'{likeness}<p class="soft">then {rest}</p><p class="soft name">{name}</p></figcaption></figure>'
    )
