"""Each command end to end on real pictures: what it prints, and what it leaves."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from kngd_ray.api.settings import notes_of_ignored
from kngd_ray.config import load_config
from kngd_ray.errors import FilterError
from kngd_ray.experiment import method_run
from kngd_ray.experiment.run import _chosen
from kngd_ray.training.metrics import Scores
from kngd_ray.training.novelty import calibrate_and_compare

FIGURES = {"accuracy", "nll", "ece", "brier"}
CURVES = "*/records/*/artifacts/figures/learning_curve.png"
REPORT = {"run_id", "method", "preset", "seeds", "steps", "refused", "seconds", "alpha", "zero_shot", "id", "ood"}


def check_report(report: dict[str, Any], leaf: type | set[str]) -> None:
    """The documented keys; every figure is a number, or an interval."""

    def check(figures: dict[str, Any], nested: bool = False) -> None:
        if not nested:
            figures = dict(figures)
            check(figures.pop("temperature_scaled"), nested=True)
        assert set(figures) == FIGURES
        for figure in figures.values():
            if leaf is float:
                assert isinstance(figure, float)
                assert math.isfinite(figure)
            else:
                assert set(figure) == leaf
                assert figure["low"] <= figure["mean"] <= figure["high"]

    assert set(report["zero_shot"]) == {"id", "ood"}
    for part in (report, report["zero_shot"]):
        check(part["id"])
        assert set(part["ood"]) == {"mean", "twemoji"}
        for figures in part["ood"].values():
            check(figures)


def pictures(data: Path, folder: Path, rows: list[int]) -> list[Path]:
    blobs = pq.read_table(data)["image"].to_pylist()
    paths = [folder / f"picture{row}.png" for row in rows]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(blobs[row])
    return paths


def test_train_prints_a_table_and_leaves_a_run(command) -> None:
    outcome = command.train("trainer.name=first", *command.nine_steps)
    assert outcome.code == 0, outcome.err
    assert "zero-shot" in outcome.out
    assert "kalman, 9 steps" in outcome.out
    note = "seeds 0; one seed, no interval; chosen on training shots: tau, sharpening, temperatures"
    assert outcome.out.splitlines()[-1] == note
    assert "Traceback" not in outcome.err
    run = command.run("first")
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "fits", "records", "results.json"}
    assert not (command.folder / "mlflow.db").exists()
    (fit,) = (run / "fits").iterdir()
    assert fit.name == "kalman-seed0"
    assert len(list(fit.glob("step-00000009-*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["posterior.temperature=0.2"], "; tau is 0.2; chosen on training shots: sharpening, temperatures"),
        (["posterior.predict=mean"], "; chosen on training shots: sharpening, temperatures"),
        (["posterior.sharpening_spread=0"], "; chosen on training shots: tau, temperatures"),
        (["method=adamw"], "; chosen on training shots: temperatures"),
        (["posterior.folds=0"], "; tau is 0.0003, by no folds"),
        (["posterior.folds=0", "posterior.temperature=0.2"], "; tau is 0.2, by no folds"),
        (["posterior.folds=0", "posterior.predict=mean"], ""),
        (["method=adamw", "posterior.folds=0"], ""),
        (
            ["tune.parameters=lora"],
            "; chosen on training shots, by folds of the head: tau, sharpening, temperatures",
        ),
        (
            ["tune.parameters=lora", "posterior.temperature=0.2", "posterior.sharpening_spread=0"],
            "; tau is 0.2; chosen on training shots, by folds of the head: temperatures",
        ),
        (["tune.parameters=lora", "posterior.folds=3"], "; chosen on training shots: tau, sharpening, temperatures"),
        (["tune.parameters=lora", "tune.start=zero_shot"], ""),
        (["tune.parameters=lora", "method=adamw"], ""),
    ],
)
def test_a_table_says_what_was_chosen_on_the_shots(settings: list[str], said: str) -> None:
    assert _chosen(load_config(None, settings), 9) == said


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        (["method=adamw", "filter.logit_variance=5"], ["filter.logit_variance has no effect with method=adamw"]),
        (
            ["baselines=adamw", "optimizer.lr=0.5"],
            ["optimizer.lr has no effect with method=kalman, and baselines keep their own presets"],
        ),
        (["tune.rank=64", "tune.views=2"], ["tune.rank has no effect with tune.parameters=adapter"]),
        (["tune.parameters=lora", "tune.rank=64", "filter.mean.gamma=1", "posterior.folds=3"], []),
        (["method=sgd", "optimizer.momentum=0.5", "posterior.folds=3"], []),
        (["method=sgd", "posterior.temperature=0.5"], ["posterior.temperature has no effect with method=sgd"]),
        (["posterior.draws=9"], ["posterior.draws has no effect with posterior.predict=linearised"]),
        (["posterior.predict=draws", "posterior.draws=9", "posterior.temperature=0.5"], []),
        (
            ["posterior.predict=mean", "posterior.temperature=0.5"],
            ["posterior.temperature has no effect with posterior.predict=mean"],
        ),
        (
            ["posterior.temperature=0.5", "posterior.tau_median=0.2"],
            ["posterior.tau_median has no effect with posterior.temperature=0.5"],
        ),
        (
            ["posterior.folds=0", "posterior.tau_spread=1"],
            ["posterior.tau_spread has no effect with posterior.folds=0"],
        ),
        (
            ["posterior.tau_median=null", "posterior.tau_spread=1"],
            ["posterior.tau_spread has no effect with posterior.tau_median=null"],
        ),
        (["posterior.folds=0", "posterior.tau_median=0.1"], []),
        (
            ["protocol=stream", "data.order=[a,b]", "posterior.folds=0", "posterior.tau_spread=1"],
            ["posterior.folds has no effect with protocol=stream"],
        ),
        (
            ["protocol=stream", "data.order=[a,b]", "posterior.sharpening_spread=0.2"],
            ["posterior.sharpening_spread has no effect with protocol=stream"],
        ),
        (
            ["baselines=adamw", "tune={rank: 7, views: 2}", "tune.rank=8"],
            ["tune.rank has no effect with tune.parameters=adapter"],
        ),
        (["tune.views=4", "filter.tolerance=0.01", "observation.r0=2"], []),
        (
            ["prior=first", "filter.logit_variance=10", "filter.mean.gamma=0.1", "filter.tolerance=0.1"],
            [
                "filter.logit_variance has no effect with prior=first",
                "filter.mean.gamma has no effect with prior=first",
            ],
        ),
        (
            ["protocol=stream", "data.order=[a,b]", "tune.views=4"],
            ["tune.views has no effect with protocol=stream"],
        ),
        (["method=adamw", "epochs=1", "tune.views=4"], ["tune.views has no effect with epochs=1"]),
        (["tune.augment=none", "tune.views=4"], ["tune.views has no effect with tune.augment=none"]),
        (["tune.refit=false"], ["tune.refit has no effect with tune.parameters=adapter"]),
        (["tune.parameters=lora", "method=adamw", "tune.refit=true"], ["tune.refit has no effect with method=adamw"]),
        (
            ["tune.parameters=lora", "tune.start=zero_shot", "tune.refit=false"],
            ["tune.refit has no effect with tune.start=zero_shot"],
        ),
        (["tune.parameters=lora", "tune.refit=false"], []),
        (["tune.parameters=lora", "tune.refit=true", "epochs=0"], ["tune.refit has no effect with epochs=0"]),
        (
            ["tune.parameters=lora", "tune.refit=true", "filter.tower_logit_variance=0"],
            ["tune.refit has no effect with filter.tower_logit_variance=0"],
        ),
        (
            ["tune.parameters=lora", "tune.refit=true", "tune.alpha=0.5"],
            ["tune.refit has no effect with tune.alpha=0.5"],
        ),
        (
            ["tune.parameters=lora", "tune.start=zero_shot", "tune.views=4", "tune.augment=random_resized_crop"],
            ["tune.views has no effect with tune.start=zero_shot"],
        ),
        (
            ["preset=kalman_diagonal", "filter.iterations=1", "filter.tolerance=0.1"],
            ["filter.tolerance has no effect with filter.iterations=1"],
        ),
        (
            ["preset=kalman_diagonal", "filter.gate=skip", "filter.tolerance=0.1"],
            ["filter.tolerance has no effect with filter.gate=skip"],
        ),
        (["preset=kalman_diagonal", "filter.tolerance=0.1"], []),
        (
            [
                "preset=kalman_diagonal",
                "noise.observation=categorical",
                "observation=[log_likelihood,cosine]",
                "observation.0.r0=2",
                "observation.1.r0=2",
            ],
            ["observation.0.r0 has no effect with noise.observation=categorical"],
        ),
    ],
)
def test_settings_that_change_nothing_are_named(settings: list[str], notes: list[str]) -> None:
    assert notes_of_ignored(load_config(None, settings), settings) == notes


def test_settings_of_a_file_that_baselines_do_not_take_are_named(tmp_path: Path) -> None:
    """Of one method alone, a file may hold the settings of others; beside baselines they look like theirs."""
    file = tmp_path / "mine.yaml"
    file.write_text("data: {shots: 2}\ntune: {rank: 8}\noptimizer: {lr: 0.5}\n")
    note = "optimizer.lr has no effect with method=kalman, and baselines keep their own presets"
    both = ["baselines=adamw"]
    assert notes_of_ignored(load_config(file, both), both, str(file)) == [note]
    assert notes_of_ignored(load_config(file, both), both, {"optimizer": {"lr": 0.5}}) == [note]
    assert notes_of_ignored(load_config(file, []), [], str(file)) == []
    assert notes_of_ignored(load_config(None, both), both, "kalman") == []


def test_a_prior_variance_that_cannot_be_chosen_is_told(command) -> None:
    """A fit that does not go to its mode takes another number than the one that was given."""
    given = ["filter.logit_variance=300", "filter.gate=skip", "epochs=1"]
    said = "kalman: filter.logit_variance is taken as 5.49 nats^2, the cautious end of 300 with its spread"
    assert said in " ".join(command.train(*given).err.split())
    assert "cautious" not in command.train(*given, "filter.logit_spread=0").err
    assert "cautious" not in command.train("filter.logit_variance=300").err


def test_a_stream_of_one_batch_has_predicted_nothing_to_choose_by() -> None:
    stream = load_config(None, ["protocol=stream", "data.order=[a,b]"])
    assert "tau was chosen by what had been predicted before" in _chosen(stream, 2)
    assert _chosen(stream, 1) == ""


def test_train_json_of_one_seed(command) -> None:
    outcome = command("train", *command.settings("trainer.name=j"), "--json")
    report = outcome.json
    assert set(report) == REPORT
    check_report(report, float)
    assert report["run_id"] is None
    assert (report["method"], report["preset"], report["seeds"], report["steps"]) == ("kalman", "kalman", [0], 1)
    assert report["seconds"] > 0
    assert json.loads((command.run("j") / "results.json").read_text()) == report


@pytest.mark.usefixtures("painted")
def test_train_json_of_several_seeds_and_a_baseline(command) -> None:
    outcome = command("train", "--json", *command.settings("seeds=0,1,2", "baselines=adamw", "epochs=1"))
    report = outcome.json
    assert set(report) == REPORT | {"baselines"}
    check_report(report, {"mean", "low", "high"})
    (baseline,) = report["baselines"]
    assert set(baseline) == REPORT
    check_report(baseline, {"mean", "low", "high"})
    assert baseline["method"] == baseline["preset"] == "adamw"
    assert baseline["seeds"] == report["seeds"] == [0, 1, 2]
    assert baseline["steps"] == 30, "a baseline runs for its own preset's epochs"
    assert baseline["zero_shot"] == report["zero_shot"]
    assert len(list(command.runs.glob(CURVES))) == 3, "none of the default's one step"


def test_no_steps_is_zero_shot(command) -> None:
    report = command(
        "train", "--json", *command.settings("epochs=0", "posterior.folds=0", "posterior.predict=mean")
    ).json
    assert report["steps"] == 0
    assert not list(command.runs.glob(CURVES)), "there is none of no step or one"
    assert report["id"]["accuracy"] == report["zero_shot"]["id"]["accuracy"]


def test_print_config_loads_back_and_starts_nothing(command) -> None:
    settings = command.settings("preset=loko", "filter.covariance=dense", "data.shots=2")
    outcome = command("train", *settings, "--print-config")
    assert outcome.code == 0
    file = command.folder / "printed.yaml"
    file.write_text(outcome.out)
    assert load_config(file) == load_config(None, settings)
    assert not command.runs.exists()
    assert command("train", file, "--print-config").out == outcome.out


def test_a_file_and_settings_over_it(command) -> None:
    file = command.folder / "mine.yaml"
    file.write_text("preset: kf_clip\nadapter: bottleneck\nadapter.width: 8\nepochs: 2\n")
    printed = yaml.safe_load(command("train", file, "epochs=4", "--print-config").out)
    assert printed["adapter"] == [{"kind": "bottleneck", "tower": "image", "width": 8, "ratio": 0.5}]
    assert printed["epochs"] == 4


@pytest.mark.usefixtures("painted")
def test_evaluate_agrees_with_train(command) -> None:
    trained = command("train", "--json", *command.settings("trainer.name=e")).json
    run = command.run("e")
    fit = run / "fits" / "kalman-seed0"
    (checkpoint,) = fit.glob("step-*")
    for target, settings in (("e", ["--storage-path", command.runs]), (run, []), (fit, []), (checkpoint, [])):
        outcome = command("evaluate", target, *settings, "--json")
        assert outcome.code == 0, outcome.err
        report = outcome.json
        assert set(report) == {"checkpoint", "id", "ood"}
        assert report["checkpoint"] == str(checkpoint)
        assert set(report["id"]) == FIGURES | {"temperature_scaled", "aurc"}
        assert set(report["ood"]["twemoji"]) == FIGURES | {"temperature_scaled", "aurc", "auroc"}
        for figure in FIGURES:
            assert report["id"][figure] == pytest.approx(trained["id"][figure])
    assert (fit / "reliability.png").is_file()
    table = command("evaluate", run)
    assert "e, kalman-seed0" in table.out


def test_evaluate_on_another_domain_by_setting_and_by_file(command) -> None:
    command.train("trainer.name=e")
    outcome = command("evaluate", command.run("e"), "data.train_domain=twemoji", "--json")
    assert "the fit learned the domain noto: figures in distribution are of twemoji" in outcome.err
    swapped = outcome.json
    assert list(swapped["ood"]) == ["mean", "noto"]
    file = command.folder / "other.yaml"
    file.write_text("data: {train_domain: twemoji}")
    assert command("evaluate", command.run("e"), file, "--json").json == swapped


def test_evaluate_on_data_to_test_on_alone(command) -> None:
    """Data without a split is scored whole; domains that only the run's data has are forgotten."""
    command.train("trainer.name=e")
    pictures = pq.read_table(command.data)
    cases = {
        "unsplit": (pictures.drop_columns(["domain", "split"]), []),
        "tests": (pictures.filter(pc.equal(pictures["split"], "test")), ["mean", "twemoji"]),
    }
    for name, (table, ood) in cases.items():
        path = command.folder / f"{name}.parquet"
        pq.write_table(table, path)
        outcome = command("evaluate", command.run("e"), f"data.path={path}", "--json")
        assert outcome.code == 0, outcome.err
        assert list(outcome.json["ood"]) == ood
    own = command("evaluate", command.run("e"), "--json").json
    assert outcome.json == own, "the test rows, and no others, are what the run is evaluated on"
    file = command.folder / "other.yaml"
    file.write_text(f"data: {{path: {command.folder / 'unsplit.parquet'}}}")
    scored = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scores, "of", lambda p, labels, of=Scores.of: scored.append(len(p)) or of(p, labels))
        assert command("evaluate", command.run("e"), file).code == 0
    assert set(scored) == {len(pictures) - 12}, "all but copies of the run's own shots"


