"""Which model computed the features in a parquet file, as `encode` writes it.

It is in the schema's metadata, as JSON: `name` of the model, `fingerprint` of its weights, and its `logit_scale`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isclose, isfinite
from pathlib import Path

from kngd_ray.errors import DataError

_METADATA = b"kngd_ray.encoded_by"
_ROUNDED = 1e-3  # relative: 100 stands for the 100.00000762939453 of a model


@dataclass(frozen=True)
class EncodedBy:
    """The model that computed features.

    Attributes:
        name: as the settings call it.
        fingerprint: sha256 (hex) of its weights.
        logit_scale: its factor from cosines to logits.
    """

    name: str
    fingerprint: str
    logit_scale: float

    def __str__(self) -> str:
        return f"{self.name} (fingerprint {self.fingerprint[:12]})"

    def scales(self, logit_scale: float) -> bool:
        """Whether a logit scale is its own, up to rounding."""
        return isclose(logit_scale, self.logit_scale, rel_tol=_ROUNDED)

    @staticmethod
    def unstated(place: str, other: str) -> str:
        """Return the sentence on features that may be of another model, as no file says which computed them.

        Args:
            place: where they are.
            other: the model that they would have to be of.
        """
        return f"which model computed the features is not stated in {place}: make sure that it is {other}"

    def metadata(self) -> dict[bytes, bytes]:
        """What a schema says of it."""
        return {_METADATA: json.dumps(asdict(self)).encode()}


def encoded_by(metadata: Mapping[bytes, bytes] | None, path: Path) -> EncodedBy | None:
    """What a file says of the model that computed its features.

    Args:
        metadata: of its schema.
        path: the file, for the message.

    Returns:
        The model; None where the file says nothing.

    Raises:
        DataError: what it says is damaged.
    """
    stated = (metadata or {}).get(_METADATA)
    if stated is None:
        return None
    try:
        found = EncodedBy(**json.loads(stated))
        texts = all(isinstance(text, str) and text.isprintable() for text in (found.name, found.fingerprint))
        number = type(found.logit_scale) in (int, float) and isfinite(found.logit_scale) and found.logit_scale > 0
        sound = texts and number
    except (TypeError, ValueError, OverflowError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{path}: what its schema says of the model of its features is damaged: write the file again")
    return found


def one_encoder(paths: Sequence[str], stated: Sequence[EncodedBy | None]) -> EncodedBy | None:
    """The one model that computed the features of several files.

    Args:
        paths: the files.
        stated: what each says of its model.

    Returns:
        The model that those name which name one.

    Raises:
        DataError: two name different models.
    """
    named = [(path, model) for path, model in zip(paths, stated, strict=True) if model is not None]
    for path, model in named[1:]:
        first_path, first = named[0]
        if model.fingerprint != first.fingerprint:
            raise DataError(
                f"{first_path} has features of the model {first}, and {path} of {model}: encode both with one model"
            )
    return named[0][1] if named else None
