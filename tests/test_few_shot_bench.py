"""The few-shot benchmark: that methods are what they say, and that what is finished stays so."""

import json
from dataclasses import replace
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


from benchmarks.few_shot import boot, claims, figures, made, tables
from benchmarks.few_shot.__main__ import RESULTS, main
from benchmarks.few_shot.data import DataSet, FeatureSet, read_features
from benchmarks.few_shot.geometry import to_clip
from benchmarks.few_shot.groups import GROUPS, open_data, store_of
from benchmarks.few_shot.methods import METHODS, adamw, kalman, laplace
from benchmarks.few_shot.probe import Probe
from benchmarks.few_shot.problem import Case, Outcome, Problem, Watch, averaged, looked_at
from benchmarks.few_shot.report import lines, write_report
from benchmarks.few_shot.run import Plan, Runner
from benchmarks.few_shot.search import held_out_nll, search
from benchmarks.few_shot.stack import Batches
from benchmarks.few_shot.store import Store
from kngd_ray.errors import DataError
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


@pytest.fixture(scope="module", autouse=True)
def _blank_figures():
    """Figures of reports are put together and saved, but not painted, which takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.draw", lambda self, renderer: None)
        yield


@pytest.fixture(scope="module")
def problem():
    return _problem()


@pytest.fixture(scope="module")
def cropped(problem):
    """The same shots, with two crops of each."""
    g = torch.Generator().manual_seed(1)

    def beside(case):
        x = case.support.features
        crops = normalize(x.unsqueeze(1) + 0.2 * torch.randn(len(x), 2, D, generator=g), dim=2)
        return replace(case, support=replace(case.support, crops=crops))

    return replace(problem, cases=[beside(case) for case in problem.cases])


SETTINGS = {"lr": 3e-3, "weight_decay": 0.1, "epochs": 3}


@pytest.mark.parametrize("adapter", adamw.ADAPTERS)
def test_a_stack_is_as_many_fits_of_the_package_by_torch_adamw(problem, cropped, adapter):
    """With crops it sees another view in each epoch, as they do."""
    settings = {**SETTINGS, "adapter": adapter}
    found = []
    for given in (problem, cropped):
        outcomes = adamw.fitted(given, settings)
        for case, outcome in zip(given.cases, outcomes, strict=True):
            head = fit(given.task(case, adamw.options_of(settings))).head
            for name, test in case.tests.items():
                expected = head(test.features).softmax(1)
                torch.testing.assert_close(outcome.probabilities[name], expected, rtol=1e-4, atol=1e-5)
        found.append(outcomes[0].probabilities["id"])
    assert not torch.allclose(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in GROUPS["crops"].methods if name != "zero_shot"])
def test_methods_with_crops_learn_from_them(problem, cropped, name):
    method = METHODS[name]
    settings = {"adapter": "class_residual", "C": 10.0, "max_iter": 300, **method.usual}
    found = [method.fit(given, settings)[0].probabilities["id"] for given in (problem, cropped)]
    assert bool(found[1].isfinite().all())
    assert not torch.allclose(*found, rtol=1e-3, atol=1e-3)


def test_keys_of_a_cache_are_means_of_views(cropped):
    shots = cropped.cases[0].support
    views = torch.cat([shots.features.unsqueeze(1), shots.crops], 1)
    torch.testing.assert_close(averaged(shots), normalize(views.mean(1), dim=1))
    assert averaged(shots.whole()) is shots.features


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
    p = laplace.probit(probe(x), own)
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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n == "champion" else ())
        for n, method in METHODS.items()
        if method.space is not None
    ],
)
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
        *_rows("adamw_class_residual", {1: 0.4, 2: 0.7}, [0.1, 0.2, 0.3, 0.8, 0.7], [0, 1, 2, 3, 4]),
    ])
    adamw = "adamw_class_residual"
    value, won, problems = claims.difference(frame, ("ours", "id_accuracy"), (adamw, "id_accuracy"))
    assert value.mean == pytest.approx(0.05)
    assert (won, problems) == ("1/1/0", 2)
    own, whole = claims._steps(GROUPS["mini"], frame)
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
    page = write_report(tmp_path, methods).read_text()
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


# ---- groups of problems ----


def test_the_geometry_of_clip_leaves_zero_shot_alone(problem):
    mapped = to_clip(problem)
    assert mapped.logit_scale == 100
    torch.testing.assert_close(mapped.class_embeddings.norm(dim=1), torch.ones(C))
    for before, after in zip(problem.cases, mapped.cases, strict=True):
        torch.testing.assert_close(after.support.features.norm(dim=1), torch.ones(len(after.support)))
        torch.testing.assert_close(after.support.labels, before.support.labels)
        for name, test in before.tests.items():
            moved = mapped.zero_shot(after.tests[name].features)
            torch.testing.assert_close(moved, problem.zero_shot(test.features) + 20, rtol=0, atol=1e-4)
            p = problem.zero_shot(test.features).softmax(1)
            torch.testing.assert_close(moved.softmax(1), p, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="at most 62"):
        to_clip(Problem(problem.cases, problem.class_embeddings, 64.0))


def _features_file(folder, *, dimensions=D, classes=C, name="own", **columns):
    rng = np.random.default_rng(0)
    labels = np.arange(classes).repeat(8)
    texts = rng.normal(size=(classes, dimensions))
    table = {
        "features": list((texts[labels] + rng.normal(size=(len(labels), dimensions))).astype(np.float32)),
        "label": labels.astype(np.int32),
        "split": np.tile(["train"] * 5 + ["test"] * 3, classes),
        **columns,
    }
    np.save(folder / f"{name}_text.npy", texts.astype(np.float32))
    path = folder / f"{name}.parquet"
    pd.DataFrame(table).to_parquet(path)
    return path


def test_features_of_ones_own(tmp_path):
    data = open_data(str(_features_file(tmp_path)))
    assert isinstance(data, FeatureSet)
    assert (data.group, data.domains, data.most_shots) == ("real", ("all",), {"all": 5})
    problem = data.problem("all", 2, [0, 3])
    first, other = problem.cases
    rows = read_features(tmp_path / "own.parquet")
    assert first.support.labels.tolist() == np.arange(C).repeat(2).tolist()
    torch.testing.assert_close(first.support.features[:2], torch.from_numpy(rows.features[:2]))  # seed 0: file order
    assert not torch.equal(first.support.features, other.support.features)
    assert list(first.tests) == ["id"]
    assert len(first.tests["id"]) == 3 * C
    torch.testing.assert_close(problem.class_embeddings.norm(dim=1), torch.ones(C))
    dev = open_data(str(tmp_path / "own.parquet"), dev=True).problem("all", 2, [3]).cases[0]
    assert len(dev.tests["id"]) == 3 * C  # the five training rows of a class without the two shots
    assert not (dev.tests["id"].features @ dev.support.features.mT > 1 - 1e-5).any()
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "own_text.npy").rename(tmp_path / "elsewhere" / "texts.npy")
    assert open_data(str(tmp_path / "own.parquet"), class_embeddings=moved).identity == data.identity


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"split": ["train", "valid"] * 16}, "split 'valid'"),
        ({"label": np.arange(32)}, "labels go from 0 to 31, there are 4 classes"),
        ({"features": [np.zeros(D, np.float32)] * 32}, "embedding 0 is 0"),
        ({"features": [np.full(D, np.nan, np.float32)] * 32}, "not finite"),
        ({"features": [np.ones(D - 1, np.float32)] * 32}, "11 numbers, class embeddings 12"),
    ],
)
def test_features_that_cannot_be_used(tmp_path, columns, told):
    path = _features_file(tmp_path, **columns)
    with pytest.raises(DataError, match=told):
        read_features(path)


def test_features_without_what_belongs_to_them(tmp_path):
    path = _features_file(tmp_path)
    pd.read_parquet(path).drop(columns="split").to_parquet(path)
    with pytest.raises(DataError, match="no column split"):
        read_features(path)
    (tmp_path / "own_text.npy").unlink()
    with pytest.raises(DataError, match="--class-embeddings"):
        read_features(path)


def test_made_data_has_the_geometry_that_it_says(monkeypatch):
    rows = made.made(200)
    x, texts = torch.from_numpy(rows.features), torch.from_numpy(rows.class_embeddings)
    labels = torch.from_numpy(rows.labels)
    cosines, between = x @ texts.mT, texts @ texts.mT
    assert between[~torch.eye(200, dtype=torch.bool)].mean().item() == pytest.approx(0.77, abs=0.01)
    assert cosines.gather(1, labels[:, None]).mean().item() == pytest.approx(0.28, abs=0.01)
    assert cosines.mean().item() == pytest.approx(0.19, abs=0.01)
    assert (x[::13] * x[1::13]).sum(1).mean().item() == pytest.approx(0.76, abs=0.01)
    assert (x[:-130:13] * x[130::13]).sum(1).mean().item() == pytest.approx(0.52, abs=0.01)  # of another kind
    assert np.array_equal(rows.features, made.made(200).features)
    monkeypatch.setitem(made.MADE, "many200", 5)
    data = open_data("many200")
    assert (data.name, data.group, data.most_shots) == ("many200", "many", {"made": 8})


@pytest.mark.slow
def test_groups_are_kept_apart(tmp_path, emoji):
    own = str(_features_file(tmp_path))
    plan = Plan(shots=[1], seeds=2, methods=["zero_shot", "clap"], trials=1, domains=["noto", "all"])
    folder = tmp_path / "results"
    for data in (open_data(emoji), open_data(emoji, geometry="clip"), open_data(own), open_data(emoji, views=1)):
        plan = replace(plan, methods=["zero_shot", "gda" if data.group == "crops" else "clap"])
        list(Runner(data, plan, store_of(data.group, folder), lambda text: None).run())
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
    names = ["clap", "zero_shot"]
    assert written == [
        *(f"clip_geometry/small-{name}.parquet" for name in names),
        *(f"crops/small-{name}.parquet" for name in ("gda", "zero_shot")),
        *(f"real/own-{name}.parquet" for name in names),
        *(f"small-{name}.parquet" for name in names),
    ]
    mini, clip = (store_of(group, folder).rows("small", "zero_shot") for group in ("mini", "clip_geometry"))
    assert not set(mini["recipe"]) & set(clip["recipe"])
    np.testing.assert_allclose(mini["id_nll"], clip["id_nll"], rtol=1e-4)
    page = write_report(folder)
    assert all(f"<h2 id={name}>" in page.read_text() for name in ("mini", "crops", "clip_geometry", "real"))
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["groups"]) == ["mini", "crops", "clip_geometry", "real"]
    assert summary["groups"]["real"]["means"]["clap"]["ood_nll"] is None
    assert store_of("real", folder, dev=True).folder == folder / "real" / "dev"
    shown = tables.markdown(folder / "summary.json")
    assert "**real CLIP features**, 1 problems" in shown
    assert "| clap |" in shown


def test_committed_rows_of_rivals_are_not_computed_again():
    data, store = DataSet("embedded"), Store(RESULTS)
    plan = Plan(GROUPS["mini"].shots, 10, [], 60)
    runner = Runner(data, plan, store, lambda text: None)
    for name in ("zero_shot", "gda", "tip_adapter_f", "adamw_class_residual"):
        recipe, _ = runner._settings(4, METHODS[name])
        assert store.finished("emoji", "noto", 4, name, recipe) == set(range(10))


def _group_rows(method, accuracy, nll, ece, shots=(1, 4, 16), ood=True):
    return [
        {"data": "d", "domain": "a", "shots": s, "seed": seed, "method": method}
        | {"id_accuracy": accuracy + 0.001 * seed, "id_nll": nll, "id_ece": ece, "curve_id": [], "curve_steps": []}
        | {f"ood_{name}": value if ood else np.nan for name, value in (("accuracy", 0.3), ("nll", nll), ("ece", ece))}
        for s in shots
        for seed in range(3)
    ]


def test_claims_of_each_group():
    mini = pd.DataFrame([
        *_group_rows("ours", 0.60, 1.0, 0.05),
        *_group_rows("adamw_class_residual", 0.55, 1.2, 0.06),
        *_group_rows("gda", 0.602, 0.9, 0.2),
        *_group_rows("zero_shot", 0.61, 2.0, 0.2, shots=(1,)),
        *_group_rows("zero_shot", 0.2, 2.0, 0.2, shots=(4, 16)),
    ])
    clip = mini.assign(id_accuracy=mini["id_accuracy"] + 0.002, id_nll=mini["id_nll"] - 0.02)
    real = pd.DataFrame([
        *_group_rows("ours", 0.60, 1.0, 0.05, ood=False),
        *_group_rows("adamw_class_residual", 0.62, 1.2, 0.04, ood=False),
    ])
    found = claims.claims({"mini": mini, "clip_geometry": clip, "real": real})
    by = {(claim.group, claim.text): claim for claim in found}
    assert not [text for group, text in by if group == "real" and "OOD" in text]
    lead = by["mini", "ID accuracy, ours - AdamW"]
    assert lead.holds
    assert lead.gap == pytest.approx(5.0)
    assert not by["real", "ID accuracy, ours - AdamW"].holds
    assert not by["mini", "OOD accuracy, ours - AdamW"].holds  # 0 [0, 0] does not exclude 0
    best = by["mini", "ID accuracy, ours - the best rival of each problem, picked afterwards"]
    assert best.value.mean == pytest.approx(100 * (-0.01 - 0.002 - 0.002) / 3)
    assert not best.holds
    assert best.note == "gda 2, zero_shot 1"
    below = by["mini", "problems whose mean ID accuracy is below zero-shot's"]
    assert (below.value.mean, below.gap, below.holds) == (1, -1, False)
    assert below.note == "d a 1: -1.0"
    nll = by["mini", "ID NLL, ours - the best rival"]
    assert (nll.note, nll.holds) == ("lowest mean: gda", False)
    assert nll.gap == pytest.approx(-0.1)
    assert [by["mini", f"ID ECE, {shots}, ours - AdamW"].problems for shots in ("1-2 shots", "16 shots")] == [1, 1]
    assert by["mini", "ID ECE, 4-8 shots, ours - AdamW"].holds
    assert by["clip_geometry", "ID accuracy, |ours here - ours by the mini CLIP|"].gap == pytest.approx(0.1)
    assert by["clip_geometry", "ID NLL, |ours here - ours by the mini CLIP|"].gap == pytest.approx(-0.01)
    assert by["clip_geometry", "OOD NLL, |ours here - ours by the mini CLIP|"].holds


def test_without_ours_nothing_is_claimed():
    frame = pd.DataFrame(_group_rows("adamw_class_residual", 0.55, 1.2, 0.06))
    assert {claim.holds for claim in claims.claims({"many": frame, "real": frame})} == {None}


@pytest.mark.parametrize("name", ["clap", "lp++", "proker"])
def test_new_rivals_learn_more_than_zero_shot_knows(name):
    easy = FeatureSet("easy", made.made(20)).problem("made", 4, [0, 1])
    method = METHODS[name]
    settings = search(method, easy, 5)["settings"] if method.space else {}
    zero = [figures.row(*pair)["id_nll"] for pair in zip(easy.cases, METHODS["zero_shot"].fit(easy, {}), strict=True)]
    own = [figures.row(*pair)["id_nll"] for pair in zip(easy.cases, method.fit(easy, settings), strict=True)]
    assert np.mean(own) < np.mean(zero)


def test_the_multipliers_of_clap_are_how_far_zero_shot_is_to_be_trusted(problem):
    from benchmarks.few_shot.methods import clap

    held = clap.multipliers(problem, problem.cases[0])
    shots = problem.cases[0].support
    p = problem.zero_shot(shots.features).softmax(1)
    expected = torch.stack([p[shots.labels == c, c].mean() for c in range(C)])
    torch.testing.assert_close(held, expected)
    assert clap.rate(0) == 1e-5
    assert clap.rate(1) == 0.1
    assert clap.rate(151) == pytest.approx(0.05)


def test_proker_solves_its_regression(problem):
    from benchmarks.few_shot.methods import proker

    shots, texts = problem.cases[0].support, problem.class_embeddings
    found = proker.solve(shots, texts, 2.0, 0.1)
    K = proker.kernel(shots.features, shots.features, 2.0)
    rest = torch.eye(C)[shots.labels] - shots.features @ texts.mT
    torch.testing.assert_close(K @ found / 0.1 + found, rest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--geometry", "clip"], "--views is for pictures"),
        (["--data", "many200"], "--views is for pictures"),
        (["--methods", "clap", "ours"], "clap learns nothing from crops"),
    ],
)
def test_crops_of_what_has_none(monkeypatch, capsys, more, told):
    monkeypatch.setattr("sys.argv", ["few_shot", "--views", "2", *more])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        main()
    assert told in capsys.readouterr().err
