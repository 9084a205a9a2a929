"""The zero-shot head on frozen embeddings, with adapters in between."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kngd_ray.clip.adapters import AdapterConfig, HeadShape


class CLIPHead(nn.Module):
    """Class logits from image embeddings: ``s * cos(image, class text)``, adapted.

    Without adapters this is CLIP's zero-shot classifier. Samples are independent of one another.

    Args:
        class_embeddings: (C, d) unit text embeddings of the classes.
        logit_scale: s, the factor from cosines to logits.
        adapters: options of the adapters, applied in this order.
        seed: of the adapters' random weights.
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
        self.register_buffer("class_embeddings", class_embeddings, persistent=False)
        shape = HeadShape(class_embeddings.shape[1], class_embeddings.shape[0])
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: of lazy CUDA it would queue a record for each of a search's thousands of heads
            torch.default_generator.manual_seed(seed)
            self.adapters = nn.ModuleList([config.build(shape) for config in adapters])

    def forward(self, features: Tensor) -> Tensor:
        """Logits (m, C) of unit image embeddings (m, d)."""
        z, t = features, self.class_embeddings
        for adapter in self.adapters:
            z = adapter.image(z)  # type: ignore[operator]
            t = adapter.text(t)  # type: ignore[operator]
        z, t = normalize(z, dim=-1), normalize(t, dim=-1)
        cosines = z @ t.mT
        for adapter in self.adapters:
            cosines = adapter.cosines(z, cosines)  # type: ignore[operator]
        return self.logit_scale * cosines
