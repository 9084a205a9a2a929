"""What stands for a CLIP model where features were computed elsewhere: its classes' embeddings and its logit scale."""

import hashlib
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from kngd_ray._vectors import Vectors, flaw, unit
from kngd_ray.clip._config import LOGIT_SCALE, PRECOMPUTED, ModelConfig
from kngd_ray.clip._prompts import called_alike, called_missing
from kngd_ray.clip._rows import better_order, chance_note, order_note, rows_note
from kngd_ray.errors import ModelError
from kngd_ray.storage import storage_errors

# What numpy raises on a header that is none: it is read as Python's literals.
_DAMAGE = (ValueError, TypeError, LookupError, SyntaxError, TokenError, OverflowError, RecursionError, MemoryError)
_EQUAL = 1 - 1e-6  # cosine from which two classes cannot be told apart


class PrecomputedModel:
    """Class embeddings in the space of features that are given; there is no tower.

    Without class embeddings all of them are zero: the head starts with equal logits for all classes, and what it learns
    is a linear classifier.

    Args:
        classes: Names of all C classes of the data set, in order of its labels.
        embeddings: Unit class embeddings (C, d); None is none.
        embed_dim: d.
        logit_scale: Factor from cosines to logits.
        encoded_by: Fingerprint of the model that computed the features, where it is known.

    Attributes:
        name: ``precomputed``.
        fingerprint: sha256 (hex) of class embeddings, their dimension and the logit scale.
        classes: The names.
        zero_shot: Whether classes can be told apart before anything is learned.
        embed_dim: d.
        logit_scale: The factor.
        encoded_by: The fingerprint of the model that computed the features; None where it is not known.
        device: The CPU.
    """

    def __init__(
        self,
        classes: Sequence[str],
        embeddings: Vectors | None,
        embed_dim: int,
        logit_scale: float,
        encoded_by: str | None = None,
    ) -> None:
        self.name = PRECOMPUTED
        self.classes = tuple(classes)
        self.zero_shot = embeddings is not None
        self.embed_dim = embed_dim
        self.logit_scale = float(logit_scale)
        self.encoded_by = encoded_by
        self.device = torch.device("cpu")
        digest = hashlib.sha256(json.dumps([PRECOMPUTED, embed_dim, self.logit_scale]).encode())
        if embeddings is None:
            embeddings = np.zeros((len(self.classes), embed_dim), np.float32)
        else:
            digest.update(np.ascontiguousarray(embeddings).tobytes())
        self.fingerprint = digest.hexdigest()
        self._embeddings = embeddings
        self._row = {name: row for row, name in enumerate(self.classes)}

    def __repr__(self) -> str:
        return f"PrecomputedModel(embed_dim={self.embed_dim}, fingerprint={self.fingerprint[:12]!r})"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from other models, as JSON data; rows of the class embeddings belong to names."""
        known: dict[str, Any] = {"classes": list(self.classes)} if self.zero_shot else {}
        if self.encoded_by is not None:
            known["encoded_by"] = self.encoded_by
        return {"fingerprint": self.fingerprint, "embed_dim": self.embed_dim, **known}

    def encode_classes(
        self, class_names: Sequence[str], templates: str | Sequence[str] = (), *, known: bool = False
    ) -> Tensor:
        """Find the embeddings of some of the classes.

        Args:
            class_names: Their names.
            templates: Unused: whoever made the embeddings chose the prompts.
            known: Unused: all embeddings were told apart when they were read.

        Returns:
            Unit class embeddings (n, d), or zeros where there are none, float32 on the CPU.

        Raises:
            ModelError: There is no embedding of a class.
        """
        if not self.zero_shot:
            return torch.zeros(len(class_names), self.embed_dim)
        unknown = [name for name in class_names if name not in self._row]
        if unknown:
            raise ModelError(
                f"model.class_embeddings has no embedding for the class {unknown[0]!r}: it belongs to data with the "
                f"classes {', '.join(self.classes[:20])}{', ...' if len(self.classes) > 20 else ''}"
            )
        return torch.from_numpy(self._embeddings[[self._row[name] for name in class_names]])

    def notes(self, class_names: Sequence[str], templates: str | Sequence[str] = ()) -> list[str]:
        """What is to be said of the classes; there are no prompts."""
        return [note for note in (called_missing(class_names), called_alike(class_names)) if note is not None]

    def row_notes(
        self,
        class_names: Sequence[str],
        features: Tensor,
        labels: Tensor,
        place: str = "model.class_embeddings",
        *,
        text: bool = False,
    ) -> list[str]:
        """What is to be said of which row of the class embeddings is whose.

        Args:
            class_names: k of the classes.
            features: (m, d) unit vectors of shots.
            labels: (m,) their classes by their number in `class_names`.
            place: What the class embeddings are called.
            text: Whether labels are text, whose order is to be named.

        Returns:
            Lines: the order of text, and whether the shots match another order much better, or this one not at all.
        """
        if not self.zero_shot:
            return []
        own = np.array([self._row[name] for name in class_names])
        shots = features.cpu().numpy(), labels.cpu().numpy(), own, self._embeddings
        found = better_order(*shots)
        doubt = chance_note(*shots, place) if found is None else order_note(found, own, class_names, place)
        return [*([rows_note(self.classes, place)] if text else []), *([] if doubt is None else [doubt])]

    def save(self, path: Path) -> None:
        """Write the class embeddings as a ``.npy`` file; nothing where there are none."""
        if self.zero_shot:
            with storage_errors(path):
                np.save(path, self._embeddings)


def load_precomputed(
    config: ModelConfig, classes: Sequence[str], embed_dim: int, encoded_by: str | None = None
) -> PrecomputedModel:
    """Read class embeddings and check them against the data that they are to serve.

    Args:
        config: The file, and the logit scale.
        classes: Names of all C classes of the data set, in order of its labels.
        embed_dim: Length d of its features.
        encoded_by: Fingerprint of the model that computed the features, where it is known.

    Returns:
        The model.

    Raises:
        ModelError: The file cannot be read, does not fit the data, or cannot tell two classes apart.
    """
    scale = LOGIT_SCALE if config.logit_scale is None else config.logit_scale
    if config.class_embeddings is None:
        return PrecomputedModel(classes, None, embed_dim, scale, encoded_by)
    path = Path(config.class_embeddings).expanduser()
    place = f"model.class_embeddings: {path}"
    return given_precomputed(read_class_embeddings(path), classes, embed_dim, scale, place, encoded_by)


def given_precomputed(
    array: npt.NDArray[Any],
    classes: Sequence[str],
    embed_dim: int,
    logit_scale: float,
    place: str,
    encoded_by: str | None = None,
) -> PrecomputedModel:
    """Check class embeddings, and average over prompts as a zero-shot head does.

    Args:
        array: (C, d) or (C, T, d) numbers.
        classes: C names in their order.
        embed_dim: Length d of the features that they are to serve.
        logit_scale: Factor from cosines to logits.
        place: What the array is called in messages.
        encoded_by: Fingerprint of the model that computed the features, where it is known.

    Returns:
        The model.

    Raises:
        ModelError: The array is of another shape or kind, or cannot tell two classes apart.
    """
    if array.ndim not in (2, 3) or array.dtype.kind not in "fiu" or 0 in array.shape:
        raise ModelError(
            f"{place} is {array.dtype} of shape {array.shape}: it must be floats (C, d), or (C, T, d) of T prompts"
        )
    C, d = array.shape[0], array.shape[-1]
    if d != embed_dim:
        raise ModelError(
            f"{place} has embeddings of length {d}, and the features of the data have length {embed_dim}: take both "
            "from one model"
        )
    if len(classes) != C:
        raise ModelError(
            f"{place} has embeddings of {C} classes, and the data has {len(classes)}: give one for each class of the "
            "data, in order of the labels"
        )
    with np.errstate(over="ignore"):
        prompts = array.astype(np.float32).reshape(C, -1, d)
    _check(prompts.reshape(-1, d), place, [f"{name!r}" for name in classes for _ in range(prompts.shape[1])])
    embeddings = unit(prompts[:, 0])
    if prompts.shape[1] > 1:
        mean = unit(prompts.reshape(-1, d)).reshape(prompts.shape).mean(axis=1)
        _check(mean, f"the mean over prompts of {place}", [f"{name!r}" for name in classes])
        embeddings = unit(mean)
    check_distinct(embeddings, classes, place)
    return PrecomputedModel(classes, embeddings, embed_dim, logit_scale, encoded_by)


def read_class_embeddings(path: Path) -> npt.NDArray[Any]:
    """Read a ``.npy`` file; nothing in it is unpickled.

    Args:
        path: The file.

    Returns:
        Its array, of whatever shape.

    Raises:
        ModelError: It is missing, of another kind or damaged.
    """
    setting = f"model.class_embeddings: {path}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{setting} is not a regular file: name a .npy file with an array (C, d)")
        # mapped: never unpickled, and a header that promises more than there is takes no memory
        return np.array(open_memmap(path, mode="r"))
    except FileNotFoundError as error:
        raise ModelError(f"{setting} does not exist: name a .npy file with an array (C, d), or leave it out") from error
    except OSError as error:
        raise ModelError(f"{setting} cannot be read ({error.strerror or error}): check the path") from error
    except _DAMAGE as error:
        raise ModelError(
            f"{setting} is not a .npy file of numbers, or is damaged; Python objects are never unpickled: write it "
            "with numpy.save(path, array) from floats (C, d)"
        ) from error


def _check(vectors: Vectors, place: str, names: Sequence[str]) -> None:
    """Refuse rows without a direction.

    Raises:
        ModelError: One is not finite, or zero.
    """
    wrong = flaw(vectors)
    if wrong is not None:
        row, what = wrong
        raise ModelError(f"{place}: the embedding of the class {names[row]} {what}: compute it again")


def check_distinct(embeddings: Vectors, classes: Sequence[str], place: str) -> None:
    """Refuse two classes with one embedding.

    Args:
        embeddings: (C, d) unit vectors.
        classes: C names.
        place: What gives the embeddings, for the message.

    Raises:
        ModelError: There are two.
    """
    for first in range(len(embeddings) - 1):
        same = np.flatnonzero(embeddings[first + 1 :] @ embeddings[first] >= _EQUAL)
        if len(same):
            second = first + 1 + int(same[0])
            raise ModelError(
                f"{place} gives the classes {classes[first]!r} and {classes[second]!r} the same embedding, so that "
                "nothing tells them apart: give each its own, or make them one class"
            )
