"""KalmanCLIP on a matrix of features: scikit-learn's own checks, and what is refused."""

import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers.features import CLASSES, SCALE, WIDTH, class_embeddings, feature_table
from scipy.sparse import csr_matrix

from kngd_ray import KalmanCLIP
from kngd_ray.errors import CheckpointError, InputError, ModelError, UsageError
from kngd_ray.estimator import FittedClassifier, NotFittedError
from kngd_ray.training.classifier import CLASS_EMBEDDINGS, Classifier
from kngd_ray.training.novelty import Novelty, total_variance

QUICK = {"epochs": 2, "posterior.folds": 0, "posterior.temperature": 0.3}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "features"


def part(split, table=None):
    """Features and class names of one split."""
    rows = [row for row in (feature_table() if table is None else table).to_pylist() if row["split"] == split]
    return np.array([row["features"] for row in rows], np.float32), [row["class_name"] for row in rows]


@pytest.fixture(scope="module")
def train():
    return part("train")


@pytest.fixture(scope="module")
def tests():
    return part("test")


def estimator(**changed):
    given = {"class_embeddings": class_embeddings(), "logit_scale": SCALE, "settings": QUICK}
    return KalmanCLIP(**{"model": "precomputed", **given, **changed})


@pytest.fixture(scope="module")
def fitted(train):
    return estimator(settings={"posterior.folds": 3}).fit(*train)


def test_fit_a_matrix(fitted, tests) -> None:
    p, std = fitted.predict_proba(tests[0], return_std=True)
    assert list(fitted.classes_) == sorted(CLASSES)
    assert fitted.n_features_in_ == WIDTH
    assert p.shape == std.shape == (60, 3)
    assert p.sum(1) == pytest.approx(np.ones(60))
    assert (std >= 0).all()
    assert (std[p < 1 - 1e-5] > 0).all(), "but where it is sure to the last digit"
    assert fitted.score(*tests) > 0.75
    scores = fitted.novelty(tests[0])
    assert ((scores >= 0) & (scores <= 1)).all()
    assert fitted.predict_proba(np.empty((0, WIDTH))).shape == (0, 3)


def test_matrices_of_every_kind(fitted, tests) -> None:
    X = tests[0][:5]
    p = fitted.predict_proba(X)
    for same in (X.tolist(), torch.from_numpy(X).requires_grad_(), X.astype(np.float64), np.asfortranarray(X), 8 * X):
        assert fitted.predict_proba(same) == pytest.approx(p, abs=1e-6)


def test_floats_that_numpy_lacks(train) -> None:
    X = torch.from_numpy(train[0]).bfloat16()
    p = estimator().fit(X.float(), train[1]).predict_proba(X.float())
    for same in (X, list(X), X.clone().requires_grad_()):
        assert np.array_equal(estimator().fit(same, train[1]).predict_proba(same), p)
    bare = estimator(class_embeddings=torch.from_numpy(class_embeddings()).bfloat16()).fit(*train)
    assert bare.score(*train) > 0.75


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (np.array([2, 3, 7], np.uint64) + np.uint64(2**63 - 5), np.uint64),
        ([5, 2**63 + 1, 2**63 + 3], np.uint64),
        ([-1, 2**63 + 1, 2**63 + 3], object),
        ([-1, 2**63, 2**70], object),
        ([0, 2**53 + 1, 2**63 - 1], np.int64),
        (["a", "a\0", "b"], object),
        ([False, True, "b"], object),
    ],
)
def test_labels_stay_what_they_are(train, labels, dtype) -> None:
    """Whatever numpy would make of them as one array."""
    plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
    y = [plain[CLASSES.index(name)] for name in train[1]]
    clf = estimator(class_embeddings=None).fit(train[0], np.array(y, labels.dtype) if hasattr(labels, "dtype") else y)
    assert clf.classes_.dtype == dtype
    assert [(type(label), label) for label in clf.classes_.tolist()] == [(type(label), label) for label in plain]
    named = estimator(class_embeddings=None).fit(*train)
    assert clf.score(train[0], y) == named.score(*train) > 0.7
    assert set(clf.predict(train[0]).tolist()) <= set(plain)


