"""The few-shot benchmark: that methods are what they say, and that what is finished stays so."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers.emoji import TRAIN_ROWS, small_table
from torch.nn.functional import normalize

pytest.importorskip("sklearn", reason="extra bench")
pytest.importorskip("laplace", reason="extra bench")
pytest.importorskip("ivon", reason="extra bench")


from benchmarks.few_shot import boot, claims, figures
from benchmarks.few_shot.data import DataSet
from benchmarks.few_shot.methods import METHODS, adamw, kalman, laplace
from benchmarks.few_shot.probe import Probe
from benchmarks.few_shot.problem import Case, Outcome, Problem, Watch, looked_at
from benchmarks.few_shot.report import lines, write_report
from benchmarks.few_shot.run import Plan, Runner
from benchmarks.few_shot.search import held_out_nll, search
from benchmarks.few_shot.stack import Batches
from benchmarks.few_shot.store import Store
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import calibrate
from kngd_ray.training.fit import fit

C, D, SCALE = 4, 12, 10.0


def _problem(seeds=(0, 1), shots=9):
    torch.manual_seed(0)
    texts = normalize(torch.randn(C, D), dim=1)

    def drawn(count, shift):
        labels = torch.arange(C).repeat_interleave(count)
        return Support(normalize(texts[labels] + shift + 0.4 * torch.randn(len(labels), D), dim=1), labels)

    cases = [
        Case(drawn(shots, 0.0), {"id": drawn(10, 0.0), "far": drawn(8, 0.5), "near": drawn(6, 0.1)}, s) for s in seeds
    ]
    return Problem(cases, texts, SCALE)


@pytest.fixture(scope="module")
def problem():
    return _problem()


SETTINGS = {"lr": 3e-3, "weight_decay": 0.1, "epochs": 3}


@pytest.mark.parametrize("adapter", adamw.ADAPTERS)
def test_a_stack_is_as_many_fits_of_the_package_by_torch_adamw(problem, adapter):
    settings = {**SETTINGS, "adapter": adapter}
    outcomes = adamw.fitted(problem, settings)
    for case, outcome in zip(problem.cases, outcomes, strict=True):
        head = fit(problem.task(case, adamw.options_of(settings))).head
        for name, test in case.tests.items():
            expected = head(test.features).softmax(1)
            torch.testing.assert_close(outcome.probabilities[name], expected, rtol=1e-4, atol=1e-5)


def test_folds_of_unequal_size_do_not_touch_each_other(problem):
    folds = problem.folds(5)
    assert len({len(case.support) for case in folds.cases}) > 1
    settings = {**SETTINGS, "adapter": "class_residual"}
    together = adamw.fitted(folds, settings)
    for n, case in enumerate(folds.cases):
        (alone,) = adamw.fitted(Problem([case], problem.class_embeddings, SCALE, watched=False), settings)
        torch.testing.assert_close(together[n].probabilities["id"], alone.probabilities["id"], rtol=1e-4, atol=1e-5)


def test_a_fold_with_a_batch_less_sets_the_number_of_steps():
    problem = _problem(shots=9)  # 36 shots are two batches, 32 of them one
    case = problem.cases[0]
    short = Case(case.support.subset(torch.arange(32)), case.tests, 0)
    batches = Batches([case, short], 2)
    weights = [weight for *_, weight in batches]
    assert batches.steps == len(weights) == 2
    assert all(torch.allclose(weight.sum(1), torch.ones(2)) for weight in weights)


def test_the_variance_of_laplace_is_that_of_laplace_torch(problem):
    case = problem.cases[0]
    probe = Probe(problem.class_embeddings, SCALE, 0.1 * torch.randn(C, D, generator=torch.manual_seed(0)))
    found = laplace.approximate(probe, case)
    x = case.tests["far"].features
    _, covariance = found._glm_predictive_distribution(x)
    own = laplace.logit_variance(found, x)
    torch.testing.assert_close(own, covariance.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=1e-6)
    p = laplace.moderated(probe(x), own).softmax(1)
    torch.testing.assert_close(p, found(x, link_approx="probit"), rtol=1e-4, atol=1e-5)


def test_tau_of_all_cases_is_that_of_each(problem):
    method = METHODS["ours"]
    assert method.space is None
    outcomes = method.fit(problem, {})
    config = kalman.load_config(overrides=["method=kalman"])
    for case, outcome in zip(problem.cases, outcomes, strict=True):
        alone = calibrate(problem.task(case, config.fit_options), config.posterior)
        assert outcome.chosen["tau"] == alone.tau
        assert outcome.chosen["held_out_nll"] == pytest.approx(alone.held_out_nll, rel=1e-4)


@pytest.mark.parametrize("name", [n for n, method in METHODS.items() if method.space is not None])
def test_a_search_is_not_worse_than_the_usual_setting(problem, name):
    method = METHODS[name]
    found = search(method, problem, 2)
    assert len(found["trials"]) == 2
    assert found["nll"] == min(trial["nll"] for trial in found["trials"])
    assert held_out_nll(method, problem.folds(3), found["settings"]) == pytest.approx(found["nll"], rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_predicts_all_sets(problem, name):
    method = METHODS[name]
    owner = METHODS[method.searched_as] if method.searched_as else method
    import optuna

    settings = owner.space(optuna.trial.FixedTrial(dict(owner.usual))) if owner.space else {}
    for case, outcome in zip(problem.cases, method.fit(problem, settings), strict=True):
        for name, test in case.tests.items():
            p = outcome.probabilities[name]
            assert p.shape == (len(test), C)
            torch.testing.assert_close(p.sum(1), torch.ones(len(test)), rtol=1e-4, atol=1e-4)
        row = figures.row(case, outcome)
        assert set(figures.FIGURES) <= set(row)
        assert np.isfinite(row["auroc_variance"]) == (outcome.variance is not None)
        if outcome.curve is not None:
            assert outcome.curve.steps[0] == 0
            assert len(outcome.curve.id) == len(outcome.curve.steps) == len(outcome.curve.ood)


def test_figures_by_hand():
    labels = torch.tensor([0, 1])
    sets = {"id": Support(torch.zeros(2, 3), labels), "far": Support(torch.zeros(2, 3), labels)}
    p = {"id": torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "far": torch.tensor([[0.6, 0.4], [0.7, 0.3]])}
    row = figures.row(Case(sets["id"], sets, 0), Outcome(p))
    assert row["id_accuracy"] == 1
    assert row["ood_accuracy"] == 0.5
    assert row["auroc_max_prob"] == row["auroc_entropy"] == 1
    assert np.isnan(row["auroc_variance"])
    assert np.isnan(row["steps"])
    assert sum(row["bins_id_count"]) == 2
    assert sum(row["bins_ood_right"]) == 1


def test_accuracy_is_followed_where_tests_differ_in_size():
    x = torch.eye(3)
    sizes = {0: 3, 1: 2}
    cases = [
        Case(
            Support(x, torch.arange(3)),
            {"id": Support(x[:n], torch.arange(n)), "far": Support(x, torch.zeros(3).long())},
            s,
        )
        for s, n in sizes.items()
    ]
    watch = Watch(cases, 1)
    watch.see(0, watch.features)  # the logits are the features: right where they are the label
    first, second = watch.curves(0.1)
    assert first.id == second.id == [1.0]
    assert first.ood == pytest.approx([1 / 3])


def test_steps_looked_at():
    assert looked_at(5) == [0, 1, 2, 3, 4, 5]
    many = looked_at(2000)
    assert many[:65] == list(range(65))
    assert many[-1] == 2000
    assert max(b / a for a, b in pairwise(many[64:])) < 1.05


def test_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    grid = rng.normal(0.3, 1.0, (1, 400))
    found = boot.over_problems([grid])
    assert found.mean == pytest.approx(grid.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * grid.std() / 20, rel=0.1)
    assert boot.over_seeds([1.0]) == boot.Interval(1.0, 1.0, 1.0)


def _rows(method, accuracies, curve, steps):
    return [
        {"data": "d", "domain": "a", "shots": s, "seed": seed, "method": method, "id_accuracy": a + 0.01 * seed}
        | {"curve_id": curve, "curve_steps": steps}
        for s, a in accuracies.items()
        for seed in range(3)
    ]


def test_differences_wins_and_steps():
    frame = pd.DataFrame([
        *_rows("ours", {1: 0.5, 2: 0.7}, [0.1, 0.8, 0.9], [0, 1, 2]),
        *_rows("adamw", {1: 0.4, 2: 0.7}, [0.1, 0.2, 0.3, 0.8, 0.7], [0, 1, 2, 3, 4]),
    ])
    value, won, problems = claims.difference(frame, ("ours", "id_accuracy"), ("adamw", "id_accuracy"))
    assert value.mean == pytest.approx(0.05)
    assert (won, problems) == ("1/1/0", 2)
    own, whole = claims._steps(frame)
    assert own.value.mean == pytest.approx(1 / 3)
    assert whole.value.mean == pytest.approx(1 / 4)
    assert whole.holds
    assert not own.holds


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small.parquet"
    pq.write_table(small_table(), path)
    return str(path)


def test_a_run_is_kept_and_not_computed_again(tmp_path, emoji):
    methods = ["zero_shot", "adamw", "ours"]
    plan = Plan(shots=[1, 16], seeds=1, methods=methods, trials=2)
    said = []
    store = Store(tmp_path)
    data = DataSet(emoji)
    first = list(Runner(data, plan, store, said.append).run())
    assert [rows["method"].tolist() for rows in first] == 2 * [[name] for name in methods]
    assert [set(rows["domain"]) for rows in first[:: len(methods)]] == [{"noto"}, {"twemoji"}]
    assert any(f"16 shots: skipped, a class has only {TRAIN_ROWS}" in line for line in said)
    assert sum("searched" in line for line in said) == 1
    said.clear()
    again = list(Runner(data, plan, store, said.append).run())
    assert not [line for line in said if "skipped" not in line]
    assert json.dumps(lines(pd.concat(first))) == json.dumps(lines(pd.concat(again)))
    page = write_report(store, methods).read_text()
    assert "What must hold" in page
    assert "not measured" in page
    assert {"report.html", "summary.json", "curves.png", "reliability.png"} <= {p.name for p in tmp_path.iterdir()}


def test_another_preset_is_computed_again(tmp_path, emoji):
    store, data = Store(tmp_path), DataSet(emoji)
    plan = Plan(shots=[1], seeds=1, methods=["ours"], trials=1, domains=["noto"])
    (before,) = Runner(data, plan, store, lambda text: None).run()
    other = kalman.method("ours", "kalman", ["filter.p0=0.01"])
    (after,) = Runner(data, plan, store, lambda text: None, methods={"ours": other}).run()
    assert before["id_nll"].item() != after["id_nll"].item()
    assert len(store.rows("small", "ours")) == 1


def test_dev_looks_at_no_test_picture(emoji):
    data = DataSet(emoji, dev=True)
    split = data._split(
        kalman.load_config(overrides=["method=adamw", "data.train_domain=noto", "data.shots=4"]), 0, frozenset()
    )
    shown = np.concatenate([split.id_test, *split.ood.values()])
    assert set(data.images.splits[shown]) == {"train"}
    assert not set(data.images.keys[shown]) & set(data.images.keys[split.support])
