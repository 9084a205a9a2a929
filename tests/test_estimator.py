"""KalmanCLIP: scikit-learn's conventions, pictures and labels of every kind, and nothing of Ray or MLflow."""

import io
import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.emoji import CLASSES, small_table
from PIL import Image
from safetensors.torch import load_file, save_file

import kngd_ray
from kngd_ray import KalmanCLIP
from kngd_ray.clip import ClipModel
from kngd_ray.config import load_config
from kngd_ray.errors import CheckpointError, DataError, FilterError, InputError, UsageError
from kngd_ray.estimator import NotFittedError, _in_memory
from kngd_ray.estimator._conventions import weighted_accuracy
from kngd_ray.training.classifier import Classifier
from kngd_ray.training.kalman import nested

QUICK = {"epochs": 2, "posterior.folds": 0, "posterior.temperature": 0.3, "tune.views": 0}


def rows(split: str, domain: str = "noto") -> tuple[list[bytes], list[str]]:
    found = [r for r in small_table().to_pylist() if (r["split"], r["domain"]) == (split, domain)]
    return [r["image"] if isinstance(r["image"], bytes) else r["image"]["bytes"] for r in found], [
        r["class_name"] for r in found
    ]


@pytest.fixture(scope="module", autouse=True)
def _towers_run_once():
    """Features of pictures that were together before, pixel for pixel, are those of then: a third of all that is done.

    Whatever is between a picture and its pixels is done each time.
    """
    known, encode = {}, ClipModel.encode_images

    def encoded(model, images, **options):
        pixels = tuple((image.mode, image.size, image.tobytes()) for image in images)
        key = (model.fingerprint, model.device, *options.items(), pixels)
        if key not in known:
            known[key] = encode(model, images, **options)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipModel, "encode_images", encoded)
        yield


@pytest.fixture(scope="module")
def train():
    return rows("train")


@pytest.fixture(scope="module")
def tests():
    return rows("test")


@pytest.fixture(scope="module")
def fitted(train):
    return KalmanCLIP(settings={"posterior.folds": 3, "posterior.temperature": 0.3}).fit(*train)


def test_three_lines(fitted, tests) -> None:
    p, std = fitted.predict_proba(tests[0], return_std=True)
    assert list(fitted.classes_) == sorted(CLASSES)
    assert p.shape == std.shape == (12, 3)
    assert p.sum(1) == pytest.approx(np.ones(12))
    assert (std > 0).all()
    assert (std <= 0.5).all()
    assert list(fitted.predict(tests[0])) == [fitted.classes_[c] for c in p.argmax(1)]
    assert fitted.score(*tests) == np.mean(fitted.predict(tests[0]) == np.array(tests[1]))
    assert fitted.score(*tests) >= 0.75
    assert np.array_equal(fitted.predict_proba(tests[0]), p)
    assert fitted.predict_proba([]).shape == (0, 3)


def test_a_gpu_that_is_not_there_is_refused(train, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"device is 'cuda:1' and this machine has no usable GPU: leave it out\."):
        KalmanCLIP(device="cuda:1", settings=QUICK).fit(*train)


def test_novelty(fitted, train, tests) -> None:
    scores = fitted.novelty(tests[0])
    assert ((scores >= 0) & (scores <= 1)).all()
    assert np.isnan(KalmanCLIP(settings=QUICK).fit(*train).novelty(tests[0][:2])).all()


def test_pictures_of_every_kind_are_the_same_picture(fitted, tests, tmp_path) -> None:
    data = tests[0][0]
    file = tmp_path / "x.png"
    file.write_bytes(data)
    from kngd_ray.data import decode

    picture = decode(data, "x")
    array = np.asarray(picture)
    p = fitted.predict_proba([data, file, str(file), picture, array, array / 255.0])
    assert np.abs(p - p[0]).max() < 1e-5
    grey = np.zeros((8, 9), np.uint8)
    assert fitted.predict_proba([grey, grey[:, :, None]]).shape == (2, 3)
    assert fitted.predict_proba(np.stack([array, array])).shape == (2, 3)


