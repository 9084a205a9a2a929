"""Valid files, changed at random: whatever a loader is given, it loads it or refuses it by a sentence.

The fast version is the same every time; the slow one is different every time and lasts minutes. A file that broke
something is kept in ``tests/security/corpus/<loader>/``, where it is read again by each run of the tests.
"""

import io
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers.emoji import small_table
from helpers.features import class_embeddings, feature_table
from helpers.hostile import DIM, LOADERS, MODEL, MODEL_NAME, sealed
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from kngd_ray.config import Config, to_yaml
from kngd_ray.data import DataConfig, FeatureCache, PictureFile, open_images
from kngd_ray.data._decode import DECODING
from kngd_ray.errors import KngdError
from kngd_ray.sharding import SingleProcess
from kngd_ray.training import checkpoint
from kngd_ray.training.method import MethodState
from kngd_ray.training.settled import Settled, save_settled

CORPUS = Path(__file__).parents[1] / "corpus"
SECONDS = float(os.environ.get("KNGD_FUZZ_SECONDS", "20"))  # of each loader, in the slow version
SLOWEST = 60.0  # that reading a small file may take, on a busy machine
FAST = {"overrides": 40, "config": 40, "search": 30, "data": 60, "picture": 120, "cache": 60, "pictures": 60}
FAST |= {"features": 60, "classes": 60}
FAST |= {"checkpoint": 60, "record": 50, "settled": 60, "model": 12}


# One valid file, or folder, for each loader


def picture(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    for number, kind in enumerate(kinds):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{number}.{kind.lower()}", kind)
    return folder


def data(folder: Path) -> Path:
    pq.write_table(small_table().slice(0, 12), folder / "x.parquet", row_group_size=5)
    return folder / "x.parquet"


def features(folder: Path) -> Path:
    pq.write_table(feature_table().slice(0, 24), folder / "x.parquet", row_group_size=10)
    return folder / "x.parquet"


def classes(folder: Path) -> Path:
    np.save(folder / "x.npy", class_embeddings())
    return folder / "x.npy"


def cache(folder: Path) -> Path:
    keys = np.array([b"%064d" % n for n in range(4)], "S64")
    made = FeatureCache(folder, "key", DIM)
    made.write(keys, np.arange(4 * DIM, dtype=np.float32).reshape(4, DIM))
    (part,) = (folder / "key").iterdir()
    return part.rename(folder / "key" / f"part-{DECODING}-0.parquet")


def pictures(folder: Path) -> Path:
    images = open_images(DataConfig(path=str(data(folder))))
    return PictureFile.write(folder / "x.arrow", images, range(8)).path


def a_checkpoint(folder: Path) -> Path:
    state = MethodState({"a": torch.ones(2, 3)}, {"n": torch.tensor(4)}, {"a": torch.ones(6)}, [{"a": [0, 6]}])
    description = {"step": 4, "steps": 4, "seed": 0, "options": {"method": "kalman"}, "class_names": ["a", "b"]}
    checkpoint.save(folder / "step-00000004-0123ab", state, description, SingleProcess())
    return folder / "step-00000004-0123ab"


def record(folder: Path) -> Path:
    from kngd_ray.tracking import Record

    made = Record.open(folder / "run", "fit", name="fit", params={"a": 1}, tags={"b": 2})
    for step in range(1, 4):
        made.log_step(step, {"train/nll": 0.5})
    made.log_metrics({"id/accuracy": 0.5})
    made.finish()
    return folder / "run"


def text(content: str, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def settled(folder: Path) -> Path:
    save_settled(folder, Settled())
    return folder / "calibration.json"


def model(folder: Path) -> Path:
    import open_clip
    from safetensors.torch import save_file

    (folder / f"{MODEL_NAME}.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / f"{MODEL_NAME}.json")
    save_file(open_clip.create_model(MODEL_NAME).state_dict(), folder / "x.safetensors")
    return folder / "x.safetensors"


SPACE = {"search": {"num_samples": 3}, "space": {"filter.p0": {"low": 0.001, "high": 10.0, "log": True}}}
VALID: dict[str, Callable[[Path], Path]] = {
    "config": text(to_yaml(Config()), "x.yaml"),
    "search": text(yaml.safe_dump({"method": "kalman", **SPACE}), "x.yaml"),
    "overrides": text("epochs=3\nfilter.covariance=dense\nadapter=bottleneck,linear\nseeds=[0, 1]", "x.txt"),
    "data": data,
    "features": features,
    "classes": classes,
    "picture": picture,
    "cache": cache,
    "pictures": pictures,
    "checkpoint": a_checkpoint,
    "record": record,
    "settled": settled,
    "model": model,
}


# How they are changed

SCALARS = [None, True, 0, -1, 1.5, 2**63, 10**30, float("nan"), "", "x", "../..", "/dev/zero", "\0", "\ud800", [], {}]
numbers = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1])
places = st.floats(0, 1, exclude_max=True)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), places, st.integers(0, 7)),
        st.tuples(st.just("set"), places, st.integers(0, 255)),
        st.tuples(st.just("cut"), places, st.just(0)),
        st.tuples(st.just("drop"), places, st.integers(1, 64)),
        st.tuples(st.just("twice"), places, st.integers(1, 64)),
        st.tuples(st.just("u32"), places, numbers),
        st.tuples(st.just("u64"), places, numbers),
        st.tuples(st.just("tree"), places, st.sampled_from(range(len(SCALARS) + 2))),
    ),
    min_size=1,
    max_size=4,
)
"""Each: what is done, where in the file, and with what."""


