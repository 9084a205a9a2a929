"""Data sets of features: kinds of columns, keys and splits, and what is refused of them."""

import hashlib
import json
import math
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.features import CLASSES, WIDTH, feature_table, with_vectors

from kngd_ray.data import DataConfig, FeatureFiles, open_images, read_features, restrict, select
from kngd_ray.errors import DataError


@pytest.fixture
def write(tmp_path):
    def writes(table, name="rows.parquet"):
        pq.write_table(table, tmp_path / name, row_group_size=10)
        return tmp_path / name

    return writes


def opened(*paths, **fields):
    return open_images(DataConfig(path=tuple(map(str, paths)), **fields), features=True)


def vectors_of(table):
    return np.array(table["features"].to_pylist(), np.float32)


def test_index_and_features(write):
    table = feature_table()
    images = pickle.loads(pickle.dumps(opened(write(table))))
    assert (images.kind, images.class_names, images.all_names) == ("parquet", CLASSES, CLASSES)
    assert images.labels.tolist() == table["label"].to_pylist()
    assert images.domains.tolist() == table["domain"].to_pylist()
    assert images.splits.tolist() == table["split"].to_pylist()
    assert images.place(11) == "rows.parquet, row 11"
    vectors = vectors_of(table)
    assert images.keys[7] == hashlib.sha256(vectors[7].tobytes()).hexdigest().encode()
    source = images.source
    assert isinstance(source, FeatureFiles)
    assert (source.width, source.rescaled) == (WIDTH, False)
    assert np.array_equal(source.vectors(np.array([70, 3, 3, 12])), vectors[[70, 3, 3, 12]])
    assert images.features.missing(images.keys) == set()
    assert np.array_equal(images.features.read(images.keys[[5, 90]]), vectors[[5, 90]])
    assert images.features.read(images.keys[:0]).shape == (0, WIDTH)
    assert list(images.read([])) == []


@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda number: pa.list_(number, WIDTH)])
def test_columns_of_every_kind(write, number, kind):
    table = feature_table()
    vectors = [[np.float16(x) if number == pa.float16() else x for x in row] for row in vectors_of(table).tolist()]
    images = opened(write(with_vectors(table, vectors, kind(number))))
    found = images.features.read(images.keys)
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(len(table)), abs=1e-6)
    assert np.abs(found - vectors_of(table)).max() < 1e-3
    assert not images.source.rescaled


def test_other_lengths_are_scaled_to_one(write):
    long, unit = opened(write(feature_table(length=12))), opened(write(feature_table(), "unit.parquet"))
    assert (long.source.rescaled, unit.source.rescaled) == (True, False)
    assert long.source.longest == pytest.approx(12)
    assert long.features.read(long.keys) == pytest.approx(unit.features.read(unit.keys), abs=1e-6)


def test_copies_fall_on_one_side_of_the_split(write):
    table = feature_table().drop_columns(["split"])
    copied = pa.concat_tables([table, table.take(list(range(0, len(table), 3)))])
    images = opened(write(copied), test_fraction=0.5)
    sides = {}
    for key, side in zip(images.keys.tolist(), images.splits.tolist(), strict=True):
        sides.setdefault(key, set()).add(side)
    assert {len(side) for side in sides.values()} == {1}
    assert {"train", "test"} == set(images.splits.tolist())
    negative = [[-0.0 if x == 0 else x for x in row] for row in [[0.0, 1.0]] * 2]
    zeros = opened(write(pa.table({"features": [[0.0, 1.0], negative[0]], "label": ["a", "b"]}), "zeros.parquet"))
    assert zeros.keys[0] == zeros.keys[1], "the two zeros of floating point are one number"


def test_classes_domains_and_shots_are_those_of_pictures(write):
    config = DataConfig(path=str(write(feature_table())), train_domain="photo", shots=4, classes=("cow", "ant"))
    images = open_images(config, features=True)
    assert (images.class_names, images.all_names) == (("cow", "ant"), CLASSES)
    split = select(images, config, seed=3)
    assert (len(split.support), len(split.id_test), list(split.ood)) == (8, 20, ["sketch"])
    assert restrict(images, ["ant"]).all_names == CLASSES


def test_several_files_are_one_set(write):
    table = feature_table()
    images = opened(write(table.slice(0, 50), "a.parquet"), write(table.slice(50), "b.parquet"))
    assert np.array_equal(images.features.read(images.keys), vectors_of(table))
    narrow = with_vectors(table, [[1.0, 2.0]] * len(table))
    with pytest.raises(DataError, match=r"d\.parquet, row 0: it has 2 features, and 8 are expected"):
        opened(write(table, "c.parquet"), write(narrow, "d.parquet"))


