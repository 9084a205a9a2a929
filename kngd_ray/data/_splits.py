"""Which pictures are trained on and which are tested on, by what the data states or else by their hashes."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from kngd_ray.data._source import Ints, Keys, Rows, listing
from kngd_ray.data._words import SPLIT_WORDS
from kngd_ray.errors import DataError

Names = npt.NDArray[np.str_]


def settle_splits(
    rows: Rows, labels: Ints, domains: Names, keys: Keys, val: Literal["ignore", "train", "test"], fraction: float
) -> tuple[Names, str]:
    """Say for each picture whether it is trained on or tested on.

    Args:
        rows: what was found.
        labels (N,): class numbers, -1 for pictures that are left out.
        domains (N,): domain names.
        keys (N,): picture hashes.
        val: what becomes of pictures for validation.
        fraction: part held out where no picture is for testing.

    Returns:
        "train" or "test" for each picture (N,), "" for one that is left out; and a sentence on where that is from.

    Raises:
        DataError: when splits are unknown or stated in part, or pictures for validation alone are left.
    """
    stated, chosen = _stated(rows), labels >= 0
    sides = np.where(chosen, "train" if stated is None else stated, "").astype("U5")
    sources = "no split is stated" if stated is None else _sources(rows, sides, val)
    for_validation = sides == "val"
    sides[for_validation] = "" if val == "ignore" else val
    if (sides == "test").any():
        return sides, sources
    if for_validation.any() and (fraction >= 1 or not (sides == "train").any()):
        raise DataError(
            f"{rows.source.place(0)}: the data states pictures for validation and none to test on, and data.val={val}"
            f" {_USE[val][0]}: set data.val=test{', or data.val=train' if val == 'ignore' else ''}"
        )
    left = np.flatnonzero(sides == "train")
    sides[left] = hash_split(labels[left], domains[left], keys[left], fraction)
    how = "all are tested on" if fraction >= 1 else f"{fraction:.0%} of each class and domain are held out to test"
    trained, tested = (int((sides == side).sum()) for side in ("train", "test"))
    none = "" if stated is None else "none to test on is stated, "
    return sides, f"{sources}; {none}{how}: {trained} to train on, {tested} to test on"


_USE = {"ignore": ("leaves them out", "left out"), "train": ("trains on them", "trained on"), "test": ("", "tested on")}


def _sources(rows: Rows, sides: Names, val: str) -> str:
    """Say how many pictures are of each split, and what states it."""
    found = []
    for split in ("train", "test", "val"):
        here = np.flatnonzero(sides == split).tolist()
        if here:
            use = f", {_USE[val][1]} by data.val={val}" if split == "val" else ""
            origins = listing(list(dict.fromkeys(str(rows.origins[row]) for row in here)), 4)
            found.append((f"{split} {len(here)}{use}", origins))
    if len({origins for _, origins in found}) == 1:
        return f"pictures: {', '.join(said for said, _ in found)} ({found[0][1]})"
    return f"pictures: {'; '.join(f'{said} ({origins})' for said, origins in found)}"


def _stated(rows: Rows) -> Names | None:
    """Return the splits (N,) that rows state, "train", "val" or "test", or None when no row states one.

    Raises:
        DataError: when a row states an unknown split, or only some rows state one.
    """
    if all(split is None for split in rows.splits):
        return None
    known = {split: SPLIT_WORDS.get(split.strip().casefold()) for split in set(rows.splits) if split is not None}
    for row, split in enumerate(rows.splits):
        if split is None or known[split] is None:
            stated = "no split, though others do" if split is None else f"the split {split!r}"
            raise DataError(
                f"{rows.source.place(row)} states {stated}: use train, val or test, in a column `split` or in the names"
                " of all files"
            )
    return np.array([known[str(split)] for split in rows.splits], object).astype(np.str_)


def hash_split(labels: Ints, domains: Names, keys: Keys, fraction: float) -> Names:
    """Hold out a fraction of each class and domain, the pictures with the lowest hashes.

    A picture's side depends on no random number and no file order. Copies of it fall on one side,
    also when they lie in different classes or domains: held out in one is held out in all.

    Args:
        labels (N,): class numbers.
        domains (N,): domain names.
        keys (N,): picture hashes.
        fraction: part held out.

    Returns:
        "train" or "test" for each row (N,).
    """
    if not len(labels):
        return np.empty(0, np.str_)
    names, domain = np.unique(domains, return_inverse=True)
    group = labels * len(names) + domain
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    pictures = [np.unique(keys[rows]) for rows in members]
    held_out = np.concatenate([part[: int(fraction * len(part) + 0.5)] for part in pictures])
    return np.where(np.isin(keys, held_out), "test", "train")


def count_copies(labels: Ints, keys: Keys, *, in_time: bool = False) -> Sequence[str]:
    """Return sentences that count pictures which are there more than once.

    Args:
        labels (N,): class numbers.
        keys (N,): picture hashes.
        in_time: whether every row is learned from, as it comes.

    Returns:
        One on copies within classes and one on pictures in several classes, each if there are any.
    """
    distinct = np.unique(np.rec.fromarrays([labels, keys]))
    copies, several = len(labels) - len(distinct), len(distinct) - len(np.unique(keys))
    said = []
    if copies:
        drawn = "each comes again, at its own time" if in_time else "no shot is drawn twice"
        said.append(f"{copies} pictures are copies of others of their class: {drawn}")
    if several:
        said.append(f"{several} pictures are also in another class, under another label")
    return said