def test_crops_of_files_are_those_of_train(train, tmp_path) -> None:
    """However a file is given; pictures without one have crops of their own, the same for equal pixels."""
    from kngd_ray.clip import ModelConfig, load_model
    from kngd_ray.data import decode, encode_batch
    from kngd_ray.estimator.given import encode_crops
    from kngd_ray.training.views import crops_of

    data, model = train[0][0], load_model(ModelConfig())
    crops = crops_of(load_config(overrides=["preset=kalman", "tune.views=2"]).fit_options, model, 1)
    assert crops is not None
    path = tmp_path / "a.png"
    path.write_bytes(data)
    of_train = encode_batch([data], [""], lambda pictures: model.encode_images(pictures).numpy(), crops).features
    for given in (data, bytearray(data), path, str(path), io.BytesIO(data), {"bytes": None, "path": str(path)}):
        assert np.abs(encode_crops(model, [given], crops)[0].numpy() - of_train).max() < 1e-5
    picture = decode(data, "")
    by_pixels = encode_crops(model, [picture, np.asarray(picture)], crops).numpy()
    assert np.abs(by_pixels[0] - by_pixels[1]).max() < 1e-5
    assert np.abs(by_pixels[0] - of_train).max() > 1e-3


def test_16_bit_pictures_of_every_kind_are_the_same_picture(fitted, tests) -> None:
    from kngd_ray.data import decode

    values = np.asarray(decode(tests[0][0], "").convert("L")).astype(np.uint16) * 257
    picture = Image.fromarray(values)
    file = io.BytesIO()
    picture.save(file, "PNG")
    kinds = [file.getvalue(), picture, Image.open(file), values, values / 65535, values.astype(np.int32)]
    kinds += [Image.fromarray((values / 65535).astype(np.float32)), Image.fromarray(values.astype(np.int32))]
    p = fitted.predict_proba(kinds)
    assert np.abs(p - p[0]).max() < 1e-5


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 2, 0], None),
        (np.array([3, 5, 4]), {3: "bird", 4: "building", 5: "flower"}),
        ([("a", 1), ("b", 2), ("c", 3)], {("a", 1): "bird", ("b", 2): "flower", ("c", 3): "building"}),
        ([b"bird", b"flower", b"building"], {b"bird": b"bird", b"flower": "flower", b"building": "building"}),
        ([True, 7, "x"], None),
        ([2.5, 1.5, 0.5], None),
    ],
)
def test_labels_of_every_kind(train, labels, names) -> None:
    kinds = labels.tolist() if isinstance(labels, np.ndarray) else labels
    y = [kinds[CLASSES.index(name)] for name in train[1]]
    clf = KalmanCLIP(class_names=names, settings=QUICK).fit(train[0], y)
    assert set(clf.classes_.tolist()) == set(kinds)
    assert set(clf.predict(train[0]).tolist()) <= set(kinds)
    assert clf.score(train[0], y) > 0.8
    said = [str(c) if names is None else names[c] for c in clf.classes_.tolist()]
    assert clf.class_names_ == tuple(name.decode() if isinstance(name, bytes) else name for name in said)


def frame_of(pictures, labels):
    """A table whose index is not the position of its rows."""
    pandas = pytest.importorskip("pandas")
    index = list(np.random.default_rng(5).permutation(len(pictures)) + 3)
    return pandas.DataFrame({"picture": pictures, "label": labels}, index=index)


