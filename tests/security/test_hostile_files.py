"""Files made to hurt: each is refused by a sentence, or harmless, within bounded memory and time, and none is run."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.hostile import DIM, MARK, Intruder, Outcome, pickled, png, read_apart, scans, sealed, zeros
from PIL import Image
from safetensors.torch import save

from kngd_ray.data._decode import DECODING
from kngd_ray.sharding import SingleProcess
from kngd_ray.training import checkpoint
from kngd_ray.training.method import MethodState

GIB = 1 << 30
NAMES = ("bird", "cat")

CASES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {}
"""By name: the loader, what its sentence says (nothing where it may be read), and what makes the file in a folder."""


def case(loader: str, says: str, name: str = "") -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Note a file; its maker returns its bytes, or its path if it is more than a file."""

    def note(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES[f"{loader}: {name or make.__name__.replace('_', ' ')}"] = (loader, says, make)
        return make

    return note


def onnx() -> bytes:
    """The beginning of an ONNX model: protobuf of its version, its producer and a graph."""
    return b"\x08\x08\x12\x07pytorch\x3a\x20" + b"\x0a\x04main" + bytes(26)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(50 << 20))
    return buffer.getvalue()


FOREIGN = {"a pickle": pickled, "onnx": onnx, "an archive": archive}


# Pictures


@case("picture", "cannot be decoded")
def text_of_a_gigabyte(_: Path) -> bytes:
    return png(8, 8, (b"zTXt", b"Comment\0\0" + zeros(GIB)))


@case("picture", "")
def profile_of_a_gigabyte(_: Path) -> bytes:
    return png(8, 8, (b"iCCP", b"x\0\0" + zeros(GIB)))


@case("picture", "")
def pixels_of_a_gigabyte_in_a_small_picture(_: Path) -> bytes:
    return png(8, 8, data=zeros(GIB))


@case("picture", "cannot be decoded")
def ten_gigapixels_announced(_: Path) -> bytes:
    return png(100_000, 100_000, data=b"")


@case("picture", "over 80,000,000 pixels")
def just_too_many_pixels(_: Path) -> bytes:
    return png(10_000, 8_001, data=zeros(241 << 20))


@case("picture", "")
def the_largest_picture_with_transparency(_: Path) -> bytes:
    return png(10_000, 8_000, data=zeros(306 << 20), colour=6)


@case("picture", "a JPEG of more than 100 scans")
def endless_scans(_: Path) -> bytes:
    return scans(2000)


@case("picture", "")
def endless_animation(_: Path) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5000, 5000), 7).save(buffer, "GIF")
    data = buffer.getvalue()
    start = data.index(b"\x2c\0\0\0\0")
    return data[:start] + data[start:-1] * 40 + b";"


@case("picture", "cannot be decoded")
def animation_whose_frame_is_larger_than_it(_: Path) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (9, 9), 7).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\x2c\0\0\0\0")
    data[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


@case("picture", "cannot be decoded")
def bitmap_of_gigapixels(_: Path) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


@case("picture", "cannot be decoded")
def jpeg_2000_of_gigapixels(_: Path) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (9, 9), 7).save(buffer, "JPEG2000")
    return buffer.getvalue().replace(struct.pack(">II", 9, 9), struct.pack(">II", 100_000, 100_000))


@case("picture", "over 50,000,000 pixels")
def jpeg_2000_of_more_pixels_than_its_decoder_has_room_for(_: Path) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (9, 9), 7).save(buffer, "JPEG2000")
    return buffer.getvalue().replace(struct.pack(">II", 9, 9), struct.pack(">II", 7100, 7100))


@case("picture", "cannot be decoded")
def avif_of_nothing(_: Path) -> bytes:
    return b"\0\0\0\x18ftypavif\0\0\0\0mif1avif"


@case("picture", "cannot be decoded")
def heic_of_nothing(_: Path) -> bytes:
    return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@case("picture", "cannot be decoded")
def tiff_of_gigapixels(_: Path) -> bytes:
    tags = {256: 100_000, 257: 100_000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 100_000, 279: 1 << 31}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


@case("picture", "cannot be decoded")
def plain_pixmap_of_gigapixels(_: Path) -> bytes:
    return b"P6 100000 100000 255\n" + bytes(1000)


@case("picture", "no known format")
def postscript(_: Path) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"


for what, maker in FOREIGN.items():
    case("picture", "no known format", what)(lambda _, maker=maker: maker())


