"""LoRA inside the towers: the identity at first, exact when merged, and only where it is asked for."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from kngd_ray.clip import TuneOptions
from kngd_ray.clip.lora import LoraLinear, LowRank, inject, merge, updates
from kngd_ray.errors import ModelError

ALL = ("q", "k", "v", "out", "mlp", "proj", "pointwise")


def lora(*targets, **options):
    return TuneOptions(parameters="lora", **({"include": ("*",), "targets": targets or ALL} | options))


def shake(network, seed=0):
    """Move every factor away from where it starts, so that no update is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in updates(network):
            update.up.copy_(torch.randn(update.up.shape, generator=generator, dtype=update.up.dtype))


def outputs(network, size=32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, size, size, generator=generator).to(network.logit_scale.dtype)
    texts = torch.randint(1, 49407, (3, network.context_length), generator=generator)
    with torch.no_grad():
        return network.encode_image(images), network.encode_text(texts)


class Whole(nn.Module):
    """Attention and its input in one layout, as open_clip's blocks call it."""

    def __init__(self, attention):
        super().__init__()
        self.attn = attention

    def forward(self, q, k, v, **kwargs):
        return self.attn(q, k, v, need_weights=False, **kwargs)[0]


@pytest.mark.parametrize("model", ["vit", "custom", "mini"])
def test_starts_as_pretrained_and_merges_exactly(model, request):
    pretrained = request.getfixturevalue(model)
    size = pretrained.preprocess_cfg["size"][0]
    network = copy.deepcopy(pretrained.network).double()
    kinds = {name: type(module) for name, module in network.named_modules()}
    before, expected = dict(network.named_parameters()), outputs(network, size)
    adapted = inject(network, lora(), seed=3)
    assert adapted
    for found, wanted in zip(outputs(network, size), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    after = dict(network.named_parameters())
    assert all(after[name] is weight and not weight.requires_grad for name, weight in before.items())
    assert all(weight.requires_grad for name, weight in after.items() if name not in before)

    shake(network)
    tuned = outputs(network, size)
    assert all((found - wanted).abs().max() > 1e-3 for found, wanted in zip(tuned, expected, strict=True))
    assert merge(network) is network
    assert {name: type(module) for name, module in network.named_modules()} == kinds
    assert {name: weight.shape for name, weight in network.named_parameters()} == {
        name: weight.shape for name, weight in before.items()
    }
    for found, wanted in zip(outputs(network, size), tuned, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "heads"])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_is_torchs(batch_first, mask, cross):
    torch.manual_seed(0)
    heads, d, m, tokens = 2, 8, 3, 5
    sizes = {"kdim": 6, "vdim": 4} if cross else {}
    plain = Whole(nn.MultiheadAttention(d, heads, batch_first=batch_first, **sizes).double().requires_grad_(False))
    nn.init.normal_(plain.attn.in_proj_bias)
    source = 7 if cross else tokens
    x = torch.randn(m, tokens, d).double()
    inputs = (x, torch.randn(m, source, 6).double(), torch.randn(m, source, 4).double()) if cross else (x, x, x)
    if not batch_first:
        q, k, v = (part.transpose(0, 1) for part in inputs)
        inputs = (q, k, v) if cross else (q, q, q)
    blocked = torch.ones(tokens, source, dtype=torch.bool).triu(1)
    masks = {
        "causal": torch.zeros(tokens, source).double().masked_fill(blocked, -torch.inf),
        "bool": blocked,
        "heads": torch.randn(m * heads, tokens, source).double(),
    }
    attn_mask = masks.get(mask)
    adapted = copy.deepcopy(plain)
    assert inject(adapted, lora("q", "k", "v", "out")) == ["attn"]
    assert torch.allclose(adapted(*inputs, attn_mask=attn_mask), plain(*inputs, attn_mask=attn_mask), atol=1e-12)

    shake(adapted)
    tuned = adapted(*inputs, attn_mask=attn_mask)
    # The same update written into torch's own weights.
    weights = adapted.attn.lora
    with torch.no_grad():
        for number, kind in enumerate("qkv"):
            block = plain.attn.in_proj_weight
            target = getattr(plain.attn, f"{kind}_proj_weight") if cross else block[number * d : (number + 1) * d]
            target += weights[kind].up @ weights[kind].down
        plain.attn.out_proj.weight += weights["out"].up @ weights["out"].down
    assert torch.allclose(tuned, plain(*inputs, attn_mask=attn_mask), atol=1e-11)


def test_attention_refuses_what_it_does_not_compute():
    network = Whole(nn.MultiheadAttention(4, 1, batch_first=True))
    inject(network, lora("q"))
    x = torch.randn(1, 3, 4)
    for wrong in ({"need_weights": True}, {"key_padding_mask": torch.zeros(1, 3)}):
        with pytest.raises(ValueError, match="attn_mask alone"):
            network.attn(x, x, x, **wrong)


@pytest.mark.parametrize("target", ["q", "k", "v"])
def test_one_target_changes_nothing_else(vit, target):
    network = copy.deepcopy(vit.network)
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    names = inject(network, lora(target, include=("visual",)))
    assert names == [f"visual.transformer.resblocks.{layer}.attn" for layer in range(2)]
    assert sum(1 for _ in updates(network)) == 2
    shake(network)
    merge(network)
    for name, weight in network.named_parameters():
        if name in {f"{layer}.in_proj_weight" for layer in names}:
            changed = [not torch.equal(*pair) for pair in zip(weight.chunk(3), before[name].chunk(3), strict=True)]
            assert changed == [kind == target for kind in "qkv"]
        else:
            assert torch.equal(weight, before[name])


