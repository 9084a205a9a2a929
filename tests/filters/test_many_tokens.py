"""Layers that see many tokens: rows by runs, estimates by draws, and one token in the place of many."""

from dataclasses import replace
from itertools import product
from math import sqrt

import pytest
import torch
from helpers.cases import rng, some_slow
from helpers.compare import max_error
from helpers.jacobians import DOUBLE, posterior, randn, random_factors, stacked_rows, whole
from torch import Tensor

from kngd_ray.filters import (
    Belief,
    Diagonal,
    Factors,
    Kronecker,
    Layer,
    Rows,
    innovation_covariance,
    solve_innovation,
    update,
)
from kngd_ray.filters import diagonal as diagonal_module

ROWS, COLUMNS = 7, 5
N = ROWS * COLUMNS


def variances() -> dict[str, dict[str, Tensor]]:
    return {"w": {"variance": torch.logspace(-1, 1, N, dtype=DOUBLE)}}


def by_draws(family: Diagonal, H: Factors | Rows, *seeds: int) -> Tensor:
    """(seeds, n) variances after one update."""
    P = variances()["w"]
    gram, work = family.gram_layer(P, H)
    innovation = solve_innovation(innovation_covariance(gram), randn(H.count, seed=5))
    return torch.stack([family.update_layer(P, H, work, replace(innovation, seed=x))["variance"] for x in seeds])


@pytest.mark.parametrize(("budget", "columns"), [(1, 2), (100, 2), (1, 512), (100, 512), (1 << 20, 512)])
def test_runs_of_rows_are_the_same_as_all(monkeypatch, subtests, budget, columns):
    monkeypatch.setitem(diagonal_module._ROW_NUMBERS, "cpu", budget)
    monkeypatch.setattr(diagonal_module, "_TILE_COLUMNS", columns)
    forms = [(4, 1, 3, False), (3, 2, 6, False), (3, 2, 4, True), (0, 2, 3, False)]
    for form, rule, dtype in product(forms, ["ekf", "vdekf"], [torch.float64, torch.bfloat16]):
        with subtests.test(form=form, rule=rule, dtype=dtype):
            check_runs(*form, rule, dtype)


def check_runs(s, k, T, shared, rule, dtype):
    H, nu = random_factors(ROWS, COLUMNS, s, k, T, shared, dtype=dtype), randn(s * k, seed=5)
    belief = Belief(torch.zeros(N, dtype=DOUBLE), variances())
    found, seen = update(Diagonal(rule=rule), belief, {"w": H}, nu)
    rows = stacked_rows({"w": H})
    moved, sigma = posterior(variances()["w"]["variance"].diag(), rows, nu)
    expected = sigma.diagonal() if rule == "ekf" else 1 / (1 / variances()["w"]["variance"] + rows.square().sum(0))
    assert max_error(found.mu, moved) < (1e-12 if dtype == DOUBLE else 2e-2)  # combined in the factors' dtype
    assert max_error(found.covariance["w"]["variance"], expected) < 1e-12
    work = Diagonal(rule=rule).work_layer(variances()["w"], H)
    step, state = Diagonal(rule=rule).condition_layer(variances()["w"], H, work, seen)
    assert max_error(step, moved) < 1e-12
    assert torch.equal(state["variance"], found.covariance["w"]["variance"])


@pytest.mark.parametrize(("o", "i", "s", "k", "T"), [(64, 40, 8, 1, 12), (6, 500, 4, 2, 3), (3000, 1, 8, 1, None)])
def test_no_more_rows_than_the_budget_live_at_once(monkeypatch, o, i, s, k, T):
    budget, largest = 4 * s * k * i, 0
    monkeypatch.setitem(diagonal_module._ROW_NUMBERS, "cpu", budget)
    H = Rows(randn(s * k, o)) if T is None else random_factors(o, i, s, k, T)
    form = diagonal_module._tiles

    def watched(H: Factors | Rows, *flat: Tensor):
        nonlocal largest
        for tiles, rows in form(H, *flat):
            largest = max(largest, rows.numel())
            yield tiles, rows

    monkeypatch.setattr(diagonal_module, "_tiles", watched)
    family = Diagonal()
    P = family.init_layer(whole(Layer("w", o, i, factored=True))[0], 0.1, randn(1))
    gram, work = family.gram_layer(P, H)
    family.condition_layer(P, H, work, solve_innovation(innovation_covariance(gram), randn(s * k)))
    assert 0 < largest <= budget