# Data sets


def table(images: Any, **columns: Any) -> pa.Table:
    count = len(images)
    plain = {"label": [n % 2 for n in range(count)], "class_name": [NAMES[n % 2] for n in range(count)]}
    return pa.table({"image": images, **plain, **columns})


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def varint(value: int) -> bytes:
    """A whole number as a parquet footer has it."""
    value, out = 2 * value, b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def with_other_footer(data: bytes, old: int, new: int) -> bytes:
    """A parquet file whose footer has one number in place of another, wherever it stands."""
    size = struct.unpack("<I", data[-8:-4])[0]
    footer = data[-8 - size : -8]
    assert varint(old) in footer
    footer = footer.replace(varint(old), varint(new))
    return data[: -8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1"


@case("data", "declares 1,000,000,000 rows")
def a_billion_rows_declared(_: Path) -> bytes:
    return with_other_footer(parquet(table(pa.nulls(12_345, pa.binary()))), 12_345, 10**9)


@case("data", "declares 30,000,000 rows")
def millions_of_rows_that_take_no_room(folder: Path) -> Path:
    path = folder / "rows.parquet"
    part = pa.table({"image": pa.nulls(10**6, pa.binary()), "label": pa.array(np.zeros(10**6, np.int8))})
    with pq.ParquetWriter(path, part.schema) as writer:
        for _ in range(30):
            writer.write_table(part)
    return path


@case("data", "declares 1,500 rows and holds 1,234")
def more_rows_declared_than_there_are(_: Path) -> bytes:
    images = [png(9, 9) + bytes([n % 256, n // 256]) for n in range(1234)]
    return with_other_footer(parquet(table(images)), 1234, 1500)


@case("data", "unpacks from")
def one_picture_of_zeros_in_every_row(_: Path) -> bytes:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([bytes(80 << 20)], pa.binary()))
    return parquet(table(column), compression="zstd", dictionary_pagesize_limit=GIB, store_schema=False)


@case("data", "")
def one_large_picture_in_every_row(_: Path) -> bytes:
    noise = np.random.default_rng(0).bytes(6 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 250, pa.int32()), pa.array([noise], pa.binary()))
    return parquet(table(column), dictionary_pagesize_limit=GIB, store_schema=False)


@case("data", "unpacks from")
def a_page_of_zeros(_: Path) -> bytes:
    images = pa.array([bytes(GIB >> 3), png(9, 9)], pa.binary())
    return parquet(table(images), compression="zstd", use_dictionary=False)


@case("data", "a name of 1,000,001 characters")
def long_names(_: Path) -> bytes:
    return parquet(table([png(9, 9)] * 300, class_name=[NAMES[n % 2] + "x" * 999_997 for n in range(300)]))


@case("data", "")
def class_list_without_a_bottom(_: Path) -> bytes:
    made = table([png(9, 9)] * 4).drop_columns(["class_name"])
    return parquet(made.replace_schema_metadata({b"huggingface": b"[" * 10**5}))


@case("data", "outside its folder")
def picture_out_of_the_folder(_: Path) -> bytes:
    return parquet(table([{"bytes": None, "path": "../../../etc/passwd"}]))


@case("data", "not a regular file")
def picture_that_is_a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    (folder / "pipes.parquet").write_bytes(parquet(table([{"bytes": None, "path": "pipe"}])))
    return folder / "pipes.parquet"


@case("data", "not a regular file", "folder with a pipe")
def folder_with_a_pipe(folder: Path) -> Path:
    (folder / "set" / "cat").mkdir(parents=True)
    os.mkfifo(folder / "set" / "cat" / "x.png")
    return folder / "set"


@case("data", "not UTF-8")
def folder_named_by_no_text(folder: Path) -> Path:
    place = os.fsencode(folder) + b"/set/\xff\xfe"
    os.makedirs(place)
    with open(place + b"/x.png", "wb") as file:
        file.write(png(9, 9))
    return folder / "set"


@case("data", "more than a picture")
def folder_with_a_picture_of_terabytes(folder: Path) -> Path:
    (folder / "set" / "cat").mkdir(parents=True)
    with (folder / "set" / "cat" / "x.png").open("wb") as file:
        file.truncate(1 << 40)
    return folder / "set"


@case("data", "a link out of")
def folder_with_a_link_out(folder: Path) -> Path:
    (folder / "set" / "cat").mkdir(parents=True)
    (folder / "set" / "cat" / "x.png").symlink_to("/etc/passwd")
    return folder / "set"


for what, maker in FOREIGN.items():
    case("data", "is not a parquet file", what)(lambda _, maker=maker: maker())


# The feature cache: a part that cannot be believed is set aside, and nothing is read


def part(folder: Path, data: bytes) -> Path:
    (folder / "root" / "key").mkdir(parents=True)
    path = folder / "root" / "key" / f"part-{DECODING}-0.parquet"
    path.write_bytes(data)
    return path


def features(keys: Any, values: Any, count: int, **options: Any) -> bytes:
    schema = pa.schema([("key", pa.binary(32)), ("feature", pa.list_(pa.float32(), DIM))])
    column = pa.FixedSizeListArray.from_arrays(values, DIM)
    assert len(keys) == len(column) == count
    return parquet(pa.Table.from_arrays([keys, column], schema=schema), **options)


@case("cache", "")
def packed_features(folder: Path) -> Path:
    count = 5_000_000
    keys = pa.array([bytes(32)] * 5, pa.binary(32)).take(pa.array(np.zeros(count, np.int8)))
    return part(folder, features(keys, pa.array(np.zeros(count * DIM, np.float32)), count, compression="zstd"))


@case("cache", "")
def keys_that_are_missing(folder: Path) -> Path:
    return part(folder, features(pa.nulls(3, pa.binary(32)), pa.array(np.ones(24, np.float32)), 3, compression="none"))


for what, maker in FOREIGN.items():
    case("cache", "", what)(lambda folder, maker=maker: part(folder, maker()))


# Files of pictures in a run's folder


for what, maker in FOREIGN.items():
    case("pictures", "no file of pictures", what)(lambda _, maker=maker: maker())


# Checkpoints


def a_checkpoint(folder: Path) -> Path:
    weights = {"a": torch.arange(6.0).reshape(2, 3)}
    state = MethodState(weights, {"step": torch.tensor(4)}, {"a": torch.ones(2, 3)}, [{"a": [0, 6]}])
    place = folder / "step-00000004-0123ab"
    checkpoint.save(
        place, state, {"step": 4, "steps": 4, "seed": 0, "options": {}, "class_names": ["a"]}, SingleProcess()
    )
    return place


def altered(folder: Path, **entries: Any) -> Path:
    place = a_checkpoint(folder)
    sealed(place, lambda manifest: manifest.update(entries))
    return place


DEEP = '{"format": "kngd_ray.checkpoint", "version": 2, "x": ' + "[" * 10**5 + "]" * 10**5 + "}"
ENTRIES: dict[str, dict[str, Any]] = {
    "files out of the folder": {"files": {"../../../etc/passwd": {"bytes": 1, "sha256": "0"}}},
    "a device for a file": {"files": {"/dev/zero": {"bytes": 1, "sha256": "0"}}},
    "files that are a list": {"files": ["weights.safetensors"]},
    "a million pieces": {"pieces": [0] * 10**6},
    "pieces that are a number": {"pieces": 10**12},
    "shapes beyond counting": {"parameters": {"a": [10**18, 10**18]}},
    "shapes below nothing": {"parameters": {"a": [-2, -3]}},
    "a step that is a text": {"step": "4"},
    "classes that are numbers": {"class_names": [1, 2]},
    "options that are a list": {"options": []},
    "shots that are a list": {"learned": []},
}
for what, entries in ENTRIES.items():
    case("checkpoint", "use an", what)(lambda folder, entries=entries: altered(folder, **entries))


@case("checkpoint", "its step is missing")
def no_step(folder: Path) -> Path:
    place = a_checkpoint(folder)
    sealed(place, lambda manifest: manifest.pop("step"))
    return place


@case("checkpoint", "nested too deeply")
def manifest_without_a_bottom(folder: Path) -> Path:
    place = a_checkpoint(folder)
    (place / "manifest.json").write_text(DEEP)
    return place


@case("checkpoint", "larger than")
def manifest_of_a_gigabyte(folder: Path) -> Path:
    place = a_checkpoint(folder)
    with (place / "manifest.json").open("r+b") as file:
        file.truncate(GIB)
    return place


def header(text: bytes, said: int | None = None) -> bytes:
    """A safetensors file of nothing but a header, which may lie about its length."""
    return struct.pack("<Q", len(text) if said is None else said) + text


LIES = {
    "a header longer than the file": header(b"{}", 1 << 40),
    "a header of all there is": header(b"{}", 2**64 - 1),
    "a header of a hundred megabytes": header(b'{"a":' + b" " * (99 << 20) + b"1}"),
    "a tensor that is not there": header(b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'),
    "a shape that overflows": header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "offsets that run backwards": header(b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[24,0]}}') + bytes(24),
    "a type that nobody has": header(b'{"a":{"dtype":"F99","shape":[2,3],"data_offsets":[0,24]}}') + bytes(24),
    "a header without a bottom": header(b'{"a":' + b"[" * 10**5),
    "other weights": save({"b": torch.zeros(1 << 10)}),
    "a weight of no dimension": save({"a": torch.tensor(1.0)}),
}
for what, data in [*LIES.items(), *((what, maker()) for what, maker in FOREIGN.items())]:
    for name in ("weights", "covariance-00000-of-00001"):

        def spoil(folder: Path, name: str = name, data: bytes = data) -> Path:
            place = a_checkpoint(folder)
            (place / f"{name}.safetensors").write_bytes(data)
            sealed(place, lambda _: None)
            return place

        # whether a covariance fits is for the method to say, which knows its shape
        may_load = name.startswith("cov") and what in ("other weights",)
        case("checkpoint", "" if may_load else "use an", f"{name} with {what}")(spoil)


# Models


@case("model", "never unpickled")
def torch_file_with_an_object(folder: Path) -> Path:
    torch.save({"state_dict": {"a": torch.ones(2)}, "more": Intruder()}, folder / "x.pt")
    return folder / "x.pt"


@case("model", "unpacks to more than it holds")
def torch_file_that_is_packed(folder: Path) -> Path:
    torch.save({"a": torch.zeros(16 << 20)}, folder / "plain.pt")
    with (
        zipfile.ZipFile(folder / "plain.pt") as plain,
        zipfile.ZipFile(folder / "x.pt", "w", zipfile.ZIP_DEFLATED) as file,
    ):
        for name in plain.namelist():
            file.writestr(name, plain.read(name))
    (folder / "plain.pt").unlink()
    return folder / "x.pt"


@case("model", "")
def torch_file_of_one_number_a_trillion_times(folder: Path) -> Path:
    torch.save({"visual.conv1.weight": torch.zeros(1).expand(1 << 40)}, folder / "x.pt")
    return folder / "x.pt"


@case("model", "never unpickled")
def pickle_that_asks_for_memory(folder: Path) -> Path:
    (folder / "x.bin").write_bytes(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.")
    return folder / "x.bin"


for suffix in (".pt", ".bin", ".pth", ".safetensors"):
    for what, maker in FOREIGN.items():

        def model_file(folder: Path, suffix: str = suffix, maker: Callable[[], bytes] = maker) -> Path:
            (folder / f"x{suffix}").write_bytes(maker())
            return folder / f"x{suffix}"

        case("model", "x.", f"{what} as {suffix}")(model_file)
for what, data in LIES.items():

    def lying_model(folder: Path, data: bytes = data) -> Path:
        (folder / "x.safetensors").write_bytes(data)
        return folder / "x.safetensors"

    case("model", "x.safetensors", what)(lying_model)


# Features and class embeddings


@case("features", "lists of over 65,536 numbers")
def a_row_of_a_billion_numbers(_: Path) -> bytes:
    # one value many times over: a few bytes in the file
    row = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1 << 24, np.int32)), pa.array([1.0], pa.float32()))
    offsets = pa.array([0, 1 << 24, 1 << 24], pa.int32())
    features = pa.ListArray.from_arrays(offsets, row.cast(pa.float32()))
    return parquet(pa.table({"features": features, "label": ["a", "b"]}))


