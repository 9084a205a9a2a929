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


def test_splits(write_folder):
    images = opened(
        write_folder("train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "val/dog/3.png", "validation/cat/4.png")
    )
    assert images.splits.tolist() == ["test", "train", "train", "test", "test"]
    assert images.labels.tolist() == [0, 0, 1, 1, 0]
    assert set(images.domains.tolist()) == {"all"}


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
        (["set.parquet"], "holds no pictures in class folders: name its files in data.path"),
        (["0.png"], "holds pictures at other depths"),
        (["cat/0.png", "train/cat/1.png"], "holds pictures at other depths"),
        (["a/b/c/0.png"], "holds pictures at other depths"),
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
        f"{root}: 5 of the 10 files of the class 'dog' would be passed over for their suffix, {suffix or 'none'} (5): "
        "save them as PNG or JPEG, or move them out of the folder"
    )


def test_a_class_of_which_nothing_is_read(write_folder):
    root = write_folder("cat/0.png", "dog/1.png", "emu/2.psd", "emu/3.psd", "masks/4.npy")
    assert "2 of the 2 files of the class 'emu' would be passed over for their suffix, .psd (2)" in refusal(root)


def test_a_class_is_counted_over_its_folders(write_folder):
    root = write_folder(
        *(f"train/dog/{n}.png" for n in range(38)), "test/dog/x.tga", "test/dog/y.png", "test/cat/z.png"
    )
    assert len(opened(root)) == 40
    (root / "train/dog/z.tga").write_bytes(b"")
    (root / "train/dog/w.tga").write_bytes(b"")
    assert "3 of the 42 files of the class 'dog'" in refusal(root)


def test_what_lies_beside_pictures_is_counted_alone(write_folder, caplog):
    root = write_folder(
        *("cat/0.png", "cat/0.xml", "cat/1.jpg", "cat/1.CR2", "cat/Thumbs.db", "cat/labels.csv", "cat/.x.tga"),
        *("dog/2.png", "README.md", "tools/x.m"),
    )
    assert len(opened(root)) == 3
    (said,) = caplog.messages
    assert said.startswith(f"{root}: passed over for their suffix: ")
    for part in (".xml (1)", ".cr2 (1)", ".db (1)", ".csv (1)", ".md (1)", ".m (1)"):
        assert part in said
    assert ".tga" not in said


def test_a_few_files_of_a_class_are_counted(write_folder, caplog):
    assert len(opened(write_folder(*(f"cat/{n}.png" for n in range(19)), "cat/x.tga"))) == 19
    assert caplog.messages[0].endswith("passed over for their suffix: .tga (1)")
