"""The model that computed the features in a file: its logit scale is taken, and features of two are not mixed."""

import json

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers.features import SCALE, feature_table, write_features

FAILED, USAGE = 1, 2
KEY = b"kngd_ray.encoded_by"
MINE = {"name": "ViT-S", "fingerprint": "a" * 64, "logit_scale": SCALE}
OTHER = {"name": "ViT-L", "fingerprint": "b" * 64, "logit_scale": SCALE}


@pytest.fixture
def write(tmp_path):
    """A function that writes features which state their model; returns the file."""

    def writes(name, stated=MINE, table=None):
        path = tmp_path / name
        meta = None if stated is None else {KEY: stated if isinstance(stated, bytes) else json.dumps(stated).encode()}
        pq.write_table((feature_table() if table is None else table).replace_schema_metadata(meta), path)
        return path

    return writes


@pytest.fixture
def train(command, tmp_path):
    """A function that trains for a second on such a file."""
    _, classes = write_features(tmp_path)

    def trains(data, *more):
        model = ["model.name=precomputed", f"model.class_embeddings={classes}", "data.train_domain=photo"]
        return command("train", "--json", *command.settings(*model, *more, data=data))

    return trains


def test_the_scale_is_taken_from_the_file(command, write, train) -> None:
    stated, untold = write("stated.parquet"), write("untold.parquet", None)
    own = train(stated, "trainer.name=own")
    given = train(untold, f"model.logit_scale={SCALE}")
    for part in ("id", "ood", "zero_shot"):
        assert own.json[part] == given.json[part]
    assert own.json["id"]["nll"] != train(untold).json["id"]["nll"]
    assert train(stated, f"model.logit_scale={SCALE * (1 + 1e-5)}").code == 0, "rounded, as in a command line"
    (checkpoint,) = command.run("own").glob("fits/kalman-seed0/step-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["source"]["logit_scale"] == SCALE
    assert manifest["model"]["encoded_by"] == MINE["fingerprint"]
    again = command("evaluate", command.run("own"), "--json").json
    assert again["id"]["nll"] == pytest.approx(own.json["id"]["nll"])


def test_a_scale_that_is_not_known_is_said(write, train) -> None:
    sentence = "the logit scale of the features' model is not known, and 100 is taken"
    untold = write("untold.parquet", None)
    assert sentence in " ".join(train(untold).err.split())
    for found in (train(untold, "model.logit_scale=100"), train(write("stated.parquet"))):
        assert "logit scale" not in found.err
    assert "logit scale" not in train(untold, "model.class_embeddings=null").err, "nothing is known before the shots"


def test_another_scale_is_refused(write, train) -> None:
    refused = train(write("stated.parquet"), "model.logit_scale=100")
    assert refused.code == USAGE
    assert refused.sentence == (
        f"model.logit_scale is 100, and the model that computed the features in {write('stated.parquet')}, ViT-S, has"
        " 20: leave model.logit_scale out, and it is taken from the file."
    )


def test_features_of_two_models_are_not_one_data_set(write, train) -> None:
    photo = pc.equal(feature_table()["domain"], "photo")
    parts = [feature_table().filter(photo), feature_table().filter(pc.invert(photo))]
    first, second = write("first.parquet", MINE, parts[0]), write("second.parquet", OTHER, parts[1])
    refused = train(f"[{first},{second}]")
    assert refused.code == FAILED
    assert "first.parquet has features of the model ViT-S (fingerprint aaaaaaaaaaaa)" in refused.sentence
    assert "second.parquet of ViT-L (fingerprint bbbbbbbbbbbb)" in refused.sentence
    untold = write("second.parquet", None, parts[1])
    assert train(f"[{first},{untold}]").json["id"] == train(write("both.parquet")).json["id"]


def test_a_fit_takes_features_of_its_own_model_alone(command, write, train) -> None:
    assert train(write("mine.parquet"), "trainer.name=mine").code == 0
    foreign, untold = write("foreign.parquet", OTHER), write("untold.parquet", None)
    fit = command.run("mine")
    for outcome in (command("evaluate", fit, f"data.path={foreign}"), command("predict", fit, foreign)):
        assert outcome.code == FAILED
        assert "has features of the model ViT-L (fingerprint bbbbbbbbbbbb)" in outcome.sentence
        assert "fingerprint aaaaaaaaaaaa" in outcome.sentence
    refused = train(foreign, "prior=mine")
    assert refused.code == FAILED
    assert "learned from features of another model: fingerprint aaaaaaaaaaaa" in refused.sentence
    for data in (untold, write("mine.parquet")):
        assert command("evaluate", fit, f"data.path={data}").code == 0
        assert command("predict", fit, data).code == 0


def test_a_damaged_statement_is_refused(write, train) -> None:
    refused = train(write("bad.parquet", b"{"))
    assert refused.code == FAILED
    assert "bad.parquet: what its schema says of the model of its features is damaged" in refused.sentence


def test_encode_states_the_model(command, tmp_path) -> None:
    """Without the scale in the settings a run has the same figures."""
    local = [f"data.cache_dir={command.cache}", "trainer.num_workers=0"]
    made = command("encode", command.data, "--out", tmp_path / "out", *local, "--json").json
    stated = json.loads(pq.read_schema(made["features"]).metadata[KEY])
    assert (stated["name"], stated["logit_scale"]) == ("embedded", 18.0)
    assert len(stated["fingerprint"]) == 64
    (scale,) = (setting for setting in made["settings"] if setting.startswith("model.logit_scale="))
    bare = [setting for setting in made["settings"] if setting != scale]
    with_scale, without = (command("train", "--json", *command.settings(*s)) for s in (made["settings"], bare))
    for part in ("id", "ood", "zero_shot"):
        assert with_scale.json[part] == without.json[part]