@case("features", "holds infinity")
def numbers_that_overflow(_: Path) -> bytes:
    return parquet(pa.table({"features": [[1e308] * 8] * 2, "label": ["a", "b"]}))


@case("classes", "never unpickled")
def class_embeddings_of_objects(folder: Path) -> Path:
    np.save(folder / "x.npy", np.array([Intruder()] * 3, object))
    return folder / "x.npy"


@case("classes", "or is damaged")
def class_embeddings_of_a_trillion_classes(folder: Path) -> Path:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 8), }".ljust(117) + b"\n"
    (folder / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(96))
    return folder / "x.npy"


for what, maker in FOREIGN.items():

    def foreign_classes(folder: Path, maker: Callable[[], bytes] = maker) -> Path:
        (folder / "x.npy").write_bytes(maker())
        return folder / "x.npy"

    case("classes", "not a .npy file of numbers", what)(foreign_classes)
    case("features", "is not a parquet file", what)(lambda _, maker=maker: maker())


# Records, as `sync` and `train --resume` read them


def record(folder: Path, **files: str) -> Path:
    place = folder / "run" / "records" / "fit"
    (place / "artifacts").mkdir(parents=True)
    meta = {"id": "fit", "uid": "0" * 32, "start": 1, "name": "fit", "parent": None, "params": {}, "tags": {}}
    (place / "meta.json").write_text(json.dumps({**meta, "status": "RUNNING", "end": None}))
    for name, text in files.items():
        (place / name.replace("_", ".")).write_text(text)
    return folder / "run"