def test_labels_that_are_times(train) -> None:
    """Of nanoseconds, as pandas has them, numpy would make whole numbers."""
    days = np.array(["2024-05-01", "2025-05-01", "2026-05-01"])
    for unit in ("D", "s", "us", "ns"):
        y = days.astype(f"datetime64[{unit}]")[[CLASSES.index(name) for name in train[1]]]
        clf = estimator(class_embeddings=None).fit(train[0], y)
        assert [day.year for day in clf.classes_] == [2024, 2025, 2026]
        same = np.array((y if unit == "D" else y.astype("datetime64[us]")).tolist(), object)
        assert clf.score(train[0], y) == (clf.predict(train[0]) == same).mean() > 0.7


def test_labels_in_tensors(train) -> None:
    numbers = [CLASSES.index(name) for name in train[1]]
    for same in ([torch.tensor(n) for n in numbers], [np.array(n) for n in numbers], torch.tensor(numbers)):
        assert estimator().fit(train[0], same).classes_.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"label 0 is tensor\(\[2, 2\]\): a label must be"):
        estimator().fit(train[0], [torch.tensor([n, n]) for n in numbers[::-1]])


@pytest.mark.parametrize("preset", ["kalman", "kalman_diagonal"])
def test_agrees_with_the_head_on_the_same_features(train, tests, preset) -> None:
    """What it says before the first step is what a zero-shot head says, as far as the prior's mean believes it."""
    clf = estimator(preset=preset, settings={**QUICK, "epochs": 0, "posterior.predict": "mean"}).fit(*train)
    gamma = float(clf.checkpoint_.state.replicated["head/gamma"])
    assert gamma == pytest.approx(0.7, rel=0.2) if preset == "kalman" else gamma == 0.7
    logits = gamma * SCALE * tests[0] @ class_embeddings().T
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert clf.predict_proba(tests[0]) == pytest.approx(expected, abs=1e-5)


def test_class_embeddings_in_the_order_of_classes(train, tests, tmp_path) -> None:
    names = {"ant": 2, "bee": 0, "cow": 1}  # labels in another order than the names
    y = [names[name] for name in train[1]]
    texts = class_embeddings()[[1, 2, 0]]
    file = tmp_path / "texts.npy"
    np.save(file, texts)
    prompts = np.stack([texts, 3 * texts], axis=1)
    found = [estimator(class_embeddings=t).fit(train[0], y) for t in (texts, texts.tolist(), prompts, file, str(file))]
    assert found[0].score(tests[0], [names[name] for name in tests[1]]) > 0.75
    for other in found[1:]:
        assert other.predict_proba(tests[0]) == pytest.approx(found[0].predict_proba(tests[0]), abs=1e-5)


def test_rows_in_another_order_are_warned_of(train, recwarn) -> None:
    estimator().fit(*train)
    assert not [w for w in recwarn if "order" in str(w.message)]
    match = r"another order of the rows of class_embeddings much better: .* with row 0 of 'bee', row 1 of 'cow'"
    with pytest.warns(UserWarning, match=match):
        estimator(class_embeddings=class_embeddings()[[1, 2, 0]]).fit(*train)
    digits = [("1", "10", "2")[CLASSES.index(name)] for name in train[1]]
    with pytest.warns(UserWarning, match="whole numbers as text, which are sorted as text, '1', '10', '2' and so on"):
        estimator().fit(train[0], digits)
    with pytest.warns(UserWarning, match="differ by case, spaces or the form of accents alone, 'Ant' and 'ant '"):
        estimator().fit(train[0], [{"ant": "Ant", "bee": "ant "}.get(name, name) for name in train[1]])


def test_without_class_embeddings(train, tests) -> None:
    clf = KalmanCLIP(model="precomputed").fit(*train)
    assert clf.score(*tests) > 0.75
    start = KalmanCLIP(model="precomputed", settings={**QUICK, "epochs": 0}).fit(*train)
    assert start.predict_proba(tests[0]) == pytest.approx(np.full((60, 3), 1 / 3))
    unbiased = KalmanCLIP(model="precomputed", settings={"adapter.bias": False}).fit(*train)
    assert unbiased.score(*tests) > 0.75
    nothing = unbiased.predict_proba(np.zeros((1, WIDTH)))
    assert nothing == pytest.approx(np.full((1, 3), 1 / 3)), "a row of zeros says nothing"


