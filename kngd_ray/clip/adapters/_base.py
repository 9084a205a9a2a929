"""What an adapter is: a small trainable module between the frozen towers' embeddings and the logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from kngd_ray.clip.adapters.modules import Adapter

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


class AdapterConfig(Protocol):
    """Options of an adapter, and how to build it."""

    @property
    def kind(self) -> Any:
        """The adapter's name in configuration files."""
        ...

    def build(self, shape: HeadShape) -> "Adapter":
        """A new adapter, its random weights drawn from torch's global generator."""
        ...


def averages(adapter: AdapterConfig) -> bool:
    """Whether an adapter's weights start at 0, so that they can be averaged with the pretrained model's.

    Args:
        adapter: its options.

    Returns:
        What their class says by ``averages``; False where it says nothing.
    """
    return getattr(adapter, "averages", False)
