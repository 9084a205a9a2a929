"""Checkpoints: theta and P as safetensors under global parameter names, a JSON manifest with checksums.

A checkpoint is one folder::

    weights.safetensors                   trainable weights                       written by rank 0
    state.safetensors                     noise state or optimiser moments        written by rank 0
    covariance-00000-of-00002.safetensors each rank's pieces of P by parameter    written by every rank
    manifest.json                         sizes and SHA-256 of the above, written last, and what the
                                          weights belong to: task, options, seed, step, who owns what

The manifest names every file with its checksum, and has one of its own, so a folder that lacks a file, or holds a file
that was cut short or altered, is never believed. Because P is stored under parameter names with the bounds of each
piece, any number of ranks can load what any other number wrote. Nothing is ever unpickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kngd_ray.errors import CheckpointError
from kngd_ray.sharding import Group
from kngd_ray.storage import read_json, storage_errors, write_text
from kngd_ray.training.method import MethodState

FORMAT = "kngd_ray.checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
_WEIGHTS = "weights.safetensors"
_STATE = "state.safetensors"
_CHECKSUM = "manifest_sha256"
# Types of entries; those of the format itself are always there, the others say what the weights belong to.
_ENTRIES: dict[str, type] = {
    "files": dict,
    "parameters": dict,
    "pieces": list,
    "step": int,
    "steps": int,
    "seed": int,
    "options": dict,
    "class_names": list,
    "templates": list,
    "learned": dict,
}


class VersionError(CheckpointError):
    """A checkpoint of another version of the format: it is sound, but not for this kngd_ray."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: where it was read from.
        manifest: what :func:`save` was given, and the format's own entries.
        state: weights, replicated state and the whole covariance by parameter.
    """

    folder: Path
    manifest: dict[str, Any]
    state: MethodState


def save(folder: Path, state: MethodState, description: Mapping[str, Any], group: Group) -> None:
    """Write one rank's part of a checkpoint, and on rank 0 the manifest after all parts are written.

    Args:
        folder: where this rank writes; the ranks may share it or have it merged afterwards.
        state: the method's state, its covariance pieces this rank's own.
        description: JSON entries of the manifest: what the weights belong to.
        group: the ranks.
    """
    with storage_errors(folder, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        mine: dict[str, Mapping[str, Tensor]] = {}
        if group.rank == 0:
            mine = {_WEIGHTS: state.weights, _STATE: state.replicated}
        if state.pieces:
            mine[_covariance_file(group.rank, group.world_size)] = state.covariance
        digests = []
        for name, tensors in mine.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, folder / name)
            _to_disk(folder / name)
            digests.append(_digest(folder / name))
        sizes = [_files_of(rank, bool(state.pieces)) for rank in range(group.world_size)]
        device = next(iter(state.weights.values())).device  # nccl gathers only on its own device
        packed = torch.stack([torch.tensor(d) for d in digests]) if digests else torch.empty(0, 40, dtype=torch.long)
        gathered = group.gather_rows(packed.to(device), sizes).cpu()
        if group.rank == 0:
            names = [_WEIGHTS, _STATE]
            if state.pieces:
                names += [_covariance_file(rank, group.world_size) for rank in range(group.world_size)]
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                **description,
                "parameters": {name: list(p.shape) for name, p in state.weights.items()},
                "pieces": list(state.pieces),
                "files": {name: _undigest(row.tolist()) for name, row in zip(names, gathered, strict=True)},
            }
            write_text(folder / MANIFEST, json.dumps({**manifest, _CHECKSUM: _checksum(manifest)}, indent=1))


def load(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        folder: a folder that :func:`save` wrote, by any number of ranks.

    Returns:
        The checkpoint, tensors on the CPU, the covariance assembled from all pieces.

    Raises:
        CheckpointError: missing, torn, altered or written by a newer version.
    """
    manifest = read_manifest(folder)
    ranks = len(manifest["pieces"])
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}: the checkpoint was cut short; use an earlier one.")
        found = _undigest(_digest(path))
        if found != expected:
            raise CheckpointError(
                f"{path} does not match its manifest ({found['bytes']} bytes, {expected['bytes']} expected, or "
                "another checksum): the file was damaged; use an earlier checkpoint."
            )
    try:
        weights = load_file(folder / _WEIGHTS)
        replicated = load_file(folder / _STATE)
        parts: dict[str, list[Tensor]] = {}
        for rank in range(ranks):
            for name, tensor in load_file(folder / _covariance_file(rank, ranks)).items():
                parts.setdefault(name, []).append(tensor)
        covariance = {name: torch.cat(pieces) for name, pieces in parts.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder} cannot be read ({reason}); use an earlier checkpoint.") from error
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    if found != manifest["parameters"]:
        raise CheckpointError(f"{folder} does not hold the weights that its manifest lists; use an earlier checkpoint.")
    return Checkpoint(folder, manifest, MethodState(weights, replicated, covariance))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest without verifying its files.

    Args:
        folder: the checkpoint's folder.

    Returns:
        The manifest.

    Raises:
        CheckpointError: there is no valid manifest of this format.
        VersionError: it is of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use an earlier checkpoint.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of {FORMAT}.")
    if manifest.get("version") != VERSION:
        raise VersionError(
            f"{path} has format version {manifest.get('version')}, this kngd_ray reads {VERSION}: "
            "use the version of kngd_ray that wrote it."
        )
    if manifest.pop(_CHECKSUM, None) != _checksum(manifest):
        raise CheckpointError(f"{path} was altered after it was written; use an earlier checkpoint.")
    return _Manifest(manifest, path)


