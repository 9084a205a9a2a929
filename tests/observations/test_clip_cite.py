"""CLIP-CITE's terms against the loops that the paper's formulas read as."""

from math import log

import pytest
import torch
from torch.nn.functional import normalize

from kngd_ray.observations.clip_cite import ClipCite, Pairs, terms

C, D, S = 4, 6, 7.0


def make_outputs(M: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = [drawn(M, C), *(normalize(drawn(M, D), dim=1) for _ in range(4))]
    return torch.cat(parts, 1), torch.randint(C, (M,), generator=generator)


def plain_losses(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The three losses, one sum at a time."""
    M = len(outputs)
    logits, pairs = outputs[:, :C], Pairs.of(outputs, C)
    dva = sum(logits[i].exp().sum().log() - logits[i, labels[i]] for i in range(M)) / M
    scl = torch.zeros((), dtype=outputs.dtype)
    vld = torch.zeros((), dtype=outputs.dtype)
    for a, b, a0, b0 in ((pairs.z, pairs.t, pairs.z0, pairs.t0), (pairs.t, pairs.z, pairs.t0, pairs.z0)):
        for i in range(M):
            others = [j for j in range(M) if j == i or labels[j] != labels[i]]
            denominator = sum((S * a[i] @ b[j]).exp() for j in others)
            scl = scl - ((S * a[i] @ b[i]) - denominator.log()) / (2 * M)
            new = torch.stack([S * a[i] @ b[j] for j in range(M)])
            old = torch.stack([S * a0[i] @ b0[j] for j in range(M)])
            for j in range(M):
                q = old[j].exp() / old.exp().sum()
                p = new[j].exp() / new.exp().sum()
                vld = vld + q * (q.log() - p.log()) / (2 * M)
    return torch.stack([dva, scl, vld])


@pytest.mark.parametrize("M", [1, 2, 7])
def test_the_losses_are_those_of_a_plain_loop(M: int) -> None:
    outputs, labels = make_outputs(M)
    assert torch.allclose(terms(outputs, labels, S, C).losses, plain_losses(outputs, labels), atol=1e-12)


@pytest.mark.parametrize("term", range(3))
def test_the_rows_add_up_to_the_gradient_of_the_loss(term: int) -> None:
    outputs, labels = make_outputs()
    outputs.requires_grad_()
    (expected,) = torch.autograd.grad(plain_losses(outputs, labels)[term], outputs)
    trained = C + 2 * D  # the original towers' embeddings are given
    found = -terms(outputs, labels, S, C).cotangents[term] / len(outputs)
    assert torch.allclose(found[:, :trained], expected[:, :trained], atol=1e-12)
    assert not found[:, trained:].any()


def test_pictures_of_one_class_are_no_negatives_of_each_other() -> None:
    outputs, _ = make_outputs()
    labels = torch.zeros(len(outputs), dtype=torch.long)
    found = terms(outputs, labels, S, C)
    assert found.losses[1] == 0
    assert not found.cotangents[1].any()


def test_towers_that_have_not_moved_are_not_pulled_back() -> None:
    outputs, labels = make_outputs()
    pairs = Pairs.of(outputs, C)
    still = torch.cat([outputs[:, :C], pairs.z0, pairs.t0, pairs.z0, pairs.t0], 1)
    found = terms(still, labels, S, C)
    assert abs(float(found.losses[2])) < 1e-15
    assert not found.cotangents[2].any()


def test_weights_are_ratios_of_noise_variances() -> None:
    outputs, labels = make_outputs()
    model = ClipCite(scl=0.7, vld=0.1)
    seen = model.observe_pairs(outputs, labels, S, slice(2, 5), C)
    rows = terms(outputs, labels, S, C).cotangents
    for block, weight in enumerate([1.0, 0.7, 0.1]):
        assert torch.allclose(seen.innovation[:, block], torch.full((3,), weight, dtype=torch.float64).sqrt())
        # the information that a row with noise 1 / weight gives: row^T row * weight, and row^T 1 * weight
        assert torch.allclose(seen.cotangent[:, block] * weight**0.5, rows[block][2:5] * weight)


def test_the_classifiers_row_is_that_of_the_log_likelihood() -> None:
    from kngd_ray.observations import LogLikelihood

    outputs, labels = make_outputs()
    plain = LogLikelihood().observe(outputs[:, :C], labels, S, torch.empty(len(labels), 0))
    seen = ClipCite().observe_pairs(outputs, labels, S, slice(None), C)
    assert torch.allclose(seen.cotangent[:, :1, :C], plain.cotangent)
    assert torch.allclose(seen.gate_residuals[:, :1], plain.gate_residuals)
    assert not seen.gate_residuals[:, 1:].any()


def test_untouched_logits_cost_log_C() -> None:
    outputs, labels = make_outputs()
    outputs[:, :C] = 0
    assert float(terms(outputs, labels, S, C).losses[0]) == pytest.approx(log(C))


@pytest.mark.parametrize("name", ["scl", "vld"])
def test_a_negative_weight_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1"):
        ClipCite(**{name: -1.0})  # type: ignore[arg-type]


def test_features_have_no_pairs() -> None:
    with pytest.raises(ValueError, match=r"tune\.parameters"):
        ClipCite().observe(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), 1.0, torch.empty(1, 0))