def test_what_counts_is_the_position(train, tests) -> None:
    """Columns of tables, their parts, generators and open files are what lists of the same are."""
    pictures, labels = train
    expected = KalmanCLIP(settings=QUICK).fit(pictures, labels)
    p = expected.predict_proba(tests[0])
    frame = frame_of(pictures, labels)
    column = pa.chunked_array([pictures[:4], pictures[4:]])
    given = {
        "series": (frame["picture"], frame["label"]),
        "categories": (frame["picture"], frame["label"].astype("category")),
        "frames": (frame[["picture"]], frame[["label"]]),
        "arrow": (column, pa.chunked_array([labels]).dictionary_encode()),
        "tables": (pa.table({"image": column}), pa.table({"label": labels})),
        "generators": ((data for data in pictures), (name for name in labels)),
        "arrays": (np.array(pictures, dtype=object), np.array(labels)[:, None]),
        "files": ([io.BytesIO(data) for data in pictures], np.array(labels)),
        "rows of Hugging Face's": ([{"bytes": data, "path": "x.png"} for data in pictures], pa.array(labels)),
        "bytes": (pictures, [name.encode() for name in labels]),
    }
    for kind, (X, y) in given.items():
        clf = KalmanCLIP(settings=QUICK).fit(X, y)
        assert np.array_equal(clf.predict_proba(tests[0]), p), kind
    found = frame_of(*tests)
    for part in (found["picture"], found[["picture"]], (data for data in tests[0])):
        assert np.array_equal(expected.predict_proba(part), p)
    part = found.sample(frac=0.5, random_state=0)
    assert np.array_equal(expected.predict_proba(part["picture"]), expected.predict_proba(list(part["picture"])))
    assert expected.score(part["picture"], part["label"]) == expected.score(list(part["picture"]), list(part["label"]))
    assert expected.score((data for data in tests[0]), iter(tests[1])) == expected.score(*tests)
    files = [io.BytesIO(data) for data in tests[0]]
    assert np.array_equal(expected.predict_proba(files), expected.predict_proba(files)), "they can be read again"
    half = frame.iloc[::2]
    more = KalmanCLIP(settings=QUICK).partial_fit(half["picture"], half["label"], classes=frame["label"].unique())
    assert more.classes_.tolist() == sorted(CLASSES)


GREY = np.zeros((8, 9), np.uint8)
COLOUR = np.zeros((8, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("X", "says"),
    [
        (COLOUR, "X is one array of shape (8, 9, 3), which looks like one picture: give a list, [X]."),
        (COLOUR[:, :, :1], "looks like one picture"),
        (COLOUR / 255, "looks like one picture"),
        (GREY, "looks like one picture"),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), "looks like one picture"),
        (list(COLOUR), "picture 0 is an array of shape (9, 3), which looks like one row of a picture"),
        (np.array(5), "X is array(5) alone"),
        ("x.png", "X is one picture, 'x.png'"),
        (io.BytesIO(b"x"), "X is one picture"),
        ({"bytes": b"x", "path": None}, "X is a dict"),
        ({b"x", b"y"}, "X is a set"),
        (7, "X is of type int"),
        (["https://host/cat.jpg"] * 6, "picture 0: https://host/cat.jpg is an address"),
        ([None] * 6, "picture 0 is of type NoneType"),
        ([{"bytes": None, "path": None}] * 6, "picture 0 is of type NoneType"),
        ([{"b": b"x"}] * 6, "picture 0 is of type dict"),
        ([float("nan")] * 6, "picture 0 is"),
        ([io.StringIO("x")] * 6, "picture 0: the file is open as text"),
        ([(COLOUR, 1)] * 6, "picture 0"),
    ],
)
def test_what_is_no_list_of_pictures(fitted, X, says) -> None:
    with pytest.raises((InputError, DataError)) as error:
        fitted.predict(X)
    assert says in str(error.value)
    if "looks like one picture: give a list" in says:
        with pytest.raises(InputError, match="looks like one picture"):
            KalmanCLIP(settings=QUICK).fit(X, list("abababab"))


