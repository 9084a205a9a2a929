"""LP++: a linear probe beside the texts, which a learned multiplier per class weighs (Huang et al., arXiv 2404.02285).

::

    logits = z W^T + b + (z T^T) * alpha      W (C, d), b (C,), alpha (C,)

Settings are fixed or follow from the shots Z (N, d), as in github.com/FereshteShakeri/FewShot-CLIP-Strong-Baseline:
W begins at the classes' sums of shots, alpha at 250 times the mean cosine of shots with their own text; W and b descend
the cross-entropy of all shots at once for 300 steps by momentum .9 and a step size of ``4 N / |Z^T Z|``, alpha after
every tenth at ``N / (4 max_c sum_i (z_i.t_c)^2)``. That code never clears alpha's gradient, so its steps go along the
sum of all gradients so far; so they do here. Two things differ. The authors keep the epoch that is best on validation
pictures; here there are none, and the last one stays. Their 250 presumes CLIP's logit scale of 100, and is 2.5 times
the model's own scale here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from benchmarks.few_shot.methods._base import Method, softmax
from benchmarks.few_shot.problem import Outcome, Problem, Settings
from kngd_ray.training.batches import Support

_STEPS, _EVERY, _MOMENTUM = 300, 10, 0.9
_OF_SCALE = 2.5


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """One probe per case."""
    texts = problem.class_embeddings
    found = [probe(case.support, texts, problem.logit_scale) for case in problem.cases]

    def logits(n: int, x: Tensor) -> Tensor:
        W, b, alpha = found[n]
        return x @ W.mT + b + x @ texts.mT * alpha

    return softmax(problem, logits)


def probe(shots: Support, texts: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Descend from the classes' sums.

    Args:
        shots: N of them.
        texts: (C, d) class embeddings.
        scale: the model's logit scale.

    Returns:
        W (C, d), b (C,) and alpha (C,).
    """
    z, labels = shots.features, shots.labels
    Y = one_hot(labels, len(texts)).to(z)
    cosines = z @ texts.mT
    of_class = (Y * cosines).sum(0) / Y.sum(0).clamp_min(1)
    alpha = torch.full((len(texts),), float(_OF_SCALE * scale * of_class.mean())).requires_grad_()
    W, b = (Y.mT @ z).requires_grad_(), torch.zeros(len(texts)).requires_grad_()
    rate = 4 * len(z) / float(torch.linalg.matrix_norm(z, 2)) ** 2
    alpha_rate = len(z) / (4 * float(cosines.square().sum(0).max()))
    optimiser = torch.optim.SGD([W, b], lr=rate, momentum=_MOMENTUM)
    for step in range(1, _STEPS + 1):
        optimiser.zero_grad()
        cross_entropy(z @ W.mT + b + cosines * alpha, labels).backward()
        optimiser.step()
        if step % _EVERY == 0:
            with torch.no_grad():
                alpha -= alpha_rate * alpha.grad
    return W.detach(), b.detach(), alpha.detach()


METHOD = Method("lp++", fit)
