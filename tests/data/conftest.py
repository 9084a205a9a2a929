"""Real pictures and data sets of a few rows, written where the test wants them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

Png = Callable[[int], bytes]
WriteParquet = Callable[..., Path]


@pytest.fixture(scope="session")
def png() -> Png:
    """A 4 x 4 picture for every number, all different."""

    def make(number: int) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()

    return make


@pytest.fixture
def write_parquet(tmp_path: Path, png: Png) -> WriteParquet:
    """Write columns to a parquet file; without an image column, row n gets picture `first` + n."""

    def write(name: str = "set.parquet", first: int = 0, row_group_size: int = 7, **columns: Any) -> Path:
        rows = len(next(iter(columns.values())))
        columns = {"image": pa.array([png(first + n) for n in range(rows)], pa.binary())} | columns
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
        return path

    return write


@pytest.fixture
def pets(write_parquet: WriteParquet) -> Path:
    """2 classes x 2 domains x (6 train + 3 test): 36 rows."""
    rows = [
        (label, domain, split)
        for domain in ("photo", "sketch")
        for label in (0, 1)
        for split in ["train"] * 6 + ["test"] * 3
    ]
    labels, domains, splits = (list(column) for column in zip(*rows, strict=True))
    names = [("cat", "dog")[label] for label in labels]
    return write_parquet("pets.parquet", label=labels, class_name=names, domain=domains, split=splits)


@pytest.fixture
def write_folder(tmp_path: Path, png: Png) -> Callable[..., Path]:
    """Write a picture to each relative path, picture n to the nth."""

    def write(*paths: str, root: str = "pictures") -> Path:
        for number, path in enumerate(paths):
            file = tmp_path / root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(number))
        return tmp_path / root

    return write