def test_tables_of_features(fitted, train, tests) -> None:
    """By position: columns with an index of their own, columns of vectors, and names that must stay in their order."""
    pandas = pytest.importorskip("pandas")
    X, y = train
    p = fitted.predict_proba(tests[0])
    index = np.random.default_rng(0).permutation(len(X))
    frame = pandas.DataFrame(X, index=index, columns=[f"f{n}" for n in range(WIDTH)])
    vectors = pandas.Series(list(X), index=index)
    column = pa.array(X.tolist())
    for same in (frame, vectors, vectors.to_frame(), column, pa.table({"features": column}), iter(X)):
        clf = estimator(settings={"posterior.folds": 3}).fit(same, pandas.Series(y, index=index[::-1]))
        assert clf.predict_proba(tests[0]) == pytest.approx(p, abs=1e-6)
    named = estimator().fit(frame, y)
    assert named.feature_names_in_.tolist() == list(frame.columns)
    named.predict(X)
    for ask in (named.predict, lambda other: named.score(other, y), lambda other: named.partial_fit(other, y)):
        with pytest.raises(InputError, match="in their order: where the fit has 'f0', X has 'f7'"):
            ask(frame[frame.columns[::-1]])
    assert not hasattr(named.fit(X, y), "feature_names_in_")
    mixed = [float("nan"), *y[1:]]
    with pytest.raises(InputError, match="1 of 36 labels are missing"):
        estimator().fit(X, mixed)


def test_partial_fit(train, tests) -> None:
    X, y = train
    clf = estimator(settings={**QUICK, "epochs": 1})
    clf.partial_fit(X[::2], y[::2], classes=CLASSES)
    before = clf.checkpoint_
    clf.partial_fit(X[1::2], y[1::2])
    assert clf.checkpoint_.manifest["prior"] is not None
    assert clf.checkpoint_ is not before
    assert clf.score(*tests) > 0.75
    with pytest.raises(InputError, match="X has 5 features, but KalmanCLIP is expecting 8 features as input"):
        clf.partial_fit(X[:, :5], y)
    with pytest.raises(UsageError, match="model was changed"):
        clf.set_params(class_embeddings=class_embeddings()[::-1]).partial_fit(X, y)


def variance_of(clf, X):
    classifier, features = clf._features(X)
    return total_variance(classifier.predictor, features)


def test_novelty_follows_a_belief_that_narrows(train, tests) -> None:
    """Shots of batches too small to hold any out were ranked among the first ones, of which it was less certain."""
    (X, y), order = train, np.random.default_rng(0).permutation(len(train[1]))
    clf = estimator(settings={})
    clf.partial_fit(X[order[:12]], [y[n] for n in order[:12]], classes=CLASSES)
    first = clf._settled.novelty
    for start in range(12, 36, 2):
        few, before = order[start : start + 2], clf._settled.novelty
        met = variance_of(clf, X[few])
        clf.partial_fit(X[few], [y[n] for n in few])
        quantiles = clf._settled.novelty.quantiles
        assert len(quantiles) == len(before.quantiles) + 2
        assert all(any(q == pytest.approx(float(v), rel=1e-4) for q in quantiles) for v in met)
    as_it_was = first.score(variance_of(clf, tests[0])).mean()
    assert clf.novelty(tests[0]).mean() > 1.5 * as_it_was


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"settings": ["filter.mean.gamma=1"]}, "settings is .* give a mapping of dotted keys"),
        ({"settings": {3: 1}}, "settings is .* give a mapping of dotted keys"),
        ({"device": "xpu7"}, "device is 'xpu7'"),
        ({"device": "meta"}, "device is 'meta'"),
    ],
)
def test_parameters_of_another_kind_are_refused_by_a_sentence(train, given, says) -> None:
    with pytest.raises(InputError, match=says):
        KalmanCLIP("precomputed", class_embeddings=class_embeddings(), **given).fit(*train)


def test_settings_that_change_nothing_are_named(train) -> None:
    model = KalmanCLIP("precomputed", class_embeddings=class_embeddings(), settings={**QUICK, "optimizer.lr": 9})
    with pytest.warns(UserWarning, match=r"optimizer\.lr has no effect with method=kalman"):
        model.fit(*train)


def test_a_fit_that_does_not_reach_its_mode_warns(train) -> None:
    settings = {"posterior.folds": 0, "filter.iterations": 2}
    model = KalmanCLIP("precomputed", class_embeddings=class_embeddings(), settings=settings)
    with pytest.warns(UserWarning, match="2 linearisations of a step did not reach the mode") as told:
        model.fit(*train)
    assert told[0].filename == __file__


