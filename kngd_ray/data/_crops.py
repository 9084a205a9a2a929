"""Random crops of pictures, each with a key of its own in the cache of features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from kngd_ray.data._source import Keys

RULE = 1
"""Raised whenever a picture's crops come out otherwise than before: files of features say which drew theirs."""

_DIGITS = 15  # hexadecimal ones of a seed: 60 bits


@dataclass(frozen=True)
class Crops:
    """Crops of a picture, the same whenever they are asked for: a function of its bytes.

    Attributes:
        count: V, of each picture.
        crop: a crop of an RGB picture, drawn by a seed.
        name: what tells this way to crop from others; part of the keys.
    """

    count: int
    crop: Callable[[Image.Image, int], Image.Image]
    name: str

    def keys(self, keys: Keys) -> Keys:
        """Keys (M, V) of the crops of pictures with keys (M,)."""
        found = [self._of(key) for key in keys.tolist()]
        return np.array(found, "S64").reshape(len(keys), self.count)

    def of(self, picture: Image.Image, key: bytes) -> list[Image.Image]:
        """The V crops of a picture with a key."""
        return [self.crop(picture, int(own[:_DIGITS], 16)) for own in self._of(key)]

    def _of(self, key: bytes) -> list[bytes]:
        return [
            hashlib.sha256(f"{key.decode()} {self.name} {number}".encode()).hexdigest().encode()
            for number in range(self.count)
        ]
