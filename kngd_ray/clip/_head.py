"""The zero-shot head on frozen embeddings, with adapters in between."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kngd_ray.clip.adapters import AdapterConfig, ClassResidualAdapter, HeadShape, averages
from kngd_ray.errors import UsageError


class CLIPHead(nn.Module):
    """Class logits from image embeddings: ``s * cos(image, class text)``, adapted.

    Without adapters this is CLIP's zero-shot classifier. Samples are independent of one another.

    Args:
        class_embeddings: (C, d) unit text embeddings of the classes.
        logit_scale: s, the factor from cosines to logits.
        adapters: options of the adapters, applied in this order.
        seed: of the adapters' random weights.

    Attributes:
        gamma: factor of the zero-shot logits, 1 in CLIP itself; below 1 the classes' texts are believed less.
        averages: whether the trained weights can be averaged with the pretrained model's, see :meth:`blend`.
    """

    class_embeddings: Tensor

    def __init__(
        self,
        class_embeddings: Tensor,
        logit_scale: float,
        adapters: Sequence[AdapterConfig] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        self.gamma = 1.0
        self.averages = all(map(averages, adapters))
        self.register_buffer("class_embeddings", class_embeddings, persistent=False)
        shape = HeadShape(class_embeddings.shape[1], class_embeddings.shape[0])
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: of lazy CUDA it would queue a record for each of a search's thousands of heads
            torch.default_generator.manual_seed(seed)
            self.adapters = nn.ModuleList([config.build(shape) for config in adapters])

    def forward(self, features: Tensor, class_embeddings: Tensor | None = None) -> Tensor:
        """Logits of images.

        Args:
            features: (m, d) unit image embeddings.
            class_embeddings: (C, d) unit text embeddings instead of the head's own, where the text tower is
                trained.

        Returns:
            (m, C).
        """
        z, t = features, self.class_embeddings if class_embeddings is None else class_embeddings
        for adapter in self.adapters:
            z = adapter.image(z)  # type: ignore[operator]
            t = adapter.text(t)  # type: ignore[operator]
        z, t = normalize(z, dim=-1), normalize(t, dim=-1)
        cosines = self.gamma * (z @ t.mT)
        for adapter in self.adapters:
            cosines = adapter.cosines(z, cosines)  # type: ignore[operator]
        return self.logit_scale * cosines

    @property
    def residual(self) -> ClassResidualAdapter | None:
        """The class residual, where it is the only adapter and the logits are a linear function of its weights."""
        only = self.adapters[0] if len(self.adapters) == 1 else None
        return only if isinstance(only, ClassResidualAdapter) else None

    def example(self, m: int) -> Tensor:
        """Inputs (m, d) of m samples that stand for any: seeded unit embeddings."""
        t = self.class_embeddings
        z = torch.randn(m, t.shape[1], generator=torch.Generator().manual_seed(0))
        return normalize(z.to(t), dim=-1)

    def blend(self, alpha: float) -> None:
        """Average with the zero-shot head in place: the adapters' weights, which start at 0, times alpha; gamma too.

        Args:
            alpha: 0 is the zero-shot head, 1 changes nothing.

        Raises:
            UsageError: alpha is not in [0, 1], or an adapter does not start at 0.
        """
        check_alpha(alpha, self.averages)
        if alpha != 1:
            self.gamma = 1.0 + alpha * (self.gamma - 1.0)
            with torch.no_grad():
                for weight in self.parameters():
                    weight.mul_(alpha)


def check_alpha(alpha: float, averages: bool) -> None:
    """Refuse weight ensembling that is none.

    Args:
        alpha: how much of the trained weights.
        averages: whether there is something to average all trained weights with.

    Raises:
        UsageError: alpha is not in [0, 1], or less than 1 without anything to average with.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha is {alpha}; it must lie in [0, 1], from pretrained to trained")
    if alpha != 1 and not averages:
        raise UsageError(
            "alpha is for weights that start from pretrained ones, and those of an adapter (such as bottleneck) do "
            "not: set alpha=1, or use the linear or class_residual adapter"
        )
