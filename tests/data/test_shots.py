from dataclasses import replace

import numpy as np
import pytest

from kngd_ray.data import DataConfig, open_images, sample_shots, select, select_tests
from kngd_ray.data._stream import in_order
from kngd_ray.errors import DataError

LABELS = np.array([1, 0] * 20)
CANDIDATES = np.arange(4, 40)


def config(path, **fields):
    return DataConfig(path=str(path), **{"shots": 2, "draw": "first", **fields})


def test_the_first_are_taken_where_asked_for():
    assert sample_shots(LABELS, CANDIDATES[::-1], 3, 0, draw="first").tolist() == [5, 7, 9, 4, 6, 8]
    assert (
        sample_shots(LABELS, CANDIDATES, 3, 1, draw="first").tolist() == sample_shots(LABELS, CANDIDATES, 3, 1).tolist()
    )


def test_every_seed_draws():
    draws = {tuple(sample_shots(LABELS, CANDIDATES, 9, seed).tolist()) for seed in range(5)}
    assert len(draws) == 5
    assert tuple(sample_shots(LABELS, CANDIDATES, 9, 0, draw="first").tolist()) not in draws


@pytest.mark.parametrize("seed", range(4))
def test_shots_are_drawn_over_domains(seed):
    domains = np.array(["a"] * 30 + ["b"] * 6 + ["c"] * 4)
    drawn = sample_shots(LABELS, np.arange(40), 7, seed, domains=domains)
    for label in (0, 1):
        of_class = domains[drawn[LABELS[drawn] == label]].tolist()
        # two of c, which has no more, and three of each other or as near as that comes
        assert sorted(map(of_class.count, "abc")) == [2, 2, 3]
        assert len(set(of_class[:3])) == 3


@pytest.mark.parametrize("draw", ["random", "first"])
def test_copies_are_not_drawn(draw):
    keys = np.array([f"{n // 4}" for n in range(40)], "S64")  # two of each class are the same
    for seed in range(3):
        drawn = sample_shots(LABELS, np.arange(40), 10, seed, keys=keys, draw=draw)
        assert len(set(keys[drawn[:10]])) == 10
    with pytest.raises(DataError, match=r"'0' has 10 pictures to train on \(20 with copies\), fewer than 11 shots"):
        sample_shots(LABELS, np.arange(40), 11, 0, keys=keys, draw=draw)


def test_other_seeds_draw_without_replacement():
    draws = [sample_shots(LABELS, CANDIDATES, 10, seed) for seed in (1, 1, 2)]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()
    assert len(set(draws[0].tolist())) == 20
    assert LABELS[draws[0]].tolist() == [0] * 10 + [1] * 10
    assert set(draws[0].tolist()) <= set(CANDIDATES.tolist())


def test_a_draw_does_not_depend_on_other_classes():
    alone = sample_shots(LABELS, CANDIDATES[LABELS[CANDIDATES] == 0], 5, 3, ["a"])
    assert sample_shots(LABELS, CANDIDATES, 5, 3)[:5].tolist() == alone.tolist()


def test_fewer_shots_are_part_of_more():
    few, more = (sample_shots(LABELS, CANDIDATES, shots, 4) for shots in (3, 6))
    assert few[:3].tolist() == more[:3].tolist()


def test_too_few_candidates():
    sentence = "class 'dog' has 18 pictures to train on, fewer than 19 shots: lower data.shots"
    with pytest.raises(DataError, match=sentence):
        sample_shots(LABELS, CANDIDATES, 19, 0, ["dog", "cat"])


def test_parts(pets):
    settings = config(pets, train_domain="photo")
    images = open_images(settings)
    split = select(images, settings, seed=0)
    assert split.support.tolist() == [0, 1, 9, 10]
    assert split.id_test.tolist() == [6, 7, 8, 15, 16, 17]
    assert {name: part.tolist() for name, part in split.ood.items()} == {"sketch": [24, 25, 26, 33, 34, 35]}
    assert split.indices.tolist() == sorted([0, 1, 9, 10, 6, 7, 8, 15, 16, 17, 24, 25, 26, 33, 34, 35])


def test_without_a_train_domain_nothing_is_out_of_distribution(pets):
    settings = config(pets)
    images = open_images(settings)
    split = select(images, replace(settings, draw="random"), seed=0)
    assert (split.ood, len(split.id_test)) == ({}, 12)
    assert images.domains[split.support].tolist().count("photo") == 2


def test_leave_one_domain_out(pets):
    settings = config(pets, ood_domains=("photo",))
    split = select(open_images(settings), settings, seed=0)
    assert split.support.tolist() == [18, 19, 27, 28]
    assert list(split.ood) == ["photo"]