def test_evaluate_in_the_folder_of_a_checkpoint(command, monkeypatch) -> None:
    command.train("trainer.name=e")
    (checkpoint,) = command.run("e").glob("fits/*/step-*")
    monkeypatch.chdir(checkpoint)
    assert command("evaluate", ".", "--json").code == 0
    monkeypatch.chdir(checkpoint.parent)
    assert command("evaluate", ".", "--json").code == 0


def test_predict_as_table_and_json(command) -> None:
    command.train("trainer.name=p")
    files = pictures(command.data, command.folder, [0, 20, 40])
    outcome = command("predict", "p", *files, "--storage-path", command.runs, "--json")
    rows = outcome.json
    assert [row["image"] for row in rows] == [str(f) for f in files]
    for row in rows:
        about = {"probability_low", "probability_high", "novelty", "logit_std", "uncertainty"}
        assert set(row) == {"image", "class", "probability", "probabilities"} | about
        assert set(row["probabilities"]) == {"bird", "flower", "building"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["class"]]
        assert 0 <= row["uncertainty"] <= math.log(3) + 1e-6
    table = command("predict", command.run("p"), *files)
    assert table.code == 0
    for row in rows:
        assert row["class"] in table.out
        assert f"{row['probability']:.3f}" in table.out


def test_predict_with_a_gradient_method(command) -> None:
    command.train("method=adamw", "epochs=2", "trainer.name=p")
    (file,) = pictures(command.data, command.folder, [0])
    (row,) = command("predict", command.run("p"), file, "--json").json
    assert row["logit_std"] == 0


