"""What an adapter is: a small trainable module between the frozen towers' embeddings and the logits."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Tower = Literal["image", "text", "both"]


@dataclass(frozen=True)
class HeadShape:
    """What an adapter may need to know to size its weights.

    Attributes:
        embed_dim: d, width of the joint embedding.
        classes: C, number of classes.
    """

    embed_dim: int
    classes: int


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


class AdapterConfig(Protocol):
    """Options of an adapter, and how to build it."""

    @property
    def kind(self) -> Any:
        """The adapter's name in configuration files."""
        ...

    def build(self, shape: HeadShape) -> Adapter:
        """A new adapter, its random weights drawn from torch's global generator."""
        ...
