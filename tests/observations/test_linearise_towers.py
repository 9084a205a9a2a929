"""H of whole CLIP towers, small ones, against the Jacobian that ``torch.func`` gives of them whole, in float64."""

import pytest
import torch
from helpers.cases import rng
from helpers.compare import max_error
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from kngd_ray.clip import ModelConfig, load_model
from kngd_ray.errors import FilterError
from kngd_ray.filters import Factors, Rows
from kngd_ray.observations import Linearizer, jacobian_rows, linearise, trainable

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention under vmap

EXACT = 1e-9
D, LENGTH = 6, 5


def small_clip(**vision: object) -> CLIP:
    torch.manual_seed(0)
    network = CLIP(
        embed_dim=D,
        vision_cfg={"layers": 2, "width": 8, "head_width": 4, "patch_size": 4, "image_size": 8, **vision},
        text_cfg={"context_length": LENGTH, "vocab_size": 11, "width": 8, "heads": 2, "layers": 2},
    )
    return network.double().eval()


class Images(nn.Module):
    """The image tower of a vision transformer."""

    def __init__(self, **vision: object) -> None:
        super().__init__()
        self.visual = small_clip(**vision).visual

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


class Scaled(Images):
    """With LayerScale."""

    def __init__(self) -> None:
        super().__init__(ls_init_value=0.3)


class Texts(nn.Module):
    """The text tower."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = small_clip()
        self.clip.visual = None

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.encode_text(x)


class Pairs(nn.Module):
    """Both towers on pairs: cosines, and what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = small_clip()

    def forward(self, pairs: dict[str, Tensor]) -> Tensor:
        z = F.normalize(self.clip.encode_image(pairs["image"]), dim=-1)
        t = F.normalize(self.clip.encode_text(pairs["text"]), dim=-1)
        return torch.cat([self.clip.logit_scale.exp() * (z * t).sum(1, keepdim=True), z, t], 1)


class Prompted(nn.Module):
    """Class prompts through the text tower, the same for all samples."""

    prompts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.clip = small_clip()
        self.clip.visual.requires_grad_(False)
        self.register_buffer("prompts", torch.randint(1, 11, (3, LENGTH), generator=rng(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.clip.encode_image(x) @ F.normalize(self.clip.encode_text(self.prompts), dim=-1).mT


class Block(nn.Module):
    """An inverted residual with squeeze-and-excitation."""

    def __init__(self, width: int, wide: int, stride: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.squeeze, self.excite = nn.Conv2d(wide, 2, 1), nn.Conv2d(2, wide, 1)
        self.project, self.bn3 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.expand(x)), inplace=True)
        x = F.silu(self.bn2(self.depthwise(x)), inplace=True)
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)), inplace=True)).sigmoid()
        return self.bn3(self.project(x))


class Convolutional(nn.Module):
    """As EfficientNet: a strided stem, pointwise and depthwise convolutions, BatchNorm by its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.block, self.down = Block(4, 6, 1), Block(4, 6, 2)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, D)
        generator = rng(1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.stem(x)), inplace=True)
        x = self.down(x + self.block(x))
        return self.head(self.norm(self.grouped(x)).mean((2, 3)))


class LoRA(nn.Module):
    """Low-rank weights beside a frozen one, and a pointwise convolution as a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(3, D, 1).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(D, 2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        y = self.base(x).flatten(2).mT + 0.5 * F.linear(F.linear(tokens, self.A), self.B)
        return torch.tanh(y).mean(1)


class Matrices(nn.Module):
    """Matrices in all their forms, one of them stored both ways, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.Parameter(torch.randn(3, 3))
        self.proj, self.back = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(D, 4))
        self.pointwise, self.bias = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x.flatten(2).mT, self.tied))
        y = torch.tanh(F.linear(y, self.tied.t()) @ self.proj)
        y = F.linear(y, self.pointwise.view(4, 4))
        y = torch.addmm(self.bias, y.mean(1), self.pointwise.flatten(1).mT)
        return y.matmul(self.back.T)


class OtherUses(nn.Module):
    """Of what has no rule of its own: slices, sums of parameters, a token, functions of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(70, 3))
        self.slope, self.scale, self.mix = (nn.Parameter(torch.randn(n)) for n in (1, 3, D * 3))
        self.one, self.two = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.view(1, 1, -1).expand(len(x), -1, -1), x.flatten(2).mT], 1)
        tokens = tokens + self.position[: tokens.shape[1]]
        tokens = torch.where(tokens > 0, tokens, self.slope)
        tokens = F.rms_norm(tokens, (3,), self.scale) * (self.one + self.two).sigmoid()
        first, second = self.mix.view(D, 3).chunk(2)
        return torch.cat([F.linear(tokens, first), torch.einsum("mti,oi->mto", tokens, second)], 2).mean(1)


