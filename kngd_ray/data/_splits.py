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
    if stated is None:
        sides = np.where(chosen, "train", "").astype("U5")
        sources = ["no split is stated"]
    else:
        sides = np.where(chosen, stated, "").astype("U5")
        sources = [_source(rows, sides, split, val) for split in ("train", "test", "val") if (sides == split).any()]
        sides[sides == "val"] = "" if val == "ignore" else val
    ignored = stated is not None and bool((chosen & (stated == "val") & (sides == "")).any())
    if ignored and (not (sides != "").any() or (fraction >= 1 and not (sides == "test").any())):
        raise DataError(
            f"{rows.source.place(0)}: the data states pictures for validation and none to test on, and data.val=ignore"
            " leaves them out: set data.val=test, or data.val=train"
        )
    if not (sides == "test").any():
        left = np.flatnonzero(sides == "train")
        sides[left] = hash_split(labels[left], domains[left], keys[left], fraction)
        how = "all are tested on" if fraction >= 1 else f"{fraction:.0%} of each class and domain are held out to test"
        sources.append(f"none to test on is stated, {how}" if stated is not None else how)
    trained, tested = (int((sides == side).sum()) for side in ("train", "test"))
    return sides, f"{trained} pictures to train on, {tested} to test on: {'; '.join(sources)}"


def _source(rows: Rows, sides: Names, split: str, val: str) -> str:
    """Say how many pictures are of a split, and what states it."""
    here = np.flatnonzero(sides == split)
    origins = list(dict.fromkeys(str(rows.origins[row]) for row in here.tolist()))
    said = f"{split} {len(here)} ({listing(origins, 4)})"
    use = {"ignore": "left out", "train": "trained on", "test": "tested on"}[val]
    return f"{said}, {use} by data.val={val}" if split == "val" else said


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


def count_copies(labels: Ints, keys: Keys) -> Sequence[str]:
    """Return sentences that count pictures which are there more than once.

    Args:
        labels (N,): class numbers.
        keys (N,): picture hashes.

    Returns:
        One on copies within classes and one on pictures in several classes, each if there are any.
    """
    distinct = np.unique(np.rec.fromarrays([labels, keys]))
    copies, several = len(labels) - len(distinct), len(distinct) - len(np.unique(keys))
    said = []
    if copies:
        said.append(f"{copies} pictures are copies of others of their class: no shot is drawn twice")
    if several:
        said.append(f"{several} pictures are also in another class, under another label")
    return said
