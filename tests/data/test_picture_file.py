"""Pictures in a file of their own: what was written, or an error that says what happened to it."""

import errno
import os
import pickle
import subprocess
import sys
import textwrap
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from kngd_ray.data import (
    DataConfig,
    ImageSet,
    PictureFile,
    content_key,
    halves,
    open_images,
    restrict,
    select,
)
from kngd_ray.errors import DataError, StorageError

ROWS = np.array([30, 2, 17, 3, 35, 0])


@pytest.fixture
def images(pets):
    return open_images(DataConfig(path=str(pets)))


@pytest.fixture
def written(images, tmp_path):
    return PictureFile.write(tmp_path / "pictures.arrow", images, ROWS)


def contents(images, rows):
    blobs = dict(images.read(rows))
    return [blobs[row] for row in rows.tolist()]


def entries(pictures):
    return [pictures.read(number) for number in range(len(pictures))]


def test_pictures_come_back_in_the_order_asked_for(images, written):
    for pictures in (written, PictureFile.open(str(written.path)), pickle.loads(pickle.dumps(written))):
        assert len(pictures) == len(ROWS)
        assert entries(pictures) == contents(images, ROWS)
        assert pictures.keys.tolist() == images.keys[ROWS].tolist()
        assert [pictures.place(number) for number in range(6)] == [images.place(row) for row in ROWS]


def test_more_pictures_than_are_held_at_once(tmp_path):
    images = open_images(DataConfig())
    rows = np.random.default_rng(0).permutation(len(images))[:150]
    pictures = PictureFile.write(tmp_path / "new" / "emoji.arrow", images, rows)
    assert entries(pictures) == contents(images, rows)
    assert os.listdir(tmp_path / "new") == ["emoji.arrow"]


def test_folders_of_pictures(write_folder, tmp_path):
    root = write_folder("cat/a.png", "cat/b.png", "dog/a.png")
    images = open_images(DataConfig(path=str(root)))
    pictures = PictureFile.write(tmp_path / "p", images, [2, 0])
    assert entries(pictures) == [(root / "dog/a.png").read_bytes(), (root / "cat/a.png").read_bytes()]
    assert pictures.place(0) == str(root / "dog/a.png")


def test_no_pictures_and_empty_ones(images, tmp_path, write_parquet):
    assert entries(PictureFile.write(tmp_path / "none", images, [])) == []
    path = write_parquet("hollow.parquet", image=pa.array([b"", None], pa.binary()), label=["a", "b"])
    assert entries(PictureFile.write(tmp_path / "p", open_images(DataConfig(path=str(path))), [1, 0])) == [b"", b""]


def test_a_picture_named_twice_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="names a picture twice"):
        PictureFile.write(tmp_path / "p", images, [1, 2, 1])
    assert not (tmp_path / "p").exists()


def test_a_picture_that_changed_since_it_was_indexed(images, tmp_path):
    keys = images.keys.copy()
    keys[17] = content_key(b"something else")
    with pytest.raises(DataError, match=r"pets.parquet, row 17 changed while it was in use"):
        PictureFile.write(tmp_path / "p", replace(images, keys=keys), ROWS)
    assert os.listdir(tmp_path) == ["pets.parquet"]


def test_threads_read_at_once(images, written):
    wanted = np.random.default_rng(0).integers(0, len(ROWS), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(written.read, wanted))
    blobs = contents(images, ROWS)
    assert read == [blobs[number] for number in wanted]


def test_a_changed_byte_is_named(written, images):
    data = bytearray(written.path.read_bytes())
    data[data.index(contents(images, ROWS)[1]) + 40] ^= 1
    written.path.unlink()  # the open file stays as it was
    written.path.write_bytes(data)
    damaged = PictureFile.open(written.path)
    with pytest.raises(
        DataError, match=r"pictures.arrow, picture 1 \(pets.parquet, row 2\): its bytes changed"
    ) as caught:
        damaged.read(1)
    assert str(caught.value).endswith("delete the file and run again")
    assert damaged.read(0) == written.read(0)
    assert written.read(1) == contents(images, ROWS)[1]


def test_every_flipped_bit_is_noticed_or_harmless(written, images, tmp_path):
    data, blobs = written.path.read_bytes(), contents(images, ROWS)
    rng = np.random.default_rng(0)
    sentences = []
    for number, place in enumerate(range(0, len(data), 5)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{number}.arrow"
        path.write_bytes(damaged)
        try:
            pictures = PictureFile.open(path)
            assert len(pictures) == len(ROWS)
            assert entries(pictures) == blobs
        except DataError as error:
            sentences.append(str(error))
        path.unlink()
    assert len(sentences) > number / 4
    assert all(str(tmp_path) in sentence and "run again" in sentence for sentence in sentences)


def test_a_file_cut_short(written, tmp_path):
    data = written.path.read_bytes()
    for length in [*range(0, len(data), 53), len(data) - 1]:
        path = tmp_path / f"{length}.arrow"
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=rf"{length}.arrow (is cut short|cannot be read).*delete it and run again"):
            PictureFile.open(path)