def spoilt(row, value):
    """The table with one row of features replaced."""
    table = feature_table()
    vectors = table["features"].to_pylist()
    vectors[row] = value
    return with_vectors(table, vectors)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (spoilt(37, [float("nan")] + [1.0] * 7), "row 37: its feature holds NaN: drop the row"),
        (spoilt(4, [float("inf")] + [1.0] * 7), "row 4: its feature holds infinity"),
        (spoilt(4, [1e300] * 8), "row 4: its feature holds infinity"),
        (spoilt(0, [0.0] * 8), "row 0: its feature has length zero"),
        (spoilt(2, [None] + [1.0] * 7), "row 2: its feature holds NaN"),
        (spoilt(95, None), "row 95 has no features"),
        (spoilt(95, []), "row 95 has no features"),
        (spoilt(95, [1.0] * 7), "row 95: it has 7 features, and 8 are expected: give all rows features of one model"),
        (feature_table().rename_columns(["vector", "label", "class_name", "domain", "split"]), "no features column"),
        (with_vectors(feature_table(), ["x"] * 96, pa.string()), "column `features` is string: it must be lists"),
        (with_vectors(feature_table(), [[1, 2]] * 96, pa.list_(pa.int64())), "must be lists of floats"),
        (feature_table().drop_columns(["label", "class_name"]), "no label column"),
        (feature_table().slice(0, 0), "no rows: name a data set with features"),
        (with_vectors(feature_table().slice(0, 1), [[1.0] * 70_000]), "lists of over 65,536 numbers"),
    ],
)
def test_refusals_say_what_and_where(write, table, says):
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        opened(write(table))
    assert "rows.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_and_features_are_not_taken_for_one_another(write, pets, write_folder):
    with pytest.raises(DataError, match=re.escape(f"kngd-ray encode {pets} --out FOLDER")):
        opened(pets)
    with pytest.raises(DataError, match="embedded holds pictures"):
        open_images(DataConfig(), features=True)
    folder = write_folder("cat/0.png")
    with pytest.raises(DataError, match=re.escape(f"{folder} holds pictures")):
        opened(folder)
    with pytest.raises(DataError, match=r"features and no pictures: set model\.name=precomputed"):
        open_images(DataConfig(path=str(write(feature_table()))))


def test_a_file_with_both_serves_both(write, pets):
    table = pq.read_table(pets)
    both = write(table.append_column("features", pa.array([[float(n), 1.0] for n in range(len(table))])))
    pictures, features = open_images(DataConfig(path=str(both))), opened(both)
    assert pictures.features is None
    assert features.features is not None
    assert pictures.keys.tolist() != features.keys.tolist()


def test_features_alone_need_no_labels(write):
    table = feature_table(length=3)
    path = write(table.select(["features"]))
    parts = list(read_features(path, WIDTH))
    assert parts[0][0] == 0
    assert np.concatenate([part for _, part in parts]) == pytest.approx(vectors_of(table) / 3, abs=1e-6)
    with pytest.raises(DataError, match="row 0: it has 8 features, and 5 are expected"):
        list(read_features(path, 5))
    with pytest.raises(DataError, match="there is no file"):
        list(read_features(path.with_name("gone.parquet"), WIDTH))


def test_a_file_that_changed_is_noticed(write):
    path = write(feature_table())
    images = opened(path)
    write(feature_table().slice(0, 20))
    with pytest.raises(DataError, match=r"changed while in use|damaged"):
        images.features.read(images.keys)


MODEL = {"name": "ViT-S", "fingerprint": "a" * 64, "logit_scale": 20}


def stating(model):
    """A table that says which model computed its features."""
    stated = model if isinstance(model, bytes) else json.dumps(model).encode()
    return feature_table().replace_schema_metadata({b"kngd_ray.encoded_by": stated})


def test_the_model_that_computed_features(write):
    stated = opened(write(stating(MODEL)), write(feature_table(), "untold.parquet")).source.encoded_by
    assert (stated.name, stated.logit_scale) == ("ViT-S", 20)
    assert str(stated) == "ViT-S (fingerprint aaaaaaaaaaaa)"
    assert [stated.scales(s) for s in (20.0, 20.001, 20.1, 18.0)] == [True, True, False, False]
    assert opened(write(feature_table())).source.encoded_by is None
    notes = opened(write(stating(MODEL)), write(feature_table(), "untold.parquet")).notes
    assert any("is not stated in" in note and "untold.parquet: make sure that it is ViT-S" in note for note in notes)
    assert not any("is not stated" in note for note in opened(write(feature_table())).notes)
    other = write(stating(MODEL | {"fingerprint": "b" * 64}), "other.parquet")
    with pytest.raises(DataError, match=r"rows.parquet has features of the model ViT-S .*other.parquet of ViT-S"):
        opened(write(stating(MODEL)), other)


@pytest.mark.parametrize(
    "stated",
    [
        b"{",
        b"[1]",
        b"\xff",
        {"name": "ViT-S"},
        *(MODEL | {"logit_scale": scale} for scale in (0, True, "20", math.nan, 10**400)),
        MODEL | {"fingerprint": 3},
        MODEL | {"name": "a\nb"},
        MODEL | {"more": 1},
    ],
    ids=lambda stated: str(stated)[:40],
)
def test_damaged_statements_of_the_model_are_refused(write, stated):
    with pytest.raises(DataError, match="what its schema says of the model of its features is damaged"):
        opened(write(stating(stated)))
