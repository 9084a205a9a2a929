"""The adapters' formulas written out, what they start as, and the options that they refuse."""

import pytest
import torch
from helpers.cases import ADAPTERS, CLASSES, DIM, LOGIT_SCALE, class_embeddings, make_head, make_support
from torch.nn.functional import normalize

from kngd_ray.clip import CLIPHead
from kngd_ray.clip.adapters import Bottleneck, ClassResidual, Linear


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return make_support(7).features


@pytest.fixture(scope="module")
def t() -> torch.Tensor:
    return class_embeddings()


@pytest.fixture(scope="module")
def zero_shot(z, t) -> torch.Tensor:
    return LOGIT_SCALE * z @ t.mT


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    "adapters", [(), (Linear(),), (Linear(tower="both"),), (ClassResidual(),), (Linear(), ClassResidual())]
)
def test_identity_adapters_start_as_zero_shot(adapters, z, t, zero_shot):
    head = CLIPHead(t, LOGIT_SCALE, adapters).double()
    assert torch.allclose(head(z), zero_shot, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tower", ["image", "text", "both"])
def test_bottleneck(tower, z, t):
    head = make_head((Bottleneck(tower=tower, width=3, ratio=0.3),))
    mlp = head.adapters[0].mlp
    assert set(mlp) == ({"image", "text"} if tower == "both" else {tower})

    def adapted(name, x):
        if name not in mlp:
            return x
        w1, w2 = mlp[name][0].weight, mlp[name][2].weight
        assert (w1.shape, w2.shape) == ((3, DIM), (DIM, 3))
        return 0.3 * ((x @ w1.mT).clamp_min(0) @ w2.mT).clamp_min(0) + 0.7 * x

    expected = LOGIT_SCALE * unit(adapted("image", z)) @ unit(adapted("text", t)).mT
    assert torch.allclose(head(z), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tower", ["image", "text", "both"])
def test_linear(tower, z, t):
    head = make_head((Linear(tower=tower),))
    W = {name: layer.weight for name, layer in head.adapters[0].residual.items()}
    image = z + z @ W["image"].mT if "image" in W else z
    text = t + t @ W["text"].mT if "text" in W else t
    assert torch.allclose(head(z), LOGIT_SCALE * unit(image) @ unit(text).mT, rtol=0, atol=1e-12)


def test_class_residual_is_linear_in_its_weights(z, zero_shot):
    head = make_head((ClassResidual(),))
    delta = head.adapters[0].delta.weight
    assert delta.shape == (CLASSES, DIM)
    assert torch.allclose(head(z), zero_shot + LOGIT_SCALE * z @ delta.mT, rtol=0, atol=1e-12)


def test_lists_compose_in_order(z, t):
    linear, residual = ADAPTERS["linear+class_residual"]
    head = make_head((linear, residual))
    W, delta = head.adapters[0].residual["image"].weight, head.adapters[1].delta.weight
    image = unit(z + z @ W.mT)
    assert torch.allclose(head(z), LOGIT_SCALE * (image @ t.mT + image @ delta.mT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ADAPTERS)
def test_samples_are_independent_of_one_another(name, z):
    head = make_head(ADAPTERS[name])
    together = head(z)
    alone = torch.cat([head(row[None]) for row in z])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    assert head(z[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_weight_of_the_matrix_is_trainable_and_used(name, z):
    head = make_head(ADAPTERS[name])
    head(z).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_random_weights_depend_on_the_seed_alone(t):
    def weights(seed):
        return torch.cat([p.detach().flatten() for p in CLIPHead(t, 1.0, (Bottleneck(width=3),), seed).parameters()])

    torch.manual_seed(5)
    first, after = weights(0), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)  # building a head leaves torch's generator alone
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_class_embeddings_are_not_part_of_the_weights(t):
    head = CLIPHead(t, LOGIT_SCALE, (ClassResidual(),))
    assert list(head.state_dict()) == ["adapters.0.delta.weight"]


def test_prior_variance_of_a_class_residual_is_a_statement_about_logits(z, t):
    """Var(logit) = s^2 p0 for unit features, whatever d and C."""
    p0, draws = 0.04, 4000
    generator = torch.Generator().manual_seed(0)
    delta = p0**0.5 * torch.randn(draws, CLASSES, DIM, generator=generator, dtype=torch.float64)
    head = CLIPHead(t, LOGIT_SCALE, (ClassResidual(),)).double()
    name = "adapters.0.delta.weight"
    logits = torch.stack([torch.func.functional_call(head, {name: d}, (normalize(z),)) for d in delta])
    expected = LOGIT_SCALE**2 * p0
    assert float((logits.var(0) / expected - 1).abs().max()) < 5 * (2 / draws) ** 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [({"width": 0}, "width is 0"), ({"ratio": 0.0}, "ratio is 0.0"), ({"ratio": 1.1}, "ratio is 1.1")],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Bottleneck(**options)
