"""The logged model: loads in a fresh process without unpickling, predicts from picture bytes."""

import base64
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kngd_ray.errors import DataError
from kngd_ray.tracking import publish, save_pyfunc
from kngd_ray.tracking._pyfunc import _EXAMPLE
from kngd_ray.training.classifier import Classification

NAMES = ("cat", "dog", "newt")
COLUMNS = ["class", "probability", "probability_low", "probability_high", "novelty", "uncertainty", "logit_std"]
COLUMNS += ["probabilities", "error"]


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Stub:
    """Says the class by the picture's width."""

    class_names = NAMES

    def __init__(self):
        self.batches = []

    def classify(self, images):
        self.batches.append(len(images))
        wanted = torch.tensor([image.width % 3 for image in images])
        p = torch.full((len(images), 3), 0.25)
        p[torch.arange(len(images)), wanted] = 0.5
        return Classification(p, p * 2, novelty=p[:, 0])


@pytest.fixture
def model():
    from kngd_ray.tracking.model_code import ClassifierModel

    model = ClassifierModel()
    model.classifier = Stub()
    return model


def picture(width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 4)).save(stream, "PNG")
    return stream.getvalue()


def test_columns_and_their_values(model):
    table = pd.DataFrame({"image": [picture(w) for w in range(3, 43)]}, index=range(100, 140))
    out = model.predict(None, table)
    assert list(out.columns) == COLUMNS
    assert list(out.index) == list(table.index)
    assert list(out["class"][:4]) == ["cat", "dog", "newt", "cat"]
    assert out["probability"].eq(0.5).all()
    assert out["logit_std"].eq(1.0).all()
    assert out["uncertainty"].to_numpy() == pytest.approx(1.5 * math.log(2))
    assert out["probabilities"][101] == [0.25, 0.5, 0.25]
    assert out["probability_low"].isna().all()
    assert list(out["novelty"][:3]) == [0.5, 0.25, 0.25]
    assert model.classifier.batches == [32, 8]


def test_certainty_has_no_entropy_and_no_rows_no_predictions(model):
    model.classifier = SimpleNamespace(
        class_names=NAMES,
        classify=lambda images: Classification(torch.eye(3)[: len(images)], torch.zeros(3, 3)),
    )
    assert model.predict(None, pd.DataFrame({"image": [picture(3)]}))["uncertainty"].item() == 0
    assert list(model.predict(None, pd.DataFrame({"image": []})).columns) == COLUMNS


def test_a_bad_row_leaves_the_others(model):
    out = model.predict(None, pd.DataFrame({"image": [picture(3), b"no picture", picture(5)]}, index=[7, 8, 9]))
    assert list(out.index) == [7, 8, 9]
    assert out["class"].tolist() == ["cat", None, "newt"]
    assert out["error"][8].startswith("row 1: the picture cannot be decoded")
    assert out["error"].tolist()[::2] == [None, None]
    assert out["probability"].isna().tolist() == [False, True, False]
    assert out["probabilities"][8] is None


def test_nothing_but_bad_rows_is_an_error(model):
    with pytest.raises(DataError, match=r"row 0: .*\(and so are the other 1 rows\)"):
        model.predict(None, pd.DataFrame({"image": [b"no picture", None]}))
    with pytest.raises(DataError, match=r"no column image of pictures, nor features \(its columns: picture\)"):
        model.predict(None, pd.DataFrame({"picture": [picture(3)]}))


CAT = picture(3)
TEXT = base64.b64encode(CAT).decode()


@pytest.mark.parametrize(
    "cell",
    [
        CAT,
        bytearray(CAT),
        TEXT,
        TEXT.encode(),
        TEXT.rstrip("="),
        base64.encodebytes(CAT).decode(),
        base64.urlsafe_b64encode(CAT).decode(),
        f"data:image/png;base64,{TEXT}",
        {"b64": TEXT},
        {"bytes": CAT, "path": "x.png"},
        {"bytes": TEXT, "path": None},
        Image.open(io.BytesIO(CAT)),
        np.zeros((4, 3 * 3, 3), np.uint8),
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_pictures_as_requests_hold_them(model, cell):
    table = pd.DataFrame({"image": pd.Series([cell], dtype=object)})
    assert model.predict(None, table)["class"].tolist() == ["cat"]


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (
            "cat.jpg",
            "row 1 is text but not base64, 'cat.jpg': send the bytes of a picture's file, in JSON as base64; paths",
        ),
        (Path("/etc/hostname"), "row 1 is text but not base64, '/etc/hostname'"),
        ("https://host/cat.png", "row 1 is text but not base64"),
        ("abcd", "row 1: the picture cannot be decoded (no known format); send the bytes"),
        ("", "row 1 is text but not base64"),
        (None, "row 1 has no picture (None)"),
        (float("nan"), "row 1 has no picture (nan)"),
        ({"path": "cat.jpg"}, 'row 1 is a dictionary with \'path\', and needs "b64" or "bytes"'),
        ({"b64": "cat.jpg"}, "row 1 is text but not base64"),
        ([[0, 1], [2, 3]], "row 1"),
        (5, "row 1"),
    ],
)
def test_what_is_no_picture_names_its_row(model, cell, says):
    out = model.predict(None, pd.DataFrame({"image": pd.Series([CAT, cell], dtype=object)}))
    assert out["class"].tolist() == ["cat", None]
    assert says in out["error"][1]


