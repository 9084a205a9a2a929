import pytest

from kngd_ray.data import DataConfig, open_images
from kngd_ray.errors import DataError


def opened(root, **fields):
    return open_images(DataConfig(path=str(root), **fields))


def refusal(root):
    with pytest.raises(DataError) as caught:
        opened(root)
    return str(caught.value)


def test_classes(write_folder, png):
    root = write_folder("dog/0.png", "cat/1.JPG", "cat/.hidden.png", "cat/notes.txt", ".git/cat/2.png")
    images = opened(root)
    assert (images.kind, images.class_names, images.labels.tolist()) == ("folder", ("cat", "dog"), [0, 1])
    assert images.paths == (str(root / "cat/1.JPG"), str(root / "dog/0.png"))
    assert images.place(1) == str(root / "dog/0.png")
    assert list(images.read([1, 0])) == [(0, png(1)), (1, png(0))]


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [
        ("train", "test", "val"),
        ("Train", "TEST", "Validation"),
        ("training", "testing", "valid"),
        ("train_images", "test_images", "val_images"),
        ("train2017", "test2017", "dev"),
        ("flowers-train", "flowers-test", "flowers-val"),
        ("TrainingSet", "TestSet", "ValidationSet"),
        ("archive/trainset", "archive/testset", "archive/valset"),
    ],
)
def test_splits(write_folder, train, test, val):
    root = write_folder(f"{train}/cat/0.png", f"{train}/dog/1.png", f"{test}/cat/2.png", f"{val}/dog/3.png")
    by_file = {
        path.rpartition("/")[2]: split for path, split in zip(opened(root).paths, opened(root).splits, strict=True)
    }
    assert by_file == {"0.png": "train", "1.png": "train", "2.png": "test"}
    images = opened(root, val="test")
    assert sorted(images.splits.tolist()) == ["test", "test", "train", "train"]
    assert set(images.domains.tolist()) == {"all"}
    assert f"train 2 ({train.removeprefix('archive/')}/); test 1" in images.notes[-1]


@pytest.mark.parametrize(
    ("paths", "classes", "domains"),
    [
        (["cat/train/0.png", "dog/train/1.png", "cat/test/2.png"], ("cat", "dog"), {"all"}),
        (
            ["train/photo/cat/0.png", "train/sketch/dog/1.png", "test/photo/dog/2.png"],
            ("cat", "dog"),
            {"photo", "sketch"},
        ),
        (
            ["photo/train/cat/0.png", "sketch/train/dog/1.png", "photo/test/dog/2.png"],
            ("cat", "dog"),
            {"photo", "sketch"},
        ),
    ],
)
def test_splits_beside_domains_and_below_classes(write_folder, paths, classes, domains):
    images = opened(write_folder(*paths))
    assert (images.class_names, set(images.domains.tolist())) == (classes, domains)
    assert sorted(images.splits.tolist()) == ["test", "train", "train"]


def test_a_class_may_be_called_train(write_folder):
    images = opened(write_folder("train/0.png", "bus/1.png", "steam_train/2.png"))
    assert images.class_names == ("bus", "steam_train", "train")


def test_of_one_split_alone_some_are_held_out(write_folder):
    images = opened(write_folder(*(f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(10))))
    assert (images.class_names, (images.splits == "test").sum()) == (("cat", "dog"), 6)


PACS = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]


@pytest.mark.parametrize(
    ("domains", "classes"),
    [
        (["art_painting", "cartoon", "photo", "sketch"], PACS),
        (["Art", "Clipart", "Product", "Real World"], ["Alarm_Clock", "Backpack"]),
        (["amazon", "dslr", "webcam"], ["bike", "mug"]),
        (["CALTECH", "LABELME", "PASCAL", "SUN"], ["bird", "car", "chair", "dog", "person"]),
        (["location_38", "location_43"], ["bobcat", "rabbit"]),
        (["Anna", "Bert"], PACS),
    ],
    ids=lambda names: names[0],
)
def test_clear_domains(write_folder, domains, classes):
    images = opened(write_folder(*(f"{domain}/{name}/0.png" for domain in domains for name in classes)))
    assert (set(images.domains.tolist()), images.class_names) == (set(domains), tuple(sorted(classes)))
    assert images.notes[0].startswith("folders are read as domain/class: domains ")


