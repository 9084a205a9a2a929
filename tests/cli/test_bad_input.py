"""Whatever is wrong: one sentence, no traceback, an exit code, and nothing lost."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from kngd_ray.clip import ClipModel
from kngd_ray.sharding import sharded_filter
from kngd_ray.training import checkpoint
from kngd_ray.training.batches import BatchSampler

FAILED, USAGE = 1, 2


def refused(outcome: Any, code: int, *words: str) -> str:
    """The sentence of a refusal that names all of `words`."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    sentence: str = outcome.sentence
    for word in words:
        assert word in sentence, sentence
    return sentence


def digests(folder: Path) -> dict[str, str]:
    """Everything below a folder, by content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def written(command, tmp_path):
    """Writes a variant of the small data and returns its path."""

    def write(change) -> Path:
        path = tmp_path / "data.parquet"
        pq.write_table(change(pq.read_table(command.data)), path)
        return path

    return write


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    number = table.schema.get_field_index(name)
    return table.set_column(number, name, pa.array(values, table.schema.field(name).type))


def first_row(table: pa.Table, **wanted: str) -> int:
    rows = table.drop_columns(["image"]).to_pylist()
    return next(n for n, row in enumerate(rows) if all(row[k] == v for k, v in wanted.items()))


# Data


def test_missing_file_names_the_nearest(command) -> None:
    refused(command.train(data=command.data.with_name("smal.parquet")), FAILED, "no such file", "small.parquet")
    assert not command.runs.exists(), "bad data leaves no empty run behind"


def test_no_image_column(command, written) -> None:
    data = written(lambda t: t.rename_columns(["pixels" if n == "image" else n for n in t.column_names]))
    refused(command.train(data=data), FAILED, str(data), "no image column", "pixels")


def test_text_file_is_no_parquet(command) -> None:
    path = command.folder / "notes.parquet"
    path.write_text("not a table")
    refused(command.train(data=path), FAILED, "is not a parquet file")


def test_label_without_class_name(command, written) -> None:
    def forget(table: pa.Table) -> pa.Table:
        names = table["class_name"].to_pylist()
        return with_column(table, "class_name", [None, *names[1:]])

    refused(command.train(data=written(forget)), FAILED, "row 0", "label 0 has no class name", "data.classes")


def break_picture(split: str):
    def change(table: pa.Table) -> pa.Table:
        blobs = table["image"].to_pylist()
        row = first_row(table, domain="noto", split=split)
        blobs[row] = b"\x89PNG no picture"
        return with_column(table, "image", blobs)

    return change


def test_undecodable_picture_is_named(command, written) -> None:
    data = written(break_picture("test"))
    refused(command.train(data=data), FAILED, "data.parquet, row 5", "cannot be decoded", "data.on_bad_image=skip")
    assert not command.runs.exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_undecodable_picture_is_skipped_and_counted(command, written, split: str) -> None:
    outcome = command.train("data.on_bad_image=skip", data=written(break_picture(split)))
    assert outcome.code == 0, outcome.err
    assert "undecodable pictures left out: 1" in outcome.err


def test_skipped_shots_may_leave_too_few(command, written) -> None:
    data = written(break_picture("train"))
    outcome = command.train("data.on_bad_image=skip", "data.shots=5", data=data)
    refused(outcome, FAILED, "class 'bird' has 4 pictures to train on, fewer than 5 shots")


def test_too_few_shots(command) -> None:
    refused(command.train("data.shots=6"), FAILED, "class 'bird' has 5 pictures", "fewer than 6 shots", "data.shots")


def test_unknown_domains_name_the_nearest(command) -> None:
    refused(command.train("data.train_domain=notto"), FAILED, "data.train_domain", "'notto'", "'noto'")
    refused(command.train("data.ood_domains=twemoj"), FAILED, "data.ood_domains", "'twemoj'", "'twemoji'")


def test_unknown_class_names_the_nearest(command) -> None:
    refused(command.train("data.classes=bird,flowre"), FAILED, "'flowre'", "'flower'")


def test_not_finite_feature_is_named(command, monkeypatch) -> None:
    encode = ClipModel.encode_images

    def poisoned(self, images, **options):
        features = encode(self, images, **options)
        features[3] = float("nan")
        return features

    monkeypatch.setattr(ClipModel, "encode_images", poisoned)
    outcome = command.train(f"data.cache_dir={command.folder}/own")
    refused(outcome, FAILED, "small.parquet, row ", "not finite", "1 of ")
    assert not list((command.folder / "own").rglob("*.parquet")), "a poisoned part is not kept"


# Settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.shot=4", ["unknown key 'data.shot'", "did you mean data.shots?"]),
        ("filter.covarience=dense", ["did you mean filter.covariance?"]),
        ("data.shots=many", ["data.shots='many'", "integer"]),
        ("filter.p0=-1", ["p0 is -1.0", "above 0"]),
        ("method=kalmann", ["did you mean kalman?"]),
        ("preset=lokko", ["there is no preset 'lokko'", "did you mean loko?"]),
        ("trainer.name=a/b", ["'a/b'", "without slashes"]),
        ("baselines=sgd,sdg", ["did you mean sgd?"]),
        ("nonsense", ["'nonsense' is neither"]),
        ("epochs=[", ["the value of epochs is not valid YAML"]),
    ],
)
def test_wrong_settings(command, setting: str, words: list[str]) -> None:
    refused(command.train(setting), USAGE, *words)
    assert not command.runs.exists()


def test_missing_configuration_file(command) -> None:
    (command.folder / "study.yaml").write_text("epochs: 1")
    refused(command("train", "stdy.yaml"), USAGE, "there is no configuration file stdy.yaml", "study.yaml")


def test_baseline_that_is_the_method(command) -> None:
    refused(command.train("method=sgd", "baselines=sgd"), USAGE, "baselines name sgd")


def test_unknown_tracking_store(command) -> None:
    refused(command.train("tracking.enabled=true", "tracking.uri=gopher://x"), FAILED, "gopher")


# Runs


def test_a_resumed_run_keeps_its_settings(command, tmp_path: Path) -> None:
    command.train("trainer.name=kept")
    refused(command("train", "--resume", command.run("kept"), "epochs=9"), USAGE, "leave out 'epochs=9'")
    (tmp_path / "mine.yaml").write_text("epochs: 9")
    refused(command("train", tmp_path / "mine.yaml", "--resume", command.run("kept")), USAGE, "leave out", "mine.yaml")
    assert command("train", "--resume", command.run("kept"), "trainer.checkpoint_every=1").code == 0


def test_resume_of_an_unknown_run_names_the_nearest(command) -> None:
    command.train("trainer.name=monday", "epochs=1")
    outcome = command("train", "--resume", "mondy", f"trainer.storage_path={command.runs}")
    refused(outcome, FAILED, "there is no run mondy", "did you mean monday?")
    refused(command("evaluate", "mondy", "--storage-path", command.runs), FAILED, "did you mean monday?")
    refused(command("sync", "mondy", "--storage-path", command.runs), FAILED, "did you mean monday?")


def test_same_name_twice(command) -> None:
    assert command.train("trainer.name=twin", "epochs=1").code == 0
    before = digests(command.run("twin"))
    refused(command.train("trainer.name=twin", "epochs=2"), USAGE, "the run twin exists", "--resume twin")
    assert digests(command.run("twin")) == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"adapter": [{"kind": "bottleneck", "tower": "image", "width": 3, "ratio": 0.5}]}, "belongs to another task"),
        ({"data": {"classes": ["flower", "bird"]}}, "shots that it would be given now are others"),
        ({"epochs": 9}, "belongs to another task"),
        ({"filter": {"covariance": {"kind": "dense"}}}, "belongs to another task"),
    ],
    ids=["architecture", "classes", "length", "covariance"],
)
def test_resume_with_other_settings_leaves_the_checkpoint_alone(command, change: dict[str, Any], word: str) -> None:
    trained = command.train("preset=kf_clip", "adapter=bottleneck", "adapter.width=4", "epochs=1", "trainer.name=r")
    assert trained.code == 0, trained.err
    file = command.run("r") / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(config))
    before = digests(command.run("r") / "fits")
    outcome = command("train", "--resume", command.run("r"))
    refused(outcome, FAILED, word)
    assert digests(command.run("r") / "fits") == before


def test_locked_by_another_process(command) -> None:
    command.train("trainer.name=busy", "epochs=1")
    lock = command.run("busy") / ".lock"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused(command("train", "--resume", command.run("busy")), USAGE, "the run busy is being driven by another")
    finally:
        holder.communicate("\n", timeout=120)
    assert command("train", "--resume", command.run("busy")).code == 0, "the lock goes with its process"


def test_evaluate_refuses_what_it_would_ignore(command) -> None:
    command.train("trainer.name=e", "epochs=1")
    refused(command("evaluate", command.run("e"), "posterior.draws=8"), USAGE, "leave out posterior.draws")
    file = command.folder / "other.yaml"
    file.write_text("filter.covariance: dense\n")
    refused(command("evaluate", command.run("e"), file), USAGE, "leave out filter.covariance")
    refused(command("evaluate", command.run("e"), "data.shot=8"), USAGE, "did you mean data.shots?")
    refused(command("evaluate", command.run("e"), "data.shots=8"), USAGE, "draws no shots: leave out data.shots")
    elsewhere = f"trainer.storage_path={command.folder}"
    for name in ("evaluate", "ensemble"):  # which would look for it where it always does
        refused(command(name, command.run("e"), elsewhere), USAGE, "name the folder of the run with --storage-path")


def test_evaluate_on_other_data_without_the_domain_that_is_asked_for(command, written) -> None:
    command.train("trainer.name=e", "epochs=1")
    data = written(lambda table: table.drop_columns(["domain"]))
    outcome = command("evaluate", command.run("e"), f"data.path={data}", "data.train_domain=noto")
    refused(outcome, FAILED, "there is no domain 'noto'")


def test_a_template_without_a_place_is_refused_before_any_work(command) -> None:
    outcome = command.train("data.templates=photo", data="nowhere.parquet")
    refused(outcome, USAGE, "prompt template 'photo' needs exactly one {}", "openai_imagenet")


@pytest.mark.parametrize("name", ["weights.safetensors", "covariance-00000-of-00001.safetensors", "manifest.json"])
def test_damaged_checkpoint(command, name: str) -> None:
    command.train("trainer.name=d", "epochs=1")
    (fit,) = (command.run("d") / "fits").iterdir()
    (file,) = fit.glob(f"step-*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(command("evaluate", command.run("d")), FAILED, "holds no usable checkpoint")
    picture = command.folder / "p.png"
    picture.write_bytes(pq.read_table(command.data)["image"][0].as_py())
    refused(command("predict", file.parent, picture), FAILED, str(file))


def test_evaluate_before_the_first_checkpoint(command) -> None:
    command.train("trainer.name=d", "epochs=1")
    (fit,) = (command.run("d") / "fits").iterdir()
    fit.rename(command.folder / "away")
    refused(command("evaluate", command.run("d")), FAILED, "no finished fit yet", "--resume d")


def test_predict_of_a_missing_and_a_broken_picture(command) -> None:
    command.train("trainer.name=p", "epochs=1")
    refused(command("predict", command.run("p"), "no.png"), FAILED, "no.png cannot be read")
    broken = command.folder / "broken.png"
    broken.write_bytes(b"no picture")
    refused(command("predict", command.run("p"), broken), FAILED, "broken.png: the picture cannot be decoded")
    (command.folder / "empty").mkdir()
    refused(command("predict", command.run("p"), command.folder / "empty"), FAILED, "there is no picture in")


# Numbers


def poison_batches(monkeypatch, *steps: int) -> None:
    """Makes the features of some steps NaN."""
    batch = BatchSampler.batch

    def poisoned(self, step, *place):
        found = batch(self, step, *place)
        if step in steps:
            found.inputs.fill_(torch.nan)
        return found

    monkeypatch.setattr(BatchSampler, "batch", poisoned)


def metrics(run: Path, method: str = "kalman") -> list[dict[str, float]]:
    """What was noted of each step."""
    lines = (run / "records" / f"{method}-seed0" / "steps.jsonl").read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines]


def refusals(run: Path, method: str = "kalman") -> list[float]:
    return [step["train/refused"] for step in metrics(run, method)]


@pytest.mark.parametrize(
    ("preset", "says"),
    [("kalman", "features or logits are NaN or infinite"), ("kalman_diagonal", "4 of 4 innovations are NaN or inf")],
)
@pytest.mark.usefixtures("painted")
def test_one_bad_step_is_refused_and_the_run_goes_on(command, monkeypatch, preset: str, says: str) -> None:
    poison_batches(monkeypatch, 4)
    outcome = command("train", *command.settings(f"preset={preset}", "trainer.name=nan", *command.nine_steps), "--json")
    assert outcome.code == 0, outcome.err
    assert f"step 5 of 9, refused: {says}" in outcome.err
    assert outcome.json["refused"] == 1
    assert refusals(command.run("nan")) == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    for figures in (outcome.json["id"], *outcome.json["ood"].values()):
        assert all(0 <= figures[key] < 100 for key in ("accuracy", "nll", "ece", "brier"))


@pytest.mark.parametrize("method", ["kalman", "adamw"])
def test_ten_bad_steps_in_a_row_end_the_run(command, monkeypatch, method: str) -> None:
    poison_batches(monkeypatch, *range(2, 40))
    settings = [f"method={method}", "epochs=8", "batch_size=4", "trainer.checkpoint_every=1", "trainer.name=nan"]
    refused(command.train(*settings), FAILED, "10 steps in a row were refused", "the last at step 12")
    assert list(command.run("nan").glob("fits/*/step-00000011-*/manifest.json")), "what was learned is kept"
    assert sum(refusals(command.run("nan"), method)) == 9


@pytest.mark.parametrize("covariance", ["kronecker", "diagonal", "dense"])
def test_singular_s_is_jittered(command, written, covariance: str) -> None:
    """Four shots of the same pixels, observed as good as exactly: S has rank one, and P all but loses a direction."""

    def repeat(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        for n, row in enumerate(rows):
            wanted = {key: row[key] for key in ("class_name", "domain", "split")}
            if row["split"] == "train":  # what follows a PNG's end is in no picture, but in the file
                row["image"] = table["image"][first_row(table, **wanted)].as_py() + bytes([n])
        return pa.Table.from_pylist(rows, schema=table.schema)

    exact = ["preset=kalman_diagonal", "observation=[log_likelihood,cosine]", "filter.p0=0.1"]
    exact += ["observation.0.r0=1e-14", "observation.1.r0=1e-14"]
    exact += ["noise.tempering=none", "filter.iterations=6", f"filter.covariance={covariance}", "posterior.folds=0"]
    outcome = command.train("trainer.name=s", *exact, data=written(repeat))
    assert outcome.code == 0, outcome.err
    assert sum(refusals(command.run("s"))) == 0
    if covariance == "diagonal":
        assert any(line["train/jitter"] > 0 for line in metrics(command.run("s")))


def test_s_that_stays_indefinite_is_a_clear_stop(command, monkeypatch) -> None:
    solve = sharded_filter.solve_innovation
    monkeypatch.setattr(sharded_filter, "solve_innovation", lambda S, nu: solve(-S, nu))
    sentence = refused(
        command.train("preset=kalman_diagonal", "epochs=4"), FAILED, "not positive definite", "observation.r0"
    )
    assert "filter.p0" in sentence


# Storage


def test_no_space_for_a_checkpoint(command, monkeypatch) -> None:
    save, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        outcome = command.train("trainer.name=full", "trainer.checkpoint_every=2", *command.nine_steps)
    refused(outcome, FAILED, "no space left while writing", str(command.run("full")), "--resume")
    assert list(command.run("full").glob("fits/*/step-00000002-*/manifest.json"))
    resumed = command("train", "--resume", command.run("full"))
    assert resumed.code == 0, resumed.err


def test_no_space_for_features(command, monkeypatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    outcome = command.train(f"data.cache_dir={command.folder}/own")
    refused(outcome, FAILED, "cannot write features", "No space left", "data.cache_dir")
    assert not [p for p in (command.folder / "own").rglob("*") if p.is_file()]


def test_no_space_for_the_configuration(command, monkeypatch) -> None:
    command.train("epochs=1")  # features are there

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(command.train("trainer.name=full"), FAILED, "no space left while writing")


def test_storage_path_that_is_a_file(command) -> None:
    command.runs.write_text("in the way")
    refused(command.train(), FAILED, "cannot write", str(command.runs))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_storage(command) -> None:
    command.runs.mkdir(mode=0o500)
    refused(command.train(), FAILED, "cannot write", "permissions")


# Tracking


def test_unreachable_server_loses_nothing(command) -> None:
    settings = ["tracking.enabled=true", "tracking.uri=http://127.0.0.1:9", "tracking.log_model=false"]
    began = time.monotonic()
    outcome = command("train", *command.settings(*settings, *command.nine_steps, "trainer.name=offline"), "--json")
    assert time.monotonic() - began < 200  # MLflow itself would try again for four minutes
    assert outcome.code == 0, outcome.err
    assert outcome.json["run_id"] is None
    assert "Traceback" not in outcome.err
    assert "http://127.0.0.1:9" in outcome.err
    assert "`kngd-ray sync" in outcome.err
    run = command.run("offline")
    assert json.loads((run / "results.json").read_text()) == outcome.json

    named = next(line for line in outcome.err.splitlines() if "`kngd-ray sync" in line)
    arguments = named.split("`")[1].removeprefix("kngd-ray ").split()
    store = f"sqlite:///{command.folder}/later.db"
    synced = command(*arguments, "--uri", store)
    assert synced.code == 0, synced.err
    assert "MLflow runs up to date: 1 (" in synced.err

    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("kngd_ray")
    (sent,) = client.search_runs([experiment.experiment_id])
    assert sent.data.metrics["id/accuracy"] == pytest.approx(outcome.json["id"]["accuracy"])
    assert sent.data.params["filter.covariance"] == "kronecker"
    history = client.get_metric_history(sent.info.run_id, "train/innovation_rms")
    assert [point.step for point in history] == list(range(1, 10))
    assert sent.info.status == "FINISHED"

    again = command("sync", run, "--uri", store)
    assert again.code == 0
    assert len(client.search_runs([experiment.experiment_id])) == 1

    refused(command("sync", run), FAILED, "127.0.0.1:9")


# As a program


def program(command, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kngd_ray.cli", *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=command.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_program_fails_with_a_sentence(command) -> None:
    done = program(command, "train", *command.settings(data=command.folder / "nothing.parquet"))
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr.startswith("kngd-ray: no such file")
    assert len(done.stderr.splitlines()) == 1