def pictures(m: int) -> Tensor:
    return torch.randn(m, 3, 8, 8, generator=rng(5), dtype=torch.float64)


def tokens(m: int) -> Tensor:
    return torch.randint(1, 11, (m, LENGTH), generator=rng(6))


def pairs(m: int) -> dict[str, Tensor]:
    return {"image": pictures(m), "text": tokens(m)}


# network: its inputs, and what has rows: all that is not a matrix times tokens
VECTORS = ("bias", "ln_", "class_embedding", "positional_embedding", "token_embedding", "logit_scale", "ls_")
TOWERS = {
    Images: (pictures, VECTORS),
    Scaled: (pictures, VECTORS),
    Texts: (tokens, VECTORS),
    Pairs: (pairs, VECTORS),
    Prompted: (pictures, VECTORS),
    Convolutional: (pictures, ("bias", "bn", "depthwise", "grouped", "norm")),
    LoRA: (pictures, ()),
    Matrices: (pictures, ("bias",)),
    OtherUses: (pictures, ("",)),
}


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    network = kind().double().eval()
    generator = rng(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return network


@pytest.fixture
def no_rows_by_passes(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a whole pass of the network for each row")

    monkeypatch.setattr(linearise, "jacobian_rows", refuse)


@pytest.mark.usefixtures("no_rows_by_passes")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_towers_jacobian(kind, large, monkeypatch):
    """With one observation for each sample, and with two: batched, or one by one as large networks have them."""
    monkeypatch.setattr(linearise, "_LARGE", 0 if large else 1 << 40)
    network, (make, vectors) = build(kind), TOWERS[kind]
    linearizer, inputs = Linearizer(network, make(2)), make(3)
    parameters = {name: p.detach() for name, p in trainable(network).items()}
    oracle = jacrev(lambda theta: functional_call(network, theta, (inputs,)))(parameters)
    for k in (1, 2):
        passed = linearizer.run(inputs)
        cotangent = torch.randn(3, k, passed.logits.shape[1], generator=rng(7), dtype=torch.float64)
        H = passed.jacobian(cotangent)
        assert max_error(passed.logits, network(inputs).detach()) < EXACT
        assert [*H] == [layer.name for layer in linearizer.layers] == [*parameters]
        for layer in linearizer.layers:
            piece, J = H[layer.name], oracle[layer.name].reshape(*passed.logits.shape, -1)
            assert isinstance(piece, Factors) == layer.factored
            assert layer.factored != any(part in layer.name for part in vectors), layer.name
            assert not layer.factored or piece.g.shape[-1] * piece.x.shape[-1] == layer.size
            assert not piece.rows().requires_grad
            assert max_error(piece.rows(), (cotangent @ J).flatten(0, 1)) < EXACT, layer.name
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.usefixtures("no_rows_by_passes")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", TOWERS)
def test_a_rank_without_samples(kind, large, monkeypatch):
    monkeypatch.setattr(linearise, "_LARGE", 0 if large else 1 << 40)
    network, (make, _) = build(kind), TOWERS[kind]
    linearizer = Linearizer(network, make(2))
    for k in (1, 2):
        passed = linearizer.run(make(0))
        H = passed.jacobian(passed.logits.new_zeros(0, k, passed.logits.shape[1]))
        for layer in linearizer.layers:
            piece = H[layer.name]
            assert isinstance(piece, Factors) == layer.factored
            assert piece.rows().shape == (0, layer.size)
            assert piece.rows().dtype == torch.float64


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_made_late_are_those_of_the_weights_then(kind, monkeypatch):
    """A filter that moves the weights layer by layer must find every layer's H where the batch was observed."""
    monkeypatch.setattr(linearise, "_LARGE", 0)
    network, (make, _) = build(kind), TOWERS[kind]
    passed = Linearizer(network, make(2)).run(make(3))
    H = passed.jacobian(torch.randn(3, 1, passed.logits.shape[1], generator=rng(7), dtype=torch.float64))
    before = {name: piece.rows().clone() for name, piece in H.items()}
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0.5).add_(1.0)
    assert all(max_error(H[name].rows(), rows) == 0.0 for name, rows in before.items())


@pytest.mark.usefixtures("no_rows_by_passes")
@pytest.mark.parametrize("kind", [Texts, Convolutional, Matrices, OtherUses])
def test_the_same_as_a_function_of_the_weights(kind):
    """``run_at``, for two values of the weights at once, is ``run`` at each."""
    network, (make, _) = build(kind), TOWERS[kind]
    linearizer, inputs = Linearizer(network, make(2)), make(3)
    cotangent = torch.randn(3, 2, D, generator=rng(7), dtype=torch.float64)
    thetas = {
        name: torch.stack([p.detach(), p.detach() + 0.1 * torch.randn(p.shape, generator=rng(8), dtype=p.dtype)])
        for name, p in trainable(network).items()
    }

    def rows(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        H = linearizer.run_at(theta, inputs).jacobian(cotangent)
        return {name: H[name].rows() for name in H}

    together = vmap(rows)(thetas)
    for n in range(2):
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(thetas[name][n])
        H = linearizer.run(inputs).jacobian(cotangent)
        for name in H:
            assert max_error(together[name][n], H[name].rows()) < EXACT, name


@pytest.mark.parametrize("mask", ["bool", "float", "each"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masked_attention(mask, batch_first):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
            if mask == "float":
                hidden = torch.zeros(5, 5, dtype=x.dtype).masked_fill(hidden, -3.0)
            if mask == "each":
                hidden = hidden.expand(2 * len(x), 5, 5)
            x = x if batch_first else x.transpose(0, 1)
            out = self.attention(x, x, x, need_weights=False, attn_mask=hidden)[0]
            return (out if batch_first else out.transpose(0, 1)).tanh().flatten(1)

    torch.manual_seed(2)
    network = Masked().double()
    x = torch.randn(3, 5, 4, generator=rng(1), dtype=torch.float64)
    cotangent = torch.randn(3, 2, 20, generator=rng(2), dtype=torch.float64)
    linearizer = Linearizer(network, x[:1])
    passed = linearizer.run(x)
    H, expected = passed.jacobian(cotangent), jacobian_rows(network, x, cotangent)
    assert {layer.name for layer in linearizer.layers if layer.factored} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert max_error(passed.logits, network(x).detach()) < EXACT
    assert all(max_error(H[name].rows(), rows) < EXACT for name, rows in expected.items())


def test_cross_attention_has_rows():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.query = nn.MultiheadAttention(4, 2, batch_first=True), nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            query = self.query.unsqueeze(0).expand(len(x), -1, -1)
            return self.attention(query, x, x, need_weights=False)[0].flatten(1)

    torch.manual_seed(2)
    network, x = Cross().double(), torch.randn(3, 5, 4, generator=rng(1), dtype=torch.float64)
    cotangent = torch.randn(3, 1, 8, generator=rng(2), dtype=torch.float64)
    H, expected = Linearizer(network, x[:1]).run(x).jacobian(cotangent), jacobian_rows(network, x, cotangent)
    assert all(max_error(H[name].rows(), rows) < EXACT for name, rows in expected.items())


@pytest.fixture(scope="module")
def mini() -> nn.Module:
    return load_model(ModelConfig())._network.visual.float().eval().requires_grad_(True)


@pytest.mark.usefixtures("no_rows_by_passes")
def test_the_shipped_image_tower(mini):
    """Every gradient is that of autograd, no parameter needs passes of its own, and layers are made when asked for."""
    x = torch.randn(2, 3, 160, 160, generator=rng(1))
    linearizer = Linearizer(mini, x)
    passed = linearizer.run(x)
    v = torch.randn(passed.logits.shape, generator=rng(2))
    parameters = trainable(mini)
    expected = torch.autograd.grad(mini(x), list(parameters.values()), v, allow_unused=True)
    H = passed.jacobian(v.unsqueeze(1))
    assert not isinstance(H, dict)
    assert all(layer.factored for layer in linearizer.layers if layer.size > 100_000)
    for (name, p), gradient in zip(parameters.items(), expected, strict=True):
        gradient = torch.zeros_like(p) if gradient is None else gradient
        found = H[name].combine(torch.ones(2)).view_as(p)
        assert float((found - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, name


def test_no_gradient_of_a_weight_is_computed():
    """The backward pass takes about what the forward pass takes; gradients of weights would take as much again."""
    network, x = build(Images), pictures(3)
    linearizer = Linearizer(network, x)
    with FlopCounterMode(display=False) as forward:
        passed = linearizer.run(x)
    with FlopCounterMode(display=False) as backward:
        H = passed.jacobian(torch.ones(3, 1, D, dtype=torch.float64))
    assert len(H) == len(linearizer.layers)
    assert 0 < backward.get_total_flops() <= 1.3 * forward.get_total_flops()


def test_rows_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(linearise, "_NUMBERS", 8 * 11 * 8)
    linearizer, cotangent = Linearizer(build(Texts), tokens(2)), torch.ones(9, 1, D, dtype=torch.float64)
    monkeypatch.setattr(linearise, "_LARGE", 0)
    with pytest.raises(FilterError, match=r"clip\.token_embedding\.weight, .* leave it out with tune\.exclude"):
        linearizer.run(tokens(9)).jacobian(cotangent)["clip.token_embedding.weight"]


class Unseen(nn.Linear):
    """A layer that mixes samples and tokens on its way, so that its weight has no factors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, (-1, 4)).mean(1)


def refused(*_: object, **__: object) -> None:
    raise RuntimeError("not this one")


def test_passes_of_a_large_network_are_refused(monkeypatch):
    monkeypatch.setattr(linearise, "_LARGE", 0)
    network, x = Unseen(3, 2), torch.randn(65, 4, 3)
    linearizer = Linearizer(network, x[:1])
    assert linearizer.run(x[:64]).jacobian(torch.ones(64, 1, 2))["weight"].rows().shape == (64, 6)
    with pytest.raises(FilterError, match="weight, bias"):
        linearizer.run(x).jacobian(torch.ones(65, 1, 2))


def test_under_autocast():
    """Factors in 16 bits, of which the rows are about those in 32."""
    network = build(Images).float()
    x = pictures(3).float()
    cotangent = torch.randn(3, 1, D, generator=rng(7))
    plain = Linearizer(network, x[:2]).run(x).jacobian(cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        linearizer = Linearizer(network, x[:2])
        H = linearizer.run(x).jacobian(cotangent)
    assert {layer.name for layer in linearizer.layers if layer.factored} == {
        name for name, piece in plain.items() if isinstance(piece, Factors)
    }
    for name, piece in H.items():
        rows, expected = piece.rows().float(), plain[name].rows()
        assert isinstance(piece, Rows) or piece.g.dtype == piece.x.dtype == torch.bfloat16
        assert float((rows - expected).norm()) < 0.1 * float(expected.norm()) + 1e-3, name


class Norm16(nn.Module):
    """A tower in 16 bits whose first layer has no factors, under a normalisation that torch.func cannot transform."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen, self.norm, self.last = Unseen(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)
        self.half = True

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            y = self.last(self.norm(self.unseen(x)))
        return y.float()


@pytest.mark.parametrize("large", [0, 10**9])
def test_rows_of_a_layer_in_16_bits(large, monkeypatch):
    """About those in 32, of a network that is linearised as towers are and of a small one."""
    monkeypatch.setattr(linearise, "_LARGE", large)
    torch.manual_seed(0)
    network, x = Norm16(), torch.randn(6, 4, 3)
    cotangent = torch.randn(6, 2, 2, generator=rng(7))
    found = {}
    for network.half in (True, False):
        linearizer = Linearizer(network, x[:2])
        H = linearizer.run(x).jacobian(cotangent)
        assert not [layer for layer in linearizer.layers if layer.factored and layer.name.startswith("unseen")]
        found[network.half] = {name: piece.rows() for name, piece in H.items()}
    assert all(rows.dtype == torch.float32 for name, rows in found[True].items() if name.startswith("unseen"))
    for name, expected in found[False].items():
        assert float((found[True][name] - expected).norm()) < 0.1 * float(expected.norm()) + 1e-3, name


def test_rows_one_at_a_time_are_those_of_all_at_once(monkeypatch):
    network, x, cotangent = build(Images), pictures(3), torch.randn(3, 2, D, generator=rng(7), dtype=torch.float64)
    names = {"visual.conv1.weight", "visual.ln_post.bias"}
    together = jacobian_rows(network, x, cotangent, names)
    monkeypatch.setattr("kngd_ray.observations.jacobian.vmap", refused)
    apart = jacobian_rows(network, x, cotangent, names)
    assert all(max_error(apart[name], rows) < EXACT for name, rows in together.items())


def test_a_batch_of_several_tensors_by_passes():
    network, inputs = build(Pairs), pairs(3)
    cotangent = torch.randn(3, 2, 1 + 2 * D, generator=rng(7), dtype=torch.float64)
    H = Linearizer(network, tree_map(lambda x: x[:1], inputs)).run(inputs).jacobian(cotangent)
    rows = jacobian_rows(network, inputs, cotangent, {"clip.logit_scale", "clip.visual.proj"})
    assert {*rows} == {"clip.logit_scale", "clip.visual.proj"}
    assert all(max_error(H[name].rows(), found) < EXACT for name, found in rows.items())