def test_encode_fills_the_cache_once(command) -> None:
    settings = [f"data.cache_dir={command.folder}/own", "trainer.num_workers=0"]
    first = command("encode", command.data, *settings, "--json").json
    pictures = pq.read_metadata(command.data).num_rows
    assert first["pictures"] == first["encoded"] == pictures
    assert first["undecodable"] == 0
    assert list(Path(first["cache"]).glob("part-*.parquet"))
    again = command("encode", f"data.path={command.data}", *settings, "--json").json
    assert again == first | {"encoded": 0}
    shown = command("encode", command.data, *settings)
    assert f"{pictures} pictures, 0 encoded now, 0 undecodable" in shown.err
    own = f"data.cache_dir={command.folder}/own"
    assert "encoding" not in command.train(own, "tune.views=0").err
    assert "encoding" in command.train(own, "tune.views=1", "trainer.name=crops").err
    shown = command.train(own, "tune.views=1", "trainer.name=known").err
    assert "encoding" not in shown
    assert "heads learn from each shot and 1 random crop of it, which count as one picture" in " ".join(shown.split())


def test_resume_of_a_run_cut_short(command, monkeypatch) -> None:
    """Stopped at a checkpoint and resumed, the figures are those of a run that never stopped."""
    straight = command("train", "--json", *command.settings("trainer.name=straight", *command.nine_steps)).json
    from kngd_ray.training.kalman import KalmanNGD

    step = KalmanNGD.step

    def interrupted(self, batch):
        if batch.step == 5:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(KalmanNGD, "step", interrupted)
        cut = command.train("trainer.name=cut", "trainer.checkpoint_every=2", *command.nine_steps)
    assert cut.code == 130
    assert "--resume" in cut.sentence
    assert list(command.run("cut").glob("fits/*/step-00000004-*"))
    outcome = command("train", "--resume", "cut", f"trainer.storage_path={command.runs}", "--json")
    assert outcome.code == 0, outcome.err
    resumed = outcome.json
    for key in ("id", "ood", "zero_shot", "steps"):
        assert resumed[key] == straight[key]
    lines = (command.run("cut") / "records" / "kalman-seed0" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


def test_progress_stays_off_standard_output(command) -> None:
    outcome = command("train", "--json", *command.settings())
    assert "step 1 of 1" in outcome.err
    assert "accuracy %" in outcome.err, "the table goes to standard error"
    json.load(io.StringIO(outcome.out))


def test_evaluate_says_that_no_picture_is_of_the_domain_trained_on(command) -> None:
    """What was out of distribution in training was reported as in distribution, without a word."""
    command.train("trainer.name=d")
    table = pq.read_table(command.data)
    pq.write_table(table.filter(pc.equal(table["domain"], "twemoji")), command.folder / "other.parquet")
    outcome = command("evaluate", command.run("d"), f"data.path={command.folder / 'other.parquet'}", "--json")
    assert outcome.json["ood"] == {}
    assert "no picture is of the domain noto, which the fit learned" in outcome.err
    assert "figures in distribution are of twemoji" in outcome.err
    outcome = command("evaluate", command.run("d"), "--json")
    assert "no picture is of the domain" not in outcome.err


def test_evaluate_knows_the_domain_of_the_shipped_pictures(command) -> None:
    """No setting names it, and the domains of other data were counted together as the one that was trained on."""
    birds = [
        "data.path=embedded",
        "data.train_domain=null",
        "data.classes=[flower,insect]",
        "data.ood_domains=[twemoji]",
    ]
    assert command.train("trainer.name=s", *birds, "epochs=0").code == 0
    table = pq.read_table(command.data)
    for name, domains, ood in (("both", ["noto", "twemoji"], ["mean", "twemoji"]), ("other", ["twemoji"], [])):
        path = command.folder / f"{name}.parquet"
        pq.write_table(table.filter(pc.is_in(table["domain"], pa.array(domains))), path)
        outcome = command("evaluate", command.run("s"), f"data.path={path}", "--json")
        assert list(outcome.json["ood"]) == ood
        assert ("no picture is of the domain noto, which the fit learned" in outcome.err) == (not ood)


def test_folds_that_cannot_be_fitted_are_said(command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise FilterError("10 steps in a row were refused.")

    monkeypatch.setattr(method_run, "calibrate_and_compare", refused)
    outcome = command.train("epochs=1")
    assert outcome.code == 0, outcome.err
    said = "(10 steps in a row were refused): tau is 0.0003, and nothing was chosen"
    assert said in " ".join(outcome.err.split())
    table = " ".join(outcome.out.split())
    assert "no interval; not chosen for every fit, see the warnings: tau, sharpening, temperatures" in table
    (card,) = next(command.runs.iterdir()).rglob("model_card.md")
    assert "posterior temperature tau 0.0003, given, not chosen" in card.read_text()
    # a baseline that fails says nothing of the method above it, nor has it a tau
    real = calibrate_and_compare

    def of_adamw(task, *arguments, **named):
        return refused() if task.options.method == "adamw" else real(task, *arguments, **named)

    monkeypatch.setattr(method_run, "calibrate_and_compare", of_adamw)
    both = command.train("baselines=adamw", "epochs=1")
    assert "warning: adamw: folds of the shots could not be fitted (10 steps in a row were refused): nothing" in (
        " ".join(both.err.split())
    )
    assert "chosen on training shots: tau, sharpening, temperatures" in " ".join(both.out.split())