def test_tables_of_several_columns_are_refused(train, fitted) -> None:
    frame = frame_of(*train)
    for ask in (lambda: fitted.predict(frame), lambda: fitted.score(frame, frame["label"])):
        with pytest.raises(InputError, match=r"X is a table of 2 columns \(picture, label\): give the one of pictures"):
            ask()
    with pytest.raises(InputError, match="y is a table of 2 columns"):
        KalmanCLIP().fit(frame["picture"], frame)
    with pytest.raises(InputError, match="2 pictures and 3 labels"):
        fitted.score(iter(train[0][:2]), train[1][:3])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (["a", "b"], "2 numbers of 0 or more that are not all 0, and it holds something else: could not convert"),
        ([None, 1], "2 numbers of 0 or more that are not all 0"),
        ([{}, 1], "and it holds something else"),
        (np.array([1j, 1]), "and it holds something else: values of type complex128"),
        ([0, 0], "2 numbers of 0 or more that are not all 0"),
        ([1, np.nan], "2 numbers of 0 or more that are not all 0"),
        ([1], "2 numbers of 0 or more that are not all 0"),
        ([[1], [1, 2]], "sample_weight is not a table of numbers"),
    ],
)
def test_weights_that_are_none_are_refused_by_a_sentence(weights, words: str) -> None:
    with pytest.raises(InputError, match=rf"sample_weight .*{re.escape(words.removeprefix('sample_weight '))}.*\.$"):
        weighted_accuracy(["x", "y"], ["x", "x"], weights)


@pytest.mark.parametrize(("found", "labels"), [(["0", "1"], [0, 1]), ([0, 1], ["0", "1"]), (["a"], [b"a"])])
def test_text_is_not_scored_against_labels_of_another_type(found, labels) -> None:
    """An accuracy of 0 would be said of a classifier that is right."""
    with pytest.raises(InputError, match=r"y has labels such as .*: text never equals anything else.*\.$"):
        weighted_accuracy(found, labels, None)
    assert weighted_accuracy([*found, None], [*labels, None], None) == 1 / (len(found) + 1)


def test_weights_may_be_written_as_texts() -> None:
    assert weighted_accuracy(["x", "y"], ["x", "x"], ["3", "1"]) == 0.75


def missing():
    pandas = pytest.importorskip("pandas")
    yield from (
        None,
        float("nan"),
        np.nan,
        np.float32("nan"),
        pandas.NA,
        pandas.NaT,
        np.datetime64("NaT"),
        float("inf"),
    )


def test_labels_that_are_missing_are_counted(train) -> None:
    pandas = pytest.importorskip("pandas")
    pictures, labels = train
    for value in missing():
        y = [value if n in (1, 4) else label for n, label in enumerate(labels)]
        given = [y, np.array(y, dtype=object), pandas.Series(y, index=range(9, 9 + len(y)), dtype=object)]
        for estimator, X in ((KalmanCLIP(), pictures), (KalmanCLIP(model="precomputed"), np.eye(len(y)))):
            for labels_given in given:
                with pytest.raises(InputError, match=r"2 of 15 labels are missing \(.*\), at position 1, 4"):
                    estimator.fit(X, labels_given)
    gaps = pandas.Series(labels, dtype="category").where(pandas.Series(range(15)) != 3)
    with pytest.raises(InputError, match="1 of 15 labels are missing"):
        KalmanCLIP().fit(pictures, gaps)
    with pytest.raises(InputError, match="1 of 15 labels are missing"):
        KalmanCLIP().fit(pictures, pa.array([None, *labels[1:]]))
    with pytest.raises(InputError, match="Input classes contains NaN"):
        KalmanCLIP().partial_fit(pictures, labels, classes=[*CLASSES, None])
    with pytest.raises(InputError, match="y is one label, 'birds'"):
        KalmanCLIP().fit(pictures[:5], "birds")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("sea_bird", "sea bird", "dog"), "'sea bird' and 'sea_bird' have one prompt"),
        (("SeaBird", "sea_bird", "dog"), "'SeaBird' and 'sea_bird' have one prompt"),
        (("IT", "it", "dog"), "read as one"),
        (("['bird']", "cat", "dog"), "which is a Python list"),
        (("", "cat", "dog"), "a class is called ''"),
        (("x" * 400, "cat", "dog"), "its name is cut off"),
        ((b"\xff", b"cat", b"dog"), "is not UTF-8"),
        ((("bird", 1), ("cat", 2), ("dog", 3)), "cannot be used in a prompt: name each label by class_names="),
    ],
)
def test_classes_that_prompts_do_not_tell_apart(train, names, says) -> None:
    y = [names[CLASSES.index(name)] for name in train[1]]
    with pytest.raises((InputError, DataError)) as error:
        KalmanCLIP(settings=QUICK).fit(train[0], y)
    assert says in str(error.value)


