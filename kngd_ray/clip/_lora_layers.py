"""Layers with low-rank updates of their frozen weights: torch's and open_clip's layers, one class for each kind.

Every factor meets its input in a ``linear`` over tokens (m, T, i) with the samples in dimension 0, so that
its per-sample gradients are read off that call.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

from kngd_ray.clip._tuning import TuneOptions


class LowRank(nn.Module):
    """x -> scaling * B A x, zero until B is trained.

    Attributes:
        down: A (r, i).
        up: B (o, r).
        scaling: the factor.
    """

    def __init__(self, inputs: int, outputs: int, options: TuneOptions, like: Tensor, seed: torch.Generator) -> None:
        super().__init__()
        rank = min(options.rank, inputs, outputs)
        down = torch.empty(rank, inputs, dtype=like.dtype)  # drawn on the CPU: the same on every device
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=seed)
        self.down = nn.Parameter(down.to(like.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, dtype=like.dtype, device=like.device))
        self.scaling = options.scaling

    def forward(self, x: Tensor) -> Tensor:
        """The update (m, ..., o) of inputs (m, ..., i)."""
        return self.scaling * linear(linear(x, self.down), self.up)

    def product(self) -> Tensor:
        """What the update adds to the layer's weight, (o, i)."""
        return self.scaling * self.up @ self.down


class LoraLinear(nn.Linear):
    """A linear layer with one update, or one for each block of rows of a packed ``qkv`` or ``kv`` projection."""

    lora: nn.ModuleDict
    blocks: tuple[str, ...]  # what each of the equal blocks of rows is, in order

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (m, ..., o) of inputs (m, ..., i)."""
        return super().forward(x) + packed_updates(self.lora, self.blocks, x, self.out_features // len(self.blocks))


class LoraPointwise(nn.Conv2d):
    """A 1x1 convolution whose update is linear over channels, a token for each place."""

    lora: nn.ModuleDict

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (m, o, H', W') of inputs (m, i, H, W)."""
        y = conv2d(x, self.weight, self.bias, self.stride)
        x = x[..., :: self.stride[0], :: self.stride[1]]
        update: Tensor = self.lora["pointwise"](x.flatten(2).mT)
        return y + update.mT.unflatten(2, y.shape[2:])


class LoraAttention(nn.MultiheadAttention):
    """torch's attention with updates of q, k, v and out, as far as CLIP towers use it."""

    lora: nn.ModuleDict

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: (m, L, d), or (L, m, d) without ``batch_first``.
            key: (m, S, d_k), laid out likewise.
            value: (m, S, d_v), laid out likewise.
            key_padding_mask: not supported.
            need_weights: not supported.
            attn_mask: (L, S) or (m heads, L, S), added to the scores or true where attention is not allowed.
            average_attn_weights: of no effect without weights.
            is_causal: a hint that ``attn_mask`` is causal; the mask says so itself.

        Returns:
            Outputs laid out as the query, and None in place of the weights.

        Raises:
            ValueError: Something is asked for that is not supported.
        """
        if need_weights or key_padding_mask is not None or query.ndim != 3 or (is_causal and attn_mask is None):
            raise ValueError("attention with LoRA takes batches with attn_mask alone, and returns no weights")
        same = query is key and key is value
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if same and self._qkv_same_embed_dim:
            packed = linear(query, self.in_proj_weight, self.in_proj_bias)
            packed = packed + packed_updates(self.lora, ("q", "k", "v"), query, self.embed_dim)
            q, k, v = packed.chunk(3, dim=-1)
        else:
            q, k, v = (
                _update(self.lora, kind, x, linear(x, *self.projection(kind)))
                for kind, x in (("q", query), ("k", key), ("v", value))
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = attend(q, k, v, attn_mask, self.dropout if self.training else 0.0).transpose(1, 2).flatten(2)
        y = _update(self.lora, "out", mixed, linear(mixed, self.out_proj.weight, self.out_proj.bias))
        return (y if self.batch_first else y.transpose(0, 1)), None

    def projection(self, kind: str) -> tuple[Tensor, Tensor | None]:
        """Weight (d, i) and bias (d,) of q, k or v."""
        start = "qkv".index(kind) * self.embed_dim
        rows = slice(start, start + self.embed_dim)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        if not self._qkv_same_embed_dim:
            return getattr(self, f"{kind}_proj_weight"), bias
        return self.in_proj_weight[rows], bias


class LoraCustomAttention(nn.Module):
    """open_clip's own attention class with updates of q, k and v; its output layer is a linear layer by itself."""

    lora: nn.ModuleDict
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    num_heads: int
    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    head_scale: Tensor | None
    attn_drop: nn.Dropout
    out_proj: nn.Module
    out_drop: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (m, L, d).
            attn_mask: (L, L) or (m heads, L, L), added to the scores or true where attention is not allowed.

        Returns:
            (m, L, d).
        """
        packed = linear(x, self.in_proj_weight, self.in_proj_bias)
        packed = packed + packed_updates(self.lora, ("q", "k", "v"), x, x.shape[-1])
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = attend(self.ln_q(q), self.ln_k(k), v, attn_mask, dropout)
        if self.head_scale is not None:
            mixed = mixed * self.head_scale
        mixed = self.ln_inner(mixed.transpose(1, 2).flatten(2))
        return self.out_drop(self.out_proj(mixed))

    @staticmethod
    def replaces(module: Any) -> bool:
        """Whether this class can take the place of a module's; not where scores are cosines, as in Swin V2."""
        kind = type(module)  # told by its name: open_clip takes seconds to import
        return (kind.__module__, kind.__name__) == ("open_clip.transformer", "Attention") and not module.scaled_cosine


def _update(lora: nn.ModuleDict, kind: str, x: Tensor, y: Tensor) -> Tensor:
    """A projection y (m, ..., o) of x (m, ..., i) with its update, if there is one."""
    return y + lora[kind](x) if kind in lora else y


def packed_updates(lora: nn.ModuleDict, blocks: tuple[str, ...], x: Tensor, width: int) -> Tensor:
    """The updates (m, ..., o) of a packed projection, zero for the blocks (m, ..., width) without one."""
    parts = [lora[kind](x) if kind in lora else None for kind in blocks]
    trained = [part for part in parts if part is not None]
    if len(trained) == len(parts) == 1:
        return trained[0]
    if not trained:
        return x.new_zeros(())
    zero = trained[0].new_zeros(*x.shape[:-1], width)
    return torch.cat([zero if part is None else part for part in parts], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention of projected tokens.

    Args:
        q: (m, heads, L, d / heads).
        k: (m, heads, S, d / heads).
        v: (m, heads, S, d / heads).
        mask: (L, S) or (m heads, L, S), added to the scores or true where attention is not allowed.
        dropout: probability that a weight is dropped.

    Returns:
        (m, heads, L, d / heads).
    """
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
        mask = (mask if mask.ndim == 2 else mask.unflatten(0, (-1, q.shape[1]))).to(q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
