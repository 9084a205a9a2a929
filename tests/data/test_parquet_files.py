import hashlib
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kngd_ray.data import DataConfig, open_images
from kngd_ray.errors import DataError


def opened(*paths, **fields):
    return open_images(DataConfig(path=tuple(str(path) for path in paths), **fields))


def refusal(*paths, **fields):
    with pytest.raises(DataError) as caught:
        opened(*paths, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_index(pets, png):
    images = opened(pets)
    assert (images.kind, images.paths, len(images)) == ("parquet", (str(pets),), 36)
    assert images.class_names == ("cat", "dog")
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == ([0] * 9 + [1] * 9) * 2
    assert images.domains.tolist() == ["photo"] * 18 + ["sketch"] * 18
    assert images.splits.tolist() == (["train"] * 6 + ["test"] * 3) * 4
    assert images.keys[17] == hashlib.sha256(png(17)).hexdigest().encode()
    assert images.place(17) == "pets.parquet, row 17"
    with pytest.raises(ValueError, match="read-only"):
        images.labels[0] = 1


def test_read_streams_in_file_order(pets, png):
    images = pickle.loads(pickle.dumps(opened(pets)))  # as a worker gets it
    assert list(images.read([30, 2, 8, 2])) == [(n, png(n)) for n in (2, 8, 30)]
    assert list(images.read([])) == []


def test_a_digest_is_of_the_content(write_parquet):
    one = write_parquet("a.parquet", label=[0, 1], class_name=["cat", "dog"])
    again = write_parquet("elsewhere.parquet", label=[0, 1], class_name=["cat", "dog"])
    turned = write_parquet("b.parquet", label=[0, 1], class_name=["dog", "cat"])
    others = write_parquet("c.parquet", first=2, label=[0, 1], class_name=["cat", "dog"])
    digests = [opened(path, test_fraction=0.5).digest for path in (one, again, turned, others)]
    assert digests[0] == digests[1], "where the file lies says nothing"
    assert len(set(digests)) == 3
    assert all(len(digest) == 32 for digest in digests)


def test_read_touches_only_the_row_groups_it_needs(pets, png):
    images = opened(pets)
    data = bytearray(pets.read_bytes())
    column = pq.ParquetFile(pets).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    pets.write_bytes(data)
    assert list(images.read([7])) == [(7, png(7))]
    with pytest.raises(DataError, match=r"pets\.parquet"):
        list(images.read([0]))


def test_several_files_are_one_set(write_parquet, png):
    first = write_parquet("a.parquet", label=[0, 1], class_name=["cat", "dog"])
    empty = write_parquet("b.parquet", label=pa.array([], pa.int32()), class_name=pa.array([], pa.string()))
    second = write_parquet("c.parquet", first=2, label=[1, 0], class_name=["dog", "cat"])
    images = opened(first, empty, second)
    assert images.labels.tolist() == [0, 1, 1, 0]
    assert images.place(3) == "c.parquet, row 1"
    assert list(images.read([3, 1])) == [(1, png(1)), (3, png(3))]


def test_files_of_one_name_are_told_apart_by_their_folder(write_parquet):
    first, second = write_parquet("x/0.parquet", label=["a"]), write_parquet("y/0.parquet", label=["b"])
    assert opened(first, second).place(1) == f"{second}, row 0"


def test_names_from_string_labels(write_parquet):
    images = opened(write_parquet(label=["dog", "cat", "dog"]))
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert set(images.domains.tolist()) == {"all"}


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ([2, 10], "numbers"),
        (["b", "a"], "text"),
        (["2", "10"], "digits"),
        (["-1", "2", "10", "-2"], "digits"),
        (["2", "9"], "text"),
        (["02", "10"], "text"),
        (["2", "10", "x"], "text"),
        ([b"2", b"10"], "digits"),
    ],
)
def test_how_labels_are_ordered(write_parquet, labels, order):
    names = {"class_name": [f"n{label}" for label in labels]} if order == "numbers" else {}
    assert opened(write_parquet(label=labels, **names)).label_order == order


