"""Filter functions under ``torch.func.vmap``, which cannot branch on numbers: no number is looked at until all is done.

What goes wrong rarely (a matrix that does not factor, numbers that are not finite) is looked for where it may happen,
and dealt with there. A transform that advances many trials together has no answer to such a question. In functional
mode it is not asked: what cannot be computed is NaN. The caller, who sees the trials side by side again, repeats those
that are not finite, each alone and eagerly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kngd_ray._deferred import Tensor, torch

_EAGER = ContextVar("eager", default=True)


@contextmanager
def functional_mode() -> Iterator[None]:
    """A stretch of code in which failures are NaN."""
    token = _EAGER.set(False)
    try:
        yield
    finally:
        _EAGER.reset(token)


def eager() -> bool:
    """Whether numbers may be looked at."""
    return _EAGER.get()


def cholesky(P: Tensor) -> Tensor | None:
    """The Cholesky factor of symmetric matrices.

    Args:
        P: (..., n, n) symmetric.

    Returns:
        (..., n, n) lower factor; None if one of the matrices is not positive definite. In functional mode the factor of
        such a matrix is NaN instead.
    """
    L, info = torch.linalg.cholesky_ex(P)
    if not eager():
        return torch.where((info == 0)[..., None, None], L, torch.nan)
    return None if bool(info.any()) else L
