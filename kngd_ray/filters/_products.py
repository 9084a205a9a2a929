"""Large products of float32 matrices, at the rate that the processor has.

On x86 torch leaves them to MKL, which keeps AVX-512 to Intel's processors: others multiply at half their rate. oneDNN,
which torch holds for convolutions and for 16 bits, makes no such difference. Measured on one core of an AMD EPYC, of
(544, 512) by (512, 128): 106 GFLOP/s by MKL, 235 by oneDNN. On Intel's the two are alike.

Either rounds in an order of its own, the same from run to run.
"""

from functools import cache

from kngd_ray._deferred import Tensor, torch
from kngd_ray.filters.functional_mode import eager

_LARGE = 1 << 24  # multiply-adds; smaller products between other work gain nothing, as measured


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices.

    Args:
        a: (p, q).
        b: (q, r).

    Returns:
        (p, r) a b.
    """
    if not _pays(a, b):
        return a @ b
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return result


def _pays(a: Tensor, b: Tensor) -> bool:
    """Whether a product is for oneDNN: it has no rules for derivatives, nor for many trials at once."""
    return (
        a.dtype == b.dtype == torch.float32
        and a.shape[0] * b.numel() >= _LARGE
        and a.is_cpu
        and eager()
        and _at_hand()
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
    )


@cache
def _at_hand() -> bool:
    """Whether torch was built with oneDNN, has the functions that its compiler calls it by, and can gain from it."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
