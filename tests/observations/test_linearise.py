"""Factors and rows of a head against the Jacobian that ``torch.func.jacrev`` gives of it whole, in float64."""

import pytest
import torch
from helpers.cases import ADAPTERS, CLASSES, DIM, make_head, make_support, rng
from helpers.compare import max_error
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import linear, relu

from kngd_ray.filters import Factors, Layer, Rows
from kngd_ray.observations import Linearizer, jacobian, jacobian_rows, trainable

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention under vmap

EXACT = 1e-10
C, D = 3, 5


class Head(nn.Module):
    """What the heads below share: a small linear read-out, and a sequence input of four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, 4)
        self.last = nn.Linear(4, C, bias=False)


class Tokens(Head):
    """Linear layers over (m, T, i), then the mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).mean(1)


class MoreTokens(Head):
    """Two dimensions of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        grid = x.unflatten(1, (2, 2))
        return self.last(torch.tanh(self.first(grid))).sum((1, 2))


class TokensFirst(Head):
    """The batch is not in dimension 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.transpose(0, 1)))).mean(0)


class Flattened(Head):
    """Samples and tokens in one dimension: which rows are whose cannot be told."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.flatten(0, 1)))).unflatten(0, (-1, 4)).mean(1)


class Twice(nn.Module):
    """One layer called twice, with inputs of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(D, D)
        self.last = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.square(torch.tanh(self.square(x)))))


class Tied(nn.Module):
    """One weight in two layers with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, C), nn.Linear(D, C)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * torch.tanh(self.two(x))


class TiedBias(nn.Module):
    """One bias in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D, C), nn.Linear(D, C)
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) * torch.tanh(self.two(x))


class BatchAndConstant(nn.Module):
    """One layer on the batch and on a constant: its calls are of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D, bias=False)
        self.register_buffer("classes", torch.randn(C, D, generator=rng(1), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x) @ self.map(self.classes).mT


class Constant(BatchAndConstant):
    """A layer whose input all samples share, all classes its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.map(self.classes)).mT


class Attention(nn.Module):
    """nn.MultiheadAttention uses the weight of its out_proj without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.first, self.last = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last((z + self.attention(z, z, z, need_weights=False)[0]).mean(1))


class Functional(nn.Module):
    """A weight and a bias that are also used outside of their layer's call."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.tanh(linear(x, self.lin.weight))


class FunctionalBias(Functional):
    """Only the bias is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + self.lin.bias.square() * x[:, :1]


class FunctionalInAllClasses(Functional):
    """Used outside in what is the same for every class, which the differences of logits do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + linear(x, self.lin.weight).sin().sum(1, keepdim=True)


class Unseen(torch.autograd.Function):
    """A function that no tape sees: the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g


class Hidden(Functional):
    """Used where it is seen and where it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + torch.tanh(linear(x, Unseen.apply(self.lin.weight)))


class BehindZeros(Hidden):
    """The same in front of a layer that starts at zero: at first its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


class OnlyFunctional(Functional):
    """Never called."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.lin.weight, self.lin.bias)


class ByKeyword(Functional):
    """Its input given by name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(input=x)


class SampleBySample(Functional):
    """Called once for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.lin(row) for row in x]) if len(x) else x.new_zeros(0, C) * self.lin.weight.sum()


class Scaled(nn.Linear):
    """A linear layer that is not W x + b."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Subclassed(nn.Module):
    """Built of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)


class Normed(nn.Module):
    """LayerNorm, a free parameter, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(D), nn.Linear(D, 4), nn.Linear(4, C)
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.temperature.exp() * self.last(relu(self.first(self.norm(x))))


class InPlace(Head):
    """The output of a layer is overwritten. All hidden units of the example are positive, so that it shows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu_())


class Unused(Head):
    """A layer that is never called, and one whose output nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.vain = nn.Linear(2, 2), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.vain(x)
        return self.last(torch.tanh(self.first(x)))


class UnusedConstant(Constant):
    """The same of a layer whose input all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.vain = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.vain(self.classes)
        return super().forward(x)


class Frozen(Head):
    """The first weight does not move; its bias does."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class NothingLinear(nn.Module):
    """Not one layer to take factors of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :C] * self.scale.exp()


