"""Losses of the gradient methods: their gradients against autograd of plain loops, whole and divided over ranks."""

import math

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training.batches import Batch
from kngd_ray.training.losses import ClipCiteLoss, CrossEntropy, Loss

CLASSES, DIM, SCALE = 4, 5, 6.0
LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "clip_cite": ClipCiteLoss(),
    "dva": ClipCiteLoss(scl=0, vld=0),
    "scl": ClipCiteLoss(scl=2.0, vld=0),
    "vld": ClipCiteLoss(scl=0, vld=3.0),
}
# as a batch may be: classes more than once, each once, all one class, a single sample
LABELS = {"mixed": (0, 2, 2, 1, 0, 3, 2), "each once": (3, 0, 1), "one class": (1, 1, 1), "one sample": (2,)}


def outputs(count: int) -> Tensor:
    """Logits (m, C), and z, t, z0, t0 (m, d) of unit length beside them."""
    generator = torch.Generator().manual_seed(count)
    logits = 2 * torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)
    parts = [normalize(torch.randn(count, DIM, generator=generator, dtype=torch.float64), dim=1) for _ in range(4)]
    return torch.cat([logits, *parts], 1)


def plain(loss: Loss, found: Tensor, labels: Tensor) -> Tensor:
    """The loss of a batch, sample by sample."""
    m = len(labels)
    logits = found[:, :CLASSES]
    total = cross_entropy(logits, labels)
    if isinstance(loss, CrossEntropy):
        return total
    z, t, z0, t0 = found[:, CLASSES:].split(DIM, 1)
    scl = vld = found.new_zeros(())
    for i in range(m):
        others = [j for j in range(m) if j == i or labels[j] != labels[i]]
        for a, b in ((z, t), (t, z)):
            scores = [SCALE * a[i] @ b[j] for j in others]
            scl = scl - (SCALE * a[i] @ b[i] - torch.stack(scores).logsumexp(0)) / (2 * m)
        for a, b, a0, b0 in ((z, t, z0, t0), (t, z, t0, z0)):
            now = torch.stack([SCALE * a[i] @ b[j] for j in range(m)]).log_softmax(0)
            then = torch.stack([SCALE * a0[i] @ b0[j] for j in range(m)]).log_softmax(0).detach()
            vld = vld + (then.exp() * (then - now)).sum() / (2 * m)
    return total + loss.scl * scl + loss.vld * vld


def whole(labels: tuple[int, ...]) -> Batch:
    return Batch(None, torch.tensor(labels), [len(labels)], 0, 0)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_plain_loops(name, labels) -> None:
    loss, batch = LOSSES[name], whole(labels)
    found = outputs(len(labels)).requires_grad_()
    (expected,) = torch.autograd.grad(plain(loss, found, batch.labels), found)
    gradient = loss.gradient(found, batch, SingleProcess(), SCALE, CLASSES)
    trained = slice(0, CLASSES + 2 * DIM)  # nobody trains the pretrained embeddings behind them
    torch.testing.assert_close(gradient[:, trained], expected[:, trained], rtol=1e-9, atol=1e-12)
    assert not gradient.requires_grad


def test_columns_that_a_loss_does_not_look_at_have_no_gradient() -> None:
    labels = LABELS["mixed"]
    found = outputs(len(labels))
    assert not CrossEntropy().gradient(found, whole(labels), SingleProcess(), SCALE, CLASSES)[:, CLASSES:].any()
    for name in ("clip_cite", "scl", "vld"):
        gradient = LOSSES[name].gradient(found, whole(labels), SingleProcess(), SCALE, CLASSES)
        assert not gradient[:, CLASSES + 2 * DIM :].any()


def parts(group: Group, labels: tuple[int, ...], sizes: list[int]) -> dict[str, Tensor]:
    """A rank's gradients of a batch that is divided so."""
    batch = Batch(None, torch.tensor(labels), sizes, group.rank, 0)
    batch = Batch(None, batch.labels[batch.own], sizes, group.rank, 0)
    local = outputs(len(labels))[batch.own]
    return {name: loss.gradient(local, batch, group, SCALE, CLASSES) for name, loss in LOSSES.items()}


def all_parts(group: Group) -> list[dict[str, Tensor]]:
    return [parts(group, LABELS["mixed"], sizes) for sizes in ([4, 3], [7, 0], [1, 6])]


def test_ranks_are_each_others_negatives() -> None:
    labels = LABELS["mixed"]
    ranks = run_ranks(2, all_parts)
    for divided in zip(*ranks, strict=True):
        for name, loss in LOSSES.items():
            expected = loss.gradient(outputs(len(labels)), whole(labels), SingleProcess(), SCALE, CLASSES)
            found = torch.cat([part[name] for part in divided])
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_samples_of_one_class_are_no_negatives() -> None:
    """Alone with its like, a pair has nothing to be told from: the contrastive term is 0."""
    labels = LABELS["one class"]
    found = outputs(len(labels))
    with_scl = LOSSES["scl"].gradient(found, whole(labels), SingleProcess(), SCALE, CLASSES)
    without = LOSSES["dva"].gradient(found, whole(labels), SingleProcess(), SCALE, CLASSES)
    torch.testing.assert_close(with_scl, without)


def test_the_original_model_has_nothing_to_be_distilled() -> None:
    labels = LABELS["mixed"]
    found = outputs(len(labels))
    found[:, CLASSES + 2 * DIM :] = found[:, CLASSES : CLASSES + 2 * DIM]
    with_vld = LOSSES["vld"].gradient(found, whole(labels), SingleProcess(), SCALE, CLASSES)
    without = LOSSES["dva"].gradient(found, whole(labels), SingleProcess(), SCALE, CLASSES)
    torch.testing.assert_close(with_vld, without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["scl", "vld"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_weights_below_0_are_refused(name, value) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; a weight must be 0 or more"):
        ClipCiteLoss(**{name: value})
