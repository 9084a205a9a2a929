"""Writing features of pictures as a data set of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kngd_ray.data._cache import FeatureCache
from kngd_ray.data._crops import Crops
from kngd_ray.data._encoded_by import EncodedBy
from kngd_ray.data._given_crops import COLUMN, described
from kngd_ray.data._images import ImageSet
from kngd_ray.data._pictures import _in_one_move
from kngd_ray.data._source import Ints, Keys

_AT_ONCE = 8192  # vectors; also those of a row group


def write_features(
    path: Path,
    images: ImageSet,
    rows: Ints,
    cache: FeatureCache,
    model: EncodedBy,
    crops: Crops | None = None,
    scale: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Write a parquet file that :func:`~kngd_ray.data.open_images` reads, with the split that a run would draw.

    Besides a DataError of a feature that is missing, a full or read-only disk raises StorageError.

    Args:
        path: the file; it appears whole or not at all.
        images: the data set.
        rows (N,): which pictures.
        cache: where their features are, and those of their crops.
        model: that computed them.
        crops: of each picture, in a column of their own; None writes none.
        scale: least and greatest part of the picture's area that they are of.
    """
    fields = [
        ("features", pa.list_(pa.float32(), cache.dim)),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
    ]
    if crops is not None:
        fields.append((COLUMN, pa.list_(pa.float32(), crops.count * cache.dim)))
    schema = pa.schema(fields, model.metadata() | ({} if crops is None else described(crops, scale)))
    at_once = max(1, _AT_ONCE // (1 if crops is None else 1 + crops.count))
    names = np.array(images.class_names, object)
    with _in_one_move(path) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            keys = images.keys[part]
            columns = [
                _lists(cache, keys, 1),
                pa.array(images.labels[part], pa.int32()),
                pa.array(names[images.labels[part]], pa.string()),
                pa.array(images.domains[part], pa.string()),
                pa.array(images.splits[part], pa.string()),
            ]
            if crops is not None:
                columns.append(_lists(cache, crops.keys(keys).ravel(), crops.count))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _lists(cache: FeatureCache, keys: Keys, each: int) -> Any:
    """Features of `keys` (m * each,) as m lists of `each` of them."""
    values = pa.array(cache.read(keys).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(values, each * cache.dim)
