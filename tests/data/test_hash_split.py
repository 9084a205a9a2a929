import numpy as np
import pytest

from kngd_ray.data import DataConfig, open_images


def opened(path, **fields):
    return open_images(DataConfig(path=str(path), **fields))


def test_a_fraction_of_each_class_and_domain_is_held_out(write_parquet):
    labels, domains = ["a", "b"] * 40, ["x"] * 20 + ["y"] * 60
    images = opened(write_parquet(label=labels, domain=domains))
    for label in (0, 1):
        for domain, rows in (("x", 10), ("y", 30)):
            here = (images.labels == label) & (images.domains == domain)
            assert (images.splits[here] == "test").sum() == 0.3 * rows


def test_the_side_does_not_depend_on_order(write_parquet, png):
    order = np.random.default_rng(0).permutation(40)
    labels = ["a", "b"] * 20
    straight = opened(write_parquet("s.parquet", label=labels))
    shuffled = opened(write_parquet("t.parquet", label=[labels[n] for n in order], image=[png(n) for n in order]))
    assert straight.splits[order].tolist() == shuffled.splits.tolist()


@pytest.mark.parametrize("column", ["label", "domain"])
def test_copies_are_on_one_side(write_parquet, png, column):
    columns = {"label": ["a"] * 40, "domain": ["x"] * 40} | {column: ["a"] * 20 + ["b"] * 20}
    pictures = [png(n) for n in [*range(20), *range(10), *range(20, 30)]]
    images = opened(write_parquet(image=pictures, **columns))
    assert images.splits[:10].tolist() == images.splits[20:30].tolist()
    assert set(images.splits[:10].tolist()) == {"train", "test"}


def test_test_fraction(write_parquet):
    images = opened(write_parquet(label=["a"] * 10 + ["b"] * 10), test_fraction=0.5)
    assert (images.splits == "test").sum() == 10
