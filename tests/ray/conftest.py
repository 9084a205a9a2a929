"""A Ray instance of two cores for the tests of a module, and a small data set of real pictures."""

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from kngd_ray.cluster import ray_session

CLASSES = ("bird", "flower", "fruit", "road vehicle")


@pytest.fixture(scope="module")
def ray_up() -> Iterator[None]:
    """For each module its own: of processes that one has killed, Ray does not always get the cores back."""
    with ray_session("local", cpus=2):
        yield


def small_table() -> pa.Table:
    """Four classes of the shipped emoji in two styles, 11 train and up to 8 test pictures each."""
    with resources.as_file(resources.files("kngd_ray") / "assets" / "emoji.parquet") as path:
        table = pq.read_table(path, columns=["image", "class_name", "domain", "split"])
    kept = []
    for name in CLASSES:
        for domain in ("noto", "twemoji"):
            for split, most in (("train", 11), ("test", 8)):
                mask = pc.and_(
                    pc.and_(pc.equal(table["class_name"], name), pc.equal(table["domain"], domain)),
                    pc.equal(table["split"], split),
                )
                kept.append(table.filter(mask).slice(0, most))
    return pa.concat_tables(kept)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.parquet"
    pq.write_table(small_table(), path)
    return path


@pytest.fixture
def settings(small_data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Settings of a run on the small data that leaves everything in the test's folder."""
    cache = tmp_path_factory.getbasetemp() / "features"

    def of(name: str, workers: int) -> list[str]:
        return [
            f"data.path={small_data}",
            "data.train_domain=noto",
            f"data.cache_dir={cache}",
            f"trainer.storage_path={tmp_path / 'runs'}",
            f"trainer.name={name}",
            f"trainer.num_workers={workers}",
            f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
            "tracking.log_model=false",
        ]

    return of
