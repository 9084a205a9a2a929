"""``kngd-ray predict``: class, probability and uncertainty of picture files, or of features in parquet files."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kngd_ray._option import option
from kngd_ray._run_layout import CONFIG
from kngd_ray.clip import PrecomputedModel
from kngd_ray.console import Display
from kngd_ray.data import (
    SUFFIXES,
    BadImage,
    EncodedBy,
    by_suffix,
    decode,
    encoder_of,
    of_a_system,
    read_features,
    unread,
)
from kngd_ray.errors import DataError, UsageError
from kngd_ray.experiment.features import check_encoder
from kngd_ray.experiment.gallery import Card, gallery
from kngd_ray.experiment.html import check_path
from kngd_ray.experiment.run_folder import find_fit, read_config
from kngd_ray.storage import address, write_text
from kngd_ray.training.classifier import Classifier

_FEATURES = ".parquet"
_REMEDY = "replace it, or name its folder, of which it is left out"
_BATCH = 64  # decoded pictures held at once
_ENDLESS = 100_000  # characters of a line
_INTERVAL = "90 % interval"
_FIGURES = ("probability", _INTERVAL, "novelty", "logit std", "uncertainty (nats)")
_WIDE = 2  # of the figures, at the end, that only a wide terminal shows


def predict(
    target: str,
    images: Sequence[str],
    storage_path: str,
    display: Display,
    *,
    html: Path | None = None,
    table: bool = True,
) -> list[dict[str, Any]]:
    """Classify picture files, or the rows of parquet files where the fit learned from features.

    Args:
        target: run, fit or checkpoint.
        images: the files; of a folder, all pictures in it and below, but for those that cannot be decoded, or
            lie in a folder that is a link or a system's own.
        storage_path: where runs live.
        display: where the table is shown.
        html: where a gallery is written; None writes none.
        table: whether one is shown.

    Returns:
        Per picture: ``image``, ``class``, ``probability``, ``probability_low`` and ``probability_high`` (its 90 %
        interval, should shots be added), ``novelty`` (percentile, 0 to 1: share of the held-out shots that the fit is
        surer of), ``uncertainty`` (entropy, nats), ``logit_std`` (of that class) and ``probabilities`` by class. None
        for what is not known. Of features ``file`` and ``row``, counted from 0, stand for ``image``.

    Raises:
        DataError: a file is missing or unreadable, or there is no picture or no row.
    """
    if html is not None:
        check_path(html, option("html"))
    apart: list[Path] = []
    if not (files := list(_files(images, apart))) and not any(name.casefold().endswith(_FEATURES) for name in images):
        raise DataError(f"there is no picture in {', '.join(images)}: name picture files, or a folder of them.")
    folder = find_fit(target, storage_path)
    classifier = Classifier.load(folder)
    if classifier.takes_features:
        rows = _classify_features(classifier, images, folder, html, display)
        if table:
            _show(rows, [f"{row['file']}, row {row['row']}" for row in rows], "feature", display)
        return rows
    rows = []
    cards: list[Card] = []
    left_out: list[BadImage] = []
    for start in range(0, len(files), _BATCH):
        opened = [(str(path), _open(path, named)) for path, named in files[start : start + _BATCH]]
        left_out += [error for _, error in opened if isinstance(error, BadImage)]
        batch = [(name, picture) for name, picture in opened if not isinstance(picture, BadImage)]
        if not batch:
            continue
        for (name, picture), said in zip(batch, _said(classifier, [picture for _, picture in batch]), strict=True):
            rows.append({"image": name, **said})
            if html is not None:
                cards.append(Card.of(rows[-1], picture))
    if passed := Counter(path.suffix.lower() for name in images if os.path.isdir(name) for path in unread(Path(name))):
        display.say(f"skipped because of their suffix: {by_suffix(passed)}")
    if apart:
        display.say(f"links and a system's folders left out: {len(apart)}, the first is {apart[0]}; name those meant")
    if left_out:
        first = str(left_out[0]).removesuffix(f"; {_REMEDY}")
        display.say(f"undecodable pictures left out: {len(left_out)}, the first is {first}")
    if not rows:
        raise DataError(f"none of the pictures in {', '.join(images)} can be decoded.")
    if table:
        _show(rows, [row["image"] for row in rows], "image", display)
    if html is not None:
        write_text(html, gallery(f"predictions of {folder.name}", cards, compared=classifier.novelty is not None))
        display.say(f"gallery: {html}")
    return rows


def _said(classifier: Classifier, inputs: Sequence[Image.Image] | Tensor) -> list[dict[str, Any]]:
    """What is said of pictures or features, with the names that the command has for it."""
    names = classifier.class_names
    return [
        {**row, "probabilities": dict(zip(names, row["probabilities"], strict=True))}
        for row in classifier.classify(inputs).rows(names)
    ]


def _classify_features(
    classifier: Classifier, files: Sequence[str], fit: Path, html: Path | None, display: Display
) -> list[dict[str, Any]]:
    """Classify the rows of parquet files.

    Raises:
        UsageError: a gallery is asked for, or a file is no parquet file.
        DataError: there is no row.
    """
    if html is not None:
        raise UsageError(f"{option('html')} shows pictures, and {fit.name} learned from features: leave it out.")
    other = next((name for name in files if not name.casefold().endswith(_FEATURES)), None)
    if other is not None:
        raise UsageError(
            f"{fit.name} learned from features, and {other} is not a parquet file with a column `features`: kngd-ray "
            "encode --out writes one of pictures."
        )
    run = next((folder for folder in (fit, *fit.parents) if (folder / CONFIG).is_file()), None)
    columns = None if run is None else read_config(run).data.columns
    rows: list[dict[str, Any]] = []
    model = classifier.model
    assert isinstance(model, PrecomputedModel)
    for name in files:
        if Path(name).is_file():
            check_encoder(encoder := encoder_of(Path(name)), model, name)
            if encoder is None and model.encoded_by is not None:
                display.say(EncodedBy.unstated(name, "that of the features that the fit learned from"))
        for first, vectors in read_features(Path(name), model.embed_dim, columns):
            for n, said in enumerate(_said(classifier, torch.from_numpy(vectors))):
                rows.append({"file": name, "row": first + n, **said})
    if not rows:
        raise DataError(f"{', '.join(files)} has no rows: name parquet files with features in them.")
    return rows


def _files(images: Sequence[str], apart: list[Path]) -> Iterator[tuple[Path, bool]]:
    """The picture files, and whether each was named itself; files of a folder are sorted by name.

    Folders that are links, which may lead anywhere, and those that systems create, with thumbnails of what is there
    already, are added to `apart`.

    Raises:
        DataError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}): check its permissions.") from error

    for name in images:
        path = Path(name)
        if not path.exists() and address(name) is not None:
            raise DataError(f"{name} is an address, and nothing is downloaded: download it, and name the file.")
        if not path.is_dir():
            yield path, True
            continue
        found = []
        for place, folders, files in os.walk(path, onerror=refuse):
            shown = sorted(folder for folder in folders if not folder.startswith("."))
            apart += [Path(place, name) for name in shown if of_a_system(name) or Path(place, name).is_symlink()]
            folders[:] = [name for name in shown if not of_a_system(name)]  # links are not walked into
            found += [Path(place, file) for file in files if Path(file).suffix.lower() in SUFFIXES and file[0] != "."]
        yield from ((file, False) for file in sorted(found))