def test_many_classes_of_few_shots_are_sharpened(tmp_path) -> None:
    """By a number that is kept, that predictions, deviations and a saved estimator share, and that changes no class."""
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((40, 32))
    y = np.tile(np.arange(40), 7)
    looks = texts + rng.standard_normal((40, 32))
    X = looks[y] + rng.standard_normal((280, 32))
    given = {"model": "precomputed", "class_embeddings": texts, "logit_scale": 10.0}
    sharp = KalmanCLIP(**given).fit(X[:80], y[:80])
    plain = KalmanCLIP(**given, settings={"posterior.sharpening_spread": 0}).fit(X[:80], y[:80])
    factor = sharp.calibration_.sharpening
    assert factor > 1.1
    assert plain.calibration_.sharpening == 1.0
    p, q = sharp.predict_proba(X[80:]), plain.predict_proba(X[80:])
    expected = q**factor / (q**factor).sum(1, keepdims=True)
    assert p == pytest.approx(expected, abs=1e-6)
    rows = np.arange(200)
    assert np.log(p[rows, y[80:]]).mean() > np.log(q[rows, y[80:]]).mean()
    deviations = [clf.predict_proba(X[80:], return_std=True)[1] for clf in (sharp, plain)]
    assert not np.allclose(*deviations, rtol=0.01)
    sharp.save(tmp_path / "sharp")
    assert np.array_equal(KalmanCLIP.load(tmp_path / "sharp").predict_proba(X[80:]), p)


def test_copies_of_samples_are_told(train, recwarn) -> None:
    X, y = train
    asked = estimator(settings={"posterior.folds": 3})
    asked.fit(X, y)
    estimator().fit(np.tile(X, (2, 1)), [*y, *y])  # holds nothing out
    assert not any("repeat" in str(w.message) for w in recwarn)
    says = rf"^samples that repeat others: {len(X)} of {2 * len(X)}\. .*: give each sample once"
    with pytest.warns(UserWarning, match=says):
        asked.fit(np.tile(X, (2, 1)), [*y, *y])


def test_copies_are_held_out_together() -> None:
    """A fit that has seen one of two knows the other: held-out figures would be those of shots that were learned."""
    rng = np.random.default_rng(0)
    y = np.repeat(range(3), 20)
    X = rng.normal(size=(60, WIDTH)) + 0.8 * np.eye(3, WIDTH)[y]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once, twice = (
            estimator(settings={"posterior.folds": 3}).fit(np.tile(X, (n, 1)), np.tile(y, n)) for n in (1, 2)
        )
    found = [clf.calibration_ for clf in (once, twice)]
    assert found[0].held_out_accuracy < 0.85
    assert found[1].held_out_accuracy == pytest.approx(found[0].held_out_accuracy, abs=0.1)
    assert found[1].held_out_nll == pytest.approx(found[0].held_out_nll, abs=0.2)


def test_few_recent_pictures_are_kept() -> None:
    first = Novelty(tuple(float(n) for n in range(1, 101)))
    renewed = first.renewed(torch.tensor([0.5, 200.0]))
    assert len(renewed.quantiles) == 64
    assert renewed.quantiles[0] == 0.5
    assert renewed.quantiles[-1] == 200.0
    assert renewed.median == pytest.approx(first.median, abs=1.0)
    assert renewed.renewed(torch.ones(70)).quantiles == (1.0,) * 70


def test_a_fit_of_features_is_scored_on_a_matrix(fitted, tests, tmp_path) -> None:
    """Which was taken for a picture."""
    (fit,) = (fitted.save(tmp_path / "saved") / "fits").iterdir()
    assert FittedClassifier(fit).score(*tests) == fitted.score(*tests)
    with pytest.raises(InputError, match=r"X is sparse, and dense data is required: give X.toarray\(\)"):
        FittedClassifier(fit).predict(csr_matrix(tests[0]))
    with pytest.raises(InputError, match="X is not a table of numbers"):
        FittedClassifier(fit).predict([[1.0, 2.0], [1.0]])
    halved = torch.as_tensor(np.asarray(tests[0]), dtype=torch.bfloat16)
    assert len(FittedClassifier(fit).predict(halved)) == len(halved)
    with pytest.raises(InputError, match="y has labels such as 0"):
        FittedClassifier(fit).score(tests[0], [0] * len(tests[0]))


