"""What every rank runs for the sharding tests: all cases in one group, because starting one costs most."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from helpers.cases import (
    ADAPTERS,
    FAMILIES,
    GATES,
    NOISES,
    OBSERVATIONS,
    PROCESSES,
    TEMPERING,
    make_head,
    make_options,
    make_support,
    rng,
)
from helpers.compare import covariance_of
from helpers.cones import as_shipped
from helpers.failing import FailsToFactor
from helpers.resuming import float64
from torch import Tensor, nn

from kngd_ray.errors import FilterError
from kngd_ray.filters import Factors, Jacobian, Layer, Rows
from kngd_ray.sharding import Group, Ownership, exchange
from kngd_ray.training.batches import Batch, BatchSampler
from kngd_ray.training.fit import begin
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import OptimizerOptions
from kngd_ray.training.predict import TAU_GRID

SHOTS = 15  # with a batch of 7: batches of 7, 7 and 1, so that ranks go without samples
Outcome = dict[str, Any]


def _cases() -> dict[str, dict[str, Any]]:
    """Every family with every adapter and every observation list in float64, a third of them in float32 too.

    Noise, process, gate, tempering, iterations and serial take turns.
    """
    cases = {}
    for f, family in enumerate(FAMILIES):
        for i, adapter in enumerate(ADAPTERS):
            names = {
                "family": family,
                "adapter": adapter,
                "observation": _turn(OBSERVATIONS, i + f),
                "noise": _turn(NOISES, i + 2 * f),
                "process": _turn(PROCESSES, i + i // 3 + f),
                "gate": _turn(GATES, i + f),
                "tempering": _turn(TEMPERING, i // 2 + f),
                "iterations": _turn((1, 2), i + f),
                "serial": _turn((0, 3, 0), i + i // 3),
            }
            if names["observation"] == "cosine" and names["noise"] == "categorical":
                names["noise"] = "ema-full"  # a cosine has no likelihood to take its noise from
            for dtype in ("float64", "float32") if i % 3 == f % 3 else ("float64",):
                cases["/".join((dtype, *map(str, names.values())))] = {"dtype": dtype, **names}
    return cases


def _turn(names: Iterable[Any], i: int) -> Any:
    among = list(names)
    return among[i % len(among)]


KALMAN_CASES = _cases()


def run_kalman(group: Group, dtype: str, **names: Any) -> Outcome:
    """Four steps of one case, the third batch smaller than the number of ranks."""
    options, torch_dtype = make_options(**names), getattr(torch, dtype)
    method = KalmanNGD(make_head(options.adapter, torch_dtype), options, seed=3, group=group)
    return _follow(method, BatchSampler(make_support(SHOTS, torch_dtype), 7, 2, seed=5))


# where real fits happen: to the mode, by rows that are linearised again, and by one variance a weight
SHIPPED: dict[str, tuple[str, ...]] = {
    "shipped/mode": (),
    "shipped/rows": ("filter.iterations=4", "noise.observation=ema", "observation=log_likelihood,cosine"),
    "shipped/diagonal": ("preset=kalman_diagonal",),
}


def run_shipped(group: Group, settings: tuple[str, ...]) -> Outcome:
    """Four steps at scale 100 in a cone, under a prior that the shots inform."""
    with float64():
        task = as_shipped(1, "epochs=2", "batch_size=7", *settings)
        method = begin(task, group)
    assert isinstance(method, KalmanNGD)
    return _follow(method, BatchSampler(task.support, 7, 2, seed=5))


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
        batch.inputs[-1] = float("nan")  # a copy: batches are gathered from the support
    refused = _refusal(method, batch)
    after = _snapshot(method)
    method.step(sampler.batch(2, group.rank, group.world_size))
    return {
        "refused": refused,
        "kept": all(torch.equal(before[key], after[key]) for key in before),
        "mu": method.belief.mu,
        "noise": method.noise,
    }


def _refusal(method: KalmanNGD, batch: Batch) -> str:
    """Why a step was refused; nothing if it was taken."""
    try:
        method.step(batch)
    except FilterError as error:
        return str(error)
    return ""


def run_failed(group: Group, family: str, function: str, names: dict[str, Any]) -> Outcome:
    """Three steps, in the second of which a matrix of the last rank does not factor."""
    options = make_options(family, adapter="bottleneck+linear+class_residual", **names)
    method = KalmanNGD(make_head(options.adapter), options, group=group)
    sampler = BatchSampler(make_support(SHOTS), 7, 2, seed=5)
    method.step(sampler.batch(0, group.rank, group.world_size))
    before = _snapshot(method)
    owners = [rank for rank, parts in enumerate(method.posterior.filter.ownership.parts) if parts]
    if group.rank == owners[-1]:
        method.posterior.filter.family = FailsToFactor(method.family, function, calls=names.get("iterations", 1) - 1)
    refused = _refusal(method, sampler.batch(1, group.rank, group.world_size))
    after = _snapshot(method)
    method.step(sampler.batch(2, group.rank, group.world_size))
    return {
        "refused": refused,
        "fails": group.rank == owners[-1],
        "kept": all(torch.equal(before[key], after[key]) for key in before),
        "mu": method.belief.mu,
    }


FAILURES: dict[str, dict[str, Any]] = {
    f"{function}/{family}/{case}": {"function": function, "family": family, "names": names}
    for function in ("gram", "gain", "update")
    for family, case, names in (
        ("kronecker", "once", {}),
        ("kronecker", "iterated", {"iterations": 3}),
        ("ekf", "gated", {"gate": "skip"}),
        ("block_diagonal", "serial", {"serial": 3}),
        ("dense", "once", {}),
    )
}


def run_cost(group: Group, family: str) -> Outcome:
    """What a step says that it cost."""
    options = make_options(family, adapter="bottleneck+linear+class_residual")
    method = KalmanNGD(make_head(options.adapter), options, group=group)
    moved = group.bytes_moved
    stats = method.step(BatchSampler(make_support(SHOTS), 7, 2, seed=5).batch(0, group.rank, group.world_size))
    return {
        "held": stats.covariance_bytes,
        "moved": stats.bytes_moved,
        "scores": group.bytes_moved - moved - (stats.bytes_moved or 0),
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
            batch.inputs[-1] = float("nan")
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
    start = sum(rows[:r])
    matrix = torch.arange(2.0 * sum(rows), dtype=torch.float64).view(sum(rows), 2)
    local = matrix[start : start + rows[r]].clone()
    # rank a sends a + b numbers to rank b: rank 0 keeps nothing for itself
    messages = [torch.full((r + other,), 10.0 * r + other, dtype=torch.float64) for other in range(W)]
    kept = vector.clone(), local.clone(), [message.clone() for message in messages]
    outcome = {
        "sum": group.sum(vector),
        "gathered": group.gather_rows(local, rows),
        "integers": group.gather_rows(torch.full((rows[r],), 2**40 + r), rows),
        "nothing": group.gather_rows(torch.zeros(0, 3), [0] * W),
        "exchanged": group.exchange(messages, [other + r for other in range(W)]),
        "no_numbers": group.exchange([torch.zeros(0)] * W, [0] * W),
    }
    untouched = zip((vector, local, *messages), (*kept[:2], *kept[2]), strict=True)
    outcome["untouched"] = all(torch.equal(after, before) for after, before in untouched)
    return outcome


# o, i, tokens (None: no factors) and whether samples have an x of their own
FORMS: dict[str, tuple[int, int, int | None, bool]] = {
    "one-token": (7, 5, 1, True),
    "rows-are-fewer": (5, 2, 4, True),  # four tokens of 7 numbers, a row of 10
    "tokens": (12, 20, 3, True),
    "shared": (6, 8, 2, False),
    "shared-rows-are-fewer": (4, 3, 9, False),
    "bias": (6, 1, None, True),
}


def exchange_case(k: int, samples: int, layers: list[str], dtype: torch.dtype) -> tuple[list[Layer], Jacobian]:
    """The Jacobian of all samples, every layer in its form."""
    found, H = [], {}
    for name in layers:
        o, i, tokens, own_x = FORMS[name]
        found.append(Layer(name, o, i, factored=tokens is not None))
        generator = rng(o + i)
        if tokens is None:
            H[name] = Rows(torch.randn(samples * k, o, generator=generator, dtype=dtype))
        else:
            g = torch.randn(samples, k, tokens, o, generator=generator, dtype=dtype)
            shape = (samples, tokens, i) if own_x else (tokens, i)
            H[name] = Factors(g, torch.randn(shape, generator=generator, dtype=dtype))
    return found, H


def exchange_samples(world_size: int) -> list[int]:
    """How many samples each rank brings; the second brings none."""
    return [3, 0, 2, 1][:world_size]


def run_exchange(group: Group, family: str, k: int, dtype: torch.dtype, layers: list[str]) -> Outcome:
    """What arrives of a Jacobian, as rows and by its form, and the bytes that it took."""
    sizes = exchange_samples(group.world_size)
    start = sum(sizes[: group.rank])
    stop = start + sizes[group.rank]
    specs, H = exchange_case(k, sum(sizes), layers, dtype)
    local: Jacobian = {
        name: Rows(piece.values[k * start : k * stop])
        if isinstance(piece, Rows)
        else Factors(piece.g[start:stop], piece.x[start:stop] if piece.own_x else piece.x)
        for name, piece in H.items()
    }
    moved = group.bytes_moved
    ownership = Ownership.balanced(FAMILIES[family], specs, group.world_size)
    arrived = exchange(group, ownership, local, sizes, k)
    return {
        "bytes": group.bytes_moved - moved,
        "rows": {name: piece.rows() for name, piece in arrived.items()},
        "factors": [name for name, piece in arrived.items() if isinstance(piece, Factors)],
    }


# each layer alone, so that its bytes are its own; all in one message; and a family that leaves ranks without parts
EXCHANGES: dict[str, dict[str, Any]] = {
    f"{family}/{'+'.join(layers)}/k={k}/{str(dtype).removeprefix('torch.')}": {
        "family": family,
        "k": k,
        "dtype": dtype,
        "layers": layers,
    }
    for family, layers in (*(("ekf", [name]) for name in FORMS), ("ekf", list(FORMS)), ("dense", list(FORMS)))
    for k, dtype in ((1, torch.float64), (3, torch.float32))
}


def run_everything(group: Group) -> dict[str, Outcome]:
    """All cases by name."""
    work: dict[str, Callable[[Group], Outcome]] = {"collectives": run_collectives}
    for case, settings in EXCHANGES.items():
        work[f"exchange/{case}"] = partial(run_exchange, **settings)
    for case, names in KALMAN_CASES.items():
        work[case] = partial(run_kalman, **names)
    for case, chosen in SHIPPED.items():
        work[case] = partial(run_shipped, settings=chosen)
    for family in FAMILIES:
        work[f"frozen/{family}"] = partial(run_frozen, family=family)
        work[f"refused/{family}"] = partial(run_refused, family=family)
        work[f"cost/{family}"] = partial(run_cost, family=family)
    for case, names in FAILURES.items():
        work[f"failed/{case}"] = partial(run_failed, **names)
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
    group, evidence, nis, scores, predictive = method.group, [], [], [], []
    for step in range(4):  # batches of 7, 7, 1 and 7
        stats = method.step(replace(sampler.batch(step, group.rank, group.world_size), scored=step > 1))
        predictive.append(stats.log_predictive or [0.0] * len(TAU_GRID))
        evidence.append(stats.log_evidence)
        nis.append(stats.nis)
        scores.append([stats.nll, stats.accuracy, stats.innovation_rms, stats.jitter, stats.gated])
    return {
        "mu": method.belief.mu,
        "covariance": covariance_of(method),
        "noise": method.noise,
        "log_evidence": torch.tensor(evidence, dtype=torch.float64),
        "nis": torch.tensor(nis, dtype=torch.float64),
        "scores": torch.tensor(scores, dtype=torch.float64),
        "log_predictive": torch.tensor(predictive, dtype=torch.float64),
    }


def _snapshot(method: KalmanNGD) -> dict[str, Tensor]:
    weights = {name: p.detach().clone() for name, p in method.head.named_parameters()}
    P = {
        f"P/{name}/{key}": value.clone()
        for name, state in method.belief.covariance.items()
        for key, value in state.items()
    }
    return {"mu": method.belief.mu.clone(), "noise": method.noise.clone(), **P, **weights}