def test_domains_without_test_rows_are_not_tested(write_parquet):
    path = write_parquet(
        label=["a", "b"] * 4, domain=["x"] * 4 + ["y"] * 4, split=["train"] * 2 + ["test"] * 2 + ["train"] * 4
    )
    settings = config(path, train_domain="x", shots=1)
    assert select(open_images(settings), settings, 0).ood == {}
    settings = config(path, train_domain="x", ood_domains=("y",), shots=1)
    with pytest.raises(DataError, match="domain y has no usable test pictures: add test rows"):
        select(open_images(settings), settings, 0)


def test_excluded_pictures_are_nowhere(pets):
    settings = config(pets, train_domain="photo")
    split = select(open_images(settings), settings, 0, excluded={0, 6, 24})
    assert split.support.tolist() == [1, 2, 9, 10]
    assert not {0, 6, 24} & set(split.indices.tolist())


def test_copies_of_the_support_are_not_tested(write_parquet, png):
    path = write_parquet(
        image=[png(n) for n in (0, 1, 0, 2, 3, 1, 4, 5)],
        label=["a", "b", "a", "a", "b", "b", "a", "b"],
        split=["train", "train", *["test"] * 6],
        domain=["x"] * 5 + ["y"] * 3,
    )
    settings = config(path, train_domain="x", shots=1)
    split = select(open_images(settings), settings, 0)
    assert (split.id_test.tolist(), split.ood["y"].tolist()) == ([3, 4], [6, 7])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"train_domain": "foto"},
            r"data.train_domain: there is no domain 'foto' \(the nearest name is 'photo'\):"
            " the data set has photo, sketch",
        ),
        ({"ood_domains": ("clipart",)}, "data.ood_domains: there is no domain 'clipart'"),
        ({"train_domain": "photo", "ood_domains": ("photo",)}, "leaves no domain to train on"),
        ({"ood_domains": ("photo", "sketch")}, "leaves no domain to train on"),
        ({"shots": 99}, "class 'cat' has 12 pictures to train on, fewer than 99 shots"),
    ],
)
def test_impossible_tasks(pets, fields, sentence):
    settings = config(pets, **fields)
    with pytest.raises(DataError, match=sentence):
        select(open_images(settings), settings, 0)


def test_embedded_task():
    settings = DataConfig()
    images = open_images(settings)
    split = select(images, settings, 0)
    assert set(images.domains[split.support].tolist()) == {"noto"}
    assert (len(split.support), len(split.ood)) == (160, 5)


def test_tests_need_no_train_rows(write_parquet):
    path = write_parquet(label=["a", "b"] * 3, domain=["x"] * 4 + ["y"] * 2, split=["test"] * 6)
    settings = config(path, train_domain="x")
    images = open_images(settings)
    with pytest.raises(DataError, match="0 pictures to train on"):
        select(images, settings, seed=0)
    split = select_tests(images, settings, excluded={1})
    assert (split.support.tolist(), split.id_test.tolist()) == ([], [0, 2, 3])
    assert {name: part.tolist() for name, part in split.ood.items()} == {"y": [4, 5]}
    assert split.indices.tolist() == [0, 2, 3, 4, 5]


def test_all_of_unsplit_data_can_be_held_out(write_parquet, pets):
    unsplit = config(write_parquet(label=["a", "b"] * 5))
    assert len(select_tests(open_images(unsplit, test_fraction=1.0), unsplit).id_test) == 10
    stated = config(pets)
    assert len(select_tests(open_images(stated, test_fraction=1.0), stated).id_test) == 12


def test_no_copy_comes_twice_in_a_stream(write_parquet, png):
    """Nor in the next visit of its domain, nor in another domain."""
    pictures = [n // 2 for n in range(48)]  # each twice, in both domains in turn
    rows = {"label": ["ab"[n % 2] for n in pictures], "domain": [("x", "y", "x")[n % 3] for n in pictures]}
    images = open_images(config(write_parquet(image=[png(n) for n in pictures], split=["train"] * 48, **rows)))
    order = config("x", order=("x", "y", "x"), shots=2)
    for seed in range(3):
        drawn = select_support(images, order, seed)
        assert len(set(images.keys[drawn].tolist())) == len(drawn) == 12
    with pytest.raises(DataError, match=r"to learn from \(\d+ with copies\), fewer than 20 shots, 2 times 10"):
        select_support(images, replace(order, shots=10), 0)


def select_support(images, data, seed):
    return in_order(images, images.splits == "train", data.order, data.shots, seed)
