"""What the step loop asks of an optimiser, and what every optimiser reports."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kngd_ray.clip import CLIPHead, CLIPNetwork, Head
from kngd_ray.sharding import Group
from kngd_ray.training.batches import Batch
from kngd_ray.training.metrics import correct


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Figures of one step on the global batch, taken before the step.

    In the first pass over the shots they are prequential: no sample has been learned from when it is scored.

    Attributes:
        nll: mean negative log-likelihood, nats per sample.
        accuracy: share of samples classified right.
        innovation_rms: root mean square of nu; None where the method has no innovation.
        nis: nu^T S^-1 nu, expected value M.
        nis_per_observation: nis / M; for observations that are residuals (cosine, probability), well above 1
            says that the noise is underestimated. Others do not reach 1 by construction.
        log_evidence: log N(nu; 0, S), nats, summed over the M observations; S holds their own noise, not the tempered
            one.
        jitter: what S needed on its diagonal to factor; normally 0.
        gated: observations that the gate gave less weight or left out.
        bytes_moved: bytes that this rank received from others.
        covariance_bytes: bytes of the covariance that this rank holds.
        log_predictive: of a batch that is scored, the log-probability of its labels under the belief before the step,
            nats, summed over samples, at each tau of the posterior; at tau = 0 alone where there is no belief.
        unsettled: 1 where the step was to end at a mode and did not come to it; None elsewhere.
        unlearned: parts of layers whose covariance stayed as predicted, because their posterior would not factor; None
            where all have learned.
    """

    nll: float
    accuracy: float
    innovation_rms: float | None = None
    nis: float | None = None
    nis_per_observation: float | None = None
    log_evidence: float | None = None
    jitter: float | None = None
    gated: int | None = None
    bytes_moved: int | None = None
    covariance_bytes: int | None = None
    log_predictive: tuple[float, ...] | None = None
    unsettled: int | None = None
    unlearned: int | None = None


def stopped_short(iterations: int) -> str:
    """What to say of a step that is `unsettled`.

    Args:
        iterations: linearisations that it may make.

    Returns:
        A sentence without its full stop.
    """
    return (
        f"{iterations} linearisations of a step did not reach the mode, and predictions are of where it stopped: raise "
        "filter.iterations, or lower the prior variance"
    )


def left_unlearned(parts: int, steps: int) -> str:
    """What to say of parts that are `unlearned`.

    Args:
        parts: the most of a step.
        steps: how many had some.

    Returns:
        A sentence without its full stop.
    """
    return (
        f"in {steps} {'steps' if steps > 1 else 'step'} up to {parts} parts of the covariance could not be factored and"
        " did not learn, so that predictions are less certain than they should be: lower the prior variance"
    )


@dataclass(frozen=True)
class MethodState:
    """What a method must remember to go on bitwise as if it had not stopped.

    Attributes:
        weights: trainable weights by name, replicated.
        replicated: the method's own tensors that every rank has alike.
        covariance: by layer and key, this rank's own piece; when loaded, the whole.
        pieces: (start, stop) of the flattened parameter that each rank's pieces cover.
    """

    weights: dict[str, Tensor]
    replicated: dict[str, Tensor] = field(default_factory=dict)
    covariance: dict[str, Tensor] = field(default_factory=dict)
    pieces: Sequence[dict[str, tuple[int, int]]] = ()


class Method(Protocol):
    """An optimiser of a head's weights."""

    head: Head

    def step(self, batch: Batch) -> StepStats:
        """Advance by one batch; ``batch.step`` counts from 0."""
        ...

    def state(self) -> MethodState:
        """Everything needed to continue, tensors on any device."""
        ...

    def load(self, state: MethodState) -> None:
        """Continue from a state, its covariance complete."""
        ...


_GAMMA = "head/gamma"
_CENTRE = "head/centre/"  # and the name of a buffer
_START = "head/start/"  # and the name of an adapter's weights


def head_state(head: Head) -> dict[str, Tensor]:
    """The state of a head besides its weights: gamma, where it is not CLIP's own, and what features are measured from.

    Args:
        head: of a fit.

    Returns:
        Replicated tensors of a state.
    """
    if isinstance(head, CLIPNetwork):
        return head_state(head.head) | {_START + name: weight.clone() for name, weight in head.started.items()}
    state = {_CENTRE + name: centre.clone() for name, centre in centres(head).items()}
    if head.gamma != 1.0:
        state[_GAMMA] = torch.tensor(head.gamma, dtype=torch.float64)
    return state


def load_head(head: Head, state: MethodState) -> None:
    """Tell a head what :func:`head_state` says.

    Args:
        head: of the fit that continues, or predicts.
        state: of the fit.
    """
    if isinstance(head, CLIPNetwork):
        load_head(head.head, state)
        like = head.class_embeddings
        found = {key: value for key, value in state.replicated.items() if key.startswith(_START)}
        head.started = {key.removeprefix(_START): value.to(like) for key, value in found.items()}
    else:
        head.gamma = float(state.replicated.get(_GAMMA, 1.0))
        for name, centre in centres(head).items():
            centre.copy_(state.replicated[_CENTRE + name])


def centres(head: CLIPHead) -> dict[str, Tensor]:
    """What the adapters of a head measure features from.

    Args:
        head: of a fit.

    Returns:
        The buffers of the adapters that measure features from something, by name.
    """
    return {name: buffer for name, buffer in head.named_buffers() if name.endswith(".centre")}


class BatchScores(TypedDict):
    """What every method reports of a batch."""

    nll: float
    accuracy: float


def batch_scores(logits: Tensor, batch: Batch, group: Group) -> BatchScores:
    """Mean NLL and accuracy of a global batch.

    Args:
        logits: (m, C) local logits.
        batch: the local part of the batch.
        group: the ranks.

    Returns:
        ``nll`` and ``accuracy``.
    """
    sums = torch.stack([
        cross_entropy(logits.detach(), batch.labels, reduction="sum").double(),
        correct(logits.detach(), batch.labels).sum(),
    ])
    nll, accuracy = (group.sum(sums) / batch.total).tolist()
    return BatchScores(nll=nll, accuracy=accuracy)