def test_save_load_and_pickle(fitted, train, tests, tmp_path) -> None:
    folder = fitted.save(tmp_path / "kept")
    p = fitted.predict_proba(tests[0])
    loaded = KalmanCLIP.load(folder)
    assert np.array_equal(loaded.predict_proba(tests[0]), p)
    assert loaded.n_features_in_ == WIDTH
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).predict_proba(tests[0]), p)
    assert np.array_equal(pickle.loads(pickle.dumps(loaded)).predict_proba(tests[0]), p)
    moved = folder.rename(tmp_path / "moved")
    assert np.array_equal(KalmanCLIP.load(moved).predict_proba(tests[0]), p)
    (fit,) = (moved / "fits").iterdir()
    judged = Classifier.load(fit).classify(torch.from_numpy(tests[0]))
    assert judged.probabilities.numpy() == pytest.approx(p, abs=1e-5)
    KalmanCLIP.load(moved).partial_fit(*train).save(tmp_path / "more")
    np.save(fit / CLASS_EMBEDDINGS, class_embeddings()[::-1])
    with pytest.raises(CheckpointError, match="other weights"):
        KalmanCLIP.load(moved).predict(tests[0])
    probe = KalmanCLIP(model="precomputed", settings=QUICK).fit(*train)
    again = KalmanCLIP.load(probe.save(tmp_path / "probe"))
    assert np.array_equal(again.predict_proba(tests[0]), probe.predict_proba(tests[0]))
    assert again.class_embeddings is None


def test_a_loaded_classifier_needs_its_folder_no_more(fitted, tests, tmp_path) -> None:
    loaded = KalmanCLIP.load(fitted.save(tmp_path / "kept"))
    kept = pickle.dumps(loaded)
    shutil.rmtree(tmp_path / "kept")
    p = fitted.predict_proba(tests[0])
    assert np.array_equal(loaded.predict_proba(tests[0]), p)
    assert np.array_equal(pickle.loads(kept).predict_proba(tests[0]), p)
    assert np.array_equal(KalmanCLIP.load(loaded.save(tmp_path / "again")).predict_proba(tests[0]), p)


def test_parameters_that_are_set_after_a_fit_are_for_the_next(fitted, train, tests, tmp_path) -> None:
    """They were mixed with what had been fitted once the model was made anew, as after pickling."""
    p = fitted.predict_proba(tests[0])
    changed = pickle.loads(pickle.dumps(fitted)).set_params(class_embeddings=class_embeddings()[::-1], logit_scale=3.0)
    for made_anew in (changed, pickle.loads(pickle.dumps(changed))):
        assert np.array_equal(made_anew.predict_proba(tests[0]), p)
        assert made_anew.score(*tests) == fitted.score(*tests)
    saved = KalmanCLIP.load(changed.save(tmp_path / "kept"))
    assert np.array_equal(saved.predict_proba(tests[0]), p)
    assert saved.logit_scale == fitted.logit_scale
    other = pickle.loads(pickle.dumps(fitted)).set_params(
        model="embedded", class_embeddings=None, logit_scale=None, settings={"filter.iterations": 1}
    )
    assert np.array_equal(other.predict_proba(tests[0]), p)
    config = yaml.safe_load((other.save(tmp_path / "other") / "config.yaml").read_text())
    assert (config["filter"]["iterations"], config["model"]["name"]) != (1, "embedded"), "those of the fit"
    assert not np.array_equal(changed.fit(*train).predict_proba(tests[0]), p)


