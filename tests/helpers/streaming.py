"""What every rank runs for the tests of the streamed filter: synthetic Jacobians that are built when asked for."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from helpers.cases import FAMILIES, GATES, rng
from torch import Tensor

from kngd_ray.errors import FilterError
from kngd_ray.filters import (
    Belief,
    CovarianceFamily,
    Diagonal,
    Factors,
    Gate,
    GateResiduals,
    Jacobian,
    Kronecker,
    Layer,
    Rows,
    Transition,
    diagonal,
)
from kngd_ray.sharding import (
    Group,
    Observed,
    Ownership,
    ShardedFilter,
    SingleProcess,
    StreamedFilter,
    exchange,
    streamed,
)

STREAMS: dict[str, CovarianceFamily] = {
    **{name: FAMILIES[name] for name in ("ekf", "vdekf", "kronecker", "block_diagonal")},
    "ekf-sampled": Diagonal(samples=2),
    "vdekf-sampled": Diagonal(rule="vdekf", samples=2),
    "kronecker-reduced": Kronecker(tokens="reduced"),
}
TRANSITIONS = {
    "still": Transition(1.0, 1.0, 0.0),
    "noise": Transition(1.0, 1.0, 0.01),
    "forgetting": Transition(1.0, 1.1, 0.0),
    "relaxing": Transition(0.9, 0.81, 0.004),
}
# o, i, tokens (None: no factors) and whether samples have an x of their own
SHAPES: dict[str, tuple[int, int, int | None, bool]] = {
    "patch.weight": (5, 6, 9, True),
    "patch.bias": (5, 1, None, True),
    "norm.weight": (4, 1, None, True),
    "mlp.weight": (9, 7, 3, True),
    "deep.weight": (12, 11, 4, True),
    "mlp.bias": (9, 1, None, True),
    "text.weight": (6, 3, 2, False),
    "head.weight": (3, 5, 1, True),
    "few.weight": (1, 8, 1, True),
}
LAYERS = [Layer(name, o, i, factored=T is not None) for name, (o, i, T, _) in SHAPES.items()]
N = sum(layer.size for layer in LAYERS)
# budgets of numbers held together, kept, and formed as rows: everything at once, and next to nothing
BUDGETS = {"roomy": (1 << 22, 1 << 22, 1 << 20), "some": (300, 1300, 100), "tight": (0, 0, 1)}


def _cases() -> dict[str, dict[str, Any]]:
    """Every family with every transition; observations, gate, tempering and budgets take turns."""
    cases = {}
    for f, family in enumerate(STREAMS):
        for t, transition in enumerate(TRANSITIONS):
            for dtype in ("float64", "float32") if (f + t) % 4 == 0 else ("float64",):
                names = {
                    "family": family,
                    "transition": transition,
                    "k": (1, 2)[(f + t // 2) % 2],
                    "gate": ("off", "inflate", "skip")[(f + t) % 3],
                    "noise": (1.0, 0.5)[(f + t // 2) % 2],
                    "budget": list(BUDGETS)[(f + 2 * t) % 3],
                    "dtype": dtype,
                }
                cases["/".join(map(str, names.values()))] = names
    return cases


CASES = _cases()


class Lazy(Mapping[str, Factors | Rows]):
    """A Jacobian whose layers are made when asked for, which counts how often and forgets them."""

    def __init__(self, H: Jacobian) -> None:
        self._H = H
        self.asked: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Factors | Rows:
        self.asked[name] += 1
        piece = self._H[name]
        return Factors(piece.g.clone(), piece.x.clone()) if isinstance(piece, Factors) else Rows(piece.values.clone())

    def __iter__(self) -> Iterator[str]:
        return iter(self._H)

    def __len__(self) -> int:
        return len(self._H)


def sizes(world_size: int) -> list[int]:
    """How many of six samples each rank brings; the second of several brings none."""
    return {1: [6], 2: [6, 0], 3: [4, 0, 2], 4: [3, 0, 2, 1]}[world_size]


def jacobian(group: Group, k: int, seed: int, dtype: torch.dtype) -> dict[str, Factors | Rows]:
    """The local samples of a batch of six."""
    per_rank = sizes(group.world_size)
    start = sum(per_rank[: group.rank])
    own = slice(start, start + per_rank[group.rank])
    H: dict[str, Factors | Rows] = {}
    for n, (name, (o, i, T, own_x)) in enumerate(SHAPES.items()):
        g = rng(100 * seed + n)

        def draw(*shape: int, g: torch.Generator = g) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        if T is None:
            H[name] = Rows(draw(6, k, o)[own].flatten(0, 1))
        else:
            H[name] = Factors(draw(6, k, T, o)[own], draw(6, T, i)[own] if own_x else draw(T, i))
    return H


def observed(group: Group, H: Jacobian, k: int, seed: int, dtype: torch.dtype, gate: Gate, noise: float) -> Observed:
    """Innovations of a batch, one of which is an outlier."""
    nu = torch.randn(6 * k, generator=rng(seed), dtype=torch.float64)
    nu[3] += 60.0
    residuals = None if gate == GATES["off"] else GateResiduals(nu, torch.ones_like(nu))
    return Observed(H, nu.to(dtype), residuals, sizes(group.world_size), k, noise, seed)


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(N, generator=rng(7), dtype=torch.float64).to(dtype)


def follow(group: Group, names: dict[str, Any], stream: bool) -> dict[str, Any]:
    """Three steps, streamed or not."""
    dtype, transition, gate = getattr(torch, names["dtype"]), TRANSITIONS[names["transition"]], GATES[names["gate"]]
    family, k = STREAMS[names["family"]], names["k"]
    streamed._TOGETHER, streamed._KEPT, diagonal._ROW_NUMBERS["cpu"] = BUDGETS[names["budget"]]
    kind = StreamedFilter if stream else ShardedFilter
    placed = kind(family, LAYERS, group, gate)
    mu = start(dtype)
    belief, anchor = placed.init(mu, 0.3), mu.clone()
    asked, figures, blocks, weights = set(), [], [], []
    for step in range(3):
        H = Lazy(jacobian(group, k, step, dtype))
        seen = observed(group, H, k, step, dtype, gate, names["noise"])
        if isinstance(placed, StreamedFilter):
            held = [tensor for state in belief.covariance.values() for tensor in state.values()]
            placed.predict_mean(belief, transition, anchor)
            outcome = placed.update(belief, transition, seen)
            assert belief.mu is mu
            after = [tensor for state in belief.covariance.values() for tensor in state.values()]
            assert all(a is b for a, b in zip(held, after, strict=True))
        else:
            outcome = placed.update(placed.predict(belief, transition, anchor), seen)
            belief = outcome.belief
        asked |= set(H.asked.values())
        figures.append([outcome.log_evidence, outcome.nis, outcome.jitter])
        blocks.append(outcome.predicted)
        weights.append(outcome.weight)
    diagonal._ROW_NUMBERS["cpu"] = BUDGETS["roomy"][2]
    return {
        "mu": belief.mu.clone(),
        "covariance": _gathered(group, placed, belief),
        "figures": torch.tensor(figures, dtype=torch.float64),
        "predicted": torch.stack(blocks),
        "weight": torch.stack(weights),
        "asked": sorted(asked),
    }


def _gathered(group: Group, placed: StreamedFilter | ShardedFilter, belief: Belief) -> Tensor:
    """P (n, n) of all ranks: H P H^T at H = I."""
    columns = dict(zip(SHAPES, torch.eye(N, dtype=belief.mu.dtype).split([x.size for x in LAYERS], 1), strict=True))
    H = {x.layer.name: Rows(columns[x.layer.name][:, x.flat]) for x in placed.ownership.parts[group.rank]}
    return group.sum(placed.family.gram(belief.covariance, H, belief.mu)[0])


def refuse(group: Group, family: str) -> dict[str, Any]:
    """A step whose innovations, and one whose Jacobian, are not finite on the last rank that has samples."""
    streamed._TOGETHER, streamed._KEPT, _ = BUDGETS["tight"]
    placed = StreamedFilter(STREAMS[family], LAYERS, group)
    belief, transition = placed.init(start(torch.float64), 0.3), TRANSITIONS["noise"]
    messages, kept = [], []
    for what in ("nu", "H", "S"):
        H = jacobian(group, 1, 0, torch.float64)
        seen = observed(group, H, 1, 0, torch.float64, GATES["off"], 1.0)
        first = H["patch.weight"]
        assert isinstance(first, Factors)
        if what == "nu":
            seen.nu[2] = torch.nan
        elif what == "H":
            first.g[-1:] = torch.inf
        solve = streamed.factored
        if what == "S":
            streamed.factored = lambda predicted, nu, noise=1.0, solve=solve: solve(-10 * predicted, nu, noise)
        before = [belief.mu.clone()] + [t.clone() for state in belief.covariance.values() for t in state.values()]
        try:
            placed.update(belief, transition, seen)
        except FilterError as error:
            messages.append(str(error))
        streamed.factored = solve
        after = [belief.mu] + [t for state in belief.covariance.values() for t in state.values()]
        kept.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return {"messages": messages, "kept": kept}


def fail(group: Group) -> dict[str, Any]:
    """A layer whose posterior does not factor, on the rank that has it."""
    from kngd_ray.filters import kronecker

    def broken(*_: object) -> None:
        raise torch.linalg.LinAlgError("singular")

    placed = StreamedFilter(Kronecker(), LAYERS, group)
    belief = placed.init(start(torch.float64), 0.3)
    before, mu = _gathered(group, placed, belief), belief.mu.clone()
    sweep, kronecker._sweep_of_tokens = kronecker._sweep_of_tokens, broken  # type: ignore[assignment]
    H = jacobian(group, 1, 0, torch.float64)
    try:
        outcome = placed.update(belief, TRANSITIONS["still"], observed(group, H, 1, 0, mu.dtype, GATES["off"], 1.0))
    finally:
        kronecker._sweep_of_tokens = sweep
    after = _gathered(group, placed, belief)
    return {"unlearned": outcome.unlearned, "before": before, "after": after, "moved": belief.mu - mu}


def spread(group: Group) -> dict[str, Any]:
    """A vector of which each rank knows its slice, the second of several ranks none."""
    W = group.world_size
    bounds = [0, *([3, 3, 8, 9][:W])] if W > 1 else [0, 9]
    mine = torch.full((bounds[-1],), -1.0)
    mine[bounds[group.rank] : bounds[group.rank + 1]] = float(group.rank)
    place, moved = mine.data_ptr(), group.bytes_moved
    group.spread_slices(mine, bounds)
    own = bounds[group.rank + 1] - bounds[group.rank]
    return {
        "whole": mine,
        "expected": torch.arange(float(W)).repeat_interleave(torch.tensor(bounds).diff()),
        "in place": mine.data_ptr() == place,
        "bytes": group.bytes_moved - moved == mine.element_size() * (len(mine) - own),
    }


def mix(group: Group) -> dict[str, Any]:
    """What arrives of layers of several dtypes, as under autocast: the numbers and the dtypes of one process."""
    H, everything = jacobian(group, 1, 0, torch.float32), jacobian(SingleProcess(), 1, 0, torch.float32)
    for piece in (H, everything):
        for name in ("patch.weight", "deep.weight", "text.weight"):
            form = piece[name]
            assert isinstance(form, Factors)
            piece[name] = Factors(form.g.bfloat16(), form.x if name == "deep.weight" else form.x.bfloat16())
    ownership = Ownership.balanced(Diagonal(), LAYERS, group.world_size)
    arrived = exchange(group, ownership, H, sizes(group.world_size), 1)
    wrong = []
    for part in ownership.parts[group.rank]:
        found = arrived[part.layer.name].rows()
        expected = everything[part.layer.name].part(part.start, part.stop).rows()
        error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        if found.dtype != expected.dtype or float(error) > (1e-2 if found.dtype == torch.bfloat16 else 1e-5):
            wrong.append(part.layer.name)
    return {"wrong": wrong}


def run_streams(group: Group) -> dict[str, dict[str, Any]]:
    """All cases by name."""
    outcomes = {case: follow(group, names, stream=True) for case, names in CASES.items()}
    for family in STREAMS:
        outcomes[f"refused/{family}"] = refuse(group, family)
    outcomes |= {"failed": fail(group), "spread": spread(group), "mixed": mix(group)}
    return outcomes