class _Manifest(dict[str, Any]):
    """A manifest's entries, of the types that the format gives them; one that it lacks is a CheckpointError.

    The checksum tells damage, not intent: whoever makes a manifest up can compute it too.

    Args:
        entries: what was read.
        path: the file, for messages.

    Raises:
        CheckpointError: an entry that no checkpoint has like this.
    """

    def __init__(self, entries: Mapping[str, Any], path: Path | None = None) -> None:
        super().__init__(entries)
        self._path = path
        for key, kind in _ENTRIES.items():
            if not isinstance(self.get(key, kind()), kind):
                self._refuse(key)
        if not all(isinstance(shape, list) and _whole(shape) for shape in self["parameters"].values()):
            self._refuse("parameters")
        ranks = len(self["pieces"])
        names = [_WEIGHTS, _STATE, *(_covariance_file(rank, ranks) for rank in range(ranks))]
        if sorted(self["files"]) != sorted(names) or not all(_is_digest(value) for value in self["files"].values()):
            self._refuse("files")
        if not all(isinstance(text, str) for key in ("class_names", "templates") for text in self.get(key, [])):
            self._refuse("class_names")

    def __missing__(self, key: str) -> Any:
        self._refuse(key)

    def _refuse(self, key: str) -> NoReturn:
        raise CheckpointError(
            f"{self._path} is not the manifest of a fit: its {key} is missing or malformed; use another checkpoint."
        )


def _whole(numbers: list[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _is_digest(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str)


def _to_disk(path: Path) -> None:
    """Get a file's bytes onto the disk before a manifest vouches for them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _covariance_file(rank: int, world_size: int) -> str:
    return f"covariance-{rank:05d}-of-{world_size:05d}.safetensors"


def _files_of(rank: int, with_covariance: bool) -> int:
    return (2 if rank == 0 else 0) + int(with_covariance)


def _digest(path: Path) -> list[int]:
    """Size as 8 numbers of one byte, then the 32 bytes of SHA-256: a row that a collective can gather."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha.update(block)
    return [*path.stat().st_size.to_bytes(8, "big"), *sha.digest()]


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _undigest(row: list[int]) -> dict[str, Any]:
    return {"bytes": int.from_bytes(bytes(row[:8]), "big"), "sha256": bytes(row[8:]).hex()}
