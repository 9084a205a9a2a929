import errno
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from kngd_ray.data import FeatureCache, content_key
from kngd_ray.errors import DataError, StorageError

DIM = 4


def keys_of(*numbers):
    return np.array([content_key(bytes([n])) for n in numbers], "S64")


def features_of(*numbers):
    return np.array([np.arange(DIM) + 10.0 * n for n in numbers], np.float32)


def fill(root, *numbers, model="m"):
    cache = FeatureCache(root, model, DIM)
    cache.write(keys_of(*numbers), features_of(*numbers))
    return cache


def parts(root, model="m"):
    return sorted((root / model).glob("part-*.parquet"))


def test_round_trip(tmp_path):
    writer = fill(tmp_path, 1, 2, 3)
    writer.write(keys_of(4), features_of(4))
    for cache in (writer, FeatureCache(tmp_path, "m", DIM), pickle.loads(pickle.dumps(writer))):
        assert cache.missing(keys_of(4, 1, 5)) == set(keys_of(5).tolist())
        features = cache.read(keys_of(4, 1, 3, 1))
        assert features.dtype == np.float32
        assert features.tolist() == features_of(4, 1, 3, 1).tolist()
    assert [path.suffix for path in (tmp_path / "m").iterdir()] == [".parquet", ".parquet"]


def test_nothing_is_written_for_nothing(tmp_path):
    FeatureCache(tmp_path / "new", "m", DIM).write(keys_of()[:0], np.empty((0, DIM), np.float32))
    assert FeatureCache(tmp_path / "new", "m", DIM).read(np.empty(0, "S64")).shape == (0, DIM)
    assert not (tmp_path / "new").exists()


def test_digests_that_end_in_zero_bytes(tmp_path):
    keys = np.array([b"ab" * 31 + b"00", b"0" * 64], "S64")
    FeatureCache(tmp_path, "m", DIM).write(keys, features_of(1, 2))
    assert FeatureCache(tmp_path, "m", DIM).read(keys).tolist() == features_of(1, 2).tolist()


def test_another_model_or_picture_meets_nothing(tmp_path):
    fill(tmp_path, 1)
    assert FeatureCache(tmp_path, "other", DIM).missing(keys_of(1)) == set(keys_of(1).tolist())
    assert FeatureCache(tmp_path, "m", DIM).missing(keys_of(2)) == set(keys_of(2).tolist())


def test_features_of_an_older_decoder_are_not_read(tmp_path):
    cache = fill(tmp_path, 1)
    (part,) = parts(tmp_path)
    part.rename(part.with_name(f"part-{part.name.rpartition('-')[2]}"))  # as they were called before
    assert FeatureCache(tmp_path, "m", DIM).missing(keys_of(1)) == set(keys_of(1).tolist())
    assert len(list(cache.folder.iterdir())) == 1


def test_parts_of_other_writers_are_found(tmp_path):
    cache = FeatureCache(tmp_path, "m", DIM)
    assert cache.missing(keys_of(1))
    fill(tmp_path, 1)
    assert not cache.missing(keys_of(1))


def test_missing_features_are_an_error(tmp_path):
    with pytest.raises(DataError, match="lacks 2 features: run again to compute them"):
        fill(tmp_path, 1).read(keys_of(1, 2, 3))


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path, caplog):
    fill(tmp_path, 1, 2)
    (part,) = parts(tmp_path)
    sound = part.read_bytes()
    noticed = 0
    for place in range(len(sound)):
        data = bytearray(sound)
        data[place] ^= 1 << (place % 8)
        part.write_bytes(data)
        cache = FeatureCache(tmp_path, "m", DIM)
        if cache.missing(keys_of(1, 2)):
            noticed += 1
            assert part.with_suffix(".corrupt").read_bytes() == data
            assert not part.exists()
            assert "set aside, its features are computed again" in caplog.text
        else:
            assert cache.read(keys_of(1, 2)).tolist() == features_of(1, 2).tolist()
        caplog.clear()
    assert noticed > len(sound) / 2


def test_every_truncation_is_noticed(tmp_path):
    fill(tmp_path, 1)
    (part,) = parts(tmp_path)
    sound = part.read_bytes()
    for length in range(0, len(sound), 7):
        part.write_bytes(sound[:length])
        assert FeatureCache(tmp_path, "m", DIM).missing(keys_of(1))
        assert not part.exists()


def test_damage_after_the_look_is_not_read(tmp_path):
    cache = fill(tmp_path, 1)
    fill(tmp_path, 2)
    assert not cache.missing(keys_of(1, 2))
    for part in parts(tmp_path):
        part.write_bytes(b"")
    with pytest.raises(DataError, match="lacks 2 features"):
        cache.read(keys_of(1, 2))
    cache.write(keys_of(1, 2), features_of(1, 2))
    assert cache.read(keys_of(1, 2)).tolist() == features_of(1, 2).tolist()