@pytest.mark.parametrize(
    ("uppers", "lowers"),
    [
        (["cat", "dog"], ["left", "right"]),
        (["cat", "dog", "emu"], ["left", "right"]),
        (["cat", "dog"], ["photo", "sketch"]),
        (["cat", "dog"], [f"batch_{n}" for n in range(12)]),
        (["cat", "dog"], [str(n) for n in range(2010, 2024)]),
        (["cat", "dog"], ["jan", "feb", "mar", "apr", "may", "jun"]),
        (["cat", "dog"], ["paris", "rome"]),
        (["train_station", "test_site"], ["paris", "rome"]),
    ],
)
def test_classes_with_folders_of_their_own_are_not_taken_for_domains(write_folder, uppers, lowers):
    root = write_folder(*(f"{upper}/{lower}/0.png" for upper in uppers for lower in lowers))
    message = refusal(root)
    assert message.startswith(f"{root} can be read in two ways, as domain/class with the classes ")
    assert message.endswith(
        f"or as class/... with the classes {', '.join(sorted(uppers))}: set data.layout=domains or data.layout=classes"
    )
    assert opened(root, layout="classes").class_names == tuple(sorted(uppers))
    assert set(opened(root, layout="domains").domains.tolist()) == set(uppers)
    assert set(opened(root, train_domain=uppers[0]).domains.tolist()) == set(uppers)
    assert opened(root, classes=tuple(uppers)).class_names == tuple(uppers)


def test_videos_are_no_classes(write_folder):
    root = write_folder(*(f"{name}/{name}{n}x/0.png" for name in ("run", "jump") for n in "abcdefgh"))
    assert "can be read in two ways" in refusal(root)


def test_classes_with_and_without_folders(write_folder):
    root = write_folder("cat/0.png", "cat/old/1.png", "dog/a/b/2.png")
    assert "set data.layout=classes if the outermost folders are classes" in refusal(root)
    assert opened(root, layout="classes").labels.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match=r"outside domain/class/picture, which data\.layout=domains asks for"):
        opened(root, layout="domains")


def test_folders_of_systems_are_passed_over(write_folder):
    root = write_folder(
        "cat/0.png",
        "dog/1.png",
        "cat/@eaDir/0.png/2.jpg",
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/cat/._0.png",
        "__MACOSX/dog/3.png",
        ".git/cat/4.png",
    )
    images = opened(root)
    assert (images.class_names, len(images)) == (("cat", "dog"), 2)
    assert images.notes[0] == "skipped: 4 files in folders called .ipynb_checkpoints, @eaDir, __MACOSX"


def test_domains(write_folder):
    images = opened(write_folder("photo/cat/0.png", "photo/dog/1.png", "sketch/cat/2.png"))
    assert images.domains.tolist() == ["photo", "photo", "sketch"]
    assert images.class_names == ("cat", "dog")


def test_selected_classes_keep_their_paths(write_folder):
    root = write_folder("a/0.png", "b/1.png", "c/2.png")
    assert opened(root, classes=("c", "b")).paths == (str(root / "b/1.png"), str(root / "c/2.png"))


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (["notes.txt"], "holds no pictures in class folders: lay it out as class/picture"),
        (["0.png"], "holds pictures at other depths"),
        (["cat/0.png", "train/cat/1.png"], "mixes train with cat: lay it out as"),
        (["a/b/c/d/0.png", "a/b/x/y/z/1.png"], "holds pictures at other depths"),
        (["train/0.png", "test/1.png"], "mixes test, train with pictures without class folders"),
        (["train/cat/0.png", "extra/cat/1.png"], "mixes train with extra: lay it out as"),
    ],
)
def test_other_layouts_are_refused(write_folder, paths, sentence):
    assert sentence in refusal(write_folder(*paths))


def test_missing_folder_names_the_nearest(write_folder):
    root = write_folder("cat/0.png")
    assert "(the nearest name is 'pictures')" in refusal(root.with_name("picture"))


@pytest.mark.parametrize("target", ["secret.png", "secrets"])
def test_links_out_of_the_folder_are_refused(write_folder, target):
    write_folder("secret.png", "secrets/0.png", root=".")
    root = write_folder("cat/0.png")
    link = root / "cat" / target
    link.symlink_to(root.parent / target)
    assert refusal(root).startswith(f"{link} is a link out of {root}")


