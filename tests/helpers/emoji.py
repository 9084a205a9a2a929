"""A few emoji of the shipped data set, as a table of their own."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import kngd_ray

CLASSES = ("bird", "flower", "building")
DOMAINS = ("noto", "twemoji")
EMOJI = Path(kngd_ray.__file__).parent / "assets" / "emoji.parquet"
TRAIN_ROWS, TEST_ROWS = 5, 4  # per class and domain


def small_table(classes: Sequence[str] = CLASSES, domains: Sequence[str] = DOMAINS) -> pa.Table:
    """A few emoji of each class, domain and split, with the columns of the whole set."""
    emoji = pq.read_table(EMOJI)
    parts = []
    for label, name in enumerate(classes):
        for domain in domains:
            for split, rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
                chosen = pc.and_(pc.equal(emoji["class_name"], name), pc.equal(emoji["domain"], domain))
                part = emoji.filter(pc.and_(chosen, pc.equal(emoji["split"], split))).slice(0, rows)
                assert len(part) == rows, (name, domain, split, len(part))
                column = part.schema.get_field_index("label")
                parts.append(part.set_column(column, "label", pa.array([label] * rows, pa.int32())))
    return pa.concat_tables(parts)
