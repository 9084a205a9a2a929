"""The order of a stream: domain after domain, or as a column of the files says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kngd_ray.data._images import ImageSet
from kngd_ray.data._parquet import open_parquet
from kngd_ray.data._source import Ints, hint, listing
from kngd_ray.errors import DataError


def in_order(images: ImageSet, usable: npt.NDArray[np.bool_], order: Sequence[str], shots: int, seed: int) -> Ints:
    """Draw the shots of a stream, domain after domain.

    Each class of each domain has a permutation of its own, so that domains whose rows are the same objects in other
    styles do not all come with the same ones. Shots of a domain come in an order that is drawn too: sorted by class, a
    batch would hold one class. A domain that comes back comes with the next shots of its permutations. No picture is
    drawn twice, nor a copy of it within its class.

    Args:
        images: the data set.
        usable: (N,) which pictures may be learned from.
        order: the domains, known ones.
        shots: pictures per class and visit.
        seed: draws them.

    Returns:
        Indices (len(order) * C * shots,), in the order of the stream.

    Raises:
        DataError: a domain has too few pictures of a class for all of its visits.
    """
    known = sorted(set(images.domains.tolist()))
    visits: dict[str, int] = {}
    parts: list[Ints] = []
    rows = np.flatnonzero(usable & np.isin(images.domains, order))
    of_key = np.rec.fromarrays([images.labels[rows], images.keys[rows]])
    first = np.zeros(len(images.labels), np.bool_)
    first[rows[np.unique(of_key, return_index=True)[1]]] = True
    for domain in order:
        visit = visits[domain] = visits.get(domain, -1) + 1
        drawn = []
        for label, name in enumerate(images.class_names):
            own = usable & (images.domains == domain) & (images.labels == label)
            pool = np.flatnonzero(own & first)
            needed = order.count(domain) * shots  # of all visits
            if len(pool) < needed:
                times = f", {order.count(domain)} times {shots}" if order.count(domain) > 1 else ""
                copies = f" ({found} with copies)" if (found := int(own.sum())) > len(pool) else ""
                raise DataError(
                    f"class {name!r} has {len(pool)} pictures of domain {domain!r} to learn from{copies}, fewer than "
                    f"{needed} shots{times}: lower data.shots, add pictures, or leave the class or the domain out"
                )
            permuted = np.random.default_rng([seed, label, known.index(domain)]).permutation(pool)
            drawn.append(permuted[visit * shots : (visit + 1) * shots])
        parts.append(
            np.random.default_rng([seed, len(parts), len(images.class_names)]).permutation(np.concatenate(drawn))
        )
    return np.concatenate(parts)


def in_time(images: ImageSet, usable: npt.NDArray[np.bool_], column: str) -> Ints:
    """The rows of a stream as they came.

    Args:
        images: the data set.
        usable: (N,) which rows may be learned from.
        column: of the parquet files, that says when.

    Returns:
        Indices of the usable rows, by time, those of one time in the order of the files.

    Raises:
        DataError: there is no such column, it is of a type that has no order, or a row has no time.
    """
    if images.kind != "parquet":
        raise DataError(
            "data.time names a column of a parquet file, and data.path is a folder: name data.order instead"
        )
    columns = [_column(Path(path), column) for path in images.source.paths]
    kinds = {str(found.type): path for found, path in zip(columns, images.source.paths, strict=True)}
    if len(kinds) > 1:
        types = " and ".join(f"{kind} in {path}" for kind, path in kinds.items())
        raise DataError(f"data.time: column {column!r} is {types}: give all files one type")
    times = pa.chunked_array([chunk for found in columns for chunk in found.chunks], columns[0].type)
    rows = np.flatnonzero(usable)
    if not len(rows):
        raise DataError("data.time: there are no rows to learn from: add train rows")
    chosen = times.take(pa.array(images.rows[rows]))
    lost = np.flatnonzero(pc.is_null(chosen, nan_is_null=True).to_numpy(zero_copy_only=False))
    if len(lost):
        raise DataError(
            f"{images.place(int(rows[lost[0]]))} has no time in column {column!r}: give it one, or drop the row"
        )
    _, ranks = np.unique(chosen.to_numpy(), return_inverse=True)
    return rows[np.argsort(ranks, kind="stable")]


def _column(path: Path, column: str) -> Any:
    """A column that says when the rows of a file came.

    Raises:
        DataError: it has none of that name, or it has no order.
    """
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(f"data.time: {path} has no column {column!r}{hint(column, names)}: it has {listing(names)}")
        kind = file.schema_arrow.field(column).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind)):
            raise DataError(f"data.time: column {column!r} of {path} is {kind}: it must be numbers, dates or times")
        return file.read(columns=[column]).column(0)