def test_a_prior_that_is_changed_after_the_first_call_is_told(train) -> None:
    X, y = train
    clf = estimator().partial_fit(X[:9], y[:9], classes=CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf.partial_fit(X[9:12], y[9:12])
    clf.set_params(settings={**QUICK, "filter.logit_variance": 5.0})
    with pytest.warns(
        UserWarning, match=r"^filter\.logit_variance has no effect after the first call: the prior is the"
    ):
        clf.partial_fit(X[12:15], y[12:15])


def test_reprs_are_short(fitted) -> None:
    shown = "class_embeddings=<array (3, 8)>, logit_scale=20.0"
    assert repr(estimator(settings=None)) == f"KalmanCLIP(model='precomputed', {shown})"


X, Y = part("train")


@pytest.mark.parametrize(
    ("make", "X", "y", "error", "says"),
    [
        ({}, X[0], Y, InputError, "Reshape your data"),
        ({}, X[:0], [], InputError, "label"),
        ({}, X, Y[:-1], InputError, "36 pictures and 35 labels"),
        ({}, np.full_like(X, np.nan), Y, InputError, "row 0 of X holds NaN"),
        ({}, X * np.inf, Y, InputError, "row 0 of X holds infinity"),
        ({}, X * 1j, Y, InputError, "Complex"),
        ({}, [[1.0, 2.0], [1.0]], ["a", "b"], InputError, "not a table of numbers"),
        ({}, np.zeros_like(X), Y, InputError, "row 0 of X has length zero"),
        ({}, X[:, :5], Y, ModelError, "embeddings of length 8, and the features of the data have length 5"),
        ({}, X, ["one"] * len(X), InputError, "one class"),
        ({}, X, np.linspace(0, 1, len(X)), InputError, "Unknown label type"),
        ({}, X, None, InputError, "the target y is None"),
        ({}, X, np.zeros((len(X), 2)), InputError, "y has shape"),
        ({}, X, ["ant", "bee"] * 18, ModelError, "embeddings of 3 classes, and the data has 2"),
        ({"class_embeddings": [[1.0], [1.0, 2.0]]}, X, Y, InputError, "class_embeddings is not a table of numbers"),
        ({"class_embeddings": class_embeddings()[[0, 0, 1]]}, X, Y, ModelError, "'ant' and 'bee' the same embedding"),
        ({"class_embeddings": "gone.npy"}, X, Y, ModelError, "gone.npy does not exist"),
        ({"logit_scale": -1}, X, Y, InputError, "logit_scale is -1"),
        ({"logit_scale": "high"}, X, Y, InputError, "logit_scale"),
        ({"pretrained": "openai"}, X, Y, InputError, "no towers"),
        ({"model": "embedded"}, X, Y, InputError, 'class_embeddings are for model="precomputed"'),
        ({"templates": "a sketch of a {}."}, X, Y, UsageError, "data.templates"),
        ({"class_embeddings": None, "settings": {"adapter": "bottleneck"}}, X, Y, UsageError, "adapter=class_residual"),
    ],
)
def test_mistakes_are_one_sentence(make, X, y, error, says) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(").replace(".", r"\.")):
        estimator(**make).fit(X, y)


def test_unfitted_and_without_scikit_learn_ray_and_mlflow() -> None:
    with pytest.raises(NotFittedError, match="not fitted"):
        KalmanCLIP(model="precomputed").predict(X)
    code = (
        "import sys, kngd_ray; assert 'torch' not in sys.modules; assert 'KalmanCLIP' in dir(kngd_ray); "
        "import numpy as np; sys.modules['sklearn'] = None; "
        "from kngd_ray import KalmanCLIP; X = np.eye(4)[[0, 1, 0, 1]]; "
        "KalmanCLIP(model='precomputed', settings={'posterior.folds': 0}).fit(X, [0, 1, 0, 1]).predict(X); "
        "assert not {'ray', 'mlflow', 'torchmetrics', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_with_scikit_learn(train, tests) -> None:
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    clf = estimator()
    assert base.clone(clf).class_embeddings is not clf.class_embeddings
    assert selection.cross_val_score(base.clone(clf), *train, cv=3).mean() > 0.75
    search = selection.GridSearchCV(clf, {"logit_scale": [1.0, SCALE]}, cv=2).fit(*train)
    assert search.best_estimator_.score(*tests) > 0.75


@pytest.mark.filterwarnings("ignore:Estimator KalmanCLIP does not inherit")
def test_checks_of_scikit_learn() -> None:
    """All of check_estimator: none is expected to fail. That on the array API skips where it is not asked for."""
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    found = checks.check_estimator(KalmanCLIP(model="precomputed"), on_skip=None, on_fail=None)
    failed = {check["check_name"]: check["exception"] for check in found if check["status"] == "failed"}
    assert not failed
    passed = {check["check_name"] for check in found if check["status"] == "passed"}
    assert {"check_classifiers_train", "check_n_features_in", "check_estimators_nan_inf"} <= passed


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real CLIP features of ../shared/features")
def test_real_features() -> None:
    table = pq.read_table(SHARED / "whurs19_clip_vitb32.parquet")
    X, y = part("train", table)
    shots = [n for name in sorted(set(y)) for n in [i for i, other in enumerate(y) if other == name][:4]]
    few = X[shots], [y[n] for n in shots]
    texts = np.load(SHARED / "whurs19_clip_vitb32_text.npy")
    zero_shot = KalmanCLIP(model="precomputed", class_embeddings=texts, settings={**QUICK, "epochs": 0}).fit(*few)
    clf = KalmanCLIP(model="precomputed", class_embeddings=texts).fit(*few)
    probe = KalmanCLIP(model="precomputed").fit(*few)
    other = part("test", table)
    assert clf.score(*other) > zero_shot.score(*other) + 0.05
    assert probe.score(*other) > 0.8
