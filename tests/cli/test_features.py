"""Features that were computed elsewhere, through every command: what it says, leaves and refuses."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers.features import CLASSES, SCALE, WIDTH, class_embeddings, feature_table, with_vectors, write_features

from kngd_ray.training.classifier import Classifier

FAILED, USAGE = 1, 2
VIEWS = 3  # crops of a picture
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "features"


def refused(outcome, code, *words):
    """The sentence of a refusal that names all of `words`."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.sentence, outcome.sentence
    return outcome.sentence


@pytest.fixture
def files(tmp_path):
    return write_features(tmp_path)


@pytest.fixture
def settings(command, files):
    """Settings of a run of a second on the made features; later ones win."""

    def given(*more, data=files[0], classes=files[1]):
        model = ["model.name=precomputed", f"model.logit_scale={SCALE}"]
        model += [] if classes is None else [f"model.class_embeddings={classes}"]
        return command.settings("data.train_domain=photo", *model, *more, data=data)

    return given


@pytest.fixture
def train(command, settings):
    return lambda *more, **where: command("train", *settings(*more, **where))


def test_train_on_features(command, settings, train) -> None:
    report = command("train", "--json", *settings("trainer.name=f", "baselines=adamw")).json
    assert report["zero_shot"]["id"]["accuracy"] > 0.6
    assert report["id"]["accuracy"] >= report["zero_shot"]["id"]["accuracy"]
    assert list(report["ood"]) == ["mean", "sketch"]
    assert report["baselines"][0]["id"]["accuracy"] > 0.6
    (checkpoint,) = command.run("f").glob("fits/kalman-seed0/step-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["source"]["class_embeddings"] == str(command.folder / "classes.npy")
    assert manifest["model"]["classes"] == list(CLASSES)
    card = (command.run("f") / "records" / "kalman-seed0" / "artifacts" / "model_card.md").read_text()
    assert "features were precomputed: 8 numbers each, logit scale 20, class embeddings classes.npy" in card
    assert "prompts" not in card
    table = train()
    assert "zero-shot" in table.out
    assert "scaled" not in table.err, "unit features need no word"
    assert "cache" not in {path.name for path in command.folder.iterdir()}


def test_lengths_are_scaled_and_that_is_said_first(command, settings, files) -> None:
    unit = command("train", "--json", *settings()).json
    pq.write_table(feature_table(length=9), files[0])
    long = command("train", "--json", *settings())
    assert "features of length 9 to 9 are scaled to length 1" in long.err.splitlines()[:2]
    assert long.json["id"]["nll"] == pytest.approx(unit["id"]["nll"], rel=1e-4)


def test_without_class_embeddings_it_is_a_linear_classifier(command, settings, train) -> None:
    report = command("train", "--json", *settings("trainer.name=probe", classes=None)).json
    assert report["zero_shot"]["id"]["nll"] == pytest.approx(math.log(3))
    assert report["zero_shot"]["id"]["accuracy"] == pytest.approx(1 / 3)
    assert report["id"]["accuracy"] > 0.8
    table = train(classes=None)
    assert "chance" in table.out
    assert "zero-shot" not in table.out
    assert not list(command.run("probe").glob("fits/*/class_embeddings.npy"))
    again = command("evaluate", command.run("probe"), "--json").json
    assert again["id"]["nll"] == pytest.approx(report["id"]["nll"])


def test_half_of_the_classes_are_told_apart_by_name(command, settings, train, tmp_path) -> None:
    """A subset in another order finds its own embeddings, and so do base and new classes."""
    report = command("train", "--json", *settings("data.classes=[cow,ant]", "trainer.name=two")).json
    assert report["zero_shot"]["id"]["accuracy"] > 0.8
    assert command("evaluate", command.run("two"), "--json").json["id"]["nll"] == pytest.approx(report["id"]["nll"])
    table = feature_table()
    more = table.set_column(1, "label", pc.add(table["label"], 3))
    names = pc.binary_join_element_wise(table["class_name"], "fly", "")
    more = more.set_column(2, "class_name", names)
    turned = [[-x for x in row] for row in table["features"].to_pylist()]
    table = pa.concat_tables([
        table,
        more.set_column(0, table.schema.field(0), pa.array(turned, table.schema.field(0).type)),
    ])
    texts = np.concatenate([class_embeddings(), -class_embeddings()])
    data, classes = write_features(tmp_path, table, texts)
    halves = command("train", "--json", *settings("protocol=bng", data=data, classes=classes)).json["protocol"]
    assert halves["new"]["accuracy"] > 0.6
    refused(train("protocol=bng", data=data, classes=None), USAGE, "new classes", "model.class_embeddings")


def test_evaluate_on_other_features(command, train, files, tmp_path) -> None:
    train("trainer.name=e")
    own = command("evaluate", command.run("e"), "--json").json
    # other data numbers its classes otherwise: names decide whose embedding is whose
    table = feature_table()
    turned = table.set_column(1, "label", pc.subtract(2, table["label"])).drop_columns(["split"])
    other = tmp_path / "other.parquet"
    pq.write_table(turned, other)
    for classes in ([], [f"data.classes=[{','.join(CLASSES)}]"]):
        report = command("evaluate", command.run("e"), f"data.path={other}", *classes, "--json").json
        assert report["id"]["accuracy"] == pytest.approx(own["id"]["accuracy"], abs=0.1)
    pq.write_table(with_vectors(table, [row[:5] for row in table["features"].to_pylist()]), other)
    outcome = command("evaluate", command.run("e"), f"data.path={other}")
    refused(outcome, FAILED, "features of length 5", "length 8", "the same model")


def test_predict_rows_of_features(command, train, files, tmp_path) -> None:
    train("trainer.name=p")
    file = tmp_path / "new.parquet"
    pq.write_table(feature_table(length=4).select(["features"]).slice(30, 5), file)
    outcome = command("predict", command.run("p"), file, "--json")
    rows = outcome.json
    assert [(row["file"], row["row"]) for row in rows] == [(str(file), n) for n in range(5)]
    about = {"class", "probability", "probability_low", "probability_high", "novelty", "logit_std", "uncertainty"}
    assert set(rows[0]) == about | {"file", "row", "probabilities"}
    assert {row["class"] for row in rows} <= set(CLASSES)
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    table = command("predict", command.run("p"), file)
    assert table.code == 0
    assert "row 4" in table.out
    refused(command("predict", command.run("p"), "cat.png"), USAGE, "learned from features", "cat.png", "encode")
    refused(command("predict", command.run("p"), file, "--html", "g.html"), USAGE, "--html", "features")
    refused(command("predict", command.run("p"), tmp_path / "no.parquet"), FAILED, "there is no file")
    pq.write_table(feature_table().select(["label"]), file)
    refused(command("predict", command.run("p"), file), FAILED, "no features column")


def test_class_embeddings_that_change_are_refused(command, train, files) -> None:
    train("trainer.name=c")
    row = ["predict", command.run("c"), files[0], "--json"]
    before = command(*row).json
    np.save(files[1], class_embeddings()[::-1])
    refused(command(*row), FAILED, "another model", "model.class_embeddings")
    refused(command("evaluate", command.run("c")), FAILED, "belongs to another task", "model")
    refused(train("prior=c"), FAILED, "features of another model")
    files[1].unlink()
    assert command(*row).json == before, "the fit has a copy"
    refused(command("evaluate", command.run("c")), FAILED, "does not exist")


def test_a_run_continues_from_an_earlier_one(command, train, settings) -> None:
    assert train("trainer.name=first").code == 0
    outcome = command("train", "--json", *settings("prior=first", "data.train_domain=sketch", "trainer.name=then"))
    assert outcome.code == 0, outcome.err
    again = command("train", "--resume", "then", f"trainer.storage_path={command.runs}", "--json")
    assert again.json["id"] == outcome.json["id"]


@pytest.mark.parametrize("classes", [True, False])
def test_tune_on_features(command, settings, files, monkeypatch, classes) -> None:
    monkeypatch.setattr("kngd_ray.tuning.run.study_figures", lambda *arguments: [])
    file = command.folder / "search.yaml"
    file.write_text(
        yaml.safe_dump({
            "preset": "kalman_diagonal",
            "search": {"num_samples": 3, "batch": 3, "sampler": "random"},
            "space": {"filter.p0": {"low": 0.001, "high": 1.0, "log": True}},
        })
    )
    given = settings("trainer.name=s", **({} if classes else {"classes": None}))
    report = command("tune", file, *given, "--json").json
    assert report["trials"]["finished"] == 3
    assert report["test"]["id"]["accuracy"] > 0.6
    rows = command("predict", command.run("s"), files[0], "--json").json
    assert len(rows) == 96


def test_weights_between_zero_shot_and_trained(command, train) -> None:
    train("trainer.name=w")
    report = command("ensemble", command.run("w"), "--points", "3", "--json").json
    assert [point["alpha"] for point in report["curve"]] == [0.0, 0.5, 1.0]
    outcome = command("export", command.run("w"), "--out", command.folder / "out", "--onnx")
    refused(outcome, USAGE, "no towers to export", "CLIP model")


def test_compare_and_the_logged_model(command, settings, files, request) -> None:
    """The model takes a frame of features and says what the fit says, also where the run's own files are gone."""
    import mlflow

    tracked = ["tracking.enabled=true", "trainer.name=m", "tracking.experiment=f"]
    report = command("train", "--json", *settings(*tracked)).json
    uri = f"sqlite:///{command.folder}/mlflow.db"
    title = command("compare", "f", "--uri", uri, "--json").json["groups"][0]["title"]
    assert "features with classes.npy" in title
    request.addfinalizer(lambda: mlflow.set_tracking_uri(None))  # or the tests after this one would read from there
    mlflow.set_tracking_uri(uri)
    fit = command.run("m") / "fits" / "kalman-seed0"
    vectors = feature_table()["features"].to_pylist()[:4]
    expected = Classifier.load(fit).classify(torch.tensor(vectors)).rows(CLASSES)
    files[1].unlink()
    model = mlflow.pyfunc.load_model(f"runs:/{report['run_id']}/model")
    assert [(c.name, str(c.type)) for c in model.metadata.signature.inputs] == [("features", "Array(double)")]
    as_arrays = [np.array(row, np.float32) for row in vectors]
    for given in (vectors, as_arrays, [4.0 * np.array(row) for row in vectors]):
        rows = model.predict(pd.DataFrame({"features": given})).to_dict("records")
        for row, wanted in zip(rows, expected, strict=True):
            assert row["class"] == wanted["class"]
            assert row["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
            assert row["novelty"] == pytest.approx(wanted["novelty"])
    found = model.predict(pd.DataFrame({"features": [vectors[0], [1.0, 2.0, 3.0]]}))
    assert found["error"].tolist() == [None, "row 1: its features have shape (3,): give 8 floats."]
    assert found["class"].tolist() == [expected[0]["class"], None]
    with pytest.raises(Exception, match="row 0: its feature holds NaN"):
        model.predict(pd.DataFrame({"features": [[math.nan] * WIDTH]}))


def test_compare_tells_data_apart_that_start_at_chance(command, settings, tmp_path) -> None:
    """Equal figures before the first step say nothing of what was learned from."""
    tracked = ["tracking.enabled=true", "tracking.experiment=f", "tracking.log_model=false"]
    other = tmp_path / "other.parquet"
    pq.write_table(feature_table(noise=0.5), other)
    for more in (["filter.logit_variance=100"], ["filter.logit_variance=300"]):
        assert command("train", *settings(*tracked, *more, classes=None)).code == 0
    assert command("train", *settings(*tracked, classes=None, data=other)).code == 0
    groups = command("compare", "f", "--uri", f"sqlite:///{command.folder}/mlflow.db", "--json").json["groups"]
    assert sorted(len(group["rows"]) for group in groups) == [2, 3]
    assert {group["rows"][0]["name"] for group in groups} == {"chance"}
    assert all("features without class embeddings" in group["title"] for group in groups)


def test_encode_writes_what_gives_the_same_figures(command, tmp_path) -> None:
    """From the files alone, without pictures or model, a run has the figures of the run on pictures, without crops."""
    out = tmp_path / "encoded"
    local = [f"data.cache_dir={command.cache}", "trainer.num_workers=0"]
    report = command("encode", command.data, "--out", out, *local, "--json").json
    assert {path.name for path in out.iterdir()} == {"features.parquet", "class_embeddings.npy"}
    assert report["features"] == str(out / "features.parquet")
    assert report["class_embeddings"] == str(out / "class_embeddings.npy")
    table, pictures = pq.read_table(report["features"]), pq.read_table(command.data)
    assert table.column_names == ["features", "label", "class_name", "domain", "split"]
    for name in table.column_names[1:]:
        assert table[name].to_pylist() == pictures[name].to_pylist()
    own = command("train", "--json", *command.settings("posterior.predict=linearised", "tune.views=0")).json
    given = [*command.settings("posterior.predict=linearised"), *report["settings"]]
    features = command("train", "--json", *given).json
    for part in ("id", "ood", "zero_shot"):
        assert features[part] == own[part]
    refused(command("encode", command.data, "--out", out, *local), USAGE, "not an empty folder")
    shown = command("encode", command.data, "--out", tmp_path / "again", *local)
    assert shlex.split(shown.out) == [s.replace("/encoded/", "/again/") for s in report["settings"]]
    assert "model.logit_scale=18" in shown.out
    refused(command("encode", report["features"], *local), FAILED, "features and no pictures")
    refused(command("encode", command.data, "model.name=precomputed", *local), USAGE, "model with towers")


@pytest.fixture(scope="module")
def with_crops(tmp_path_factory):
    """A function that encodes pictures with three crops of each, once; returns the settings of the files."""
    made = {}

    def encoded(command):
        if not made:
            out = tmp_path_factory.mktemp("crops") / "out"
            local = [f"data.cache_dir={command.cache}", "trainer.num_workers=0"]
            made.update(command("encode", command.data, "--out", out, "--views", VIEWS, *local, "--json").json)
        return made["settings"]

    return encoded


@pytest.mark.parametrize(
    ("more", "views", "told"),
    [
        ([f"tune.views={VIEWS}"], VIEWS, "3 random crops of it, which count"),
        (["tune.views=2", "seeds=[0,1]"], 2, "2 random crops of it, which count"),
        pytest.param(
            ["tune.views=2", "preset=adamw", "epochs=3"],
            2,
            "2 random crops of it, which count",
            marks=pytest.mark.slow,
        ),
        ([], VIEWS, "3 random crops of it (its file holds no more, and tune.views asks for 8), which count"),
        (["tune.augment=none"], 0, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_crops_in_the_file_are_those_of_the_pictures(command, with_crops, more, views, told) -> None:
    """Figures are equal to the last digit: shots, features and crops are the same numbers."""
    settings = [*command.settings(*more), *with_crops(command)]
    found = command("train", "--json", *settings)
    own = command("train", "--json", *command.settings(*more, f"tune.views={views}"))
    for part in ("id", "ood", "zero_shot"):
        assert found.json[part] == own.json[part]
    assert told is None or told in " ".join(found.err.split())
    if told is None:
        assert "random crop" not in found.err


def test_shots_and_crops_of_a_file_are_those_of_the_pictures_bit_for_bit(command, with_crops) -> None:
    from kngd_ray.config import load_config
    from kngd_ray.experiment.prepared import prepare
    from kngd_ray.experiment.task import open_task

    options = [*command.settings(f"tune.views={VIEWS - 1}", "data.shots=3", "seeds=[0,1]")]
    given = prepare(open_task(load_config(overrides=[*options, *with_crops(command)])))
    own = prepare(open_task(load_config(overrides=options)))
    for seed in (0, 1):
        assert given.support(seed).views == VIEWS
        assert given.support(seed).digest() == own.support(seed).digest()


def test_encode_says_what_becomes_of_crops(command, tmp_path) -> None:
    local = [f"data.cache_dir={command.cache}", "trainer.num_workers=0"]
    shown = " ".join(command("encode", command.data, "--out", tmp_path / "none", *local).err.split())
    assert "as by tune.views=0; to write crops as well, encode with `views` at 8, which takes 9 times the time" in shown
    scale = "tune.crop_scale=[0.6,0.9]"
    report = command("encode", command.data, "--out", tmp_path / "one", "--views", 1, scale, *local, "--json")
    assert "and 1 crop of each picture" in " ".join(report.err.split())
    assert report.json["settings"][-1] == scale
    plain = command.settings(*report.json["settings"][:-1])
    refused(command("train", *plain), USAGE, "tune.crop_scale is [0.5,1]", f"set {scale}", "tune.views=0")
    assert command("train", *plain, "tune.views=0").code == 0
    assert command("train", *plain, scale).code == 0
    refused(
        command("encode", command.data, "--views", 1, "tune.augment=none", *local),
        USAGE,
        "tune.augment=none",
        "views is 1",
    )


def _kept(table, about=None, crops=None):
    """The table with other crops, or another description of them."""
    if crops is not None:
        table = table.set_column(table.column_names.index("crops"), "crops", crops)
    return table.replace_schema_metadata({b"kngd_ray.crops": json.dumps(about).encode()} if about else None)


ABOUT = {"views": VIEWS, "scale": [0.5, 1.0], "crop": "", "rule": 1}


@pytest.mark.parametrize(
    ("about", "spoil", "words"),
    [
        (ABOUT, lambda row: row[:-1], ["row 1", "numbers, and 3 crops of"]),
        (ABOUT, lambda row: None, ["row 1", "has 0 numbers"]),
        (ABOUT, lambda row: [*row[:-1], math.nan], ["row 1", "crop 2", "holds NaN"]),
        (ABOUT, lambda row: [0.0] * (len(row) // VIEWS) + row[-2 * (len(row) // VIEWS) :], ["row 1", "crop 0", "zero"]),
        (ABOUT, "narrow", ["column `crops` has", "3 crops of"]),
        (ABOUT, "text", ["column `crops` is string", "lists of floats"]),
        (ABOUT | {"views": 0}, None, ["what its schema says", "damaged"]),
        (ABOUT | {"views": True}, None, ["damaged"]),
        (ABOUT | {"scale": 3}, None, ["damaged"]),
        (ABOUT | {"scale": ["a", 1]}, None, ["damaged"]),
        (ABOUT | {"rule": 9}, None, ["drawn by rule 9", "tune.views=0"]),
        ([], None, ["damaged"]),
    ],
)
def test_damaged_crops_are_refused_at_the_door(command, with_crops, tmp_path, about, spoil, words) -> None:
    settings = with_crops(command)
    table = pq.read_table(settings[0].removeprefix("data.path="))
    rows = table["crops"].to_pylist()
    crops = None
    if spoil == "narrow":
        crops = pa.array([row[:-1] for row in rows], pa.list_(pa.float32(), len(rows[0]) - 1))
    elif spoil == "text":
        crops = pa.array(["x"] * len(rows))
    elif spoil is not None:
        rows[1] = spoil(rows[1])
        crops = pa.array(rows, pa.list_(pa.float32()))
    bad = tmp_path / "bad.parquet"
    pq.write_table(_kept(table, about or [1], crops), bad)
    given = command.settings(*settings[1:], "data.draw=first", data=bad)
    sentence = refused(command("train", *given), FAILED, "bad.parquet", *words)
    assert sentence.count("\n") == 0


def test_shots_in_files_with_and_without_crops(command, with_crops, tmp_path) -> None:
    """Mixed shots are refused; files of test pictures need no crops; a file that tells nothing of them has none."""
    settings = with_crops(command)
    table = pq.read_table(settings[0].removeprefix("data.path="))
    bare = table.drop_columns(["crops"]).replace_schema_metadata(None)
    train = pc.equal(table["split"], "train")
    parts = {
        "a": table.filter(pc.equal(table["domain"], "noto")),
        "b": bare.filter(pc.equal(bare["domain"], "twemoji")),
        "train": table.filter(train),
        "test": bare.filter(pc.invert(train)),
        "untold": table.replace_schema_metadata(None),
    }
    for name, part in parts.items():
        pq.write_table(part, tmp_path / f"{name}.parquet", row_group_size=7)

    def run(*names, more=()):
        path = f"[{','.join(str(tmp_path / f'{name}.parquet') for name in names)}]"
        return command("train", *command.settings(*settings[1:], "data.train_domain=null", *more, data=path))

    refused(run("a", "b"), FAILED, "b.parquet has no crops", "a.parquet has", "tune.views=0")
    assert run("a", "b", more=["tune.views=0"]).code == 0
    assert "3 random crops" in run("train", "test").err
    assert "random crop" not in run("untold").err


def test_encode_keeps_the_split_that_a_run_would_draw(command, tmp_path) -> None:
    data = tmp_path / "unsplit.parquet"
    pq.write_table(pq.read_table(command.data).drop_columns(["split", "domain"]), data)
    local = [f"data.cache_dir={command.cache}", "trainer.num_workers=0"]
    two = "data.classes=[flower,bird]"
    report = command("encode", data, "--out", tmp_path / "out", *local, two, "--json").json
    table = pq.read_table(report["features"])
    assert set(table["domain"].to_pylist()) == {"all"}
    assert set(table["split"].to_pylist()) == {"train", "test"}
    assert set(zip(table["label"].to_pylist(), table["class_name"].to_pylist(), strict=True)) == {
        (0, "flower"),
        (1, "bird"),
    }
    no_domain = ["data.train_domain=null", "data.ood_domains=null"]
    own = command("train", "--json", *command.settings(two, "tune.views=0", *no_domain, data=data)).json
    features = command("train", "--json", *command.settings(*no_domain), *report["settings"]).json
    assert features["id"] == own["id"]


@pytest.mark.parametrize(
    ("more", "where", "code", "words"),
    [
        (["model.name=embedded", "model.logit_scale=null"], {"classes": None}, FAILED, ["no pictures", "precomputed"]),
        ([], {"data": "embedded"}, FAILED, ["holds pictures", "kngd-ray encode embedded --out FOLDER"]),
        (["tune.parameters=lora"], {}, USAGE, ["tune.parameters is lora", "has none", "tune.parameters=adapter"]),
        (["tune.parameters=full"], {}, USAGE, ["tune.parameters is full"]),
        (["data.templates=a sketch of a {}."], {}, USAGE, ["data.templates", "model.class_embeddings"]),
        (["protocol=cdg", "targets=[embedded]"], {}, USAGE, ["protocol is cdg", "targets"]),
        (["model.logit_scale=0"], {}, USAGE, ["logit_scale is 0", "positive"]),
        (["model.logit_scale=-3"], {}, USAGE, ["logit_scale is -3"]),
        (["model.logit_scale=.inf"], {}, USAGE, ["model.logit_scale", "finite"]),
        (["model.pretrained=openai"], {}, USAGE, ["model: pretrained", "no towers"]),
        (["adapter=bottleneck"], {"classes": None}, USAGE, ["adapter is bottleneck", "adapter=class_residual"]),
        ([], {"classes": "gone.npy"}, FAILED, ["gone.npy does not exist"]),
        (["model.name=embedded"], {}, USAGE, ["class_embeddings is for name=precomputed"]),
    ],
)
def test_refusals(command, train, more, where, code, words) -> None:
    refused(train(*more, **where), code, *words)
    assert not command.runs.exists()


def test_refused_features_and_class_embeddings(command, train, files) -> None:
    """The rest is refused where it is read; here is that it comes out as one sentence, before a run is made."""
    table = feature_table()
    vectors = table["features"].to_pylist()
    for value, words in (
        ([float("nan")] * WIDTH, ["rows.parquet, row 3", "NaN"]),
        ([0.0] * WIDTH, ["rows.parquet, row 3", "length zero"]),
    ):
        pq.write_table(with_vectors(table, [*vectors[:3], value, *vectors[4:]]), files[0])
        refused(train(), FAILED, *words)
    pq.write_table(table, files[0])
    texts = class_embeddings()
    for array, words in (
        (texts[:, :5], ["length 5", "length 8"]),
        (texts[:2], ["2 classes", "the data has 3"]),
        (texts[[0, 0, 2]], ["'ant' and 'bee'", "same embedding"]),
        (np.array([None, "x"], object), ["not a .npy file of numbers", "never unpickled"]),
    ):
        np.save(files[1], array)
        refused(train(), FAILED, "classes.npy", *words)
    assert not command.runs.exists()


def test_which_row_is_whose(command, train, files) -> None:
    """Rows are in the order of labels; of text the order is named, refused or doubted in the first lines."""
    named, doubted = "row 0 of model.class_embeddings is 'ant', row 1 'bee', row 2 'cow'", "match another order"
    shots = ["data.shots=12", "data.train_domain=null"]
    numbered = feature_table()
    assert named not in (said := train(*shots).err)
    assert doubted not in said
    as_text = numbered.drop_columns(["label"]).rename_columns({"class_name": "label"})
    pq.write_table(as_text, files[0])
    outcome = train(*shots, "trainer.name=text")
    assert named + ": text labels are sorted" in outcome.err
    assert doubted not in outcome.err
    assert named not in command("evaluate", command.run("text")).err, "a fit knows whose its rows are"
    np.save(files[1], class_embeddings()[[1, 2, 0]])
    assert f"the shots {doubted} of the rows of model.class_embeddings much better" in (said := train(*shots).err)
    assert "with row 0 of 'bee', row 1 of 'cow', row 2 of 'ant': give the rows in order of the labels" in said
    digits = pa.array([("2", "10", "1")[label] for label in numbered["label"].to_pylist()])
    pq.write_table(numbered.drop_columns(["class_name"]).set_column(1, "label", digits), files[0])
    refused(train(), FAILED, "rows.parquet has whole numbers as text for labels", "'10' before '2'", "as integers")
    assert train(classes=None).code == 0


def test_doctor_looks_at_class_embeddings(command, files) -> None:
    given = ["--json", *command.settings("model.name=precomputed")]
    found = command("doctor", *given, f"model.class_embeddings={files[1]}").json
    assert "class embeddings of shape (3, 8)" in json.dumps(found)
    assert command("doctor", *given, "model.class_embeddings=gone.npy").code == FAILED


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real CLIP features of ../shared/features")
@pytest.mark.parametrize(("name", "zero_shot"), [("whurs19_clip_rn50", 0.715), ("whurs19_clip_vitb32", 0.813)])
def test_real_features(command, name, zero_shot) -> None:
    model = ["model.name=precomputed", f"model.class_embeddings={SHARED / name}_text.npy", "model.logit_scale=100"]
    given = command.settings(
        "data.train_domain=null", "epochs=4", "posterior.folds=0", *model, data=SHARED / f"{name}.parquet"
    )
    report = command("train", "--json", *given).json
    assert report["zero_shot"]["id"]["accuracy"] == pytest.approx(zero_shot, abs=0.02)
    assert report["id"]["accuracy"] > report["zero_shot"]["id"]["accuracy"] + 0.05


def blocks(language: str) -> list[str]:
    """The blocks of code of docs/features.md in a language."""
    text = (ROOT / "docs" / "features.md").read_text()
    return [part.split("\n```", 1)[0] for part in text.split(f"\n```{language}\n")[1:]]


def test_what_the_documentation_shows(command, tmp_path, monkeypatch) -> None:
    """Its commands in their order, and its first and last lines of Python; only where things are differs."""
    monkeypatch.setattr("kngd_ray.tuning.run.study_figures", lambda *arguments: [])
    pq.write_table(pq.read_table(command.data), tmp_path / "pictures.parquet")
    (tmp_path / "tune_configs").mkdir()
    (tmp_path / "tune_configs" / "smoke.yaml").write_text((ROOT / "tune_configs" / "smoke.yaml").read_text())
    made, _, from_python = blocks("python")
    names: dict[str, object] = {}
    exec(made, names)
    local = ["trainer.num_workers=0", "tracking.enabled=false"]
    lines = [line for block in blocks("") for line in block.splitlines() if line.startswith("kngd-ray ")]
    assert len(lines) == 10
    for line in lines:
        _, name, *arguments = shlex.split(line)
        where = {
            "train": local,
            "tune": [*local, "search.num_samples=4"],
            "encode": ["trainer.num_workers=0", f"data.cache_dir={command.cache}"],
            "evaluate": ["trainer.num_workers=0"],
        }.get(name, [])
        outcome = command(name, *arguments, *where)
        assert outcome.code == 0, (line, outcome.err)
        if name == "encode":
            folder = tmp_path / arguments[arguments.index("--out") + 1]
            shown = (folder / "features.parquet", folder / "class_embeddings.npy")
            expected = f"data.path={shown[0]} model.name=precomputed model.class_embeddings={shown[1]}"
            assert outcome.out == f"{expected} model.logit_scale=18.0\n"
            for copy in ("others.parquet", "new.parquet"):
                pq.write_table(pq.read_table(shown[0]), tmp_path / copy)
    exec(from_python, names)
    assert names["p"].shape == (60, 3)
