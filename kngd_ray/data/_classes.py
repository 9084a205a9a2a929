"""Class names and labels: from what the rows carry, and from the class list of the configuration."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from kngd_ray.data._source import Ints, Rows, hint, listing
from kngd_ray.data._words import JOINED, SPLIT_WORDS
from kngd_ray.errors import DataError

LabelOrder = Literal["numbers", "text", "digits"]
_BETWEEN_WORDS = re.compile(r"[\s_.\-]+")


def resolve_classes(
    rows: Rows, classes: Sequence[str] | None, *, absent: bool = False
) -> tuple[Ints, tuple[str, ...], tuple[str, ...]]:
    """Number the classes from 0.

    Args:
        rows: labels and names of N rows. Names win; bare numbers are named by `classes`.
        classes: selects and orders the names of the rows, or names their numbers; None for all.
        absent: whether `classes` may name some that no row is of.

    Returns:
        Labels (N,), -1 for rows of a class that is not selected; the selected names; and the names of all classes in
        order of their labels.

    Raises:
        DataError: when a label is missing, negative, unnamed or named twice, or a class is unknown.
    """
    _check_labels(rows)
    named = any(name is not None for name in rows.names)
    if not named and classes is not None:
        return _by_number(rows, classes), tuple(classes), tuple(classes)
    first: dict[int | str, int] = {}  # per label, the row that named it
    for row, (label, name) in enumerate(zip(rows.labels, rows.names, strict=True)):
        if name in {None, ""} or label is None:
            lost = [n for n, found in enumerate(rows.names) if found in {None, ""}]
            raise DataError(
                f"{rows.source.place(row)}: label {label!r} has no class name{_others(lost, rows)}:"
                " add a class_name column, or list the names in data.classes"
            )
        before = first.setdefault(label, row)
        if rows.names[before] != name:
            raise DataError(
                f"label {label!r} is {rows.names[before]!r} in {rows.source.place(before)} but {name!r} in"
                f" {rows.source.place(row)}: give all files one class list"
            )
    ordered = [str(rows.names[first[label]]) for label in sorted(first)]
    for before_name, name in pairwise(sorted(ordered)):
        if name == before_name:
            raise DataError(f"class {name!r} has several labels: give each class one label")
    chosen = tuple(ordered if classes is None else classes)
    if absent:
        chosen = tuple(name for name in chosen if name in ordered)
    for name in chosen:
        if name not in ordered:
            raise DataError(
                f"class {name!r} is not in the data set{hint(name, ordered)}:"
                f" data.classes must name some of {listing(ordered)}"
            )
    number = {name: n for n, name in enumerate(chosen)}
    return np.array([number.get(str(name), -1) for name in rows.names], np.int64), chosen, tuple(ordered)


def order_of(labels: Sequence[int | str | None]) -> LabelOrder:
    """Tell how labels are ordered.

    Args:
        labels: of N rows, numbers or text.

    Returns:
        `text` of text; `digits` if it is all whole numbers, which are in another order as text.
    """
    distinct = sorted({label for label in labels if isinstance(label, str)})
    if not distinct:
        return "numbers"
    numbers = [int(label) for label in distinct if label.removeprefix("-").isdecimal()]
    return "digits" if len(numbers) == len(distinct) and numbers != sorted(numbers) else "text"


def named_as_splits(class_names: Sequence[str]) -> list[str]:
    """Return a sentence on classes whose names differ by the word of a split alone, `Forest_train` and `Forest_test`.

    Args:
        class_names: the classes.

    Returns:
        None or one.
    """
    alike: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in class_names:
        rest, split = _beside_split(name)
        alike[rest][split].append(name)
    found = []
    for by_split in alike.values():
        bare = by_split.pop("", [])
        stated = [name for names in by_split.values() for name in names]
        # "toy" and "toy train" are two things, "toy" and "toy_train" hardly
        if len(by_split) > 1 or (bare and any(" " not in name for name in stated)):
            found.append(bare + stated)
    if not found:
        return []
    shown = listing([" and ".join(repr(name) for name in names) for names in found], 3)
    return [
        f"classes differ by the word of a split alone, {shown}: if it is one, put them in folders train/ and test/, or"
        " state it in a column `split`"
    ]


def _beside_split(name: str) -> tuple[tuple[str, ...], str]:
    """The words of a name but for that of a split at either end, and the split; empty where there is none."""
    words = tuple(word.casefold() for word in _BETWEEN_WORDS.split(name.strip()))
    for word, rest in ((words[-1], words[:-1]), (words[0], words[1:])):
        split = SPLIT_WORDS.get(word) or JOINED.get(word)
        if split is not None and rest:
            return rest, split
    return words, ""


def _check_labels(rows: Rows) -> None:
    """Refuse labels that name no class.

    Raises:
        DataError: for the first null or negative label, or for a mix of numbers and names.
    """
    lost = [row for row, label in enumerate(rows.labels) if label is None or label == ""]
    if lost:
        raise DataError(f"{rows.source.place(lost[0])} has no label{_others(lost, rows)}: fill it in or drop the row")
    for row, label in enumerate(rows.labels):
        if isinstance(label, int) and label < 0:
            drop = ", and drop rows without a class" if label == -1 else ""  # Hugging Face's mark of such
            raise DataError(f"{rows.source.place(row)}: label {label} is negative: number classes from 0{drop}")
        if isinstance(label, str) != isinstance(rows.labels[0], str):
            raise DataError(
                f"{rows.source.place(0)} has a label {rows.labels[0]!r} but {rows.source.place(row)}"
                f" {label!r}: use numbers or class names, not both"
            )


def _others(lost: Sequence[int], rows: Rows) -> str:
    """How many further rows have the same fault."""
    return f", as {len(lost)} of {len(rows.labels)} rows" if len(lost) > 1 else ""


def _by_number(rows: Rows, classes: Sequence[str]) -> Ints:
    """Return the labels (N,) of rows without names.

    Raises:
        DataError: when a label is beyond the class list.
    """
    labels = np.array(rows.labels, np.int64)
    beyond = np.flatnonzero(labels >= len(classes))
    if len(beyond):
        raise DataError(
            f"{rows.source.place(int(beyond[0]))}: label {labels[beyond[0]]} has no class name:"
            f" data.classes names {len(classes)} classes, labels 0 to {len(classes) - 1}"
        )
    return labels
