"""LoRA inside the towers: W x + scaling * B A x, A (r, i) random, B (o, r) zero (Hu et al., arXiv 2106.09685).

A layer that is adapted keeps its place, its name and its frozen weights; it only gets another class, with
the low-rank factors in a child module of their own::

    visual.transformer.resblocks.0.attn                 nn.MultiheadAttention -> LoraAttention
    visual.transformer.resblocks.0.attn.in_proj_weight  W of q, k and v, frozen
    visual.transformer.resblocks.0.attn.lora.q.down     A of q (r, d)
    visual.transformer.resblocks.0.attn.lora.q.up       B of q (d, r)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kngd_ray.clip._lora_layers import LoraAttention, LoraCustomAttention, LoraLinear, LoraPointwise, LowRank
from kngd_ray.clip._tuning import Target, TuneOptions, select
from kngd_ray.errors import ModelError

__all__ = [
    "LoraAttention",
    "LoraCustomAttention",
    "LoraLinear",
    "LoraPointwise",
    "LowRank",
    "inject",
    "merge",
    "updates",
]


def inject(network: nn.Module, options: TuneOptions, seed: int = 0) -> list[str]:
    """Put low-rank updates into the selected layers of a network; it computes the same as before.

    Args:
        network: an open_clip model; none of its layers has updates yet.
        options: patterns, targets, rank and scaling.
        seed: of the random factors A.

    Returns:
        Names of the layers that were adapted, in the network's order.

    Raises:
        ModelError: A pattern matches no layer, or no selected layer is a target.
    """
    modules = dict(network.named_modules())
    selected = set(select([name for name in modules if name], options, "layer"))
    generator = torch.Generator().manual_seed(seed)
    adapted: list[str] = []
    kinds: set[str] = set()
    for site in _sites(modules):
        if site.name not in selected:
            continue
        kinds.update(site.shapes)
        shapes = {kind: shape for kind, shape in site.shapes.items() if kind in options.targets}
        if shapes:
            _adapt(modules[site.name], site, shapes, options, generator)
            adapted.append(site.name)
    if not adapted:
        has = f"have only {', '.join(sorted(kinds))}" if kinds else "have no layer that LoRA can update"
        raise ModelError(
            f"tune.targets: the layers that tune.include selects {has}, but the targets are "
            f"{', '.join(options.targets)}: change either"
        )
    return adapted


def merge(network: nn.Module) -> nn.Module:
    """Add every update to its layer's frozen weight and put the plain layers back, in place.

    Args:
        network: with or without updates.

    Returns:
        The same network, which computes the same up to rounding.
    """
    layer: Any
    for layer in list(network.modules()):
        if (plain := getattr(layer, "lora_plain", None)) is None:
            continue
        with torch.no_grad():
            for kind, update in layer.lora.items():
                weight = _weight(layer, kind)
                weight += update.product().view_as(weight)
        del layer.lora, layer.lora_plain
        layer.__class__ = plain
    return network


def updates(network: nn.Module) -> Iterator[LowRank]:
    """All low-rank updates in a network."""
    return (module for module in network.modules() if isinstance(module, LowRank))


@dataclass(frozen=True)
class _Site:
    """A layer that can be adapted: the class it gets, and (i, o) of each target that it has."""

    name: str
    adapted: type[nn.Module]
    shapes: Mapping[Target, tuple[int, int]]


_ROLES: Mapping[str, tuple[Target, ...]] = {
    **dict.fromkeys(("q", "q_proj", "query"), ("q",)),
    **dict.fromkeys(("k", "k_proj", "key"), ("k",)),
    **dict.fromkeys(("v", "v_proj", "value"), ("v",)),
    **dict.fromkeys(("out_proj", "o_proj", "out_lin"), ("out",)),
    **dict.fromkeys(("c_fc", "c_proj", "fc1", "fc2"), ("mlp",)),
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
}


def _sites(modules: Mapping[str, nn.Module]) -> Iterator[_Site]:
    """The layers of a network that can be adapted."""
    # Attention whose layers are never called: torch's own adapts its output layer itself, that of open_clip's ResNets
    # hands the weights of all four to a function.
    inside = tuple(
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "AttentionPool2d"
    )
    for name, module in modules.items():
        layer: Any = module  # the class is found out by hand, since subclasses may compute something else
        forward = type(module).forward
        if forward is nn.MultiheadAttention.forward:
            if layer.bias_k is None and not layer.add_zero_attn:
                d = layer.embed_dim
                yield _Site(
                    name, LoraAttention, {"q": (d, d), "k": (layer.kdim, d), "v": (layer.vdim, d), "out": (d, d)}
                )
        elif LoraCustomAttention.replaces(module):
            d = layer.in_proj_weight.shape[1]
            yield _Site(name, LoraCustomAttention, {"q": (d, d), "k": (d, d), "v": (d, d)})
        elif forward is nn.Linear.forward and not name.startswith(inside):
            roles = _roles(name)
            if layer.out_features % len(roles) == 0:
                shape = (layer.in_features, layer.out_features // len(roles))
                yield _Site(name, LoraLinear, dict.fromkeys(roles, shape))
        elif isinstance(module, nn.Conv2d) and _is_pointwise(module):
            yield _Site(name, LoraPointwise, {"pointwise": (module.in_channels, module.out_channels)})


def _roles(name: str) -> tuple[Target, ...]:
    """What a linear layer is, from the names that open_clip, timm and transformers give to layers."""
    *path, last = name.split(".")
    if last in _ROLES:
        return _ROLES[last]
    if any("attn" in part or "attention" in part for part in path[-2:]):
        return ("out",)
    if "mlp" in path or (last == "dense" and path[-1:] in (["intermediate"], ["output"])):
        return ("mlp",)
    return ("proj",)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    plain = type(conv).forward is nn.Conv2d.forward or type(conv).__name__ == "Conv2dSame"  # timm's: 1x1 pads nothing
    return plain and conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")


def _adapt(
    layer: Any,
    site: _Site,
    shapes: Mapping[Target, tuple[int, int]],
    options: TuneOptions,
    generator: torch.Generator,
) -> None:
    """Give a layer its updates, and the class that uses them."""
    like = next(layer.parameters())
    layer.lora = nn.ModuleDict({kind: LowRank(i, o, options, like, generator) for kind, (i, o) in shapes.items()})
    if site.adapted is LoraLinear:
        layer.blocks = tuple(site.shapes)
    layer.lora_plain = type(layer)
    layer.__class__ = site.adapted


def _weight(layer: Any, kind: str) -> Tensor:
    """The view of an adapted layer's frozen weights that one update belongs to."""
    if isinstance(layer, LoraAttention):
        return layer.out_proj.weight if kind == "out" else layer.projection(kind)[0]
    if isinstance(layer, LoraLinear):
        return layer.weight.chunk(len(layer.blocks))[layer.blocks.index(kind)]
    if isinstance(layer, LoraPointwise):
        return layer.weight
    return layer.in_proj_weight.chunk(3)["qkv".index(kind)]
