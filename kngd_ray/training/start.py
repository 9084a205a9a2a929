"""Where a fit of towers begins: at a head that was fitted on the features of the pretrained ones.

Towers that move while a head is learned from scratch are moved by errors that the head alone would have corrected.
LP-FT (Kumar et al., arXiv 2202.10054) therefore fits the head first. For the filter this is a sequence of posteriors:
theta starts at the head's mean, and the head's covariance is kept, Kronecker factors as they are, while the towers are
at their prior. The shots are not counted twice, see :mod:`~kngd_ray.sharding.streamed`. Gradient methods take the
weights.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kngd_ray.clip import CLIPNetwork
from kngd_ray.filters import Belief
from kngd_ray.sharding import Group
from kngd_ray.training.batches import Support
from kngd_ray.training.kalman import KalmanNGD, nested
from kngd_ray.training.method import MethodState, load_head
from kngd_ray.training.options import FitOptions
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.streamed import ADAPTERS, StreamedPosterior


@dataclass(frozen=True)
class HeadStart:
    """The fit of a head that precedes the fit of towers.

    Attributes:
        options: of the fit.
        posterior: how its tau is chosen.
        support: features of the training shots by the pretrained towers, with their crops.
    """

    options: FitOptions
    posterior: PosteriorOptions
    support: Support

    @classmethod
    def of(cls, options: FitOptions, support: Support) -> "HeadStart | None":
        """The default preset's fit of the adapters of a fit that trains towers.

        Args:
            options: of the fit of towers.
            support: features of its shots.

        Returns:
            The head's fit; None where the fit of the towers starts elsewhere, or there are no towers.
        """
        if not options.tune.after_head:
            return None
        from kngd_ray.config import load_config  # of YAML files, which fits without this do not need

        default = load_config(overrides=["method=kalman"])
        return cls(replace(default.fit_options, adapter=options.adapter), default.posterior, support)

    def subset(self, keep: Tensor) -> "HeadStart":
        """The same on some of the shots."""
        return replace(self, support=self.support.subset(keep))

    def to(self, device: torch.device | str) -> "HeadStart":
        """The same with its features on another device."""
        return replace(self, support=self.support.to(device))


def describe_start(options: FitOptions, prior: str | None) -> str | None:
    """Where a run of towers begins, and what becomes of the head that it begins at, in a line.

    Args:
        options: of the fit.
        prior: the run that it continues.

    Returns:
        A sentence without its full stop; None where no towers are trained.
    """
    if not options.tune.images or prior is not None:
        return None
    names = " and ".join(one.kind for one in options.adapter)
    if options.tune.start == "zero_shot":
        return "the towers are trained from zero-shot CLIP" + (f" together with {names}" if names else "")
    begin = f"{names} fitted first by the default preset on frozen features, then trained on together with the towers"
    return f"{begin}, and fitted again on features of the trained towers" if options.refits else begin


def begin_at(network: CLIPNetwork, fitted: MethodState, group: Group) -> None:
    """Give a network the fitted head, on every rank the first rank's.

    Args:
        network: before its optimiser is built.
        fitted: the head's fit on this rank; processors of different kinds may round differently.
        group: the ranks.
    """
    like = network.class_embeddings
    agreed = {name: from_first(weight.to(like.device), group) for name, weight in fitted.weights.items()}
    state = replace(fitted, replicated={n: from_first(t.to(like.device), group) for n, t in fitted.replicated.items()})
    load_head(network.head, state)
    network.started = {name: weight.to(like).clone() for name, weight in agreed.items()}
    put_start(network)


@torch.no_grad()
def put_start(network: CLIPNetwork) -> None:
    """Give the adapters the weights that the fit of the towers starts from, if there are any."""
    for name, weight in network.head.named_parameters():
        if name in network.started:
            weight.copy_(network.started[name])


def take_covariance(method: KalmanNGD, fitted: MethodState, held_out: Tensor | None) -> None:
    """Give the belief of a fit of towers the covariance of a head: of the first, or of the one that is fitted again.

    Args:
        method: at its prior or after its last step, on the head's weights.
        fitted: the head's fit on this rank.
        held_out: (N, C) logits of the shots by heads that have not seen them, less the head's; None if not known,
            which keeps what was.
    """
    assert isinstance(method.posterior, StreamedPosterior)
    filter, belief = method.posterior.filter, method.belief
    covariance = nested(fitted.covariance, belief.mu)
    agreed = {
        ADAPTERS + name: {key: from_first(tensor, method.group) for key, tensor in state.items() if key != "B0"}
        for name, state in covariance.items()
    }
    own = {}
    for part in filter.ownership.parts[method.group.rank]:
        name = part.layer.name
        if name in agreed:
            like = torch.promote_types(belief.mu.dtype, torch.float32)
            own[name] = {k: (v if part.whole else v[part.flat]).to(like).clone() for k, v in agreed[name].items()}
    if held_out is not None:
        method.posterior.held_out = from_first(held_out, method.group)
    method.posterior.belief = Belief(belief.mu, {**belief.covariance, **own})


def from_first(tensor: Tensor, group: Group) -> Tensor:
    """A tensor as the first rank has it."""
    return tensor if group.world_size == 1 else group.sum(tensor * (group.rank == 0))
