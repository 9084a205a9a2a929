"""One thread for what is small: batches of a dozen pictures gain nothing from more, and lose much on a busy machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs and searches of this process take one thread, where they would take all cores."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for package in ("experiment", "tuning"):
            patch.setattr(f"kngd_ray.{package}.run.cores", lambda: 1)
        yield