# head: shape of a sample, and the parameters that have factors
HEADS: dict[type[nn.Module], tuple[tuple[int, ...], set[str]]] = {
    Tokens: ((4, D), {"first.weight", "last.weight"}),
    MoreTokens: ((4, D), {"first.weight", "last.weight"}),
    TokensFirst: ((4, D), {"first.weight", "last.weight"}),
    Flattened: ((4, D), set()),
    Twice: ((D,), {"square.weight", "last.weight"}),
    Tied: ((D,), {"one.weight"}),
    TiedBias: ((D,), {"one.weight", "two.weight"}),
    BatchAndConstant: ((D,), {"map.weight"}),
    Constant: ((D,), {"map.weight"}),
    Attention: ((4, D), {"attention.in_proj_weight", "attention.out_proj.weight", "first.weight", "last.weight"}),
    Functional: ((D,), {"lin.weight"}),
    FunctionalBias: ((D,), {"lin.weight"}),
    FunctionalInAllClasses: ((D,), {"lin.weight"}),
    Hidden: ((D,), set()),
    BehindZeros: ((D,), {"last.weight"}),
    OnlyFunctional: ((D,), {"lin.weight"}),
    ByKeyword: ((D,), {"lin.weight"}),
    SampleBySample: ((D,), set()),
    Subclassed: ((D,), {"scaled.weight"}),
    Normed: ((D,), {"first.weight", "last.weight"}),
    InPlace: ((D,), {"first.weight", "last.weight"}),
    Unused: ((D,), {"first.weight", "last.weight", "vain.weight"}),
    UnusedConstant: ((D,), {"map.weight", "vain.weight"}),
    Frozen: ((D,), {"last.weight"}),
    NothingLinear: ((D,), set()),
}


def build(kind: type[nn.Module]) -> nn.Module:
    head = kind().double()
    generator = rng(3)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return head


def logit_jacobian(head: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """(m, C, size) derivative of the outputs, by parameter."""
    parameters = {name: p.detach() for name, p in trainable(head).items()}
    found = jacrev(lambda theta: functional_call(head, theta, (inputs,)))(parameters)
    return {name: J.reshape(*J.shape[:2], -1) for name, J in found.items()}


def assert_jacobian(head: nn.Module, inputs: Tensor, k: int, example: Tensor) -> list[Layer]:
    """The Jacobian of k random observations per sample is that of the oracle."""
    m, classes = len(inputs), head(example).shape[1]
    cotangent = torch.randn(m, k, classes, generator=rng(7), dtype=torch.float64)
    linearizer = Linearizer(head, example)
    passed = linearizer.run(inputs)
    H = passed.jacobian(cotangent)
    assert max_error(passed.logits, head(inputs)) < EXACT
    assert [*H] == [layer.name for layer in linearizer.layers] == [*trainable(head)]
    oracle = logit_jacobian(head, inputs) if m else {}
    for layer in linearizer.layers:
        piece = H[layer.name]
        assert isinstance(piece, Factors) == layer.factored
        assert layer.size == trainable(head)[layer.name].numel()
        assert piece.rows().shape == (m * k, layer.size)
        assert not piece.rows().requires_grad
        if m:
            expected = (cotangent @ oracle[layer.name]).reshape(m * k, layer.size)
            assert max_error(piece.rows(), expected) < EXACT, layer.name
    assert all(p.grad is None for p in head.parameters())
    return linearizer.layers


@pytest.mark.parametrize("kind", HEADS)
def test_factors_and_rows_are_the_jacobian(kind, subtests):
    for m, k in [(0, 1), (0, 3), (1, 1), (5, 1), (5, 3)]:
        with subtests.test(m=m, k=k):
            head, (shape, factored) = build(kind), HEADS[kind]
            inputs = torch.randn(6, *shape, generator=rng(5), dtype=torch.float64)
            layers = assert_jacobian(head, inputs[:m], k, inputs[5:])
            assert {layer.name for layer in layers if layer.factored} == factored


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("m", "k"), [(0, 1), (5, 1), (5, 3)])
def test_every_adapter_has_factors_and_no_rows(adapter, m, k):
    head, features = make_head(ADAPTERS[adapter]), make_support(5).features
    layers = assert_jacobian(head, features[:m], k, head.class_embeddings[:1])
    assert all(layer.factored for layer in layers)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_at_its_initial_weights_has_them_too(adapter):
    """Where a residual starts at zero, gradients behind it are zero and prove nothing about how a weight is used."""
    head, features = make_head(ADAPTERS[adapter], perturb=0.0), make_support(5).features
    assert all(layer.factored for layer in assert_jacobian(head, features, 3, head.class_embeddings[:1]))


