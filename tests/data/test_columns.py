"""Columns by other names, the names of a ClassLabel, and files by patterns: what is read, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kngd_ray._keywords import settings_of
from kngd_ray.comparison.rows import Row
from kngd_ray.config import flatten, load_config
from kngd_ray.data import ColumnNames, DataConfig, open_images
from kngd_ray.errors import DataError, UsageError

FINE = {"image": "img", "label": "fine_label"}
CLASSES = ["cat", "dog", "emu"]
FEATURES = {"fine_label": {"names": CLASSES, "_type": "ClassLabel"}, "coarse_label": {"names": ["pet", "bird"]}}


@pytest.fixture
def write(tmp_path, png):
    """A file as `datasets` writes it: pictures as {bytes, path}, numbers of classes, their names in the schema."""

    def written(name: str, labels=(0, 2, 1), first=0, features=None, **columns) -> Path:
        images = [{"bytes": png(first + n), "path": None} for n in range(len(labels))]
        coarse = [int(label == 2) for label in labels]
        table = pa.table({"img": images, "fine_label": list(labels), "coarse_label": coarse} | columns)
        info = {"info": {"features": FEATURES if features is None else features}}
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
        return path

    return written


def opened(path, columns=FINE, **fields):
    return open_images(DataConfig(path=str(path), columns=ColumnNames(**columns), **fields))


def refusal(path, columns=FINE, **fields):
    with pytest.raises(DataError) as caught:
        opened(path, columns, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_of_named_splits_with_the_columns_that_are_named(write, tmp_path, png):
    write("data/train-00000-of-00002.parquet", style=["photo", "sketch", "photo"])
    write("data/train-00001-of-00002.parquet", first=3, style=["photo", "sketch", "photo"])
    write("data/test-00000-of-00001.parquet", first=6, style=["sketch", "sketch", "photo"])
    images = opened(tmp_path, FINE | {"domain": "style"})
    assert images.class_names == tuple(CLASSES)
    assert images.labels.tolist() == [0, 2, 1] * 3
    assert images.splits.tolist() == ["test"] * 3 + ["train"] * 6
    assert images.domains.tolist() == ["sketch", "sketch", "photo", *["photo", "sketch", "photo"] * 2]
    assert [data for _, data in images.read(range(9))] == [png(n) for n in (6, 7, 8, 0, 1, 2, 3, 4, 5)]
    assert "columns: image from img, label from fine_label, domain from style" in images.notes
    coarse = opened(tmp_path, FINE | {"label": "coarse_label"})
    assert (coarse.class_names, coarse.labels.tolist()) == (("pet", "bird"), [0, 1, 0] * 3)
    assert coarse.digest != images.digest


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "has no image column (it has img, fine_label, coarse_label): name the column of picture bytes `image`, or"
             " say which it is, data.columns.image=img"),
        ({"image": "img"}, "or class names, or say which it is, data.columns.label=fine_label or coarse_label"),
        (FINE | {"label": "fine_lable"}, "has no column 'fine_lable', which data.columns.label names (the nearest name"
                                         " is 'fine_label'); it has img, fine_label, coarse_label"),
        (FINE | {"domain": "style"}, "has no column 'style', which data.columns.domain names"),
        (FINE | {"split": "part"}, "has no column 'part', which data.columns.split names"),
        (FINE | {"image": "fine_label"}, "label and image are both"),
        (FINE | {"image": "coarse_label"}, "column `coarse_label` is int64: it must be bytes"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_is_refused_with_those_that_are(write, columns, said):
    path = write("a.parquet")
    if columns.get("image") == columns.get("label", ""):
        with pytest.raises(ValueError, match="image and label are both 'fine_label': name two columns"):
            ColumnNames(**columns)
    else:
        assert said in refusal(path, columns)


def test_a_file_with_the_usual_names_says_the_way_back(write_parquet):
    message = refusal(write_parquet(label=["a", "b"]), {"image": "img"})
    assert message.endswith("it has image, label: set data.columns.image=image")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"labels": [0, 3, 1]}, "a.parquet, row 1: column `fine_label` has 3, and the ClassLabel in the file's schema"
                                " names 3 classes, 0 to 2: write the file again with all names"),
        ({"labels": [0, -1, 1]}, "row 1: label -1 is negative: number classes from 0, and drop rows without a class"),
        ({"fine_label": [[0], [1], [2]]}, "column `fine_label` is list<element: int64>: it must be integers or class"
                                          " names, one a row"),
        ({"features": {"fine_label": {"names": ["cat", "cat", "emu"]}}}, "class 'cat' has several labels"),
    ],
)  # fmt: skip
def test_labels_that_are_no_classes(write, fields, said):
    if "fine_label" in fields:
        fields["fine_label"] = pa.array(fields["fine_label"], pa.list_(pa.field("element", pa.int64())))
    assert said in refusal(write("a.parquet", **fields))


def test_files_whose_class_labels_differ_are_refused(write, tmp_path):
    write("train-0.parquet")
    write("test-0.parquet", first=3, features={"fine_label": {"names": ["dog", "cat", "emu"]}})
    assert "give all files one class list" in refusal(tmp_path)


def test_a_column_can_be_left_unread(write_parquet):
    path = write_parquet(label=[0, 1], class_name=["a", "b"], domain=["x.org", "y.org"])
    assert set(opened(path, {}).domains.tolist()) == {"x.org", "y.org"}
    images = opened(path, {"domain": None})
    assert set(images.domains.tolist()) == {"all"}
    assert "columns: no domain" in images.notes
    # a column that is to be the label is no domain, and nobody guesses which of the two was meant
    with pytest.raises(ValueError, match=r"read no domain, data\.columns\.domain=null"):
        ColumnNames(label="domain")
    assert opened(path, {"label": "domain", "domain": None, "class_name": None}).class_names == ("x.org", "y.org")


def test_features_under_another_name(tmp_path):
    rows = np.eye(4, dtype=np.float32).tolist()
    table = pa.table({"emb": rows, "fine_label": ["a", "b", "a", "b"], "split": ["train", "train", "test", "test"]})
    pq.write_table(table, tmp_path / "f.parquet")
    config = DataConfig(path=str(tmp_path / "f.parquet"), columns=ColumnNames(features="emb", label="fine_label"))
    images = open_images(config, features=True)
    assert images.features is not None
    assert images.features.read(images.keys).tolist() == rows
    with pytest.raises(DataError, match=r"no features column \(it has emb, .*data\.columns\.features=emb"):
        open_images(DataConfig(path=config.path), features=True)


def test_two_columns_of_one_name_are_refused(tmp_path, png):
    pictures, labels = pa.array([png(0), png(1)], pa.binary()), pa.array(["a", "b"])
    table = pa.Table.from_arrays([pictures, pictures, labels], names=["image", "image", "label"])
    pq.write_table(table, tmp_path / "two.parquet")
    assert "has 2 columns `image`" in refusal(tmp_path / "two.parquet", {})


def test_pictures_in_a_folder_have_no_columns(tmp_path, png):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(ord(name)))
    images = opened(tmp_path)
    assert images.class_names == ("a", "b")
    assert images.notes[0] == f"data.columns is for parquet files of yours, and not for {tmp_path}"


def test_what_save_to_disk_writes_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "train/data-00000-of-00001.arrow").write_bytes(b"")
    assert "save_to_disk of Hugging Face's datasets wrote it: write each split as parquet" in refusal(tmp_path)


# Patterns


def test_a_pattern_names_the_files_that_it_finds_each_once(write, tmp_path):
    for split, first in [("train", 0), ("test", 3)]:
        write(f"shards/{split}-0.parquet", first=first)
    (tmp_path / "shards" / "readme.txt").write_text("no data")
    for pattern in ("shards/*.parquet", "**/t*.parquet", "shards/te*.parquet,{}/shards/*.parquet"):
        images = opened(f"{tmp_path}/{pattern.format(tmp_path)}")
        assert len(images) == 6
        assert images.splits.tolist().count("test") == 3
    assert DataConfig(path="shards/*.parquet").name == "shards"
    one = write("odd[1].parquet")
    assert opened(one).paths == (str(one),), "a file of that very name is no pattern"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("shrds/*.parquet", "is a pattern, and there is no folder {}/shrds (the nearest name is 'shards')"),
        ("shards/*.parqet", "is a pattern, and no file below {}/shards has such a name"),
        ("shards/*", "finds readme.txt: a pattern names parquet files, as in {}/shards/*.parquet"),
    ],
)
def test_a_pattern_that_finds_no_parquet_files_is_refused(write, tmp_path, pattern, said):
    write("shards/train-0.parquet")
    (tmp_path / "shards" / "readme.txt").write_text("no data")
    assert said.format(tmp_path) in refusal(f"{tmp_path}/{pattern}")


# Settings


@pytest.mark.parametrize(
    "settings",
    [
        ["data.columns={image: img, label: fine_label, domain: null}"],
        ["data.columns.image=img", "data.columns.label=fine_label", "data.columns.domain=null"],
        settings_of({"columns": {"image": "img", "label": "fine_label", "domain": None}}),
        settings_of({"data": {"path": "x", "columns": {"image": "img", "label": "fine_label", "domain": None}}}),
    ],
)
def test_columns_are_settings(settings):
    assert load_config(None, settings).data.columns == ColumnNames(image="img", label="fine_label", domain=None)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.columns.lable=x", "did you mean data.columns.label?"),
        ("data.columns={img: image}", "unknown key 'data.columns.img'"),
        ("data.columns.label=domain", "label and domain are both 'domain': name two columns, or read no domain"),
        ("data.columns.label=", "data.columns.label"),
        ("data.columns=img", "expected settings of the form key: value"),
    ],
)
def test_columns_that_are_none(setting, said):
    with pytest.raises(UsageError) as caught:
        load_config(None, [setting])
    assert said in str(caught.value)


def test_runs_from_before_are_of_the_same_task_where_columns_have_the_usual_names():
    new = {key: str(value) for key, value in flatten(load_config()).items()}
    old = {key: value for key, value in new.items() if not key.startswith("data.columns.")}
    other = new | {"data.columns.label": "coarse_label"}
    tasks = [Row("", "", "", "", params, {}).task for params in (new, old, other)]
    assert tasks[0] == tasks[1] != tasks[2]
