"""The class residual in the form that laplace-torch and IVON are given."""

import torch
from torch import Tensor, nn


class Probe(nn.Module):
    """A residual on each class's text embedding in units of logits: ``s z T^T + z Delta'^T``, Delta' = s Delta.

    Args:
        class_embeddings: (C, d) unit text embeddings T.
        logit_scale: s.
        delta: (C, d) the residual of the package's head; None is 0, zero-shot.
    """

    zero_shot: Tensor

    def __init__(self, class_embeddings: Tensor, logit_scale: float, delta: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("zero_shot", logit_scale * class_embeddings)
        self.residual = nn.Linear(class_embeddings.shape[1], len(class_embeddings), bias=False)
        with torch.no_grad():
            self.residual.weight.copy_(torch.zeros_like(class_embeddings) if delta is None else logit_scale * delta)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (m, C) of unit image embeddings (m, d)."""
        return features @ self.zero_shot.mT + self.residual(features)
