"""The functions that a tape reads, each as what it does with parameters: multiply tokens, scale, or add.

A reader calls the function and records the call; it returns None, and calls nothing, where parameters are used
in another way, which is then differentiated as any other function is. Arguments have the names that torch gives them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kngd_ray.observations._uses import Outer, Scale, Source, Use

_Function = Callable[..., Any]


class Recorder(Protocol):
    """What a reader needs of a tape."""

    def source(self, value: Any) -> Source | None:
        """What a tensor is made of, if that is one parameter."""
        ...

    def record(self, uses: Sequence[Use], tensors: Sequence[Tensor], out: Tensor, fresh: bool = True) -> Tensor:
        """Keep a call, and return its output."""
        ...


def _linear(tape: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    w, b = tape.source(weight), tape.source(bias)
    if (w and not w.is_matrix) or tape.source(input):
        return None
    x = _cast(input)
    uses: list[Use] = [Outer(w, w.form == "transposed")] if w else []
    if b:
        uses.append(Scale(b, b.value.shape))
    return tape.record(uses, [x], functional.linear(x, weight, bias))


def _matmul(tape: Recorder, input: Tensor, other: Tensor) -> Tensor | None:
    w = tape.source(other)
    if not w or not w.is_matrix or tape.source(input):
        return None
    x = _cast(input)
    return tape.record([Outer(w, w.form == "same")], [x], x @ other)


def _mm(tape: Recorder, input: Tensor, mat2: Tensor) -> Tensor | None:
    return _matmul(tape, input, mat2)


def _rmatmul(tape: Recorder, other: Tensor, input: Tensor) -> Tensor | None:
    return _matmul(tape, input, other)


def _addmm(
    tape: Recorder, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Tensor | None:
    w, b = tape.source(mat2), tape.source(input)
    if beta != 1 or alpha != 1 or (w and not w.is_matrix) or tape.source(mat1):
        return None
    x = _cast(mat1)
    uses: list[Use] = [Outer(w, w.form == "same")] if w else []
    if b:
        uses.append(Scale(b, b.value.shape))
    return tape.record(uses, [x], torch.addmm(input, x, mat2))


def _conv2d(
    tape: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """A convolution of one group is a linear layer on the patches of its input."""
    w, b = tape.source(weight), tape.source(bias)
    plain = groups == 1 and not isinstance(padding, str)
    if input.dim() != 4 or tape.source(input) or (w and not (plain and w.form == "same")):
        return None
    x = _cast(input)
    unfold = partial(_patches, kernel=tuple(weight.shape[2:]), stride=stride, padding=padding, dilation=dilation)
    uses: list[Use] = [Outer(w, unfold=unfold)] if w else []
    if b:
        uses.append(Scale(b, (len(b.value), 1, 1)))
    return tape.record(uses, [x], functional.conv2d(x, weight, bias, stride, padding, dilation, groups))


def _attention(
    tape: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    is_causal: bool = False,
    **others: Any,
) -> tuple[Tensor, None] | None:
    """Self-attention of nn.MultiheadAttention, its projections as linear layers of samples by tokens."""
    refused = need_weights or use_separate_proj_weight or add_zero_attn or (training and dropout_p > 0)
    absent = (bias_k, bias_v, key_padding_mask, others.get("static_k"), others.get("static_v"))
    if refused or any(tensor is not None for tensor in absent) or in_proj_weight is None:
        return None
    if query is not key or key is not value or query.dim() != 3 or tape.source(query):
        return None
    weights = [tape.source(weight) for weight in (in_proj_weight, out_proj_weight)]
    if any(w is not None and not w.is_matrix for w in weights):
        return None
    x = query.transpose(0, 1)
    m, T, d = x.shape
    packed = _linear(tape, x, in_proj_weight, in_proj_bias)
    assert packed is not None
    q, k, v = packed.view(m, T, 3, num_heads, d // num_heads).permute(2, 0, 3, 1, 4)
    mask = None if is_causal else attn_mask
    if mask is not None:
        mask = mask.logical_not() if mask.dtype == torch.bool else mask.to(q.dtype)
        if mask.dim() == 3 and len(mask) > 1:
            mask = mask.view(m, num_heads, T, T)
    mixed = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
    out = _linear(tape, mixed.transpose(1, 2).reshape(m, T, d), out_proj_weight, out_proj_bias)
    assert out is not None
    return out.transpose(0, 1), None


def _add(tape: Recorder, input: Any, other: Any, *, alpha: Any = 1, in_place: _Function | None = None) -> Tensor | None:
    if not _scaled(tape, input, other, in_place) or alpha != 1:
        return None
    uses = [Scale(source, source.value.shape) for source in (tape.source(input), tape.source(other)) if source]
    tensors = [tensor for tensor in (input, other) if not tape.source(tensor)]
    return tape.record(uses, tensors, in_place(input, other) if in_place else input + other)


def _mul(tape: Recorder, input: Any, other: Any, *, in_place: _Function | None = None) -> Tensor | None:
    if not _scaled(tape, input, other, in_place):
        return None
    tensors = [input.detach().clone() if in_place else input, other]
    uses = [
        Scale(source, source.value.shape, operand)
        for source, operand in ((tape.source(input), 1), (tape.source(other), 0))
        if source
    ]
    return tape.record(uses, tensors, in_place(input, other) if in_place else input * other)


def _scaled(tape: Recorder, a: Any, b: Any, in_place: _Function | None) -> bool:
    """Whether two operands are tensors that are not of one parameter, and none that is written into is of any."""
    one, two = tape.source(a), tape.source(b)
    apart = one is None or two is None or one.name != two.name
    return isinstance(a, Tensor) and isinstance(b, Tensor) and apart and not (in_place and one)


def _layer_norm(
    tape: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    shape = list(normalized_shape)
    plain = partial(_over_last, shape=shape, eps=eps)
    return _normed(tape, input, weight, bias, plain, 0, partial(functional.layer_norm, normalized_shape=shape, eps=eps))


def _group_norm(
    tape: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    plain = partial(functional.group_norm, num_groups=num_groups, eps=eps)
    return _normed(tape, input, weight, bias, plain, input.dim() - 2, plain)


def _batch_norm(
    tape: Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if training or running_mean is None or running_var is None:  # samples would depend on one another
        return None
    plain = partial(_by_statistics, mean=running_mean, var=running_var, eps=eps)
    whole = partial(functional.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps)
    return _normed(tape, input, weight, bias, plain, input.dim() - 2, whole)


def _normed(
    tape: Recorder,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    plain: Callable[[Tensor], Tensor],
    after: int,
    whole: Callable[..., Tensor],
) -> Tensor | None:
    """A normalisation whose weight and bias are followed by so many dimensions of the output."""
    w, b = tape.source(weight), tape.source(bias)
    if tape.source(x):
        return None
    uses: list[Use] = []
    if w:
        uses.append(Scale(w, (*w.value.shape, *[1] * after), 0, plain))
    if b:
        uses.append(Scale(b, (*b.value.shape, *[1] * after)))
    return tape.record(uses, [x], whole(x, weight=weight, bias=bias))


def _cast(x: Tensor) -> Tensor:
    """The input as autocast gives it to the function: so it is kept once, not twice."""
    device = x.device.type
    if x.dtype != torch.float64 and x.is_floating_point() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _patches(x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """(m, T, c kh kw) of images (m, c, H, W)."""
    (down, right), pads = _pair(stride), _pair(padding)
    if kernel == (1, 1) and not any(pads):
        return x[:, :, ::down, ::right].flatten(2).mT
    return functional.unfold(x, kernel, _pair(dilation), pads, (down, right)).mT


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


def _over_last(x: Tensor, shape: list[int], eps: float) -> Tensor:
    return functional.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), shape, None, None, eps)


def _by_statistics(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return functional.batch_norm(x.to(torch.promote_types(x.dtype, mean.dtype)), mean, var, eps=eps)


READERS: Mapping[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.conv2d: _conv2d,
    functional.multi_head_attention_forward: _attention,
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.batch_norm: _batch_norm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm), _mm),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
    **{function: partial(_add, in_place=function) for function in (Tensor.add_, Tensor.__iadd__)},
    **{function: partial(_mul, in_place=function) for function in (Tensor.mul_, Tensor.__imul__)},
}