def test_open_clips_own_attention_is_adapted(custom):
    network = copy.deepcopy(custom.network)
    names = inject(network, lora("q", "out", include=("visual",)))
    block = "visual.transformer.resblocks.1.attn"
    assert {block, f"{block}.out_proj"} <= set(names)
    attention = network.get_submodule(block)
    assert list(attention.lora) == ["q"]
    x, mask = torch.randn(2, 5, 32), torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    plain = custom.network.get_submodule(block)
    assert plain.head_scale is not None
    with torch.no_grad():
        for attn_mask in (None, mask, mask.isinf()):
            assert torch.allclose(attention(x, attn_mask=attn_mask), plain(x, attn_mask=attn_mask), atol=1e-6)


def test_text_stays_causal(vit):
    network = copy.deepcopy(vit.network)
    inject(network, lora(include=("transformer",)))
    shake(network)
    x = torch.randn(2, 16, 32)
    later = x.clone()
    later[:, 9:] += 1
    with torch.no_grad():
        y, z = (network.transformer(tokens, attn_mask=network.attn_mask) for tokens in (x, later))
    assert torch.allclose(y[:, :9], z[:, :9], atol=1e-6)
    assert not torch.allclose(y[:, 9:], z[:, 9:], atol=1e-2)


def test_packed_linear_projections():
    class Block(nn.Module):
        """timm's names."""

        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(6, 12), "proj": nn.Linear(4, 6)})
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(6, 8)})
            self.head = nn.Linear(6, 2)

    x = torch.randn(2, 5, 6)
    for targets, names in {
        ("q", "v"): ["attn.qkv"],
        ("out",): ["attn.proj"],
        ("mlp",): ["mlp.fc1"],
        ("proj",): ["head"],
    }.items():
        network = Block()
        assert inject(network, lora(*targets)) == names
    network = Block()
    plain = network.attn["qkv"](x)
    inject(network, lora("q", "v"))
    shake(network)
    change = [part.abs().max() > 1e-3 for part in (network.attn["qkv"](x) - plain).chunk(3, dim=-1)]
    assert change == [True, False, True]
    tuned = network.attn["qkv"](x)
    assert torch.allclose(merge(network).attn["qkv"](x), tuned, atol=1e-5)


@pytest.mark.parametrize("conv", [{"stride": 2}, {"bias": False}, {}])
def test_pointwise_convolutions_alone(conv):
    torch.manual_seed(0)
    skipped = [nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 6, 1, padding=1)]
    network = nn.Sequential(nn.Conv2d(4, 6, 1, **conv), *skipped)
    assert inject(network, lora("pointwise")) == ["0"]
    shake(network)
    x = torch.randn(2, 4, 7, 9)
    tuned = network[0](x)
    assert torch.allclose(merge(network)[0](x), tuned, atol=1e-5)


def test_pointwise_layers_of_the_embedded_model(mini):
    network = copy.deepcopy(mini.network)
    names = inject(network, TuneOptions(parameters="lora"))
    pointwise = [
        name
        for name, module in mini.network.visual.named_modules(prefix="visual")
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    assert names == pointwise
    assert len(names) == 32


def test_jacobians_reach_the_factors(vit):
    network = copy.deepcopy(vit.network).double()
    inject(network, lora("q", "out", rank=1, include=("visual.transformer.resblocks.1",)))
    shake(network)
    factors = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}
    image = torch.randn(2, 3, 32, 32).double()
    found = jacrev(lambda theta: functional_call(network, theta, (image,))[0].sum(0))(factors)
    eps, name = 1e-6, "visual.transformer.resblocks.1.attn.lora.q.up"
    up = network.get_parameter(name)
    base = network.encode_image(image, normalize=True)
    with torch.no_grad():
        up[3, 0] += eps
        change = (network.encode_image(image, normalize=True) - base).sum(0) / eps
    assert torch.allclose(found[name][:, 3, 0], change, atol=1e-5)


def test_random_factors_follow_the_seed_alone(vit):
    def factors(seed):
        network = copy.deepcopy(vit.network)
        torch.rand(1)
        inject(network, lora(), seed)
        return [update.down for update in updates(network)]

    state = torch.get_rng_state()
    one, same, other = factors(1), factors(1), factors(2)
    assert all(torch.equal(*pair) for pair in zip(one, same, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one, other, strict=True))
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    inject(copy.deepcopy(vit.network), lora(), 1)
    assert torch.equal(torch.rand(1), expected)


def test_scaling_and_rank():
    network = nn.Sequential(nn.Linear(3, 9))
    inject(network, lora("proj", rank=5, scaling=0.5))
    layer = network[0]
    assert isinstance(layer, LoraLinear)
    update: LowRank = layer.lora["proj"]
    assert (update.down.shape, update.up.shape) == ((3, 3), (9, 3))  # no more than the layer's own rank
    shake(network)
    x = torch.randn(4, 3)
    expected = x @ (layer.weight + 0.5 * update.up @ update.down).mT + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_no_target_among_the_selected_layers(mini, vit):
    with pytest.raises(ModelError, match="have only pointwise, proj, but the targets are q, k: change either"):
        inject(copy.deepcopy(mini.network), lora("q", "k", include=("visual",)))
    with pytest.raises(ModelError, match="have no layer that LoRA can update, but"):
        inject(copy.deepcopy(vit.network), lora("q", include=("visual.ln_post",)))
    assert inject(copy.deepcopy(mini.network), lora("q", "pointwise", include=("visual",)))
