"""Packages that were built for another torch than the one that is installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from kngd_ray._deferred import torch
from kngd_ray.errors import KngdError


@contextmanager
def torchvision_errors() -> Iterator[None]:
    """Turn the error of a torchvision that does not fit torch into a sentence; also a decorator.

    torchvision registers its operators when open_clip or torchmetrics imports it, and fails there.

    Yields:
        Nothing.

    Raises:
        KngdError: torchvision was built for another torch.
        RuntimeError: any other, as it was raised.
    """
    try:
        yield
    except RuntimeError as error:
        if "torchvision" not in str(error):
            raise
        raise KngdError(
            f"torchvision was built for another torch than {torch.__version__} ({error}): install both again, together "
            "and from one package index."
        ) from error
