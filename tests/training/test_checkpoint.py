"""Checkpoints: what is written comes back, and what was damaged is never believed."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cases import FAMILIES, make_options, make_task
from safetensors import SafetensorError

from kngd_ray.errors import CheckpointError, StorageError
from kngd_ray.sharding import SingleProcess
from kngd_ray.training import checkpoint
from kngd_ray.training.fit import build_head, build_method, fit
from kngd_ray.training.method import Method

ALONE = SingleProcess()
FILES = ["weights.safetensors", "state.safetensors", "covariance-00000-of-00001.safetensors", "manifest.json"]


def finished(method: str = "kalman", family: str = "ekf") -> Method:
    return fit(make_task(make_options(family, adapter="bottleneck-both", noise="ema-diagonal", method=method)))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "step"
    checkpoint.save(folder, finished().state(), {"step": 6, "classes": ["ä", "b"]}, ALONE)
    return folder


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.mark.parametrize("method", ["kalman", "adamw", "sgd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(method, family, tmp_path):
    first = finished(method, family)
    checkpoint.save(tmp_path, first.state(), {"step": 6}, ALONE)
    found = checkpoint.load(tmp_path)
    task = make_task(make_options(family, adapter="bottleneck-both", noise="ema-diagonal", method=method))
    second = build_method(task, build_head(task), ALONE)
    second.load(found.state)
    expected, again = first.state(), second.state()
    for part in ("weights", "replicated", "covariance"):
        saved, loaded = getattr(expected, part), getattr(again, part)
        assert set(saved) == set(loaded)
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert found.manifest["step"] == 6


def test_manifest_names_every_file_and_what_was_given(original):
    manifest = checkpoint.read_manifest(original)
    assert manifest["classes"] == ["ä", "b"]
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(FILES)
    assert sorted(path.name for path in original.iterdir()) == sorted(FILES)
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (original / name).stat().st_size


def one_sentence(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.02, 0.3, 0.6, 0.98])
def test_a_flipped_bit_is_found(copy, name, where):
    raw = bytearray((copy / name).read_bytes())
    raw[int(where * len(raw))] ^= 1
    (copy / name).write_bytes(raw)
    one_sentence(copy)


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(copy):
    raw = (copy / "manifest.json").read_bytes()
    for at in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[at] ^= 1
        (copy / "manifest.json").write_bytes(damaged)
        try:
            found = checkpoint.read_manifest(copy)
        except CheckpointError:
            continue
        assert found == json.loads(raw)  # white space may differ


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 100])
def test_a_file_cut_short_is_found(copy, name, kept):
    raw = (copy / name).read_bytes()
    (copy / name).write_bytes(raw[:kept])
    one_sentence(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert name in one_sentence(copy)


def test_no_folder(tmp_path):
    assert "is not a checkpoint" in one_sentence(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "somebody.else"}', "null", '"x"'])
def test_a_foreign_manifest_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    assert "not a manifest of" in one_sentence(copy)


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_an_unreadable_manifest_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    assert "cannot be read" in one_sentence(copy)


def test_a_newer_version_says_so(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"version": checkpoint.VERSION + 1}))
    assert f"format version {checkpoint.VERSION + 1}" in one_sentence(copy)


def test_an_older_version_says_so(copy):
    """Version 1 had one tensor of covariance per parameter: it is not guessed what they would mean now."""
    assert checkpoint.VERSION == 2
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    message = one_sentence(copy)
    assert "format version 1, this kngd_ray reads 2" in message
    assert "use the version of kngd_ray that wrote it" in message


def test_a_torn_write_leaves_no_manifest(tmp_path, monkeypatch):
    """The manifest comes last: a run that dies while writing leaves nothing that looks like a checkpoint."""

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, finished().state(), {}, ALONE)
    assert "is not a checkpoint" in one_sentence(tmp_path)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, error, says):
    def refuse(*_):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(StorageError, match=says) as caught:
        checkpoint.save(tmp_path / "c", finished().state(), {}, ALONE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "step", finished().state(), {}, ALONE)