def changed(data: bytes, steps: list[tuple[str, float, int]]) -> bytes:
    """A file after some changes."""
    out = bytearray(data)
    for kind, place, value in steps:
        at = int(place * len(out))
        if kind == "tree":
            out = bytearray(with_other_branch(bytes(out), place, value))
        elif kind == "cut":
            del out[at:]
        elif kind == "drop":
            del out[at : at + value]
        elif kind == "twice":
            out[at:at] = out[at : at + value]
        elif not out:
            continue
        elif kind == "flip":
            out[at] ^= 1 << value
        elif kind == "set":
            out[at] = value
        else:
            width = 4 if kind == "u32" else 8
            out[at : at + width] = struct.pack("<Q", value)[:width]
    return bytes(out)


def with_other_branch(data: bytes, place: float, value: int) -> bytes:
    """JSON or YAML in which one value is another or gone; any other file as it was."""
    try:
        tree = yaml.safe_load(data.decode())
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return data
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            spots.append((node, key))
            walk(node[key])

    walk(tree)
    if not spots:
        return data
    node, key = spots[int(place * len(spots))]
    if value >= len(SCALARS) + 1:
        del node[key]
    elif value == len(SCALARS):
        deep: list[Any] = []
        for _ in range(200):
            deep = [deep]
        node[key] = deep
    else:
        node[key] = SCALARS[value]
    try:
        return json.dumps(tree).encode()
    except (TypeError, ValueError):  # YAML has dates
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")


def targets(loader: str, made: Path) -> list[Path]:
    """The files of a valid case that are changed, smallest names first."""
    return sorted(path for path in made.rglob("*") if path.is_file()) if made.is_dir() else [made]


def read(loader: str, path: Path) -> None:
    """Load, or be refused; anything else is the test's failure."""
    began = time.monotonic()
    sentence = "-"
    try:
        LOADERS[loader](path)
    except KngdError as error:
        sentence = str(error)
    assert sentence
    assert "\n" not in sentence
    assert time.monotonic() - began < SLOWEST


def tried(loader: str, valid: Path, which: int, steps: list[tuple[str, float, int]], seal: bool) -> None:
    """Change one file of a copy of a valid case, and read it."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(shutil.copytree(valid, Path(place) / "copy"))
        files = targets(loader, root / "case")
        file = files[which % len(files)]
        file.write_bytes(changed(file.read_bytes(), steps))
        made = json.loads((root / "case.json").read_text())
        if seal and loader == "checkpoint":
            try:
                sealed(root / made, lambda _: None)
            except (ValueError, AttributeError, TypeError):
                return  # the manifest itself is what was spoilt
        path = file if loader in {"picture"} else root / made
        try:
            read(loader, path)
        except Exception as error:
            kept = Path(tempfile.gettempdir()) / f"kngd-broke-{loader}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(root / "case", kept)
            error.add_note(f"{file.relative_to(root)} broke it: move what is in {kept} to {CORPUS / loader}")
            raise


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a valid case: its files in ``case``, what to load in ``case.json``."""
    made: dict[str, Path] = {}

    def of(loader: str) -> Path:
        if loader not in made:
            root = tmp_path_factory.mktemp(loader)
            (root / "case").mkdir()
            path = VALID[loader](root / "case")
            (root / "case.json").write_text(json.dumps(str(path.relative_to(root))))
            made[loader] = root
        return made[loader]

    return of


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
anything = given(which=st.integers(0, 9), steps=changes, seal=st.booleans())


@pytest.mark.parametrize("loader", VALID)
def test_a_valid_file_loads(valid: Callable[[str], Path], loader: str) -> None:
    root = valid(loader)
    made = root / json.loads((root / "case.json").read_text())
    for path in targets(loader, made) if loader == "picture" else [made]:
        LOADERS[loader](path)


@pytest.mark.parametrize("loader", VALID)
def test_changed_at_random(valid: Callable[[str], Path], loader: str) -> None:
    root = valid(loader)

    @settings(max_examples=FAST[loader], deadline=None, database=None, derandomize=True, suppress_health_check=checks)
    @anything
    def once(which: int, steps: list[tuple[str, float, int]], seal: bool) -> None:
        tried(loader, root, which, steps, seal)

    once()


@pytest.mark.slow
@pytest.mark.parametrize("loader", VALID)
def test_changed_at_random_for_long(valid: Callable[[str], Path], loader: str) -> None:
    root, end = valid(loader), time.monotonic() + SECONDS
    first = chosen = int.from_bytes(os.urandom(4), "big")
    count = 0
    while time.monotonic() < end:

        @seed(chosen)
        @settings(max_examples=100, deadline=None, database=None, suppress_health_check=checks)
        @anything
        def some(which: int, steps: list[tuple[str, float, int]], seal: bool) -> None:
            nonlocal count
            if time.monotonic() < end:  # hypothesis itself has no limit of time
                count += 1
                tried(loader, root, which, steps, seal)

        some()
        chosen += 1
    print(f"{loader}: {count} files, seeds from {first}")  # noqa: T201


KEPT = sorted(path for path in CORPUS.glob("*/*") if path.parent.name in LOADERS)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_broke_something_once(path: Path, tmp_path: Path) -> None:
    loader = path.parent.name
    copy = tmp_path / "key" / path.name  # where a part of the feature cache would be
    copy.parent.mkdir()
    if path.is_dir():
        shutil.copytree(path, copy)
    else:
        shutil.copy(path, copy)
    read(loader, copy)


def test_changes_are_what_they_say() -> None:
    assert changed(b"abcdef", [("cut", 0.5, 0)]) == b"abc"
    assert changed(b"abcdef", [("twice", 0.0, 2)]) == b"ababcdef"
    assert json.loads(changed(b'{"a": {"b": 1}}', [("tree", 0.9, 0)])) == {"a": {"b": None}}
    assert io.BytesIO(changed(b"ab", [("u32", 0.0, 0xFFFFFFFF)])).read() == b"\xff" * 4
