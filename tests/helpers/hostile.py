"""Files that nobody means well with, and reading them where nothing can come of it.

A file is read by a loader of the package in a process of its own, forked from one that has all imports behind it: its
memory may grow by so much and no more, and its time is bounded too. :func:`main` is that process.
"""

import contextlib
import gc
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "intruder-was-here"
MODEL = {  # the smallest CLIP that open_clip builds; its file of weights is what the tests spoil
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
MODEL_NAME = "kngd-hostile"
DIM = 8  # of the features of a hostile cache


class Intruder:
    """Unpickled, it leaves a mark in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def pickled() -> bytes:
    """A pickle that must not be read."""
    return pickle.dumps(Intruder(), protocol=2)


# Loaders


def load_config(path: Path) -> None:
    """A configuration."""
    from kngd_ray.config import load_config

    load_config(path)


def load_search(path: Path) -> None:
    """A search file."""
    from kngd_ray.tuning.file import load_search

    load_search(path, [])


def load_overrides(path: Path) -> None:
    """Settings of a command line, one a line."""
    from kngd_ray.config import load_config

    load_config(None, path.read_text(errors="surrogateescape").split("\n"))


def load_data(path: Path) -> None:
    """A data set, each of its pictures decoded as in a run that goes on without the bad ones."""
    from kngd_ray.data import BadImage, DataConfig, decode, open_images

    images = open_images(DataConfig(path=str(path)))
    for row, data in images.read(range(len(images))):
        with contextlib.suppress(BadImage):
            decode(data, images.place(row))


def load_features(path: Path) -> None:
    """A data set of features, each of them read."""
    from kngd_ray.data import DataConfig, open_images

    images = open_images(DataConfig(path=str(path)), features=True)
    assert images.features is not None
    assert len(images.features.read(images.keys)) == len(images)


def load_classes(path: Path) -> None:
    """Class embeddings of features."""
    from kngd_ray.clip import ModelConfig, load_precomputed

    load_precomputed(ModelConfig("precomputed", class_embeddings=str(path)), ("ant", "bee", "cow"), DIM)


def load_picture(path: Path) -> None:
    """One picture."""
    from kngd_ray.data import decode

    decode(path.read_bytes(), path.name)


def load_checkpoint(path: Path) -> None:
    """A checkpoint, or the newest one of a fit."""
    from kngd_ray.training import checkpoint
    from kngd_ray.training.resumable import latest

    if (path / checkpoint.MANIFEST).exists():
        found = checkpoint.load(path)
        assert isinstance(found.manifest["step"], int)
        assert isinstance(found.manifest["options"], dict)
    else:
        latest(path)


def load_cache(path: Path) -> None:
    """A feature cache, the one part of which is `path`."""
    import numpy as np

    from kngd_ray.data import FeatureCache

    cache = FeatureCache(path.parent.parent, path.parent.name, DIM)
    keys = np.array([b"%064d" % n for n in range(4)], "S64")
    absent = cache.missing(keys)
    here = np.array([key for key in keys.tolist() if key not in absent], "S64")
    assert cache.read(here).shape == (len(here), DIM)


def load_pictures(path: Path) -> None:
    """A file of pictures."""
    from kngd_ray.data import PictureFile

    pictures = PictureFile.open(path)
    for n in range(min(len(pictures), 100)):
        pictures.read(n)


def load_model(path: Path) -> None:
    """A checkpoint of CLIP."""
    import open_clip

    from kngd_ray.clip import ModelConfig, load_model

    description = Path(f"{MODEL_NAME}.json")  # in the folder of this process
    description.write_text(json.dumps(MODEL))
    open_clip.add_model_config(description)
    load_model(ModelConfig(name=MODEL_NAME, pretrained=str(path)))


def load_settled(path: Path) -> None:
    """A fit's calibration."""
    from kngd_ray.training.settled import read_settled

    read_settled(path)


def load_record(path: Path) -> None:
    """A run folder's records, as they are sent to MLflow and gone on with."""
    from kngd_ray.tracking import Record
    from kngd_ray.tracking._publish import _by_parents

    for folder, _ in _by_parents(path):
        record = Record.open(path, folder.name, name="x", params={}, tags={})
        record.steps()
        record.log_metrics({"a": 1.0})
        record.finish()


LOADERS: Mapping[str, Callable[[Path], None]] = {
    "config": load_config,
    "search": load_search,
    "overrides": load_overrides,
    "data": load_data,
    "features": load_features,
    "classes": load_classes,
    "picture": load_picture,
    "checkpoint": load_checkpoint,
    "cache": load_cache,
    "pictures": load_pictures,
    "model": load_model,
    "settled": load_settled,
    "record": load_record,
}


# Reading them apart


@dataclass(frozen=True)
class Outcome:
    """What came of reading a file.

    Attributes:
        end: ``loaded``, ``refused`` by an error with a sentence, ``crashed`` by any other, ``killed`` or ``slow``.
        sentence: of the error; of a crash its kind too.
        seconds: that it took.
        megabytes: by which the most memory in use was more than at the start.
    """

    end: str
    sentence: str
    seconds: float
    megabytes: float


def read_apart(
    cases: Sequence[tuple[str, Path]], folder: Path, *, megabytes: int = 1500, seconds: int = 120
) -> list[Outcome]:
    """Read files each in a process of its own.

    Args:
        cases: name of the loader and the file.
        folder: where the processes are, for what they might leave.
        megabytes: of address space that reading one may take.
        seconds: that reading one may take.

    Returns:
        What came of each.
    """
    asked = json.dumps({"cases": [(name, str(path)) for name, path in cases], "mb": megabytes, "s": seconds})
    # the package beside these tests, whichever is installed
    places = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    # and with the memory of a user's process, which the tests' own settings do not enlarge
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = usual | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.hostile"],
        input=asked,
        capture_output=True,
        text=True,
        timeout=300 + seconds * len(cases),
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Outcome(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Read cases from standard input and print their outcomes."""
    asked = json.load(sys.stdin)
    if {name for name, _ in asked["cases"]} == {"config"}:
        import kngd_ray.config  # settings are read without what computes
    else:
        import open_clip  # noqa: F401
        import pyarrow.parquet  # noqa: F401
        import torch

        import kngd_ray.training.classifier  # noqa: F401

        torch.set_num_threads(1)
    gc.freeze()  # or a collection in a child would copy all memory, page by page
    outcomes = [_forked(LOADERS[name], Path(path), asked["mb"], asked["s"]) for name, path in asked["cases"]]
    print(json.dumps(outcomes))  # noqa: T201


def _forked(loader: Callable[[Path], None], path: Path, megabytes: int, seconds: int) -> dict[str, Any]:
    receive, send = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(receive)
        os.write(send, json.dumps(_bounded(loader, path, megabytes, seconds)).encode())
        os._exit(0)
    os.close(send)
    with open(receive, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    took = time.monotonic() - began
    if not data:
        slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        return {"end": "slow" if slow else "killed", "sentence": f"status {status}", "seconds": took, "megabytes": 0.0}
    return {**json.loads(data), "seconds": took}


def _bounded(loader: Callable[[Path], None], path: Path, megabytes: int, seconds: int) -> dict[str, Any]:
    from kngd_ray.errors import KngdError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _peak()
    end, sentence = "loaded", ""
    try:
        loader(path)
    except KngdError as error:
        end, sentence = "refused", str(error)
    except BaseException as error:
        end, sentence = "crashed", f"{type(error).__name__}: {error}"[:2000]
    return {"end": end, "sentence": sentence, "megabytes": (_peak() - before) / 1024}


def _peak() -> int:
    """The most memory in use since it was last cleared, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


# Making them


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes | None = None, colour: int = 2) -> bytes:
    """A PNG of what is given; its pixels are those of an empty picture unless `data` has them, compressed."""
    body = zlib.compress(bytes((3 * width + 1) * height), 9) if data is None else data
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def zeros(count: int) -> bytes:
    """So many zero bytes, a multiple of 2^20, compressed without ever being held: one block over and over."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + block * (count >> 20) + b"\x03\0" + struct.pack(">HH", count % 65521, 1)


def scans(count: int) -> bytes:
    """A progressive JPEG whose last pass over its 4000 x 4000 pixels is there so many times over."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000), (90, 120, 40)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def sealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a checkpoint's manifest as one who knows how it is signed."""
    import hashlib

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("manifest_sha256", None)
    change(manifest)
    for name, entry in manifest.get("files", {}).items() if isinstance(manifest.get("files"), dict) else ():
        if isinstance(entry, dict) and isinstance(name, str) and (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "manifest_sha256": digest}))