def test_factors_may_be_of_two_dtypes():
    """As under autocast: an input wider than what comes back to the output."""
    H = random_factors(4, 3, 3, 2, T=2)
    mixed = Factors(H.g.bfloat16(), H.x.float())
    alike = Factors(H.g.bfloat16().float(), H.x.float())
    w, v = randn(6, seed=1), randn(12, seed=2)
    assert torch.equal(mixed.rows(), alike.rows())
    assert torch.equal(mixed.combine(w), alike.combine(w))
    assert torch.equal(mixed.times(v), alike.times(v))
    assert torch.equal(mixed.part(1, 3).rows(), alike.rows().view(6, 4, 3)[:, 1:3].flatten(1))


@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
@pytest.mark.parametrize("form", ["factors", "shared", "rows"])
def test_what_is_given_is_left_as_it_is(form, rule):
    H: Factors | Rows = random_factors(ROWS, COLUMNS, 4, 2, 5, form == "shared")
    H = Rows(H.rows()) if form == "rows" else H
    before = [tensor.clone() for tensor in vars(H).values()]
    P, family = {"variance": torch.rand(N, dtype=DOUBLE)}, Diagonal(rule=rule)
    kept = P["variance"].clone()
    gram, work = family.gram_layer(P, H)
    family.condition_layer(P, H, work, solve_innovation(innovation_covariance(gram), randn(8)))
    assert all(torch.equal(tensor, was) for tensor, was in zip(vars(H).values(), before, strict=True))
    assert torch.equal(P["variance"], kept)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_factors_of_two_dtypes(dtypes):
    H = random_factors(ROWS, COLUMNS, 4, 1, 5, False)
    mixed = Factors(H.g.to(dtypes[0]), H.x.to(dtypes[1]))
    P = {"variance": torch.rand(N, dtype=DOUBLE)}
    rows = mixed.rows().double()
    assert mixed.rows().dtype == dtypes[1]
    assert max_error(Diagonal().gram_layer(P, mixed)[0], (rows * P["variance"]) @ rows.mT) < 1e-12


@pytest.mark.parametrize(("most", "columns"), [(128, 256), (64, 512), (1000, 40), (1, 256), (0, 3072), (130, 96)])
def test_rows_of_tiles_do_not_compete_for_a_cache(most, columns):
    run = diagonal_module._run(most, columns)
    assert max(1, most - 8) <= max(run, 1) <= max(1, most)
    if columns % 512 and most > 8:
        assert 64 <= run * columns % 512 <= 448