def test_names_from_dictionary_encoded_labels(write_parquet):
    images = opened(write_parquet(label=pa.array(["dog", "cat"]).dictionary_encode()))
    assert images.class_names == ("cat", "dog")


def test_class_name_alone_is_label_enough(write_parquet):
    assert opened(write_parquet(class_name=["dog", "cat"])).labels.tolist() == [1, 0]


def test_gaps_between_labels_are_closed(write_parquet):
    images = opened(write_parquet(label=[7, 3], class_name=["dog", "cat"]))
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog"), [1, 0])


def test_names_from_hugging_face_metadata(tmp_path, png):
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    image = [{"bytes": png(n), "path": f"{n}.png"} for n in range(2)]
    table = pa.table({"image": image, "label": [1, 0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "h.parquet")
    images = opened(tmp_path / "h.parquet")
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert [data for _, data in images.read([0, 1])] == [png(0), png(1)]


def test_configured_classes_name_bare_numbers(write_parquet):
    images = opened(write_parquet(label=[1, 0]), classes=("cat", "dog"))
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog"), [1, 0])


def test_configured_classes_select_and_order(write_parquet, png):
    path = write_parquet(label=[0, 1, 2, 0], class_name=["cat", "dog", "emu", "cat"])
    images = opened(path, classes=("emu", "cat"))
    assert (images.class_names, images.labels.tolist()) == (("emu", "cat"), [1, 0, 1])
    assert list(images.read([1])) == [(1, png(2))]
    assert images.place(1) == "set.parquet, row 2"


SPLITS = ["train", "Test", "VALIDATION", "dev", "training"]


@pytest.mark.parametrize(
    ("val", "splits", "said"),
    [
        ("ignore", ["train", "test", "train"], "left out"),
        ("train", ["train", "test", "train", "train", "train"], "trained on"),
        ("test", ["train", "test", "test", "test", "train"], "tested on"),
    ],
)
def test_validation_is_what_is_asked_for(write_parquet, val, splits, said):
    images = opened(write_parquet(label=["a", "b", "a", "b", "a"], split=SPLITS), val=val)
    assert images.splits.tolist() == splits
    assert images.notes == (
        f"pictures: train 2, test 1, val 2, {said} by data.val={val} (column split of set.parquet)",
    )


def test_without_pictures_to_test_on_some_are_held_out(write_parquet):
    path = write_parquet(label=["a", "b"] * 10, split=["train"] * 18 + ["val"] * 2)
    images = opened(path)
    assert (len(images), (images.splits == "test").sum()) == (18, 6)
    assert images.notes[-1].endswith(
        "; none to test on is stated, 30% of each class and domain are held out to test: 12 to train on, 6 to test on"
    )
    with pytest.raises(DataError, match=r"data\.val=ignore leaves them out: set data\.val=test"):
        open_images(DataConfig(path=str(path)), test_fraction=1.0)
    with pytest.raises(DataError, match=r"set data\.val=test"):
        opened(write_parquet(label=["a", "b"], split=["val"] * 2))


HUB = ("train-00000-of-00002-0a", "train-00001-of-00002-9c", "validation-00000-of-00001", "test-00000-of-00001")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train", "test"], ["train", "test"]),
        (["train/0000", "test/0000"], ["train", "test"]),
        (["data/Flowers_TRAIN", "data/Flowers_TEST"], ["train", "test"]),
        ([f"data/{name}" for name in HUB], ["train", "train", "test"]),
        (["trainset", "more"], None),  # both to train on
        (["train", "train-2"], None),
        (["latest", "training_wheels"], None),
    ],
    ids=lambda names: (names or ["held out"])[0],
)
@pytest.mark.parametrize("given", ["files", "folder"])
def test_names_of_files_are_splits(write_parquet, tmp_path, names, splits, given):
    files = [
        write_parquet(f"x/snapshot/{name}.parquet", first=10 * n, label=["a", "b"] * 5) for n, name in enumerate(names)
    ]
    images = opened(*(sorted(files) if given == "files" else [tmp_path / "x"]))
    if splits is None:
        assert (images.splits == "test").sum() == 6
        return
    found = {str(images.place(n)).rpartition("/")[2].partition(",")[0]: s for n, s in enumerate(images.splits)}
    assert sorted(images.splits.tolist()) == sorted(splits * 10)
    assert all(name in images.notes[-1] for name in found)


