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