# Disks that fill up or turn read-only: root may write where its mode forbids, so only a real one refuses


class Disk:
    """A small file system in memory that only this object's commands can see, since it is in a namespace of its own.

    Args:
        folder: where it is mounted; must exist.
        megabytes: how much it holds.

    Attributes:
        inside: the same folder as this process can see it.
    """

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        mount = f"mount -t tmpfs -o size={megabytes}m tmpfs '{folder}' && echo ready && exec sleep 3600"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise PermissionError("no file system can be mounted here")
        self.inside = Path(f"/proc/{self._holder.pid}/root{folder}")

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()

    def command(self, *arguments: object) -> list[str]:
        """The command that runs another one where the disk is."""
        return ["nsenter", "-t", str(self._holder.pid), "-m", "--wd=/", *map(str, arguments)]

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes of room."""
        with (self.inside / "filler").open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12):  # the last pages one by one
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
        if left:
            os.truncate(self.inside / "filler", max(0, (self.inside / "filler").stat().st_size - left))

    def clear(self) -> None:
        """Make room again."""
        (self.inside / "filler").unlink()

    def freeze(self, folder: str, frozen: bool = True) -> None:
        """Let a folder refuse what is opened from now on, as a disk does that turned read-only, or take it again."""
        place = self.folder / folder
        how = (
            [["mount", "--bind", place, place], ["mount", "-o", "remount,bind,ro", place]]
            if frozen
            else [["umount", "--lazy", place]]
        )
        for arguments in how:
            for _ in range(1000):  # it is busy while a file is being written
                if not subprocess.run(self.command(*arguments), check=False, capture_output=True).returncode:
                    break
            else:
                raise AssertionError(f"{arguments} did not succeed")


def can_mount() -> bool:
    """Whether this user may have a file system of his own."""
    with contextlib.suppress(OSError):
        return not subprocess.run(
            ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /tmp"], capture_output=True, check=False
        ).returncode
    return False


def program(*arguments: object) -> list[str]:
    """The command line of kngd-ray."""
    return [sys.executable, "-m", "kngd_ray.cli", *map(str, arguments)]


if __name__ == "__main__":
    main()