def test_a_column_comes_before_the_name(write_parquet):
    first = write_parquet("train.parquet", label=["a", "b"], split=["test", "train"])
    second = write_parquet("test.parquet", first=2, label=["a", "b"])
    assert opened(first, second).splits.tolist() == ["test", "train", "test", "test"]


def test_names_of_some_files_alone_are_no_splits(write_parquet):
    files = [write_parquet(f"{name}.parquet", label=["a", "b"]) for name in ("more", "flowers-test")]
    assert "more.parquet, row 0 states no split, though others do" in refusal(*files)


def test_versions_of_a_data_set_are_not_pooled(write_parquet, tmp_path):
    for version in ("fine", "coarse"):
        write_parquet(f"x/{version}/train-0.parquet", label=["a", "b"])
    assert "holds parquet files in several folders, coarse, fine, which may be versions" in refusal(tmp_path / "x")


def test_columns_in_the_names_of_folders_are_refused(write_parquet, tmp_path):
    files = [write_parquet(f"hive/domain={d}/0.parquet", first=10 * n, label=["a", "b"]) for n, d in enumerate("xy")]
    says = "domain=x: its name states the column 'domain', as in a partitioned data set"
    for given in (files, [tmp_path / "hive/*/0.parquet"]):
        assert says in refusal(*given)
    one = opened(files[0], write_parquet("hive/domain=x/1.parquet", first=20, label=["a", "b"]))
    assert set(one.domains) == {"all"}, "folders of one value tell nothing apart"
    both = [
        write_parquet(f"told/domain={d}/0.parquet", first=10 * n, label=["a"], domain=[d]) for n, d in enumerate("xy")
    ]
    assert set(opened(*both).domains) == {"x", "y"}, "the files have it too"
    other = write_parquet("hive/day=1/0.parquet", label=["a", "b"]), write_parquet("hive/day=2/0.parquet", label=["a"])
    assert len(opened(*other).labels) == 3


def test_a_pattern_may_have_a_comma(write_parquet, tmp_path):
    write_parquet("my,dir/0.parquet", label=["a", "b"])
    assert len(opened(DataConfig(path=str(tmp_path / "my,dir/*.parquet")).path).labels) == 2
    assert DataConfig(path="a.parquet,b.parquet").path == ("a.parquet", "b.parquet")


def test_a_class_has_a_name(write_parquet):
    path = write_parquet(label=[0, 1, 0], class_name=["a", "", "a"])
    assert "label 1 has no class name" in refusal(path)


def test_a_snapshot_in_the_cache_of_hugging_face(write_parquet, tmp_path):
    repository = tmp_path / "hub/datasets--a--pets"
    data = repository / "snapshots/0123abc/data"
    data.mkdir(parents=True)
    for number, split in enumerate(("train", "test")):
        blob = write_parquet(f"hub/datasets--a--pets/blobs/{number}", first=2 * number, label=["a", "b"])
        (data / f"{split}-00000-of-00001.parquet").symlink_to(f"../../../blobs/{blob.name}")
    assert opened(data.parent).splits.tolist() == ["test", "test", "train", "train"]
    secret = write_parquet("secret.parquet", label=["a", "b"])
    (data / "train-00001-of-00001.parquet").symlink_to(secret)
    assert "is a link out of" in refusal(data.parent)


def test_pictures_and_parquet_in_one_folder(write_folder, write_parquet):
    root = write_folder("cat/0.png")
    write_parquet("pictures/train.parquet", label=["a", "b"])
    assert "holds pictures and parquet files: name the files" in refusal(root)