def _open(path: Path, named: bool) -> Image.Image | BadImage:
    """A picture; the error of one that cannot be decoded and was not named itself.

    Raises:
        DataError: one that was named cannot be decoded, or a file cannot be read.
        BadImage: it cannot be decoded.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"the picture {path} cannot be read (it is not a regular file): check the path.")
        return decode(path.read_bytes(), str(path), _REMEDY)
    except BadImage as error:
        if named:
            raise
        return error
    except OSError as error:
        raise DataError(f"the picture {path} cannot be read ({error.strerror}): check the path.") from error


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Predictions as a table for programs; the probabilities of all classes are in JSON alone.

    Args:
        rows: of :func:`predict`.

    Returns:
        CSV with a line of names; what is not known is empty.
    """
    stream = io.StringIO()
    names = [name for name in rows[0] if name != "probabilities"]
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _show(rows: Sequence[dict[str, Any]], names: Sequence[str], kind: str, display: Display) -> None:
    """Print the table: as wide as it needs to be in a log, with fewer figures on a narrow terminal, none cut off."""
    table, out = _table(rows, names, kind, _FIGURES), display.out
    width = out.width
    wanted = out.measure(table, options=out.options.update(max_width=_ENDLESS)).maximum
    if not out.is_terminal:
        out.width = max(width, wanted)
    elif wanted > width:
        table = _table(rows, names, kind, _FIGURES[:-_WIDE])
    out.print(table)
    out.width = width
    if out.is_terminal and wanted > width:
        left_out = " and ".join(_FIGURES[-_WIDE:])
        display.say(f"{left_out} are left out, as this terminal has under {wanted} columns; CSV and JSON have them")


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str], kind: str, figures: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (kind, "class", *figures):  # names and intervals are told in several lines before a figure is cut
        table.add_column(column, no_wrap=column in figures and column != _INTERVAL, overflow="fold")
    for name, row in zip(names, rows, strict=True):
        low, high, novelty = row["probability_low"], row["probability_high"], row["novelty"]
        shown = (
            f"{row['probability']:.3f}",
            "–" if low is None else f"{low:.3f} to {high:.3f}",
            "–" if novelty is None else f"{novelty:.2f}",
            f"{row['logit_std']:.3f}",
            f"{row['uncertainty']:.3f}",
        )
        table.add_row(escape(name), escape(row["class"]), *shown[: len(figures)])
    return table
