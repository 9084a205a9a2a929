"""Large products are those of torch up to rounding, whoever computes them, and where only torch has rules for them."""

import pytest
import torch

from kngd_ray.filters import _products
from kngd_ray.filters._products import product
from kngd_ray.filters.functional_mode import functional_mode

LARGE = 300, 260, 290  # above the least size, and no multiple of a vector's width
SMALL = 3, 4, 5


def matrices(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (p, q) and (q, r)."""
    p, q, r = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((p, q), (q, r)))
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_is_that_of_float64_in_every_layout(shape, dtype, bound, transposed):
    a, b = (x.mT.contiguous().mT if turned else x for x, turned in zip(matrices(shape, dtype), transposed, strict=True))
    found, expected = product(a, b), a.double() @ b.double()
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert (found - expected).abs().max() < bound * expected.abs().max()
    assert torch.equal(found, product(a, b))


def test_the_large_ones_are_large_enough():
    a, b = matrices(LARGE, torch.float32)
    assert _products._pays(a, b) == _products._at_hand()
    assert not _products._pays(*matrices(SMALL, torch.float32))
    assert not _products._pays(a.double(), b.double())


def test_derivatives_and_transforms_are_torchs():
    a, b = matrices(LARGE, torch.float32)
    product(a.requires_grad_(), b).sum().backward()
    assert torch.allclose(a.grad, b.sum(1).expand_as(a), atol=1e-4)
    several = torch.stack([b, 2 * b])
    with functional_mode():
        found = torch.func.vmap(product, in_dims=(None, 0))(a.detach(), several)
    assert torch.allclose(found, a.detach() @ several, atol=1e-3)