def test_part_of_another_dimension_is_set_aside(tmp_path):
    FeatureCache(tmp_path, "m", 7).write(keys_of(1), np.zeros((1, 7), np.float32))
    assert FeatureCache(tmp_path, "m", DIM).missing(keys_of(1))


def test_damage_in_a_read_only_cache_is_passed_over(tmp_path, monkeypatch, caplog):
    fill(tmp_path, 1)
    parts(tmp_path)[0].write_bytes(b"")

    def refuse(self, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    cache = FeatureCache(tmp_path, "m", DIM)
    assert cache.missing(keys_of(1))
    assert cache.missing(keys_of(1))
    assert caplog.text.count("is damaged") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(tmp_path, value):
    features = features_of(1, 2)
    features[1, 2] = value
    cache = FeatureCache(tmp_path, "m", DIM)
    with pytest.raises(DataError, match=r"b\.png: the model's feature is not finite \(1 of 2"):
        cache.write(keys_of(1, 2), features, ["a.png", "b.png"])
    with pytest.raises(DataError, match=keys_of(2)[0].decode()):
        cache.write(keys_of(1, 2), features)
    assert not parts(tmp_path)


def test_features_that_are_not_finite_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("kngd_ray.data._cache.np.isfinite", np.ones_like)
    FeatureCache(tmp_path, "m", DIM).write(keys_of(1), np.full((1, DIM), np.nan, np.float32))
    monkeypatch.undo()
    assert FeatureCache(tmp_path, "m", DIM).missing(keys_of(1))


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "mount it writable"),
        (errno.EACCES, "correct its permissions"),
        (errno.EIO, "check the folder"),
    ],
)
def test_storage_that_cannot_be_written(tmp_path, monkeypatch, code, advice):
    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", refuse)
    sentence = f"cannot write features to {tmp_path}/m .{os.strerror(code)}.: {advice}, or set data.cache_dir"
    with pytest.raises(StorageError, match=sentence):
        fill(tmp_path, 1)
    assert list((tmp_path / "m").iterdir()) == []


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file", "m", DIM)
    with pytest.raises(StorageError, match="cannot read features in"):
        cache.missing(keys_of(1))
    with pytest.raises(StorageError, match="cannot write features to"):
        cache.write(keys_of(1), features_of(1))


WRITER = """
    import os, signal, sys
    import numpy as np
    from kngd_ray.data import FeatureCache, content_key

    cache = FeatureCache(sys.argv[1], "m", 4)
    def write(number):
        cache.write(np.array([content_key(bytes([number]))], "S64"),
                    np.array([np.arange(4) + 10.0 * number], np.float32))
"""


def start(body, *arguments):
    script = textwrap.dedent(WRITER) + textwrap.dedent(body)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)])


def test_a_killed_writer_leaves_no_part(tmp_path):
    body = """
        write(1)
        def cut(descriptor):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = cut
        write(2)
    """
    assert start(body, tmp_path).wait(30) == -signal.SIGKILL
    (temporary,) = (tmp_path / "m").glob(".*.tmp")
    assert temporary.stat().st_size > 0
    cache = FeatureCache(tmp_path, "m", DIM)
    assert cache.missing(keys_of(1, 2)) == set(keys_of(2).tolist())
    assert cache.read(keys_of(1)).tolist() == features_of(1).tolist()
    assert temporary.exists()  # it may be a living writer's
    os.utime(temporary, (time.time() - 90_000,) * 2)
    FeatureCache(tmp_path, "m", DIM).missing(keys_of(2))
    assert not temporary.exists()


def test_kill_at_any_time(tmp_path):
    body = """
        while True:
            for number in range(200):
                write(number)
    """
    child = start(body, tmp_path)
    try:
        deadline = time.monotonic() + 300
        while len(parts(tmp_path)) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    cache = FeatureCache(tmp_path, "m", DIM)
    here = [n for n in range(200) if keys_of(n)[0] not in cache.missing(keys_of(*range(200)))]
    assert len(here) >= 19
    assert cache.read(keys_of(*here)).tolist() == features_of(*here).tolist()
    assert not list((tmp_path / "m").glob("*.corrupt"))


def test_concurrent_writers(tmp_path, caplog):
    body = """
        for number in range(int(sys.argv[2]), int(sys.argv[2]) + 40):
            cache.missing(np.array([content_key(b"")], "S64"))
            write(number)
    """
    children = [start(body, tmp_path, first) for first in (0, 20, 40)]
    reader = FeatureCache(tmp_path, "m", DIM)
    with caplog.at_level(logging.WARNING):
        while any(child.poll() is None for child in children):
            reader.missing(keys_of(0))
    assert [child.returncode for child in children] == [0, 0, 0]
    assert reader.read(keys_of(*range(80))).tolist() == features_of(*range(80)).tolist()
    assert len(parts(tmp_path)) == 120
    assert not caplog.records
