"""Blocks: where they lie, and that inside each the filter is the dense one."""

from itertools import pairwise

import pytest
import torch
from helpers.compare import max_error
from helpers.jacobians import (
    DOUBLE,
    LAYERS,
    mixed_jacobian,
    posterior,
    randn,
    random_factors,
    stacked_rows,
    whole,
)

from kngd_ray.filters import Belief, BlockDiagonal, Covariance, Diagonal, Layer, Part, update

N = sum(layer.size for layer in LAYERS)
START = torch.zeros(N, dtype=DOUBLE)


def full(P: Covariance) -> torch.Tensor:
    """All layers' blocks as one matrix; row j of a state is that of weight j from the start of its block on."""
    layers = []
    for state in P.values():
        rows = state["covariance"]
        n, b = rows.shape
        matrix = torch.zeros(n, n + b, dtype=rows.dtype)
        for j, row in enumerate(rows):
            matrix[j, j // b * b : j // b * b + b] = row
        assert not bool(matrix[:, n:].any()), "what fills up the last block is zero"
        layers.append(matrix[:, :n])
    return torch.block_diag(*layers)


@pytest.mark.parametrize(
    ("o", "i", "size", "block", "grain"),
    [
        (128, 512, 64, 64, 1),  # pieces of a row
        (128, 48, 64, 48, 1),  # a row
        (128, 20, 64, 60, 3),  # three rows
        (2, 20, 64, 40, 2),  # all
        (8, 100, 64, 50, 1),  # equal pieces
        (8, 7, 4, 4, 4),  # pieces that reach over the ends of rows
        (2, 7, 4, 4, 2),
        (100, 1, 64, 64, 64),  # a bias
        (3, 5, 1, 1, 1),  # a diagonal
    ],
)
def test_blocks_are_rows_or_pieces_of_rows(o, i, size, block, grain):
    family, layer = BlockDiagonal(size=size), Layer("w", o, i, factored=True)
    assert (family.block(layer), family.grain(layer)) == (block, grain)
    assert family.cost(layer) == o * i * block
    assert family.init(whole(layer), 1.0, START)["w"]["covariance"].shape == (o * i, block)
    assert (family.grain(layer) * i) % block == 0 or family.grain(layer) == o


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 64])
def test_update_is_the_dense_one_inside_the_blocks(size):
    family, q = BlockDiagonal(size=size), 0.01
    belief = Belief(START, family.init(whole(*LAYERS), 0.4, START))
    mask = full(_everything(family)) > 0
    for t in range(5):
        H, nu = mixed_jacobian(k=2, seed=10 * t), randn(6, seed=t)
        predicted = family.predict(belief.covariance, 0.9, q, lambda x: x)
        P = full(predicted)
        assert max_error(P, 0.9 * full(belief.covariance) + q * torch.eye(N, dtype=DOUBLE)) < 1e-14
        moved, exact = posterior(P, stacked_rows(H), nu)
        updated, _ = update(family, Belief(belief.mu, predicted), H, nu)
        found = full(updated.covariance)
        assert max_error(updated.mu - belief.mu, moved) < 1e-12
        assert max_error(found, torch.where(mask, exact, 0.0)) < 1e-12
        assert torch.equal(found, found.mT)
        belief = updated
    assert max_error(family.diagonal(belief.covariance), found.diagonal()) < 1e-15
    assert max_error(family.log_det(belief.covariance), torch.logdet(found)) < 1e-12


def _everything(family: BlockDiagonal) -> Covariance:
    """A state of ones wherever a block has a covariance."""
    states = {}
    for layer in LAYERS:
        b = family.block(layer)
        rows = torch.ones(layer.size, b, dtype=DOUBLE)
        rows[layer.size // b * b :, layer.size % b :] = 0
        states[layer.name] = {"covariance": rows}
    return states


def test_blocks_of_one_weight_are_the_diagonal_family():
    blocks, plain = BlockDiagonal(size=1), Diagonal()
    one, two = (Belief(START, f.init(whole(*LAYERS), 0.4, START)) for f in (blocks, plain))
    for t in range(4):
        H, nu = mixed_jacobian(seed=10 * t), randn(3, seed=t)
        (one, _), (two, _) = update(blocks, one, H, nu), update(plain, two, H, nu)
    assert max_error(one.mu, two.mu) < 1e-12
    assert max_error(blocks.diagonal(one.covariance), plain.diagonal(two.covariance)) < 1e-12


@pytest.mark.parametrize(("o", "i", "size"), [(9, 4, 8), (9, 7, 4), (3, 10, 4)])
def test_parts_cut_at_the_grain_do_not_need_one_another(o, i, size):
    family, layer = BlockDiagonal(size=size), Layer("w", o, i, factored=True)
    cuts = [*range(0, o, family.grain(layer)), o]
    H, nu, start = random_factors(o, i), randn(3, seed=1), torch.zeros(o * i, dtype=DOUBLE)
    belief, _ = update(family, Belief(start, family.init(whole(layer), 0.4, start)), {"w": H}, nu)
    P, again = belief.covariance, {"w": random_factors(o, i, seed=3)}
    expected, innovation = update(family, Belief(start, P), again, nu)
    gram, found = 0.0, []
    for low, high in pairwise(cuts):
        part, h = Part(layer, low, high), {"w": again["w"].part(low, high)}
        mine = {"w": {"covariance": P["w"]["covariance"][part.flat]}}
        share, work = family.gram(mine, h, nu)
        gram = gram + share
        found.append(family.update(mine, h, share, work, innovation)["w"]["covariance"])
    assert max_error(gram, family.gram(P, again, nu)[0]) < 1e-13
    assert max_error(torch.cat(found), expected.covariance["w"]["covariance"]) < 1e-13


def test_blocks_stay_definite_over_confident_float32_updates():
    family, start = BlockDiagonal(size=6), torch.zeros(N)
    belief = Belief(start, family.init(whole(*LAYERS), 1.0, start))
    for t in range(300):
        H = {
            name: h.scaled(torch.full((6,), 1e2)) for name, h in mixed_jacobian(6, seed=t, dtype=torch.float32).items()
        }
        belief, _ = update(family, belief, H, randn(6, seed=t, dtype=torch.float32))
        assert float(torch.linalg.eigvalsh(full(belief.covariance).double()).min()) > 0
    assert bool(torch.isfinite(belief.mu).all())


@pytest.mark.parametrize("size", [0, -3])
def test_empty_blocks_are_refused(size):
    with pytest.raises(ValueError, match="size is"):
        BlockDiagonal(size=size)
