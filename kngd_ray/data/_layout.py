"""What the names of folders and files say: of which split, which domain and which class a picture is.

    <class>/x.png              <domain>/<class>/x.png        either below train/, test/ and val/, or with those
                                                             between domain and class, or below the class

A level of folders is one of splits where every name in it holds one word for a split, in any case, and the names have
nothing else that tells them apart: ``Train`` and ``Test``, ``train_images`` and ``val_images``, ``train2017``.

Two levels that are left may be domain/class or class/whatever: PACS and a folder of cats from the left and from the
right have the same shape. What is read in silence must not be wrong, so they are domain/class only

1. where a setting says so: ``data.layout``, a domain in ``data.train_domain`` or ``data.ood_domains``, the names in
   ``data.classes``;
2. where half of the upper names or more are words for how pictures came about or where they are from (``photo``,
   ``art_painting``, ``hospital_2``), and fewer than half of the lower names are such words, words for a side, a time
   or a part of a collection (``left``, ``winter``, ``batch_3``), or bare numbers;
3. where the lower names are as in 2, there are twice as many of them as of upper ones and six or more, and half of them
   or more are in several upper folders: classes are many and recur in each domain, domains are few.

Everything else is refused with both readings and the setting that chooses.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kngd_ray.data._config import DataConfig
from kngd_ray.data._source import DEFAULT_DOMAIN, listing
from kngd_ray.data._words import ASPECTS, BESIDE_SPLITS, JOINED, ORIGINS, SPLIT_WORDS
from kngd_ray.errors import DataError

LAYOUTS = "class/picture, train/class/picture and test/class/picture, or domain/class/picture"

Parts = tuple[str, ...]


def split_named(name: str) -> tuple[str, Parts] | None:
    """Read a split out of a name.

    Args:
        name: of a folder, or of a file without its suffix.

    Returns:
        ``train``, ``val`` or ``test``, and the other words that tell such names apart; None where the name has no word
        for a split, or words for two.
    """
    words = _words(name)
    splits = {found for word in words if (found := SPLIT_WORDS.get(word) or JOINED.get(word))}
    if len(splits) != 1:
        return None
    return splits.pop(), tuple(word for word in words if word not in {*SPLIT_WORDS, *JOINED, *BESIDE_SPLITS})


def file_splits(paths: Sequence[Path]) -> list[str | None]:
    """Read the splits out of the names of parquet files, or of the folders that tell them apart.

    Hugging Face writes ``data/train-00000-of-00002.parquet``, its converter ``default/test/0000.parquet``.

    Args:
        paths: of all files of a data set.

    Returns:
        The split that each name states, None where it states none; all None where they do not tell splits apart.
    """
    base = os.path.commonpath([path.parent for path in paths])
    found = []
    for path in paths:
        names = [path.stem, *reversed(path.parent.relative_to(base).parts)]
        found.append(next((split[0] for name in names if (split := split_named(name)) is not None), None))
    # train.parquet and more.parquet are two files to train on; test.parquet and more.parquet are not
    return found if len(set(found)) > 1 and {"val", "test"} & set(found) else [None] * len(paths)


@dataclass(frozen=True)
class Reading:
    """What folders say, one entry per picture.

    Attributes:
        splits: ``train``, ``val`` or ``test``; None where no folder states one.
        origins: the folders that state the splits.
        domains: of the pictures.
        classes: of the pictures.
        note: how the folders were read, where they could have been read otherwise.
    """

    splits: list[str | None]
    origins: list[str | None]
    domains: list[str]
    classes: list[str]
    note: str | None


def read_folders(folders: Sequence[Parts], root: Path, config: DataConfig) -> Reading:
    """Tell splits, domains and classes by the names of folders.

    Args:
        folders: per picture, the names of the folders between `root` and it.
        root: of the data set, for messages.
        config: the layout, domains and classes that are asked for.

    Returns:
        The reading.

    Raises:
        DataError: the folders are no data set, or can be read in two ways.
    """
    folders = list(folders)
    while min(map(len, folders)) > 2 and len({part[0] for part in folders}) == 1 and not split_named(folders[0][0]):
        folders = [part[1:] for part in folders]  # a folder around everything, as archives have
    splits: list[str | None] = [None] * len(folders)
    origins: list[str | None] = [None] * len(folders)
    level = _split_level(folders, root, config)
    if level is not None:
        splits = [_split(part[level]) for part in folders]
        origins = ["/".join([*("*" * level), part[level], ""]) for part in folders]
        folders = [part[:level] + part[level + 1 :] for part in folders]
    depths = {len(part) for part in folders}
    layout, note = _layout(folders, depths, root, config)
    deep = layout == "domains"
    return Reading(
        splits, origins, [part[0] if deep else DEFAULT_DOMAIN for part in folders], [p[deep] for p in folders], note
    )


def _split_level(folders: Sequence[Parts], root: Path, config: DataConfig) -> int | None:
    """The level of folders that states splits, None where none does.

    Raises:
        DataError: some folders state one, and others none.
    """
    depth = min(map(len, folders))
    if depth > 1 and _all_splits([part[0] for part in folders]):
        return 0
    inner = [part[1] for part in folders] if depth > 1 and {len(part) for part in folders} <= {2, 3} else []
    if inner and _all_splits(inner) and len({_split(name) for name in inner}) > 1:
        return 1
    tops = sorted({part[0] for part in folders if part})
    named = [name for name in tops if (found := split_named(name)) is not None and not found[1]]
    flat = max(map(len, folders)) == 1
    if named and config.layout == "auto" and (not flat or len(named) == len(tops) > 1):
        mixed = ", ".join(name for name in tops if name not in named) or "pictures without class folders"
        raise DataError(
            f"{root} mixes {', '.join(named)} with {mixed}: lay it out as {LAYOUTS}, or set data.layout=classes or"
            " data.layout=domains if none of them is a split"
        )
    return None


def _all_splits(names: Sequence[str]) -> bool:
    """Whether names are split names that differ in nothing else."""
    found = [split_named(name) for name in set(names)]
    return None not in found and len({split[1] for split in found if split is not None}) == 1


def _split(name: str) -> str:
    found = split_named(name)
    assert found is not None
    return found[0]


def _layout(folders: Sequence[Parts], depths: set[int], root: Path, config: DataConfig) -> tuple[str, str | None]:
    """Whether the outermost folders are ``domains`` or ``classes``, and a remark on it.

    Raises:
        DataError: they can be either, or the folders are too shallow or too deep.
    """
    if config.layout != "auto":
        if min(depths) < (2 if config.layout == "domains" else 1):
            wanted = "domain/class/picture" if config.layout == "domains" else "class/picture"
            raise DataError(f"{root} holds pictures outside {wanted}, which data.layout={config.layout} asks for")
        return config.layout, None
    if depths == {1}:
        return "classes", None
    if depths != {2}:
        raise DataError(
            f"{root} holds pictures at other depths than a data set: lay it out as {LAYOUTS}, or set"
            " data.layout=classes if the outermost folders are classes, whatever is in them"
        )
    tops, seconds = ({part[level] for part in folders} for level in (0, 1))
    domains, classes = listing(sorted(tops), 8), listing(sorted(seconds), 8)
    chosen = _said(tops, seconds, config)
    if chosen == "classes":
        return chosen, f"folders are read as class/..., classes {domains}, as data.classes names them"
    if chosen is None and not _clear(tops, seconds, set(folders)):
        raise DataError(
            f"{root} can be read in two ways, as domain/class with the classes {classes} in the domains {domains}, or"
            f" as class/... with the classes {domains}: set data.layout=domains or data.layout=classes"
        )
    return "domains", f"folders are read as domain/class: domains {domains} (data.layout=classes makes them classes)"


def _said(tops: set[str], seconds: set[str], config: DataConfig) -> str | None:
    """Which layout the other settings imply."""
    if ({config.train_domain} | set(config.ood_domains or ())) & tops:
        return "domains"
    named = set(config.classes or ())
    if named and (named <= tops) != (named <= seconds):
        return "classes" if named <= tops else "domains"
    return None


def _clear(tops: set[str], seconds: set[str], pairs: set[Parts]) -> bool:
    """Whether two levels of folders can only be domain/class; see the head of this module."""
    if len(tops) == 1:
        return True  # as class/... there would be one class
    if _half(seconds, ORIGINS | ASPECTS):
        return False
    if _half(tops, ORIGINS):
        return True
    shared = sum(sum(pair[1] == name for pair in pairs) > 1 for name in seconds)
    return len(seconds) >= max(6, 2 * len(tops)) and 2 * shared >= len(seconds)


def _half(names: set[str], known: frozenset[str]) -> bool:
    """Whether half of some names or more are made of known words, numbers and single letters alone."""

    def made_of_them(words: list[str]) -> bool:
        return "".join(words) in known or all(len(word) == 1 or word in known for word in words)

    return 2 * sum(made_of_them(_words(name)) for name in names) >= len(names)


def _words(name: str) -> list[str]:
    """The words of a name, in small letters: runs of letters, and what capitals tell apart in them."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word.casefold() for word in re.findall(r"[^\W\d_]+", parted)]