for name in ("meta_json", "metrics_json", "steps_jsonl"):
    for what, text in {
        "no bottom": "[" * 10**5,
        "a number": "3\n",
        "half a file": '{"id": "fi',
        "null": "null\n",
    }.items():
        says = "is damaged" if name == "meta_json" and what != "null" else None
        case("record", says or "", f"{name} of {what}")(lambda folder, n=name, t=text: record(folder, **{n: t}))


@case("record", "")
def records_that_are_each_others_parents(folder: Path) -> Path:
    run = record(folder)
    first = run / "records" / "fit" / "meta.json"
    shutil.copytree(first.parent, run / "records" / "other")
    for one, other in (("fit", "other"), ("other", "fit")):
        meta = json.loads(first.read_text()) | {"id": one, "parent": other}
        (run / "records" / one / "meta.json").write_text(json.dumps(meta))
    return run


# Of the same contents in files of other names, or in the other file of a checkpoint.
SLOW = {
    *(f"model: {what} as {suffix}" for what in FOREIGN for suffix in (".bin", ".pth")),
    *(f"checkpoint: covariance-00000-of-00001 with {what}" for what in [*LIES, *FOREIGN]),
}
assert CASES.keys() > SLOW


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Every file that is asked about read once, by one process that has the imports behind it."""
    root = tmp_path_factory.mktemp("hostile")
    own = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    asked = {item.callspec.params["name"] for item in own if hasattr(item, "callspec")}
    names = [name for name in CASES if name in asked]
    read: list[tuple[str, Path]] = []
    for number, (loader, _, make) in enumerate(CASES[name] for name in names):
        folder = root / f"{number:03d}"
        folder.mkdir()
        made = make(folder)
        if isinstance(made, bytes):
            path = folder / (
                "x.png" if loader == "picture" else "x.parquet" if loader in ("data", "features") else "x.arrow"
            )
            path.write_bytes(made)
            made = path
        read.append((loader, made))
    yield dict(zip(names, read_apart(read, root), strict=True))
    shutil.rmtree(root)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_refused_by_a_sentence_or_harmless(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    says = CASES[name][1]
    assert outcome.end in ({"refused"} if says else {"refused", "loaded"}), outcome
    assert says in outcome.sentence, outcome
    assert "\n" not in outcome.sentence
    assert len(outcome.sentence) < 2000


def test_nothing_was_run(outcomes: dict[str, Outcome], tmp_path_factory: pytest.TempPathFactory) -> None:
    assert not list(tmp_path_factory.getbasetemp().rglob(MARK))


def test_the_intruder_would_have_left_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled())
    assert (tmp_path / MARK).is_dir()


def test_damage_to_a_run_costs_its_record_and_no_more(tmp_path: Path) -> None:
    """A file that links out of a record is not sent, whoever put it there."""
    from kngd_ray.tracking._sender import _files

    root = tmp_path / "artifacts"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").write_text("a")
    (root / "b.txt").symlink_to("/etc/passwd")
    (root / "etc").symlink_to("/etc")
    assert [name for name, _ in _files(root)] == ["sub/a.txt"]


def test_a_file_that_may_be_read_by_nobody_else_never_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml holds what the user gave as tracking.uri; its temporary file, too, is for him alone."""
    from kngd_ray import storage

    path = tmp_path / "config.yaml"
    path.touch(mode=0o600)
    seen: list[int] = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (seen.append(self.stat().st_mode & 0o777), replace(self, to))[1]
    )
    storage.write_text(path, "secret")
    assert seen == [0o600]
    assert path.stat().st_mode & 0o777 == 0o600