VIEWS = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])


@pytest.mark.parametrize("kind", ["view", "large", "dictionary"])
def test_columns_of_newer_types(write_parquet, png, kind):
    texts = {"view": pa.string_view(), "large": pa.large_string(), "dictionary": pa.dictionary(pa.int8(), pa.string())}
    blobs = {"view": pa.binary_view(), "large": pa.large_binary(), "dictionary": pa.binary()}
    names, text = ["dog", "cat"], texts[kind]
    columns = {
        "label": pa.array(names, text),
        "domain": pa.array(["x", "y"], text),
        "split": pa.array(["train", "test"], text),
    }
    images = opened(write_parquet(image=pa.array([png(0), png(1)], blobs[kind]), **columns))
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert (images.domains.tolist(), images.splits.tolist()) == (["x", "y"], ["train", "test"])
    assert list(images.read([0, 1])) == [(0, png(0)), (1, png(1))]


def test_pictures_in_a_struct_of_views(write_parquet, png):
    entries = pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in range(2)], VIEWS)
    images = opened(write_parquet(image=entries, label=["a", "b"]))
    assert list(images.read([0, 1])) == [(0, png(0)), (1, png(1))]


def test_names_as_bytes_are_decoded(write_parquet):
    path = write_parquet(label=[0, 1], class_name=[b"bird", "\u732b".encode()], domain=[b"x", b"y"])
    images = opened(path)
    assert (images.class_names, images.domains.tolist()) == (("bird", "\u732b"), ["x", "y"])
    assert opened(write_parquet(label=[b"bird", b"cat"])).class_names == ("bird", "cat")


def test_copies_are_counted(write_parquet, png):
    pictures = [png(n) for n in (0, 1, 0, 0, 1)]
    images = opened(write_parquet(image=pictures, label=["a", "b", "a", "a", "a"]))
    assert images.notes[-2:] == (
        "2 pictures are copies of others of their class: no shot is drawn twice",
        "1 pictures are also in another class, under another label",
    )
    in_time = opened(write_parquet(image=pictures, label=list("abaaa"), at=range(5)), time="at")
    assert in_time.notes[-2] == "2 pictures are copies of others of their class: each comes again, at its own time"


def test_pictures_by_path_lie_beside_the_file(write_parquet, tmp_path, png):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.png").write_bytes(png(5))
    images = opened(write_parquet(image=[{"bytes": None, "path": "img/0.png"}], label=["a"]))
    assert list(images.read([0])) == [(0, png(5))]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "link.png", "nul\0.png", "none.png"])
def test_pictures_by_path_never_leave_the_folder(write_parquet, tmp_path, png, path):
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    file = write_parquet("set/a.parquet", image=[{"bytes": None, "path": path}], label=["a"])
    assert "names a picture" in refusal(file)


def test_null_picture_is_left_to_the_decoder(write_parquet):
    images = opened(write_parquet(image=pa.array([None], pa.binary()), label=["a"]))
    assert list(images.read([0])) == [(0, b"")]


def test_missing_file_names_the_nearest(pets):
    message = refusal(pets.with_name("pet.parquet"))
    assert message.startswith("no such file or folder: ")
    assert "pet.parquet (the nearest name is 'pets.parquet'): correct data.path" in message


def test_missing_folder_is_named_before_the_file_in_it(pets):
    message = refusal(pets.parent / "nowhere" / "deeper" / "pets.parquet")
    assert message.endswith("nowhere: correct data.path")


def test_not_a_parquet_file(tmp_path):
    (tmp_path / "a.parquet").write_text("label,image\n")
    assert refusal(tmp_path / "a.parquet").endswith("a.parquet is not a parquet file: name one in data.path")


def test_truncated_parquet_file(pets):
    pets.write_bytes(pets.read_bytes()[:-100])
    assert refusal(pets).endswith("pets.parquet is cut short or damaged: fetch or write it again")