def test_example_is_a_picture():
    picture = Image.open(io.BytesIO(_EXAMPLE))
    picture.load()  # its header alone says nothing of the pixels
    assert picture.size == (8, 8)


@pytest.mark.parametrize("name", ["fit", "50%20? #é"])
def test_saved_folder_holds_code_fit_signature_and_pins(tmp_path, name):
    fit = tmp_path / name / "fit"
    fit.mkdir(parents=True)
    (fit / "calibration.json").write_text("{}")
    save_pyfunc(fit, tmp_path / "model", NAMES)
    files = {p.relative_to(tmp_path / "model").as_posix() for p in (tmp_path / "model").rglob("*") if p.is_file()}
    assert {"MLmodel", "model_code.py", "artifacts/fit/calibration.json", "requirements.txt"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle"))]
    from mlflow.models import Model

    loaded = Model.load(str(tmp_path / "model"))
    assert loaded.metadata["class_names"] == list(NAMES)
    assert [c["name"] for c in loaded.signature.outputs.to_dict()] == COLUMNS
    requirements = (tmp_path / "model" / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements
    assert any(line.startswith("kngd_ray") for line in requirements)


PREDICT = """
import base64, json, os, sys
os.environ["MLFLOW_TRACKING_URI"] = sys.argv[1]
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[2])
table = pd.DataFrame({"image": [base64.b64decode(x) for x in json.load(sys.stdin)]})
print(model.predict(table).to_json(orient="records"))
"""


@pytest.mark.slow
def test_published_model_in_a_fresh_process(open_record, run_folder, store, experiment, client):
    from kngd_ray.clip import ModelConfig, load_model
    from kngd_ray.sharding import SingleProcess
    from kngd_ray.training.batches import Support
    from kngd_ray.training.calibration import Calibration
    from kngd_ray.training.classifier import Classifier
    from kngd_ray.training.fit import FitTask
    from kngd_ray.training.options import FitOptions
    from kngd_ray.training.predict import PosteriorOptions
    from kngd_ray.training.restoring import identity_of
    from kngd_ray.training.resumable import run_fit
    from kngd_ray.training.settled import Settled, save_settled

    clip, fit = load_model(ModelConfig()), run_folder / "fits" / "seed-0"
    templates = ["a photo of a {}."]
    pictures = [png(n) for n in range(6)]
    features = clip.encode_images([Image.open(io.BytesIO(data)) for data in pictures])
    support = Support(features, torch.arange(6) % 3)
    task = FitTask(FitOptions(epochs=2), 0, support, clip.encode_classes(NAMES, templates), clip.logit_scale)
    run_fit(task, fit, identity_of(clip, ModelConfig(), NAMES, templates), SingleProcess(), "cpu", checkpoint_every=0)
    save_settled(fit, Settled(Calibration(0.3, 1.0), PosteriorOptions()))
    record = open_record()
    record.log_metrics({"id/accuracy": 0.5})
    record.set_model(fit, NAMES)
    record.finish()
    ids = publish(run_folder, store, experiment)

    [logged] = client.search_logged_models([client.get_run(ids["seed-0"]).info.experiment_id])
    assert logged.status == "READY"
    assert logged.source_run_id == ids["seed-0"]
    assert {m.key: m.value for m in logged.metrics} == {"id/accuracy": 0.5}
    command = [sys.executable, "-c", PREDICT, store, logged.model_uri]
    asked = json.dumps([base64.b64encode(data).decode() for data in pictures[:2]])
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)

    expected = Classifier.load(fit).predict([Image.open(io.BytesIO(data)) for data in pictures[:2]])
    for row, p, spread in zip(rows, expected.probabilities, expected.logit_std, strict=True):
        c = int(p.argmax())
        assert row["class"] == NAMES[c]
        assert row["probabilities"] == pytest.approx(p.tolist(), rel=1e-4)
        assert row["probability"] == pytest.approx(float(p[c]), rel=1e-4)
        assert row["logit_std"] == pytest.approx(float(spread[c]), rel=1e-3)
        assert row["uncertainty"] == pytest.approx(-float((p * p.log()).sum()), rel=1e-3)


@pytest.fixture
def fitted(tmp_path):
    """A fit of nine pictures, and the pictures."""
    from kngd_ray.clip import ModelConfig, load_model
    from kngd_ray.sharding import SingleProcess
    from kngd_ray.training.batches import Support
    from kngd_ray.training.fit import FitTask
    from kngd_ray.training.novelty import calibrate_and_compare
    from kngd_ray.training.options import FitOptions
    from kngd_ray.training.predict import PosteriorOptions
    from kngd_ray.training.restoring import identity_of
    from kngd_ray.training.resumable import run_fit
    from kngd_ray.training.settled import Settled, save_settled

    clip, fit, templates = load_model(ModelConfig()), tmp_path / "fit", ["a photo of a {}."]
    pictures = [png(n) for n in range(9)]
    features = clip.encode_images([Image.open(io.BytesIO(data)) for data in pictures])
    support = Support(features, torch.arange(9) % 3)
    task = FitTask(FitOptions(epochs=2), 0, support, clip.encode_classes(NAMES, templates), clip.logit_scale)
    run_fit(task, fit, identity_of(clip, ModelConfig(), NAMES, templates), SingleProcess(), "cpu", checkpoint_every=0)
    posterior = PosteriorOptions(temperature=0.3, folds=3)
    calibration, novelty = calibrate_and_compare(task, posterior)
    save_settled(fit, Settled(calibration, posterior, None, novelty))
    return fit, pictures


@pytest.mark.slow
def test_what_a_server_makes_of_requests(fitted, tmp_path, monkeypatch):
    """MLflow's own parsing, without its process."""
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import invocations

    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    fit, pictures = fitted
    save_pyfunc(fit, tmp_path / "model", NAMES)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    schema = model.metadata.get_input_schema()
    a, b = (base64.b64encode(data).decode() for data in pictures[:2])

    def ask(body):
        answer = invocations(json.dumps(body).encode(), "application/json", model, schema)
        assert answer.status == 200

        def no_json(text):
            raise AssertionError(f"{text} is no JSON")

        return json.loads(answer.response, parse_constant=no_json)["predictions"]

    both = [
        {"dataframe_split": {"columns": ["image"], "data": [[a], [{"b64": b}]]}},
        {"dataframe_records": [{"image": {"bytes": a, "path": "x"}, "id": 3}, {"image": b}]},
        {"inputs": {"image": [a, b]}},
        {"inputs": {"image": [{"b64": a}, {"b64": b}]}},
        {"inputs": {"b64": [a, b]}},
        {"inputs": [{"b64": a}, {"b64": b}]},
        {"instances": [{"image": a}, {"image": b}]},
        {"instances": [{"image": {"b64": a}}, {"image": {"b64": b}}]},
        {"instances": [{"b64": a}, {"b64": b}]},
    ]
    expected = [row["class"] for row in ask(both[0])]
    for body in both:
        rows = ask(body)
        assert [row["class"] for row in rows] == expected, body.keys()
        assert [row["error"] for row in rows] == [None, None]
    for bad in ("cat.jpg", None, 5):
        rows = ask({"dataframe_split": {"columns": ["image"], "data": [[a], [bad]]}})
        assert [row["class"] for row in rows] == [expected[0], None]
        assert rows[1]["error"].startswith("row 1 ")
        assert rows[1]["probability"] is None
    for body in ({"instances": [{"b64": "cat.jpg"}]}, {"inputs": ["cat.jpg"]}, {"inputs": {"picture": [a]}}):
        with pytest.raises(MlflowException) as error:
            ask(body)
        assert error.value.get_http_status_code() == 400
        assert "Traceback" not in error.value.serialize_as_json()
        assert "base64" in error.value.message


@pytest.mark.slow
def test_served_model_answers_bytes_with_what_the_fit_says(fitted, tmp_path):
    from kngd_ray.training.classifier import Classifier

    fit, pictures = fitted
    save_pyfunc(fit, tmp_path / "model", NAMES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = ["-m", "mlflow", "models", "serve", "-m", tmp_path / "model", "--env-manager", "local", "-h", "127.0.0.1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, *serve, "-p", str(port), "-w", "1"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "PATH": path}, start_new_session=True
        )
    try:
        sent = [[base64.b64encode(data).decode()] for data in pictures[:3]]
        body = json.dumps({"dataframe_split": {"columns": ["image"], "data": sent}}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    rows = json.load(answer)["predictions"]
                break
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode())
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(1)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    expected = Classifier.load(fit).classify([Image.open(io.BytesIO(data)) for data in pictures[:3]]).rows(NAMES)
    assert [set(row) for row in rows] == [set(COLUMNS)] * 3
    for row, wanted in zip(rows, expected, strict=True):
        assert (row["class"], row["error"]) == (wanted["class"], None)
        for key in wanted.keys() - {"class"}:
            assert row[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6), key


def test_fit_that_is_gone_does_not_hold_up_the_rest(open_record, run_folder, store, experiment, client, caplog):
    record = open_record()
    record.set_model(run_folder / "gone", NAMES)
    record.finish()
    ids = publish(run_folder, store, experiment)
    assert client.get_run(ids["seed-0"]).info.status == "FINISHED"
    assert "has no model" in caplog.text