def test_labels_that_look_like_code_are_said_in_words(train, tests, tmp_path) -> None:
    code = {"bird": "SeaBird", "flower": "F-16A", "building": "b'house'"}
    y = [code[name] for name in train[1]]
    with pytest.warns(UserWarning, match="SeaBird as 'Sea Bird'"):
        clf = KalmanCLIP(settings=QUICK).fit(train[0], y)
    assert set(clf.classes_) == set(code.values())
    plain = KalmanCLIP(settings=QUICK, class_names={"SeaBird": "Sea Bird", "F-16A": "F-16A", "b'house'": "house"})
    p = plain.fit(train[0], y).predict_proba(tests[0])
    assert np.array_equal(clf.predict_proba(tests[0]), p)
    loaded = KalmanCLIP.load(clf.save(tmp_path / "kept"))
    assert np.array_equal(loaded.predict_proba(tests[0]), p)
    loaded.partial_fit(train[0], y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = KalmanCLIP(settings=QUICK, templates="a photo of a {name}.").fit(train[0], y)
    assert not np.array_equal(kept.predict_proba(tests[0]), p)
    with pytest.warns(UserWarning, match="labels are numbers, and prompts say them"):
        KalmanCLIP(settings=QUICK).fit(train[0], [CLASSES.index(name) for name in train[1]])
    with pytest.warns(UserWarning, match="a class called 'nan'"):
        KalmanCLIP(settings=QUICK).fit(train[0], ["nan" if name == "bird" else name for name in train[1]])
    with pytest.raises(UsageError, match="class_names is a list"):
        KalmanCLIP(class_names=["a", "b"]).fit(*train)


def test_random_state(train) -> None:
    settings = {**QUICK, "batch_size": 4}

    def p(state):
        return KalmanCLIP(settings=settings, random_state=state).fit(*train).predict_proba(train[0][:3])

    assert np.array_equal(p(1), p(1))
    assert not np.array_equal(p(1), p(2))
    assert np.array_equal(p(np.random.RandomState(3)), p(np.random.RandomState(3)))
    for state in (None, np.random.default_rng(0)):
        assert p(state).shape == (3, 3)
    with pytest.raises(ValueError, match="random_state"):
        p("now")


@pytest.mark.parametrize("preset", ["kalman", "kalman_diagonal"])
def test_partial_fit_continues_the_posterior(train, tests, preset) -> None:
    pictures, labels = train
    settings = {**QUICK, "epochs": 1, "batch_size": 64, "noise.tempering": "none"}
    family = load_config(overrides=[f"preset={preset}"]).filter.covariance
    first, second = slice(0, None, 2), slice(1, None, 2)
    clf = KalmanCLIP(preset=preset, settings=settings)
    clf.partial_fit(pictures[first], labels[first], classes=CLASSES)
    before = {name: t.clone() for name, t in clf.checkpoint_.state.covariance.items()}
    clf.partial_fit(pictures[second], labels[second])
    now = clf.checkpoint_.state.covariance
    volume, volume_before = (family.log_det(nested(P, torch.zeros(0))) for P in (now, before))
    assert volume < volume_before
    if preset == "kalman_diagonal":  # of a product fitted to the posterior only the volume is sure to shrink
        for name, variance in now.items():
            assert (variance <= before[name] + 1e-12).all(), "variances do not grow"
    assert clf.checkpoint_.manifest["prior"] is not None
    clf.partial_fit(pictures[:1], labels[:1])  # a single picture
    assert clf.score(*tests) > 0.5
    with pytest.raises(UsageError, match="'tree' is new"):
        clf.partial_fit(pictures[:1], ["tree"])
    with pytest.raises(UsageError, match="adapter was changed"):
        clf.set_params(settings={**settings, "adapter": "linear"}).partial_fit(pictures[:1], labels[:1])
    with pytest.raises(UsageError, match="one class"):
        KalmanCLIP(settings=settings).partial_fit(pictures[:1], labels[:1])


@pytest.mark.parametrize("count", [1, 2])
def test_a_first_part_may_be_a_picture_or_two(train, count) -> None:
    """Of the first and the third class: one fold holds out both."""
    known = sorted(CLASSES)
    chosen = [train[1].index(known[c]) for c in (0, 2)][:count]
    pictures, labels = ([part[n] for n in chosen] for part in train)
    clf = KalmanCLIP(settings={"epochs": 1}).partial_fit(pictures, labels, classes=known)
    assert list(clf.predict(pictures)) == labels
    clf.partial_fit(*train)
    assert clf.score(*train) > 0.8


def test_save_and_load(fitted, tests, tmp_path) -> None:
    folder = fitted.save(tmp_path / "kept")
    loaded = KalmanCLIP.load(folder)
    assert np.array_equal(loaded.predict_proba(tests[0]), fitted.predict_proba(tests[0]))
    assert np.array_equal(loaded.novelty(tests[0]), fitted.novelty(tests[0]))
    (fit,) = (folder / "fits").iterdir()
    judged = Classifier.load(fit).classify([Image.open(io.BytesIO(data)).convert("RGB") for data in tests[0][:2]])
    assert judged.interval is not None
    loaded.partial_fit(*tests).save(tmp_path / "more")
    with pytest.raises(UsageError, match="not an empty folder"):
        fitted.save(folder)
    with pytest.raises(CheckpointError, match="no saved KalmanCLIP"):
        KalmanCLIP.load(tmp_path)
    (file,) = folder.glob("fits/*/step-*/weights.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        KalmanCLIP.load(folder)


def test_a_loaded_estimator_is_fitted_as_the_one_that_was_saved(tmp_path) -> None:
    """Prompts are read off the labels again, and a seed stays one."""
    known = dict(zip(CLASSES, ("RedFruit", "GreenTree", "BlueSky"), strict=True))
    X, y = (part[:12] for part in rows("train"))
    y = [known[label] for label in y]
    first = KalmanCLIP(settings=QUICK, random_state=np.int64(3))
    with pytest.warns(UserWarning, match="Red Fruit"):
        first.fit(X, y)
    loaded = KalmanCLIP.load(first.save(tmp_path / "kept"))
    assert loaded.random_state == 3
    with pytest.warns(UserWarning, match="Red Fruit"):
        loaded.fit(X, y)
    assert np.array_equal(loaded.predict_proba(X), first.predict_proba(X))


def test_a_model_that_was_written_anew_is_read_anew(tmp_path) -> None:
    folder = Path(shutil.copytree(Path(kngd_ray.__file__).parent / "assets" / "mini_clip", tmp_path / "model"))
    clf, (X, y) = KalmanCLIP(f"local-dir:{folder}", settings=QUICK), rows("train")
    before = clf.fit(X, y).checkpoint_.manifest["model"]["fingerprint"]
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({name: 0.9 * w if w.ndim > 1 else w for name, w in weights.items()}, folder / "new.safetensors")
    (folder / "new.safetensors").replace(folder / "open_clip_model.safetensors")
    assert clf.fit(X, y).checkpoint_.manifest["model"]["fingerprint"] != before


def test_folds_that_cannot_be_fitted_are_said(train, monkeypatch) -> None:
    def refused(*_, **__):
        raise FilterError("10 steps in a row were refused.")

    monkeypatch.setattr(_in_memory, "calibrate_and_compare", refused)
    with pytest.warns(UserWarning, match=r"10 steps in a row were refused\): tau is 0.3, and nothing was chosen"):
        KalmanCLIP(settings=QUICK).fit(*train)


def test_pictures_after_features_leave_nothing_of_them(train, tests) -> None:
    X = np.eye(4)[[0, 1, 2, 3] * 2] + 0.1
    clf = KalmanCLIP("precomputed", settings=QUICK).fit(X, [0, 1, 2, 3] * 2)
    clf.set_params(model="embedded").fit(*train)
    assert not hasattr(clf, "n_features_in_")
    assert np.array_equal(clf.predict_proba(tests[0]), KalmanCLIP(settings=QUICK).fit(*train).predict_proba(tests[0]))


def test_pickles_without_the_model(fitted, tests) -> None:
    fitted.predict(tests[0][:1])
    data = pickle.dumps(fitted)
    assert len(data) < 1 << 20
    assert np.array_equal(pickle.loads(data).predict_proba(tests[0]), fitted.predict_proba(tests[0]))


@pytest.mark.parametrize(
    ("make", "X", "y", "error", "says"),
    [
        ({}, [b"x"], ["a"], UsageError, "one class"),
        ({}, [b"x", b"y"], ["a"], UsageError, "2 pictures and 1 labels"),
        ({}, [b"x", b"y"], ["a", "b"], DataError, "picture 0: the picture cannot be decoded"),
        ({}, ["no.png", "no.png"], ["a", "b"], DataError, "no.png cannot be read"),
        ({}, np.zeros((2, 5)), ["a", "b"], UsageError, "one array of shape .2, 5."),
        ({}, [b"x", b"y"], ["a", []], UsageError, "label 1"),
        ({"settings": {"p0": 1}}, [b"x", b"y"], ["a", "b"], UsageError, "filter.p0"),
        ({"settings": {"data.shots": 1}}, [b"x", b"y"], ["a", "b"], UsageError, "data.shots"),
        ({"preset": "adamw"}, [b"x", b"y"], ["a", "b"], UsageError, "for adamw"),
        ({"preset": "kalman_lora"}, [b"x", b"y"], ["a", "b"], UsageError, "trains towers"),
        ({"class_names": {"a": "cat"}}, [b"x", b"y"], ["a", "b"], UsageError, "lacks the label 'b'"),
        ({"class_names": {"a": "cat", "b": "cat"}}, [b"x", b"y"], ["a", "b"], UsageError, "one name"),
    ],
)
def test_mistakes_are_one_sentence(make, X, y, error, says) -> None:
    with pytest.raises(error, match=says):
        KalmanCLIP(**make).fit(X, y)


def test_unfitted() -> None:
    for ask in ("predict", "predict_proba", "novelty"):
        with pytest.raises(NotFittedError, match="not fitted"):
            getattr(KalmanCLIP(), ask)([b""])
    with pytest.raises(ValueError, match="no parameter 'p0'"):
        KalmanCLIP().set_params(p0=1)
    with pytest.raises(UsageError, match="one picture"):
        KalmanCLIP(settings=QUICK).fit(b"ab", ["a", "b"])


def test_with_scikit_learn(train) -> None:
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    validation = pytest.importorskip("sklearn.utils.validation")
    settings = {"epochs": 1, **QUICK}
    clf = KalmanCLIP(settings=settings, random_state=4)
    copy = base.clone(clf)
    assert copy is not clf
    assert copy.get_params() == clf.get_params()
    assert base.is_classifier(clf)
    with pytest.raises(NotFittedError):
        clf.predict(train[0])
    scores = selection.cross_val_score(clf, *train, cv=3)
    assert scores.shape == (3,)
    assert scores.mean() > 0.6
    search = selection.GridSearchCV(clf, {"settings": [settings, {**settings, "filter.p0": 1e-6}]}, cv=2).fit(*train)
    validation.check_is_fitted(search.best_estimator_)
    assert search.best_estimator_.score(*train) > 0.8


CHECKS = (  # of check_estimator, those that fit no matrix of numbers
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
)


@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_scikit_learn(name) -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    check = getattr(checks, name, None)
    if check is None:
        pytest.skip("this scikit-learn has no such check")
    check("KalmanCLIP", KalmanCLIP())