def test_no_image_column(tmp_path):
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), tmp_path / "a.parquet")
    message = refusal(tmp_path / "a.parquet")
    assert "has no image column (it has picture, label): name the column of picture bytes `image`" in message


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"domain": ["a"]}, "has no label column (it has image, domain): add `label`"),
        ({"label": [0.5]}, "column `label` is double: it must be integers or class names"),
        ({"label": ["a"], "image": ["x.png"]}, "column `image` is string: it must be bytes"),
        ({"label": [0, 1], "class_name": [["a"], ["b"]]}, "column `class_name` is list<"),
        ({"label": [0, 1], "class_name": [b"a", b"\xff"]}, r"column `class_name` holds b'\xff', which is not UTF-8"),
        ({"label": ["a", "b"], "domain": [0.5, 1.5]}, "column `domain` is double: it must be text"),
        ({"label": [0, -1]}, "set.parquet, row 1: label -1 is negative: number classes from 0"),
        ({"label": [0, None]}, "set.parquet, row 1 has no label: fill it in or drop the row"),
        ({"label": [None, None, 0]}, "set.parquet, row 0 has no label, as 2 of 3 rows: fill it in or drop the row"),
        ({"label": [0, 1]}, "set.parquet, row 0: label 0 has no class name, as 2 of 2 rows: add a class_name column"),
        ({"label": [0, 1], "class_name": ["a", None]}, "set.parquet, row 1: label 1 has no class name"),
        ({"label": [0, 0], "class_name": ["a", "b"]}, "label 0 is 'a' in set.parquet, row 0 but 'b' in"),
        ({"label": [0, 1], "class_name": ["a", "a"]}, "class 'a' has several labels: give each"),
        ({"label": ["a", "b"], "split": ["train", "extra"]}, "set.parquet, row 1 states the split 'extra': use"),
        ({"label": ["a", "b"], "split": ["train", None]}, "row 1 states no split, though others do"),
        (
            {"label": ["a", "b"], "domain": ["photo", None]},
            "set.parquet, row 1 has no domain in the column `domain`: name",
        ),
        (
            {"label": ["a"] * 3, "domain": [None, "x", None]},
            "set.parquet, row 0 has no domain in the column `domain`, as",
        ),
        ({"label": pa.array([], pa.int32())}, "has no rows"),
    ],
)
def test_columns_that_cannot_be_used(write_parquet, columns, sentence):
    assert sentence in refusal(write_parquet(**columns))


def test_a_column_without_any_domain_is_as_good_as_none(write_parquet):
    none = write_parquet("none.parquet", label=["a", "b"], domain=pa.array([None, None], pa.string()))
    assert set(opened(none).domains.tolist()) == {"all"}
    assert not any("domain" in note for note in opened(none).notes[:-1])
    images = opened(write_parquet("a.parquet", label=["a", "b"], domain=["x", "y"]), none)
    assert images.domains.tolist() == ["x", "y", "all", "all"]
    assert "no domain is stated in none.parquet, as others do: its rows are of the domain 'all'" in images.notes


def test_numbers_in_one_file_and_names_in_another(write_parquet):
    message = refusal(write_parquet("a.parquet", label=["cat"]), write_parquet("b.parquet", label=[0]))
    assert "use numbers or class names, not both" in message


def test_label_beyond_the_configured_classes(write_parquet):
    message = refusal(write_parquet(label=[0, 2]), classes=("cat", "dog"))
    assert message.endswith("row 1: label 2 has no class name: data.classes names 2 classes, labels 0 to 1")


def test_unknown_class(pets):
    message = refusal(pets, classes=("cat", "dgo"))
    assert message.startswith("class 'dgo' is not in the data set (the nearest name is 'dog')")


def test_folder_among_files(pets, tmp_path):
    assert "is a folder: data.path takes several parquet files or one folder" in refusal(pets, tmp_path)


def test_embedded_set():
    images = open_images(DataConfig())
    assert len(images.class_names) == 20
    assert "noto" in images.domains
