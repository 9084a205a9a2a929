"""Features of a few classes and domains, made of seeded numbers, and class embeddings that know something of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLASSES = ("ant", "bee", "cow")
DOMAINS = ("photo", "sketch")
WIDTH = 8
TRAIN_ROWS, TEST_ROWS = 6, 10  # per class and domain
SCALE = 20.0


def class_embeddings() -> np.ndarray:
    """(3, 8) unit rows."""
    texts = np.random.default_rng(0).normal(size=(len(CLASSES), WIDTH))
    return (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)


def feature_table(*, length: float = 1.0, noise: float = 0.25) -> pa.Table:
    """Rows around their class embedding, the second domain noisier, with the columns of a data set of features."""
    random = np.random.default_rng(1)
    texts, rows = class_embeddings(), []
    for label, name in enumerate(CLASSES):
        for domain, spread in zip(DOMAINS, (noise, 1.6 * noise), strict=True):
            for split, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
                for _ in range(count):
                    vector = texts[label] + spread * random.normal(size=WIDTH)
                    vector *= length / np.linalg.norm(vector)
                    rows.append({
                        "features": vector.astype(np.float32),
                        "label": label,
                        "class_name": name,
                        "domain": domain,
                        "split": split,
                    })
    column = pa.array([row["features"].tolist() for row in rows], pa.list_(pa.float32(), WIDTH))
    rest = {key: [row[key] for row in rows] for key in ("label", "class_name", "domain", "split")}
    return pa.table({"features": column, **rest})


def with_vectors(table: pa.Table, vectors: list, kind: pa.DataType | None = None) -> pa.Table:
    """The table with other features."""
    return table.set_column(0, "features", pa.array(vectors, kind or pa.list_(pa.float64())))


def write_features(folder: Path, table: pa.Table | None = None, texts: np.ndarray | None = None) -> tuple[Path, Path]:
    """Features and class embeddings as files."""
    data, classes = folder / "rows.parquet", folder / "classes.npy"
    pq.write_table(feature_table() if table is None else table, data, row_group_size=32)
    np.save(classes, class_embeddings() if texts is None else texts)
    return data, classes