def test_what_an_overwritten_output_was_does_not_depend_on_the_example():
    """An example that leaves every unit on cannot tell a layer's output from what ReLU made of it."""
    head = build(InPlace)
    with torch.no_grad():
        head.first.bias.copy_(torch.full((4,), 0.5).double())
    example = torch.zeros(1, D, dtype=torch.float64)
    assert bool((head.first(example) > 0).all())
    inputs = torch.randn(5, D, generator=rng(5), dtype=torch.float64)
    assert bool((head.first(inputs) < 0).any())
    assert_jacobian(head, inputs, 1, example)


def test_a_tapes_hooks_leave_the_head_as_it_was():
    head = build(Normed)
    Linearizer(head, torch.zeros(1, D, dtype=torch.float64))
    assert not any(module._forward_hooks for module in head.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_jacobian_has_the_weights_dtype(dtype):
    head = build(Normed).to(dtype)
    inputs = torch.randn(4, D, generator=rng(5)).to(dtype)
    H = Linearizer(head, inputs[:1]).run(inputs).jacobian(torch.randn(4, 2, C, dtype=torch.float64))
    assert {piece.dtype for piece in H.values()} == {dtype}


@pytest.mark.parametrize("kind", [Normed, Tokens, Attention])
@pytest.mark.parametrize("numbers", [1, 400])
def test_rows_do_not_depend_on_chunks(kind, numbers, monkeypatch):
    head, (shape, _) = build(kind), HEADS[kind]
    inputs = torch.randn(7, *shape, generator=rng(5), dtype=torch.float64)
    cotangent = torch.randn(7, 2, C, generator=rng(6), dtype=torch.float64)
    whole = jacobian_rows(head, inputs, cotangent)
    monkeypatch.setattr(jacobian, "_NUMBERS", numbers)
    chunked = jacobian_rows(head, inputs, cotangent)
    assert list(whole) == list(chunked) == list(trainable(head))
    assert all(max_error(chunked[name], rows) < 1e-13 for name, rows in whole.items())


def test_layers_are_judged_where_their_gradients_are_not_zero():
    head = build(BehindZeros)
    before = nn.init.zeros_(head.last.weight).clone()
    linearizer = Linearizer(head, torch.ones(1, D, dtype=torch.float64))
    assert [layer.name for layer in linearizer.layers if layer.factored] == ["last.weight"]
    assert torch.equal(head.last.weight, before)


def test_rows_of_some_parameters():
    head = build(Normed)
    inputs = torch.randn(4, D, generator=rng(5), dtype=torch.float64)
    cotangent = torch.randn(4, 2, C, generator=rng(6), dtype=torch.float64)
    everything = jacobian_rows(head, inputs, cotangent)
    some = jacobian_rows(head, inputs, cotangent, {"norm.weight", "last.bias"})
    assert list(some) == ["norm.weight", "last.bias"]
    assert all(max_error(rows, everything[name]) < 1e-13 for name, rows in some.items())


@pytest.mark.parametrize("form", ["factors", "rows"])
def test_products_of_a_jacobian_are_those_of_its_rows(form):
    """The forms that a filter uses without the rows."""
    head, (shape, _) = build(Tokens), HEADS[Tokens]
    inputs = torch.randn(4, *shape, generator=rng(5), dtype=torch.float64)
    cotangent = torch.randn(4, 3, C, generator=rng(6), dtype=torch.float64)
    piece = Linearizer(head, inputs[:1]).run(inputs).jacobian(cotangent)["first.weight"]
    H = piece.rows()
    piece = piece if form == "factors" else Rows(H)
    w, v = (torch.randn(n, generator=rng(n), dtype=torch.float64) for n in H.shape)
    assert piece.count == len(H)
    assert max_error(piece.combine(w), H.mT @ w) < EXACT
    assert max_error(piece.times(v), H @ v) < EXACT
    assert max_error(piece.scaled(w).rows(), w[:, None] * H) < EXACT
    assert max_error(piece.part(*((1, 3) if form == "factors" else (D, 3 * D))).rows(), H[:, D : 3 * D]) < EXACT


def test_the_factors_of_classes_are_shared():
    """The text tower's input is the classes, the same for every sample: it is kept once."""
    head, features = make_head(ADAPTERS["linear-text"]), make_support(5).features
    H = Linearizer(head, features[:1]).run(features).jacobian(torch.ones(5, 1, CLASSES, dtype=torch.float64))
    (piece,) = H.values()
    assert isinstance(piece, Factors)
    assert not piece.own_x
    assert piece.x.shape == (CLASSES, DIM)