def test_files_that_are_none_of_ours(pets, tmp_path):
    with pytest.raises(DataError, match=r"absent.arrow is missing: run again"):
        PictureFile.open(tmp_path / "absent.arrow")
    with pytest.raises(DataError, match="cut short, damaged, or no file of pictures"):
        PictureFile.open(pets)
    table = pa.table({"x": [1]})
    with pa.ipc.new_file(tmp_path / "other.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"no file of pictures .its columns are x"):
        PictureFile.open(tmp_path / "other.arrow")
    with pytest.raises(DataError, match="cannot be read"):
        PictureFile.open(tmp_path)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "no space left while writing"), (errno.EROFS, "cannot write"), (errno.EIO, "cannot write")],
)
@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_disk_that_takes_no_more(images, tmp_path, monkeypatch, code, sentence, call):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    path = tmp_path / "pictures.arrow"
    path.write_bytes(b"as before")
    monkeypatch.setattr(call, refuse)
    with pytest.raises(StorageError, match=f"{sentence} {path}"):
        PictureFile.write(path, images, ROWS)
    assert path.read_bytes() == b"as before"
    assert sorted(os.listdir(tmp_path)) == ["pets.parquet", "pictures.arrow"]


LIMITED = """
    import resource, signal, sys
    from kngd_ray.data import DataConfig, PictureFile, open_images
    from kngd_ray.errors import StorageError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    images = open_images(DataConfig(path=sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        PictureFile.write(sys.argv[2], images, range(36))
    except StorageError as error:
        print(error)
"""


def test_a_write_that_really_fails_half_way(pets, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(pets), str(tmp_path / "p.arrow")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith(f"cannot write {tmp_path}/p.arrow ([Errno 27] File too large"), done.stderr
    assert os.listdir(tmp_path) == ["pets.parquet"]


def test_a_folder_that_cannot_be_made(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        PictureFile.write(tmp_path / "file" / "p.arrow", images, ROWS)


def test_what_killed_writers_left_is_swept_away(images, tmp_path):
    for age, name in ((3 * 24 * 3600, ".p.arrow.old.tmp"), (60, ".p.arrow.new.tmp"), (3 * 24 * 3600, ".q.tmp")):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    PictureFile.write(tmp_path / "p.arrow", images, ROWS)
    assert sorted(os.listdir(tmp_path)) == [".p.arrow.new.tmp", ".q.tmp", "p.arrow", "pets.parquet"]


def test_neither_writing_nor_reading_holds_the_pictures(tmp_path):
    count, size = 300, 100_000  # 30 MB in all
    for number in range(count):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.random.default_rng(number).bytes(size))
    images = open_images(DataConfig(path=str(tmp_path / "set")))
    before = pa.total_allocated_bytes()
    held = []

    class Watched(ImageSet):
        def place(self, index):
            held.append(pa.total_allocated_bytes() - before)
            return super().place(index)

    watched = Watched(**{name: getattr(images, name) for name in images.__dataclass_fields__})
    tracemalloc.start()
    try:
        pictures = PictureFile.write(tmp_path / "p.arrow", watched, range(count))
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.reset_peak()
        for number in range(count):
            pictures.read(number)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
    assert len(held) == count
    assert max(held) < 10e6
    assert pa.total_allocated_bytes() - before < 1e6


@pytest.mark.parametrize(("count", "middle"), [(4, 2), (5, 3), (20, 10), (101, 51)])
def test_halves_are_in_the_order_of_labels(count, middle):
    names = [f"class {number}" for number in range(count)]
    base, new = halves(names)
    assert (len(base), [*base, *new]) == (middle, names)


def test_too_few_classes_for_halves():
    with pytest.raises(DataError, match="halves of 3 classes: they need four or more"):
        halves("abc")


def test_base_and_new_classes_keep_their_split():
    images = open_images(DataConfig())
    parts = [restrict(images, half) for half in halves(images.class_names)]
    assert [len(part.class_names) for part in parts] == [10, 10]
    assert sum(map(len, parts)) == len(images)
    for part in parts:
        was = np.searchsorted(images.rows, part.rows)
        assert part.keys.tolist() == images.keys[was].tolist()
        assert part.splits.tolist() == images.splits[was].tolist()
        names = np.array(part.class_names)[part.labels].tolist()
        assert names == np.array(images.class_names)[images.labels[was]].tolist()
        assert contents(part, np.array([0, 5])) == contents(images, np.array([was[0], was[5]]))
        task = select(part, DataConfig(shots=2), seed=0)
        assert np.bincount(part.labels[task.support]).tolist() == [2] * 10


def test_classes_of_bare_numbers_can_be_kept(write_parquet):
    path = write_parquet("bare.parquet", label=[0, 1, 2, 3] * 9)
    images = open_images(DataConfig(path=str(path), classes=("w", "x", "y", "z")))
    kept = restrict(images, ("z", "x"))
    assert kept.labels.tolist() == [1, 0] * 9
    assert kept.rows.tolist() == [row for row in range(36) if row % 4 in (1, 3)]


def test_classes_that_cannot_be_kept(images):
    with pytest.raises(DataError, match=r"class 'dgo' is not in the data set \(the nearest name is 'dog'\)"):
        restrict(images, ("cat", "dgo"))
    with pytest.raises(DataError, match="name one twice"):
        restrict(images, ("cat", "cat"))
