"""Writing features of pictures as a data set of their own."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kngd_ray.data._cache import FeatureCache
from kngd_ray.data._images import ImageSet
from kngd_ray.data._pictures import _in_one_move
from kngd_ray.data._source import Ints

_AT_ONCE = 8192  # rows; also those of a row group


def write_features(path: Path, images: ImageSet, rows: Ints, cache: FeatureCache) -> None:
    """Write a parquet file that :func:`~kngd_ray.data.open_images` reads, with the split that a run would draw.

    Besides a DataError of a feature that is missing, a full or read-only disk raises StorageError.

    Args:
        path: the file; it appears whole or not at all.
        images: the data set.
        rows (N,): which pictures.
        cache: where their features are.
    """
    schema = pa.schema([
        ("features", pa.list_(pa.float32(), cache.dim)),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
    ])
    names = np.array(images.class_names, object)
    with _in_one_move(path) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            vectors = cache.read(images.keys[part]).reshape(-1)
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(vectors, pa.float32()), cache.dim),
                pa.array(images.labels[part], pa.int32()),
                pa.array(names[images.labels[part]], pa.string()),
                pa.array(images.domains[part], pa.string()),
                pa.array(images.splits[part], pa.string()),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
