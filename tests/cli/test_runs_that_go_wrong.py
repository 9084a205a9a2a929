"""What is kept of a run in which something failed, and what a run folder may say to others."""

import json
import re
import shutil
from pathlib import Path

import open_clip
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from kngd_ray.errors import IndefiniteError
from kngd_ray.training.kalman import KalmanNGD


@pytest.fixture
def seed_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    step = KalmanNGD.step

    def failing(self: KalmanNGD, batch):
        if self.seed == 1 and batch.step == 2:
            raise IndefiniteError("S is not positive definite.")
        return step(self, batch)

    monkeypatch.setattr(KalmanNGD, "step", failing)


def test_one_failed_seed_leaves_the_others(command, seed_one_fails) -> None:
    outcome = command.train(
        "seeds=0,1,2", "trainer.name=three", "baselines=adamw", "tracking.log_model=false", *command.nine_steps
    )
    assert outcome.code == 1
    assert "kalman-seed1: S is not positive definite." in outcome.err
    results = json.loads((command.run("three") / "results.json").read_text())
    assert results["seeds"] == [0, 2]
    assert results["baselines"][0]["seeds"] == [0, 1, 2]
    assert set(results["id"]["accuracy"]) == {"mean", "low", "high"}
    status = {
        path.parent.name: json.loads(path.read_text())["status"]
        for path in (command.run("three") / "records").glob("*/meta.json")
    }
    assert status["kalman-seed1"] == status["kalman"] == "FAILED"
    assert status["kalman-seed0"] == status["adamw"] == status["adamw-seed1"] == "FINISHED"


def test_a_run_whose_every_fit_failed_says_why(command, seed_one_fails) -> None:
    outcome = command.train("seeds=1", *command.nine_steps)
    assert outcome.code == 1
    assert outcome.out == ""
    assert "kalman-seed1: S is not positive definite." in outcome.err


def test_a_fit_that_ends_at_no_numbers_is_a_failed_one(command, tmp_path: Path) -> None:
    """All pictures were of the first class: a third of them right, with a good ECE, and exit code 0."""
    outcome = command.train("trainer.name=far", "method=sgd", "optimizer.lr=3e38", "epochs=1", "batch_size=999")
    assert outcome.code == 1
    assert re.search(r"sgd-seed0: \d+ of \d+ predictions in distribution are NaN.*optimizer.lr lower", outcome.err)
    assert outcome.out == ""
    assert not (command.run("far") / "results.json").exists()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for asked in (("evaluate",), ("predict", tmp_path / "a.png")):
        outcome = command(asked[0], command.run("far"), *asked[1:])
        assert (outcome.code, outcome.out) == (1, "")
        assert "are NaN: the fit's weights have grown beyond all bounds" in outcome.err


def test_an_unfinished_fit_does_not_predict(command, monkeypatch) -> None:
    command.train("trainer.name=cut", "trainer.checkpoint_every=2")
    fit = command.run("cut") / "fits" / "kalman-seed0"
    (fit / "calibration.json").unlink()
    outcome = command("evaluate", command.run("cut"))
    assert outcome.code == 1
    assert "is not finished" in outcome.err
    assert "--resume" in outcome.err


def test_a_checkpoint_of_an_unfinished_fit_predicts_at_its_mean(command, caplog) -> None:
    """At tau = 1, which nobody chose, it took most pictures for another class and was sure of none."""
    settings = ("posterior.predict=mean", "posterior.sharpening_spread=0")
    found = command.train("trainer.name=mean", *settings, "--json").json["id"]
    fit = command.run("mean") / "fits" / "kalman-seed0"
    (fit / "calibration.json").unlink()
    (checkpoint,) = fit.glob("step-*")
    outcome = command("evaluate", checkpoint, "--json")
    assert outcome.json["id"]["nll"] == pytest.approx(found["nll"], rel=1e-5)
    assert f"{checkpoint} predicts at the mean of its belief" in caplog.text
    outcome = command("ensemble", checkpoint, "alpha=0.5")  # to keep it would settle a tau with it
    assert outcome.code == 2
    assert "has not ended" in outcome.err
    assert not (fit / "calibration.json").exists()


def test_a_finished_run_is_not_resumed_on_other_test_pictures(command, tmp_path: Path) -> None:
    """Its figures were replaced by those of the other pictures, in its own files and in MLflow."""
    data = tmp_path / "data.parquet"
    table = pq.read_table(command.data)
    pq.write_table(table, data)
    tracked = ("tracking.enabled=true", "tracking.log_model=false")
    assert command.train("trainer.name=done", "seeds=0,1", *tracked, data=data).code == 0
    kept = {path: path.read_bytes() for path in command.run("done").rglob("*") if path.is_file()}
    is_test = pc.equal(table["split"], "test")
    fewer = pc.and_(is_test, pc.equal(table["label"], 0))
    pq.write_table(table.filter(pc.invert(fewer)), data)
    outcome = command("train", "--resume", command.run("done"))
    assert outcome.code == 1
    assert "kalman-seed0: the test data was changed since the fit" in outcome.sentence
    assert {path: path.read_bytes() for path in kept} == kept
    pq.write_table(table, data)
    assert command("train", "--resume", command.run("done")).code == 0


def test_other_shots_are_not_resumed_from(command, tmp_path: Path) -> None:
    command.train("trainer.name=shots", "data.shots=4")
    config = command.run("shots") / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["data"]["train_domain"] = "twemoji"
    config.write_text(yaml.safe_dump(settings))
    outcome = command("train", "--resume", command.run("shots"))
    assert outcome.code == 1
    assert "12 of the 12 shots that it would be given now are others" in outcome.sentence
    assert outcome.sentence.endswith("put the data back as it was, or start a new run.")


def test_a_password_in_the_tracking_uri_is_not_logged(command) -> None:
    uri = "http://bob:hunter2@127.0.0.1:9"
    outcome = command(
        "train",
        *[s for s in command.settings("trainer.name=secret") if not s.startswith("tracking.")],
        f"tracking.uri={uri}",
    )
    assert outcome.code == 0, outcome.err
    folder = command.run("secret")
    assert "hunter2" not in outcome.err
    for path in (folder / "records").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    assert (folder / "config.yaml").stat().st_mode & 0o077 == 0, "the run needs the password, others do not"


def test_a_run_outlives_its_preset_file_and_its_folder(command, tmp_path: Path, monkeypatch) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("method: kalman\nepochs: 2\nfilter: {p0: 0.02}\n")
    command.train(f"preset={preset}", "trainer.name=moved")
    preset.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    outcome = command("evaluate", command.run("moved"), "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["id"]["accuracy"] > 0.2


def test_a_model_file_may_be_named_from_anywhere(command, tmp_path: Path, monkeypatch) -> None:
    """Of a model its weights are what a checkpoint belongs to, not the path that they were named by."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "kngd-test-path.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(home / "kngd-test-path.json")
    save_file(open_clip.create_model("kngd-test-path").state_dict(), home / "weights.safetensors")
    monkeypatch.chdir(home)
    trained = command.train("model.name=kngd-test-path", "model.pretrained=weights.safetensors", "trainer.name=paths")
    assert trained.code == 0, trained.err
    monkeypatch.chdir(elsewhere)
    for again in (command("train", "--resume", command.run("paths")), command("evaluate", command.run("paths"))):
        assert again.code == 0, again.err
    shutil.move(home / "weights.safetensors", elsewhere / "moved.safetensors")
    moved = command("evaluate", command.run("paths"), f"model.pretrained={elsewhere / 'moved.safetensors'}")
    assert moved.code == 0, moved.err
