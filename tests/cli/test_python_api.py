"""The Python API: the settings, results and sentences of the command line, as keywords, frames and exceptions."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import kngd_ray
from kngd_ray import KalmanCLIP
from kngd_ray._keywords import settings_of
from kngd_ray.api.settings import configured, in_process
from kngd_ray.errors import CheckpointError, UsageError
from kngd_ray.results import RunResult

FUNCTIONS = "compare doctor encode ensemble evaluate export load predict sync train tune"
PUBLIC = ["KalmanCLIP", "__version__", *FUNCTIONS.split()]


@pytest.fixture
def settings(command) -> dict[str, Any]:
    """The settings of ``command.settings()`` as keywords: plain, short, nested and dotted."""
    return {
        "data": command.data,
        "train_domain": "noto",
        "shots": 4,
        "cache_dir": command.cache,
        "storage_path": command.runs,
        "tracking": {"enabled": False, "uri": f"sqlite:///{command.folder}/mlflow.db"},
        "posterior": {"folds": 2},
        "quiet": True,
    }


def pictures(command, count: int = 3) -> list[bytes]:
    column = pq.read_table(command.data, columns=["image"]).column("image").to_pylist()
    return [cell["bytes"] if isinstance(cell, dict) else cell for cell in column[:count]]


def test_the_package_shows_its_public_names_alone_and_imports_nothing_heavy() -> None:
    assert dir(kngd_ray) == PUBLIC
    code = (
        "import sys, kngd_ray; assert not {'torch', 'ray', 'mlflow', 'pandas', 'rich'} & set(sys.modules); "
        "kngd_ray.train; assert not {'ray', 'mlflow', 'pandas', 'optuna', 'open_clip'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = kngd_ray.trian


@pytest.mark.parametrize(
    ("keywords", "written"),
    [
        ({"shots": 16}, ["data.shots=16"]),
        ({"seeds": 3}, ["seeds=[0, 1, 2]"]),
        ({"seeds": np.int64(2)}, ["seeds=[0, 1]"]),
        ({"seeds": 2.0}, ["seeds=[0, 1]"]),
        ({"seeds": "2"}, ['seeds="2"']),
        ({"seeds": [4, 7]}, ["seeds=[4, 7]"]),
        ({"seeds": range(2)}, ["seeds=[0, 1]"]),
        ({"data": Path("a b.parquet")}, ['data.path="a b.parquet"']),
        ({"data": ["a.parquet", "b.parquet"]}, ['data.path=["a.parquet", "b.parquet"]']),
        ({"data": {"path": "a.parquet", "shots": 2}}, ['data.path="a.parquet"', "data.shots=2"]),
        ({"filter.p0": np.float64(0.1)}, ["filter.p0=0.1"]),
        ({"filter": {"p0": 0.1, "covariance": "dense"}}, ['filter={"p0": 0.1, "covariance": "dense"}']),
        ({"model": "ViT-B-32", "pretrained": "openai"}, ['model.name="ViT-B-32"', 'model.pretrained="openai"']),
        ({"name": "first", "tracking": False}, ['trainer.name="first"', "tracking.enabled=false"]),
        ({"train_domain": None}, ["data.train_domain=null"]),
        ({"space": {"filter.p0": {"low": 1, "high": 2}}}, ['space.filter.p0={"low": 1, "high": 2}']),
    ],
)
def test_keywords_are_settings(keywords: dict[str, Any], written: list[str]) -> None:
    assert settings_of(keywords) == written


@pytest.mark.parametrize("given", [np.zeros((2, 3)), 3, [b"x"], None])
def test_predict_takes_names_of_files_alone(given: Any) -> None:
    with pytest.raises(UsageError, match=r"predict classifies files by their names: .* use run\.classifier"):
        kngd_ray.predict("first", given)


@pytest.mark.parametrize("call", [kngd_ray.load, kngd_ray.evaluate, lambda run: kngd_ray.predict(run, "cat.jpg")])
@pytest.mark.parametrize("run", [None, 3])
def test_a_run_is_named(call: Any, run: Any) -> None:
    with pytest.raises(UsageError, match=f"a run is needed, and what was given is of type {type(run).__name__}"):
        call(run)


def test_options_of_a_search_have_short_names_where_there_is_one() -> None:
    assert settings_of({"num_samples": 5}, ["num_samples", "seeds"]) == ["search.num_samples=5"]
    assert settings_of({"num_samples": 5}) == ["num_samples=5"]
    for twice in ({"shots": 4, "data": {"shots": 8}}, {"data.shots": 4, "shots": 8}, {"data": "a", "data.path": "b"}):
        with pytest.raises(UsageError, match=r"^data\.(shots|path) is given twice, by its own name and by another"):
            settings_of(twice)
    with pytest.raises(UsageError, match="filter is of type object, which no setting takes"):
        settings_of({"filter": object()})


@pytest.mark.parametrize("wrong", ["filter.p=1", "data.shotz=1", "data.shots=-1", "preset=kalmn", "epochs=[1]", "x=1"])
def test_a_wrong_setting_is_the_sentence_of_the_command_line(command, wrong: str) -> None:
    key, _, value = wrong.partition("=")
    said = command("train", wrong)
    assert said.code == 2
    with pytest.raises(UsageError) as error:
        kngd_ray.train(quiet=True, **{key: int(value) if value.lstrip("-").isdecimal() else value})
    assert str(error.value).replace("'[1]'", "[1]").rstrip(".") == said.sentence.rstrip(".")
    with pytest.raises(UsageError) as error:
        kngd_ray.train(wrong, quiet=True)
    assert str(error.value).rstrip(".") == said.sentence.rstrip(".")


def test_a_run_is_that_of_the_command_line_and_prints_nothing(command, settings) -> None:
    told = command.train("seeds=0,1", "baselines=adamw", "trainer.name=told", "preset=kalman", "--json").json
    run = kngd_ray.train("kalman", seeds=2, baselines=["adamw"], name="first", **settings)
    assert command.read() == ("", "")
    for own, theirs in zip([run.report, *run.report["baselines"]], [told, *told["baselines"]], strict=True):
        assert {key: own[key] for key in ("id", "ood", "zero_shot")} == {
            key: theirs[key] for key in ("id", "ood", "zero_shot")
        }
    assert run.folder == command.runs / "first"
    assert run.mlflow_run_id is None
    frame = run.frame
    assert set(frame["method"]) == {"kalman", "adamw", "zero-shot"}
    own = frame[(frame["method"] == "kalman") & (frame["set"] == "id")]
    assert sorted(own["seed"]) == [0, 1]
    assert own["accuracy"].mean() == pytest.approx(run.metrics["id/accuracy"])
    assert run.metrics["id/accuracy/low"] <= run.metrics["id/accuracy"] <= run.metrics["id/accuracy/high"]
    assert len(run.plot().axes) == 1
    again = kngd_ray.load("first", storage_path=command.runs)
    assert again.frame.equals(frame)
    assert repr(again) == repr(run)

    images = pictures(command)
    p = run.classifier.predict_proba(images)
    assert p.shape == (3, len(run.classifier.classes_))
    assert p.sum(1) == pytest.approx(np.ones(3))
    opened = [Image.open(io.BytesIO(data)) for data in images]
    assert np.array_equal(run.classifier.predict(opened), run.classifier.classes_[p.argmax(1)])
    labels = list(run.classifier.predict(images))
    assert run.classifier.score(images, labels) == 1.0
    assert run.classifier.score(images, [labels[0], "x", "x"], sample_weight=[3, 1, 0]) == pytest.approx(0.75)
    files = [command.folder / f"{n}.png" for n in range(3)]
    for file, picture in zip(files, opened, strict=True):
        picture.save(file)
    table = kngd_ray.predict(run, files, quiet=True)
    assert list(table["class"]) == labels
    assert table["probability"].to_numpy() == pytest.approx(p.max(1), abs=1e-6)

    figures = kngd_ray.evaluate(run, quiet=True)
    seed = frame[(frame["method"] == "kalman") & (frame["seed"] == 0)].set_index("set")["accuracy"]
    assert figures.frame.set_index("set")["accuracy"].to_dict() == pytest.approx(seed.to_dict())
    with pytest.raises(UsageError, match="evaluate takes the fit and its posterior from the run: leave out epochs"):
        kngd_ray.evaluate(run, epochs=3, quiet=True)
    with pytest.raises(UsageError, match="a resumed run keeps its settings"):
        kngd_ray.train(resume=run.folder, shots=3, quiet=True)
    assert kngd_ray.train(resume=run.folder, quiet=True).metrics == run.metrics


def test_a_preset_is_known_by_its_name_on_the_command_line_too(command) -> None:
    named = command("train", "kf_clip", "data.shots=3", "--print-config")
    assert named.out == command("train", "preset=kf_clip", "data.shots=3", "--print-config").out
    (command.folder / "mine.yaml").write_text("trainer: {num_workers: 3}\nseeds: [1]\n")
    for preset, workers in (("mine.yaml", 3), ("kalman", 0), ({"trainer.num_workers": 3}, 3), (None, 0)):
        assert configured(preset, in_process([], preset, ray=False)).trainer.num_workers == workers
    assert "trainer.num_workers=0" not in in_process(["trainer.num_workers=2"], None, ray=False)


def test_the_workers_that_a_file_names_are_those_of_a_search_too(command, settings, monkeypatch) -> None:
    file = command.folder / "search.yaml"
    file.write_text("trainer: {num_workers: 3}\nspace: {filter.p0: {low: 0.1, high: 1.0}}\n")

    def asked(search, *_, **__):
        raise UsageError(f"workers: {search.config.trainer.num_workers}")

    monkeypatch.setattr("kngd_ray.tuning.run.tune", asked)
    for search, workers in ((file, 3), ("smoke", 0)):
        with pytest.raises(UsageError, match=f"workers: {workers}"):
            kngd_ray.tune(search, **settings)


def test_a_search_from_python(command, settings, monkeypatch) -> None:
    monkeypatch.setattr("kngd_ray.tuning.run.study_figures", lambda *arguments: [])
    search = kngd_ray.tune(
        "smoke", num_samples=3, name="search", **{"search.seeds": [0], "search.batch": 3}, **settings
    )
    assert command.read() == ("", "")
    assert list(search.frame["trial"]) == [0, 1, 2]
    assert set(search.best["params"]) <= set(search.frame.columns)
    assert len(search.study.trials) == 3
    assert search.metrics["objective/evidence"] == pytest.approx(search.frame["evidence"].max())
    assert search.run.metrics["id/accuracy"] == search.metrics["id/accuracy"]
    assert search.classifier.predict_proba(pictures(command)).shape[0] == 3
    assert len(search.plot().axes) == 1
    assert kngd_ray.load(search.folder).frame.equals(search.frame)
    with pytest.raises(UsageError, match="name a search, such as noise_priors"):
        kngd_ray.tune(quiet=True)


def test_a_comparison_from_python(command, settings) -> None:
    settings["tracking"]["enabled"] = True
    for preset in ("kalman", "adamw"):
        run = kngd_ray.train(preset, seeds=2, log_model=False, experiment="mine", **settings)
        assert run.mlflow_run_id
    found = kngd_ray.compare("mine", uri=settings["tracking"]["uri"], out=command.folder / "page.html", quiet=True)
    assert found.page.is_file()
    frame = found.frame[found.frame["metric"] == "id/accuracy"].set_index("method")
    assert {"kalman", "adamw"} <= set(frame.index)
    assert frame.loc["kalman", "mean"] - frame.loc["adamw", "mean"] == pytest.approx(frame.loc["kalman", "difference"])
    assert len(found.plot().axes) == 1


def test_features_averages_and_exports_from_python(command, settings) -> None:
    shared = {key: settings[key] for key in ("train_domain", "cache_dir")}
    encoded = kngd_ray.encode(command.data, out=command.folder / "encoded", quiet=True, **shared)
    assert encoded["undecodable"] == 0
    own = {key: value for key, value in settings.items() if key not in ("data", "cache_dir")}
    run = kngd_ray.train("kalman", *encoded["settings"], name="first", **own)
    assert run.metrics["id/accuracy"] >= 0
    linear = {"adapter": "linear", "epochs": 1}
    run = kngd_ray.train(name="towers", **{**settings, **linear})
    exported = kngd_ray.export(run, command.folder / "exported", quiet=True)
    assert Path(exported["open_clip"]["path"]).is_file()
    with pytest.raises(UsageError, match=r"is not an empty folder: name another one with out\.$"):
        kngd_ray.export(run, command.folder / "exported", quiet=True)
    with pytest.raises(UsageError, match=r"trained no LoRA .*: leave out peft\.$"):
        kngd_ray.export(run, command.folder / "new", peft=True, quiet=True)
    with pytest.raises(UsageError, match=r"^points is 1;"):
        kngd_ray.ensemble(run, points=1, quiet=True)
    with pytest.raises(UsageError, match="continue it with resume='towers', or give"):
        kngd_ray.train(name="towers", **{**settings, **linear})
    with pytest.raises(UsageError, match="leave out kalman, or write alpha=kalman"):
        kngd_ray.ensemble(run, "kalman", quiet=True)
    curve = kngd_ray.ensemble(run, alpha=0.5, points=3, quiet=True)
    assert (curve["kept"], curve["alpha"]) == (True, 0.5)
    assert [point["alpha"] for point in curve["curve"]] == [0.0, 0.5, 1.0]
    assert command.read() == ("", "")
    for result in (run, kngd_ray.load(run.folder)):  # the figures of the run stay those of its end
        said = "kalman-seed0 predicts at alpha=0.5, and its figures here are of alpha=1"
        assert repr(result).endswith(f"; {said})")
        for figures in ("metrics", "frame"):
            with pytest.warns(UserWarning, match=rf"{said}: kngd_ray\.evaluate"):
                assert len(getattr(result, figures))
    again = kngd_ray.train(resume=run.folder, quiet=True)  # which evaluates the fits that are there, at 0.5
    assert again.report["alpha"] == [0.5]
    assert "alpha" not in repr(again)
    kngd_ray.ensemble(run, alpha=0.5, points=2, quiet=True)
    (place,) = run.folder.glob("fits/*/calibration.json")
    kept = place.read_bytes()
    place.write_text("{")
    assert "alpha" not in repr(run), "a damaged file is no matter of how a result is shown"
    place.write_bytes(kept)
    kngd_ray.ensemble(run, alpha=1, points=2, quiet=True)
    assert "alpha" not in repr(run)
    assert run.metrics


def test_what_kalman_clip_saves_is_a_run(command) -> None:
    images = pictures(command, 8)
    clf = KalmanCLIP(settings={"epochs": 1, "posterior.folds": 2}).fit(images, ["a", "b"] * 4)
    folder = clf.save(command.folder / "kept")
    loaded = kngd_ray.load(folder)
    assert isinstance(loaded.classifier, KalmanCLIP)
    assert np.array_equal(loaded.classifier.predict_proba(images), clf.predict_proba(images))
    Image.open(io.BytesIO(images[0])).save(command.folder / "one.png")
    said = command("predict", folder, command.folder / "one.png", "--json").json[0]
    assert said["probabilities"]["a"] == pytest.approx(clf.predict_proba(images[:1])[0, 0], abs=1e-5)
    assert command("export", folder, "--out", command.folder / "files").sentence.startswith("kalman-seed0 trained no")
    assert command("evaluate", folder).sentence == (
        "kept learned from pictures in memory: name data to score it on by data.path."
    )
    with pytest.raises(CheckpointError, match="there is no run nothing"):
        kngd_ray.load("nothing")


def test_an_estimator_of_scikit_learn() -> None:
    base = pytest.importorskip("sklearn.base")
    assert isinstance(KalmanCLIP(), (base.ClassifierMixin, base.BaseEstimator))
    assert "KalmanCLIP" in KalmanCLIP()._repr_html_()


def test_the_frame_has_every_domain_by_its_whole_name(tmp_path) -> None:
    """A domain with slashes in its name was left out without a word."""
    logged = {"id/accuracy": 0.9, "id/temperature_scaled/accuracy": 0.8, "ood/mean/accuracy": 0.5}
    domains = {"hospital/a": 0.4, "subzero": 0.6}
    logged |= {f"ood/{name}/{part}accuracy": p for name, p in domains.items() for part in ("", "temperature_scaled/")}
    zero_shot = {f"zero_shot/{name}": p / 2 for name, p in logged.items()}
    folder = tmp_path / "records" / "kalman-seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({**zero_shot, **logged}))
    frame = RunResult(tmp_path, {"method": "kalman", "preset": "kalman", "seeds": [0]}).frame
    found = {(row["method"], row["set"]): row["accuracy"] for row in frame.to_dict("records")}
    own = {"id": 0.9, **domains}
    assert found == {(by, name): p / part for by, part in (("kalman", 1), ("zero-shot", 2)) for name, p in own.items()}