FORMS = {
    "rows": Rows(random_factors(ROWS, COLUMNS, 6, T=2).rows()),
    "one token": random_factors(ROWS, COLUMNS, 6),
    "tokens": random_factors(ROWS, COLUMNS, 6, T=3),
    "observations": random_factors(ROWS, COLUMNS, 2, k=3, T=3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
@pytest.mark.parametrize("samples", some_slow([1, 2], 2))
def test_estimates_of_the_information_are_unbiased(form, rule, samples):
    H, draws, P = FORMS[form], 2000, variances()["w"]["variance"]
    rows = stacked_rows({"w": H})
    S = innovation_covariance((rows * P) @ rows.mT)
    exact = rows.square().sum(0) if rule == "vdekf" else torch.einsum("mj,mn,nj->j", rows, S.inverse(), rows)
    family = Diagonal(rule=rule, samples=samples)
    estimates = 1 / by_draws(family, H, *range(draws)) - 1 / P
    error = (estimates.mean(0) - exact) / (estimates.std(0) / sqrt(draws)).clamp_min(1e-9 * exact)
    assert float(error.abs().max()) < 5
    assert float(estimates.std(0).max()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_estimated_variances_are_positive_and_never_surer_than_ekf_on_average(form):
    H = FORMS[form]
    strong = Rows(1e3 * H.values) if isinstance(H, Rows) else Factors(1e3 * H.g, H.x)
    for piece in (H, strong):
        found, exact = by_draws(Diagonal(samples=1), piece, *range(500)), by_draws(Diagonal(), piece, 0)[0]
        assert bool((found > 0).all())
        assert bool((found <= variances()["w"]["variance"]).all())
        assert bool((found.mean(0) > 0.95 * exact).all())


@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
def test_draws_leave_the_mean_exact_and_follow_the_seed(rule):
    H, nu = {"w": FORMS["tokens"]}, randn(6, seed=5)
    belief = Belief(torch.zeros(N, dtype=DOUBLE), variances())
    exact, _ = update(Diagonal(rule=rule), belief, H, nu)
    drawn, _ = update(Diagonal(rule=rule, samples=2), belief, H, nu)
    assert max_error(drawn.mu, exact.mu) < 1e-12
    family = Diagonal(rule=rule, samples=2)
    assert torch.equal(by_draws(family, H["w"], 3), by_draws(family, H["w"], 3))
    assert not torch.equal(by_draws(family, H["w"], 3), by_draws(family, H["w"], 4))


def test_many_draws_on_many_weights_are_nearly_exact():
    H = random_factors(60, 50, 4, T=3)
    P = Diagonal().init_layer(whole(Layer("w", 60, 50, factored=True))[0], 0.1, randn(1))
    nu = randn(4)
    for rule in ("ekf", "vdekf"):
        found = {}
        for samples in (0, 1, 64):
            family = Diagonal(rule=rule, samples=samples)
            gram, work = family.gram_layer(P, H)
            innovation = solve_innovation(innovation_covariance(gram), nu)
            found[samples] = family.update_layer(P, H, work, innovation)["variance"]
        learned = 0.1 - found[0]
        one, many = ((found[q] - found[0]).norm() / learned.norm() for q in (1, 64))
        assert float(many) < 0.3
        assert float(many) < float(one)


def test_samples_are_counted():
    with pytest.raises(ValueError, match="samples is -1"):
        Diagonal(samples=-1)


def alike_tokens(T: int, alike: float, s: int, k: int = 1, seed: int = 0, signal: float = 1.0) -> Factors:
    """Factors whose tokens have some correlation; H H^T has `signal` on its diagonal, on average."""
    generator = rng(seed)

    def draw(*shape: int, own: tuple[int, ...]) -> Tensor:
        common = torch.randn(own, generator=generator, dtype=DOUBLE)
        return sqrt(alike) * common + sqrt(1 - alike) * torch.randn(shape, generator=generator, dtype=DOUBLE)

    H = Factors(draw(s, k, T, ROWS, own=(s, k, 1, ROWS)), draw(s, T, COLUMNS, own=(s, 1, COLUMNS)))
    size = H.rows().square().sum(1).mean().sqrt()
    return Factors(H.g * (sqrt(signal) / size), H.x)


def kron_prior() -> dict[str, dict[str, Tensor]]:
    B, A = randn(ROWS, ROWS, seed=1), randn(COLUMNS, COLUMNS, seed=2)
    unit = (torch.eye(n, dtype=DOUBLE) for n in (ROWS, COLUMNS))
    return {"w": {"B": B @ B.mT / ROWS + 0.2 * next(unit), "A": A @ A.mT / COLUMNS + 0.2 * next(unit)}}


def stepped(family: Kronecker, H: Factors | Rows, nu: Tensor) -> Belief:
    return update(family, Belief(torch.zeros(N, dtype=DOUBLE), kron_prior()), {"w": H}, nu)[0]


REDUCED = Kronecker(tokens="reduced")


@pytest.mark.parametrize(("k", "T"), [(1, 1), (2, 1)])
def test_one_token_is_reduced_to_itself(k, T):
    H, nu = random_factors(ROWS, COLUMNS, 3, k, T), randn(3 * k)
    exact, reduced = stepped(Kronecker(), H, nu), stepped(REDUCED, H, nu)
    assert torch.equal(exact.mu, reduced.mu)
    assert torch.equal(exact.covariance["w"]["B"], reduced.covariance["w"]["B"])


@pytest.mark.parametrize("k", [1, 2])
def test_equal_tokens_are_one_token(k):
    """Then nothing is given up."""
    H, nu = alike_tokens(2, 1.0, 4, k), randn(4 * k)
    assert H.within(4)
    exact, reduced = stepped(Kronecker(), H, nu), stepped(REDUCED, H, nu)
    assert max_error(reduced.mu, exact.mu) < 1e-12
    for key in ("B", "A"):
        assert max_error(reduced.covariance["w"][key], exact.covariance["w"][key]) < 1e-12


def test_a_layer_of_far_fewer_rows_than_factors_is_left_exact():
    H, nu = alike_tokens(12, 0.3, 4), randn(4)
    assert not H.within(4)
    assert torch.equal(stepped(REDUCED, H, nu).mu, stepped(Kronecker(), H, nu).mu)


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_samples_of_reduced_tokens_keep_their_own_variance_and_a_full_gain(k, shared, matrices):
    o, i = (30, 4) if matrices else (9, 8)
    T = 6 if matrices else 2 if not shared else 3
    H, s = random_factors(o, i, 4, k, T, shared), 4
    P = {"B": torch.eye(o, dtype=DOUBLE) * 0.3, "A": torch.eye(i, dtype=DOUBLE)}
    assert H.within(4)
    gram, work = REDUCED.gram_layer(P, H)
    exact, _ = Kronecker().gram_layer(P, H)
    token = Factors(H.g.sum(2, keepdim=True), H.x.mean(-2, keepdim=True))
    single, _ = Kronecker().gram_layer(P, token)
    own = torch.block_diag(*torch.ones(s, k, k)).bool()
    assert max_error(gram[~own], single[~own]) < 1e-12
    for block in (gram - exact, gram - single):  # never below either
        blocks = block.view(s, k, s, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        assert float(torch.linalg.eigvalsh(blocks).min()) > -1e-9
    w = randn(s * k, seed=3)
    assert max_error(REDUCED.gain_layer(P, H, work, w), 0.3 * (w @ H.rows())) < 1e-12


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("signal", [0.1, 10.0])
def test_what_reducing_tokens_gives_up(alike, signal, record_property, monkeypatch):
    """Against the dense posterior: the mean step, and the covariance beside that of exact tokens."""
    monkeypatch.setattr(Factors, "within", lambda self, reach: True)
    errors = []
    for seed in range(4):
        H, nu = alike_tokens(16, alike, 12, seed=seed, signal=signal), sqrt(1 + signal) * randn(12, seed=seed)
        P = kron_prior()["w"]
        moved, sigma = posterior(torch.kron(P["B"], P["A"]), stacked_rows({"w": H}), nu)
        row = [float((torch.kron(P["B"], P["A"]) - sigma).norm() / sigma.norm())]
        for family in (Kronecker(), REDUCED):
            found = stepped(family, H, nu)
            full = torch.kron(found.covariance["w"]["B"], found.covariance["w"]["A"])
            row += [float((found.mu - moved).norm() / moved.norm()), float((full - sigma).norm() / sigma.norm())]
        errors.append(row)
    untouched, exact_mean, exact, mean, covariance = torch.tensor(errors).mean(0).tolist()
    record_property("errors", {"exact": (exact_mean, exact), "reduced": (mean, covariance)})
    assert exact_mean < 1e-10
    # alike tokens lose next to nothing; others lose what they would have taught the factors, and an error of
    # the step's own size, where S of single tokens alone would make it ten times that
    limits = {0.0: (0.25, 1.5), 0.5: (0.1, 0.7), 0.9: (0.02, 0.2)}[alike]
    assert mean < limits[signal > 1]
    assert covariance < exact + {0.0: 1.05, 0.5: 0.2, 0.9: 0.05}[alike] * (untouched - exact)


@pytest.mark.parametrize("alike", [0.0, 0.7])
@pytest.mark.parametrize("k", [1, 2])
def test_reduced_factors_stay_definite_over_hundreds_of_float32_updates(alike, k, monkeypatch):
    monkeypatch.setattr(Factors, "within", lambda self, reach: True)
    start = torch.zeros(N)
    belief = Belief(start, REDUCED.init(whole(Layer("w", ROWS, COLUMNS, factored=True)), 1.0, start))
    for t in range(200):
        H = alike_tokens(6, alike, 3, k, seed=t, signal=1e3)
        H = Factors(H.g.float(), H.x.float())
        belief, _ = update(REDUCED, belief, {"w": H}, 0.01 * randn(3 * k, seed=t, dtype=torch.float32))
        for factor in belief.covariance["w"].values():
            assert float(torch.linalg.eigvalsh(factor.double())[0]) > 0
    assert bool(torch.isfinite(belief.mu).all())
