"""What every rank runs for the sharding tests: all cases in one group, because starting one costs most."""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from helpers.cases import ADAPTERS, FAMILIES, NOISES, OBSERVATIONS, make_head, make_options, make_support
from torch import Tensor, nn

from kngd_ray.errors import FilterError
from kngd_ray.sharding import Group
from kngd_ray.training.batches import BatchSampler
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import OptimizerOptions

SHOTS = 15  # with a batch of 7: batches of 7, 7 and 1, so that ranks go without samples
Outcome = dict[str, Any]


def _cases() -> dict[str, dict[str, str]]:
    """Every family with every observation list (in both dtypes) and with every adapter (in float64)."""
    turn, cases = count(), {}
    adapters, noises = list(ADAPTERS), list(NOISES)

    def add(dtypes: tuple[str, ...], **names: str) -> None:
        for dtype in dtypes:
            cases["/".join((dtype, *names.values()))] = {"dtype": dtype, **names}

    for observation in OBSERVATIONS:
        for family in FAMILIES:
            i = next(turn)
            add(
                ("float64", "float32"),
                family=family,
                observation=observation,
                adapter=adapters[4 * i % len(adapters)],  # 4 and 9 have no common divisor: each takes its turn
                noise=noises[(i // 3 + i) % len(noises)],
            )
    for family in FAMILIES:
        for adapter in ADAPTERS:
            add(("float64",), family=family, observation="categorical-sampled", adapter=adapter, noise="ema-diagonal")
    return cases


KALMAN_CASES = _cases()


def run_kalman(group: Group, dtype: str, **names: str) -> Outcome:
    """Six steps of one case, the last batch of each epoch smaller than the number of ranks."""
    options, torch_dtype = make_options(**names), getattr(torch, dtype)
    method = KalmanNGD(make_head(options.adapter, torch_dtype), options, seed=3, group=group)
    return _follow(method, BatchSampler(make_support(SHOTS, torch_dtype), 7, 2, seed=5))


def run_frozen(group: Group, family: str) -> Outcome:
    """A frozen layer, and a trainable one that the forward pass never uses."""
    options = make_options(family, adapter="bottleneck+linear+class_residual", noise="ema-diagonal")
    head = make_head(options.adapter)
    head.spare = nn.Linear(5, 2, bias=False).double()
    nn.init.ones_(head.spare.weight)
    head.adapters[1].residual["text"].weight.requires_grad_(False)
    outcome = _follow(KalmanNGD(head, options, group=group), BatchSampler(make_support(SHOTS), 7, 2, seed=5))
    outcome["frozen"] = head.adapters[1].residual["text"].weight.detach().clone()
    outcome["spare"] = head.spare.weight.detach().clone()
    return outcome


def run_refused(group: Group, family: str) -> Outcome:
    """One step, one whose last sample is NaN (so on the last rank alone), and one more."""
    options = make_options(family, noise="ema-diagonal", observation="all")
    method = KalmanNGD(make_head(options.adapter), options, group=group)
    sampler = BatchSampler(make_support(SHOTS), 7, 2, seed=5)
    method.step(sampler.batch(0, group.rank, group.world_size))
    before = _snapshot(method)
    batch = sampler.batch(1, group.rank, group.world_size)
    if group.rank == group.world_size - 1:
        batch.features[-1] = float("nan")  # a copy: batches are gathered from the support
    try:
        method.step(batch)
        refused = ""
    except FilterError as error:
        refused = str(error)
    after = _snapshot(method)
    method.step(sampler.batch(2, group.rank, group.world_size))
    return {
        "refused": refused,
        "kept": all(torch.equal(before[key], after[key]) for key in before),
        "mu": method.belief.mu,
        "noise": method.noise,
    }


def run_gradient(group: Group, method: str, schedule: Literal["constant", "cosine"]) -> Outcome:
    """AdamW or SGD under DDP, one step refused on the way."""
    optimizer = OptimizerOptions(lr=0.02, schedule=schedule)
    options = make_options(adapter="bottleneck+linear+class_residual", method=method, optimizer=optimizer)
    head = make_head(options.adapter)
    descent = GradientDescent(head, options, steps=6, group=group)
    sampler = BatchSampler(make_support(SHOTS), 7, 2, seed=5)
    losses, refused = [], []
    for step in range(sampler.steps):
        batch = sampler.batch(step, group.rank, group.world_size)
        if step == 1 and group.rank == group.world_size - 1:
            batch.features[-1] = float("nan")
        try:
            losses.append(descent.step(batch).nll)
        except FilterError:
            refused.append(step)
    return {
        "mu": torch.cat([p.detach().flatten() for p in head.parameters()]),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "refused": refused,
    }


def run_collectives(group: Group) -> Outcome:
    """Sums, uneven gathers and exchanges, with empty ranks; and whether the arguments survived."""
    W, r = group.world_size, group.rank
    vector = torch.arange(4, dtype=torch.float64) + r
    rows = [rank % 3 for rank in range(W)]  # 0, 1, 2: rank 0 brings nothing
    columns = [2 * (W - 1 - rank) for rank in range(W)]  # the last rank receives nothing
    start = sum(rows[:r])
    matrix = torch.arange(sum(rows) * sum(columns), dtype=torch.float64).view(sum(rows), sum(columns))
    local = matrix[start : start + rows[r]].clone()
    kept = vector.clone(), local.clone()
    outcome = {
        "sum": group.sum(vector),
        "gathered": group.gather_rows(local, rows),
        "integers": group.gather_rows(torch.full((rows[r],), 2**40 + r), rows),
        "nothing": group.gather_rows(torch.zeros(0, 3), [0] * W),
        "exchanged": group.exchange_columns(local, rows, columns),
        "no_rows": group.exchange_columns(local[:0], [0] * W, columns),
    }
    outcome["untouched"] = torch.equal(vector, kept[0]) and torch.equal(local, kept[1])
    return outcome


def run_everything(group: Group) -> dict[str, Outcome]:
    """All cases by name."""
    work: dict[str, Callable[[Group], Outcome]] = {"collectives": run_collectives}
    for case, names in KALMAN_CASES.items():
        work[case] = partial(run_kalman, **names)
    for family in FAMILIES:
        work[f"frozen/{family}"] = partial(run_frozen, family=family)
        work[f"refused/{family}"] = partial(run_refused, family=family)
    work["adamw"] = partial(run_gradient, method="adamw", schedule="constant")
    work["sgd"] = partial(run_gradient, method="sgd", schedule="cosine")
    outcomes = {}
    for name, run in work.items():
        try:
            outcomes[name] = run(group)
        except Exception as error:
            error.add_note(f"in case {name}")
            raise
    return outcomes


def _follow(method: KalmanNGD, sampler: BatchSampler) -> Outcome:
    group, evidence, nis, scores = method.group, [], [], []
    for step in range(sampler.steps):
        stats = method.step(sampler.batch(step, group.rank, group.world_size))
        evidence.append(stats.log_evidence)
        nis.append(stats.nis)
        scores.append([stats.nll, stats.accuracy, stats.innovation_rms, stats.jitter])
    return {
        "mu": method.belief.mu,
        "covariance": _assembled(method),
        "noise": method.noise,
        "log_evidence": torch.tensor(evidence, dtype=torch.float64),
        "nis": torch.tensor(nis, dtype=torch.float64),
        "scores": torch.tensor(scores, dtype=torch.float64),
    }


def _assembled(method: KalmanNGD) -> Tensor:
    """The whole covariance, on every rank."""
    own = method.belief.covariance
    if own.dim() == 2 and not len(own):
        own = own.new_zeros(0, len(method.belief.mu))  # a rank without rows of the dense covariance
    return method.group.gather_rows(own, method.filter.ownership.sizes)


def _snapshot(method: KalmanNGD) -> dict[str, Tensor]:
    weights = {name: p.detach().clone() for name, p in method.head.named_parameters()}
    belief = method.belief
    return {"mu": belief.mu.clone(), "P": belief.covariance.clone(), "noise": method.noise.clone(), **weights}
