"""Adapters as torch modules; their settings are in a module that does not need torch."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kngd_ray.clip.adapters._base import HeadShape
from kngd_ray.clip.adapters.bottleneck import Bottleneck
from kngd_ray.clip.adapters.linear import Linear


class Adapter(nn.Module):
    """Base of the adapters: each hook is the identity until an adapter overrides it."""

    def image(self, z: Tensor) -> Tensor:
        """Adapt image embeddings z (m, d), before they are normalised."""
        return z

    def text(self, t: Tensor) -> Tensor:
        """Adapt class text embeddings t (C, d), before they are normalised."""
        return t

    def cosines(self, z: Tensor, cosines: Tensor) -> Tensor:
        """Adapt cosines (m, C) of the unit image embeddings z (m, d) with the class texts."""
        return cosines


class BottleneckAdapter(Adapter):
    """The module of :class:`Bottleneck`."""

    def __init__(self, config: Bottleneck, shape: HeadShape) -> None:
        super().__init__()
        self.ratio = config.ratio
        towers = ("image", "text") if config.tower == "both" else (config.tower,)
        self.mlp = nn.ModuleDict({
            tower: nn.Sequential(
                nn.Linear(shape.embed_dim, config.width, bias=False),
                nn.ReLU(),
                nn.Linear(config.width, shape.embed_dim, bias=False),
                nn.ReLU(),
            )
            for tower in towers
        })

    def image(self, z: Tensor) -> Tensor:
        """Mix the adapted embeddings in."""
        return self._mix("image", z)

    def text(self, t: Tensor) -> Tensor:
        """Mix the adapted embeddings in."""
        return self._mix("text", t)

    def _mix(self, tower: str, x: Tensor) -> Tensor:
        if tower not in self.mlp:
            return x
        return self.ratio * self.mlp[tower](x) + (1 - self.ratio) * x


class LinearAdapter(Adapter):
    """The module of :class:`Linear`."""

    def __init__(self, config: Linear, shape: HeadShape) -> None:
        super().__init__()
        towers = ("image", "text") if config.tower == "both" else (config.tower,)
        self.residual = nn.ModuleDict({
            tower: nn.Linear(shape.embed_dim, shape.embed_dim, bias=False) for tower in towers
        })
        for layer in self.residual.values():
            torch.nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def image(self, z: Tensor) -> Tensor:
        """Add the residual."""
        return z + self.residual["image"](z) if "image" in self.residual else z

    def text(self, t: Tensor) -> Tensor:
        """Add the residual."""
        return t + self.residual["text"](t) if "text" in self.residual else t


class ClassResidualAdapter(Adapter):
    """The adapter itself.

    Args:
        shape: of the head.
        bias: whether the layer sees a constant beside the features.
        centred: whether it sees them less `centre`.

    Attributes:
        delta: the one linear layer, of which the logits are a linear function.
        centre: (d,) what features are measured from, 0 until it is set; None where they are taken as they are.
    """

    centre: Tensor | None

    def __init__(self, shape: HeadShape, *, bias: bool, centred: bool = False) -> None:
        super().__init__()
        self._bias = bias
        self.register_buffer("centre", torch.zeros(shape.embed_dim) if centred else None, persistent=False)
        self.delta = nn.Linear(shape.embed_dim + bias, shape.classes, bias=False)
        torch.nn.init.zeros_(self.delta.weight)

    def inputs(self, z: Tensor) -> Tensor:
        """What the layer sees of unit image embeddings z (m, d): (m, d), or (m, d + 1) with a constant 1."""
        if self.centre is not None:
            z = z - self.centre
        return pad(z, (0, 1), value=1.0) if self._bias else z

    def cosines(self, z: Tensor, cosines: Tensor) -> Tensor:
        """Add the residual."""
        return cosines + self.delta(self.inputs(z))