def test_links_within_the_folder(write_folder):
    root = write_folder("cat/0.png", "dog/1.png")
    (root / "dog" / "2.png").symlink_to(root / "cat" / "0.png")
    (root / "dog" / "loop").symlink_to(root)
    assert len(opened(root)) == 3


def test_endless_link(write_folder):
    root = write_folder("cat/0.png")
    (root / "cat" / "1.png").symlink_to("1.png")
    assert "1.png cannot be read: " in refusal(root)


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".ppm", ".pgm", ".pnm", ".apng", ".avif", ".jp2", ".heic", ".MPO"])
def test_every_suffix_of_pictures_is_read(write_folder, suffix):
    root = write_folder("cat/0.png", f"cat/1{suffix}", "dog/2.png", f"dog/3{suffix}")
    assert opened(root).labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("suffix", [".tga", ".xyz", ""])
def test_a_class_of_which_much_is_not_read(write_folder, suffix):
    paths = [f"{name}/{n}.png" for name in ("cat", "dog") for n in range(5)]
    root = write_folder(*paths, *(f"dog/{n}{suffix}" for n in range(5, 10)))
    assert refusal(root) == (
        f"{root}: 5 of the 10 files of the class 'dog' would be skipped because of their suffix, {suffix or 'none'} "
        "(5): "
        "save them as PNG or JPEG, or move them out of the folder"
    )


def test_a_class_of_which_nothing_is_read(write_folder):
    root = write_folder("cat/0.png", "dog/1.png", "emu/2.psd", "emu/3.psd", "masks/4.npy")
    assert "2 of the 2 files of the class 'emu' would be skipped because of their suffix, .psd (2)" in refusal(root)


def test_a_class_is_counted_over_its_folders(write_folder):
    root = write_folder(
        *(f"train/dog/{n}.png" for n in range(38)), "test/dog/x.tga", "test/dog/y.png", "test/cat/z.png"
    )
    assert len(opened(root)) == 40
    (root / "train/dog/z.tga").write_bytes(b"")
    (root / "train/dog/w.tga").write_bytes(b"")
    assert "3 of the 42 files of the class 'dog'" in refusal(root)


def test_what_lies_beside_pictures_is_counted_alone(write_folder):
    root = write_folder(
        *("cat/0.png", "cat/0.xml", "cat/1.jpg", "cat/1.CR2", "cat/Thumbs.db", "cat/labels.csv", "cat/.x.tga"),
        *("dog/2.png", "README.md", "tools/x.m"),
    )
    found = opened(root)
    assert len(found) == 3
    (said,) = [note for note in found.notes if note.startswith("skipped because of their suffix: ")]
    for part in (".xml (1)", ".cr2 (1)", ".db (1)", ".csv (1)", ".md (1)", ".m (1)"):
        assert part in said
    assert ".tga" not in said


def test_a_few_files_of_a_class_are_counted(write_folder):
    found = opened(write_folder(*(f"cat/{n}.png" for n in range(19)), "cat/x.tga"))
    assert len(found) == 19
    assert "skipped because of their suffix: .tga (1)" in found.notes


@pytest.mark.parametrize(
    ("classes", "shown"),
    [
        (
            ("Forest_test", "Forest_train", "Sea_test", "Sea_train"),
            "'Forest_test' and 'Forest_train', 'Sea_test' and 'S",
        ),
        (("train.bird", "val.bird", "cow"), "'train.bird' and 'val.bird':"),
        (("test bird", "train bird", "cow"), "'test bird' and 'train bird':"),
        (("bird", "bird-validation", "cow"), "'bird' and 'bird-validation':"),
        (("crash 1 test", "crash 2 train", "cow"), None),
        (("toy", "toy train", "train", "test"), None),
        (("bird_train", "cow_test", "dog"), None),
    ],
)
def test_classes_that_differ_by_a_split(write_folder, classes, shown):
    root = write_folder(*(f"{name}/{n}.png" for name in classes for n in range(2)))
    images = opened(root, layout="classes")
    assert images.class_names == tuple(sorted(classes))
    said = [note for note in images.notes if "the word of a split alone" in note]
    assert len(said) == (shown is not None)
    for sentence in said:
        assert sentence.startswith(f"classes differ by the word of a split alone, {shown}")
