"""Runs that train towers on pictures, end to end: what they leave is what they tested, and nobody used a feature."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers.cases import some_slow
from helpers.emoji import small_table
from helpers.towers import NAME, tiny_model
from torch import Tensor

from kngd_ray.clip import CLIPNetwork
from kngd_ray.config import load_config
from kngd_ray.console import Display
from kngd_ray.data import FeatureCache, PictureFile, decode, open_images
from kngd_ray.experiment.prepared import PICTURES
from kngd_ray.experiment.run import train
from kngd_ray.filters import kronecker
from kngd_ray.training import checkpoint
from kngd_ray.training.classifier import Classifier
from kngd_ray.training.settled import read_settled

FAILED, USAGE = 1, 2
FULL, LORA = "tune.parameters=full", "tune.parameters=lora"
BOTH = "tune.include=['*']"
ZERO_SHOT = "tune.start=zero_shot"
BIRDS = "data.classes=[flower,bird]"
TINY = ("data.shots=2", "epochs=2", "batch_size=4", BIRDS)
MODEL = (f"model.name={NAME}", "model.pretrained=random")
KALMAN_FULL = (FULL, "filter.towers=0.1", "baselines=adamw")  # of the tiny model: that of LoRA is the embedded one
RUNS: dict[str, tuple[str, ...]] = {
    "kalman-full": (*MODEL, *KALMAN_FULL),
    "kalman-lora": (LORA, "posterior.predict=draws", "posterior.draws=2", "posterior.temperature=0.1"),
    "kalman-norm": ("tune.parameters=norm", "posterior.temperature=0.1"),
    "kalman-cite": ("preset=kalman_cite",),
    "adamw-cite": ("method=adamw", "preset=clip_cite", "optimizer.lr=1e-4"),
    "adamw-lora": ("method=adamw", "preset=clip_lora", "optimizer.lr=1e-2"),
}


QUICK = ("kalman-full", "kalman-lora")  # which other tests need too


class Runs:
    """The runs of this module, each trained once, of the embedded model and data of six pictures a class."""

    def __init__(self, folder: Path, data: Path, cache: Path) -> None:
        self.folder = folder
        self.settings = [
            f"data.path={data}",
            f"data.cache_dir={cache}",
            "data.train_domain=noto",
            "trainer.num_workers=0",
            f"trainer.storage_path={folder}",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            *TINY,
        ]
        self._reports: dict[str, Any] = {}

    def report(self, name: str) -> Any:
        if name not in self._reports:
            logged = str(name == "kalman-lora").lower()
            settings = [*self.settings, f"tracking.enabled={logged}", *RUNS[name], f"trainer.name={name}"]
            self._reports[name] = train(load_config(None, settings), Display(quiet_stdout=True))
        return self._reports[name]

    def fit(self, name: str) -> Path:
        self.report(name)
        return self.folder / name / "fits" / f"{name.split('-')[0]}-seed0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_data, shared_cache) -> Runs:
    torch.set_num_threads(1)
    return Runs(tmp_path_factory.mktemp("runs"), small_data, shared_cache)


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> None:
    """The tiny model is known to open_clip."""
    tiny_model()


@pytest.fixture(scope="module")
def blobs(small_data) -> list[bytes]:
    """The bytes of three pictures."""
    return pq.read_table(small_data)["image"].take([0, 7, 30]).to_pylist()


@pytest.fixture
def pictures(tmp_path, blobs) -> list[Path]:
    paths = [tmp_path / f"{n}.png" for n in range(len(blobs))]
    for path, blob in zip(paths, blobs, strict=True):
        path.write_bytes(blob)
    return paths


@pytest.fixture
def tiny(command, monkeypatch) -> Callable[..., Any]:
    """Trains the tiny model; figures, which take longer, are not drawn."""
    for figure in ("learning_curve", "reliability_diagram"):
        monkeypatch.setattr(f"kngd_ray.experiment.method_run.{figure}", lambda *arguments: None)
    return lambda *settings: command.train(*MODEL, *TINY, "posterior.folds=0", *settings)


def final(fit: Path) -> checkpoint.Checkpoint:
    (folder,) = fit.glob("step-*")
    return checkpoint.load(folder)


def same_weights(one: Path, other: Path) -> bool:
    a, b = final(one).state, final(other).state
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights) and all(
        torch.equal(a.covariance[name], b.covariance[name]) for name in a.covariance
    )


def assert_figures(found: Any, expected: Any) -> None:
    """Every figure of the expected report is in the one found."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_figures(found[key], value)
        else:
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def moved(fit: Path) -> dict[str, bool]:
    """Which weights of the pretrained model are others now."""
    pretrained = dict(Classifier.load(fit).model.network.named_parameters())
    weights = {name.removeprefix("clip."): weight for name, weight in final(fit).state.weights.items()}
    return {name: not torch.equal(weight, pretrained[name]) for name, weight in weights.items() if name in pretrained}


# What a run leaves


@pytest.mark.parametrize("name", some_slow(RUNS, *QUICK))
def test_a_run_is_evaluated_and_predicts_as_it_was_tested(runs, command, pictures, blobs, name) -> None:
    report = runs.report(name)
    state = final(runs.fit(name)).state
    assert bool(state.covariance) == name.startswith("kalman")
    assert all(bool(torch.isfinite(weight).all()) for weight in state.weights.values())

    outcome = command("evaluate", runs.folder / name, "--json")
    assert outcome.code == 0, outcome.err
    assert_figures(outcome.json, {key: report[key] for key in ("id", "ood")})

    outcome = command("predict", runs.folder / name, *pictures, "--json")
    assert outcome.code == 0, outcome.err
    found = torch.tensor([list(row["probabilities"].values()) for row in outcome.json])
    classifier = Classifier.load(runs.fit(name))
    expected = classifier.predict([decode(blob, "") for blob in blobs]).probabilities
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", some_slow(["kalman-full", "kalman-cite", "adamw-cite"], *QUICK))
def test_the_towers_have_moved(runs, name) -> None:
    found = moved(runs.fit(name))
    assert {key.startswith("visual.") for key in found} == ({True} if name == "kalman-full" else {True, False})
    assert np.mean(list(found.values())) > 0.9


@pytest.mark.parametrize("name", some_slow(["kalman-lora", "adamw-lora"], *QUICK))
def test_lora_leaves_the_pretrained_weights_alone(runs, name) -> None:
    assert not moved(runs.fit(name))
    weights = final(runs.fit(name)).state.weights
    assert all(".lora." in key or "adapters" in key for key in weights)
    assert all(bool(weights[key].any()) for key in weights if key.endswith(".up"))


def test_a_baseline_has_its_own_preset_and_the_same_pictures(runs) -> None:
    report = runs.report("kalman-full")
    (baseline,) = report["baselines"]
    assert (report["preset"], baseline["method"], baseline["preset"]) == ("kalman_full", "adamw", "adamw_full")
    fits = runs.folder / "kalman-full" / "fits"
    kalman, adamw = (final(fits / f"{method}-seed0").manifest for method in ("kalman", "adamw"))
    assert kalman["shots"] == adamw["shots"]
    assert kalman["parameters"] == adamw["parameters"]
    assert np.mean(list(moved(fits / "adamw-seed0").values())) > 0.9
    command_line = {key: kalman["options"][key] == adamw["options"][key] for key in ("tune", "adapter", "batch_size")}
    assert all(command_line.values())


def test_draws_differ_from_the_mean(runs, blobs) -> None:
    classifier = Classifier.load(runs.fit("kalman-lora"))
    images = [decode(blob, "") for blob in blobs]
    drawn = classifier.predict(images)
    classifier.calibration = type(classifier.calibration)(0.0, 1.0)
    mean = classifier.predict(images)
    assert (drawn.probabilities - mean.probabilities).abs().max() > 1e-4
    assert bool((drawn.logit_std > 0).all())
    assert not mean.logit_std.any()
    torch.testing.assert_close(drawn.probabilities.sum(1), torch.ones(len(images)))


def test_the_logged_model_predicts_the_same(runs, blobs) -> None:
    import mlflow
    import pandas as pd

    run_id = runs.report("kalman-lora")["run_id"]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{runs.folder}/mlflow.db")
    try:
        (logged,) = mlflow.search_logged_models([mlflow.get_run(run_id).info.experiment_id], output_format="list")
        model = mlflow.pyfunc.load_model(logged.model_uri)
    finally:
        mlflow.set_tracking_uri(before)
    found = torch.tensor(model.predict(pd.DataFrame({"image": blobs}))["probabilities"].tolist())
    expected = Classifier.load(runs.fit("kalman-lora")).predict([decode(blob, "") for blob in blobs])
    torch.testing.assert_close(found, expected.probabilities, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(
    "settings",
    [
        (FULL, "filter.covariance=kronecker"),
        (LORA, "filter.covariance=block_diagonal", "tune.alpha=0.5"),
        (FULL, "noise.process={kind: ornstein_uhlenbeck, gamma: 0.9}", "tune.precision=bfloat16"),
        (
            FULL,
            "observation=[cosine,probability]",
            "noise.observation=ema",
            "filter.gate=skip",
            "adapter=[]",
            ZERO_SHOT,
        ),
    ],
    ids=["kronecker", "block_diagonal-alpha", "ornstein_uhlenbeck-bfloat16", "ema-gate"],
)
def test_draws_of_other_families_and_processes(tiny, command, settings) -> None:
    outcome = tiny(*settings, "trainer.name=t", "posterior.predict=draws", "posterior.draws=2", "--json")
    assert outcome.code == 0, outcome.err
    again = command("evaluate", command.run("t"), "--json")
    assert again.code == 0, again.err
    assert_figures(again.json, {key: outcome.json[key] for key in ("id", "ood")})


def test_layers_that_cannot_be_factored_are_told(tiny, command, monkeypatch) -> None:
    """The step goes on without them, and their weights stay as uncertain as they were."""

    def broken(*_: object) -> None:
        raise torch.linalg.LinAlgError("singular")

    monkeypatch.setattr(kronecker, "_sweep_of_tokens", broken)
    outcome = tiny(FULL, "filter.covariance=kronecker", "trainer.name=t", "posterior.predict=mean")
    assert outcome.code == 0, outcome.err
    said = re.search(r"kalman-seed0: in (\d+) steps up to (\d+) parts of the covariance", " ".join(outcome.err.split()))
    assert said is not None, outcome.err
    record = command.run("t") / "records" / "kalman-seed0" / "steps.jsonl"
    steps = [json.loads(line) for line in record.read_text().splitlines()]
    assert [step["metrics"]["train/unlearned"] for step in steps] == [int(said[2])] * int(said[1])
    assert int(said[2]) > 1


def test_alpha_0_is_the_pretrained_model(tiny) -> None:
    """Its scores are those of zero-shot, whatever was learned."""
    outcome = tiny(FULL, ZERO_SHOT, "tune.alpha=0", "filter.towers=1", "adapter=[linear]", "trainer.name=t", "--json")
    assert outcome.code == 0, outcome.err
    plain = {key: value for key, value in outcome.json["id"].items() if key != "temperature_scaled"}
    assert_figures(outcome.json["zero_shot"]["id"], plain)


def test_a_fold_may_hold_out_nothing(tiny) -> None:
    """Two classes of two shots in four folds: one stays empty."""
    outcome = tiny(LORA, "method=sgd", "posterior.folds=4", "trainer.name=t")
    assert outcome.code == 0, outcome.err


# Pictures, and no features of them


def test_no_feature_of_a_training_picture_is_used_but_for_a_head(tiny, command, monkeypatch) -> None:
    assert tiny(FULL, ZERO_SHOT, "trainer.name=plain").code == 0
    report = command("evaluate", command.run("plain"), "--json").json
    emptied = command("evaluate", command.run("plain"), f"data.cache_dir={command.folder / 'empty'}", "--json")
    assert emptied.code == 0, emptied.err
    assert_figures(emptied.json, {key: report[key] for key in ("id", "ood")})

    def noise(self: FeatureCache, keys: Any) -> Any:
        return np.random.default_rng(0).normal(size=(len(keys), tiny_model().embed_dim)).astype(np.float32)

    monkeypatch.setattr(FeatureCache, "read", noise)
    outcome = tiny(FULL, ZERO_SHOT, "trainer.name=noise", "--json")
    assert outcome.code == 0, outcome.err
    plain, noisy = (command.run(name) / "fits" / "kalman-seed0" for name in ("plain", "noise"))
    assert same_weights(plain, noisy)
    assert outcome.json["id"]["nll"] == pytest.approx(report["id"]["nll"], rel=1e-6)


@pytest.mark.parametrize("method", ["kalman", "adamw"])
def test_a_run_says_where_its_towers_begin(tiny, method) -> None:
    """In its first lines, before anything is fitted."""
    for start, said in (("head", "class_residual fitted first by the default preset"), ("zero_shot", "zero-shot CLIP")):
        outcome = tiny(LORA, f"method={method}", f"tune.start={start}", "epochs=0", f"trainer.name={start}")
        assert outcome.code == 0, outcome.err
        assert said in " ".join((outcome.out + outcome.err).split())


def test_towers_that_may_not_move_are_the_heads_run(tiny, command, pictures) -> None:
    """Figures, tau, intervals and novelty of the default preset's run on the same shots and the same crops of them."""
    assert tiny(LORA, "filter.tower_logit_variance=0", "tune.views=2", "trainer.name=towers").code == 0
    told = (
        "trainer.name=head",
        "tune.views=2",
        "epochs=1",
        "batch_size=0",
        "posterior.folds=4",
        "posterior.tau_spread=1.5",
    )
    assert tiny(*told).code == 0
    found, expected = (command("evaluate", command.run(name), "--json").json for name in ("towers", "head"))
    assert_figures(found, {key: expected[key] for key in ("id", "ood")})
    moved, plain = (command("predict", command.run(name), *pictures, "--json").json for name in ("towers", "head"))
    for row, wanted in zip(moved, plain, strict=True):
        for key in ("probability_low", "probability_high", "novelty"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5)


def test_the_shots_of_all_seeds_are_kept_in_the_run(tiny, command) -> None:
    outcome = tiny(FULL, "seeds=0,1", "trainer.name=t", "--json")
    assert outcome.code == 0, outcome.err
    kept = PictureFile.open(command.run("t") / PICTURES)
    config = load_config(command.run("t") / "config.yaml")
    images = open_images(config.data)
    assert 4 <= len(kept) <= 8
    assert set(kept.keys.tolist()) <= set(images.keys[images.domains == "noto"].tolist())
    fits = [command.run("t") / "fits" / f"kalman-seed{seed}" for seed in (0, 1)]
    assert not same_weights(*fits)


def damaged(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()  # another file: this one is mapped
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["picture", "footer", "cut"])
def test_damaged_pictures_are_told_of_on_resume(tiny, command, where) -> None:
    assert tiny(FULL, "trainer.name=t").code == 0
    fit, path = command.run("t") / "fits" / "kalman-seed0", command.run("t") / PICTURES
    whole = shutil.move(fit, command.folder / "whole")
    if where == "picture":
        damaged(path, path.read_bytes().index(PictureFile.open(path).read(1)) + 40)
    elif where == "footer":
        damaged(path, path.stat().st_size - 1)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    outcome = command("train", "--resume", command.run("t"))
    assert outcome.code == FAILED
    assert str(path) in outcome.sentence
    assert "delete" in outcome.sentence
    path.unlink()
    outcome = command("train", "--resume", command.run("t"))
    assert outcome.code == 0, outcome.err
    assert same_weights(fit, Path(whole))


@pytest.mark.parametrize("skip", [True, False])
def test_a_picture_that_cannot_be_decoded(tiny, command, tmp_path, skip) -> None:
    table = small_table()
    bad = [0, 2, 3, 6]  # three of the five to learn from and one to test on, of the first class
    images = table["image"].to_pylist()
    assert {(table["split"][row].as_py(), table["domain"][row].as_py()) for row in bad} == {
        ("train", "noto"),
        ("test", "noto"),
    }
    for row in bad:
        images[row] = b"no picture"
    column = table.schema.get_field_index("image")
    pq.write_table(table.set_column(column, "image", pa.array(images, pa.binary())), tmp_path / "bad.parquet")
    settings = (FULL, f"data.path={tmp_path / 'bad.parquet'}", "trainer.name=t")
    outcome = tiny(*settings, *(["data.on_bad_image=skip"] if skip else []))
    if not skip:
        assert outcome.code == FAILED
        assert "cannot be decoded" in outcome.sentence
        assert not command.run("t").exists()
        return
    assert outcome.code == 0, outcome.err
    assert "undecodable pictures left out: " in outcome.err
    kept = PictureFile.open(command.run("t") / PICTURES)
    assert len(kept) == 4
    assert all(decode(kept.read(n), kept.place(n)) for n in range(4))
    again = command("evaluate", command.run("t"))
    assert again.code == 0, again.err


# What is refused, and when


@pytest.mark.parametrize(
    ("code", "settings", "words"),
    [
        (FAILED, (FULL, "tune.include=[visual.trnsformer]"), ("no weight matches", "visual.transformer")),
        (FAILED, (LORA, "tune.include=[visual.transformer.resblocks.9]"), ("no layer matches", "resblocks.1")),
        (FAILED, (LORA, "tune.targets=[pointwise]"), ("have only k, mlp, out, q, v", "change either")),
        (FAILED, (FULL, "tune.exclude=['*']"), ("tune.exclude", "take a pattern out")),
        (USAGE, (LORA, "tune.rank=0"), ("rank is 0", "at least rank 1")),
        (USAGE, ("tune.parameter=full",), ("unknown key 'tune.parameter'", "tune.parameters")),
        (USAGE, ("tune.parameters=ful",), ("did you mean full?",)),
        (USAGE, ("observation=clip_cite",), ("clip_cite", "tune.parameters")),
        (USAGE, ("method=adamw", "optimizer.loss=clip_cite"), ("clip_cite", "tune.parameters")),
        (USAGE, (FULL, "filter.serial=2"), ("filter.serial is 2", "leave it out")),
        (USAGE, (LORA, "filter.iterations=2"), ("filter.iterations is 2", "leave it out")),
        (USAGE, (FULL, "filter.covariance=dense"), ("filter.covariance is dense", "diagonal")),
        (USAGE, (FULL, "tune.checkpointing=true"), ("tune.checkpointing", "kalman")),
        (USAGE, (FULL, "tune.alpha=2"), ("alpha is 2", "[0, 1]")),
        (USAGE, (FULL, "tune.alpha=0.5", "adapter=[bottleneck]"), ("bottleneck", "alpha=1")),
        (
            USAGE,
            (FULL, ZERO_SHOT, BOTH, "posterior.predict=linearised"),
            ("posterior.predict=linearised", "mean or draws"),
        ),
    ],
    ids=lambda value: None if isinstance(value, int) else " ".join(value) if value[0].startswith(("tune", "f")) else "",
)
def test_refused_at_the_door(tiny, command, monkeypatch, code, settings, words) -> None:
    monkeypatch.setattr("kngd_ray.experiment.run.prepare", None)  # no picture is encoded before
    outcome = tiny(*settings, "trainer.name=t")
    assert outcome.code == code
    assert outcome.out == ""
    for word in words:
        assert word in outcome.sentence
    assert not command.run("t").exists()


def test_a_tower_that_cannot_recompute(tiny, command, tmp_path) -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "kngd-test-resnet.json").write_text(
        json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path / "kngd-test-resnet.json")
    settings = ("model.name=kngd-test-resnet", FULL, "method=adamw", "trainer.name=t")
    outcome = tiny(*settings, "tune.checkpointing=true")
    assert outcome.code == FAILED
    assert "image tower of kngd-test-resnet has no gradient checkpointing" in outcome.sentence
    assert not command.run("t").exists()


def test_a_prior_of_another_kind(tiny, command) -> None:
    assert tiny(FULL, "trainer.name=full").code == 0
    assert tiny(FULL, "trainer.name=second", "prior=full").code == 0
    first, second = (read_settled(command.run(name) / "fits" / "kalman-seed0") for name in ("full", "second"))
    assert first.calibration.tau > 0
    assert (second.calibration.tau, second.novelty) == (0, None), "tau of a head on these shots alone is not this fit's"
    for settings, says in (((LORA,), "lora"), ((), "adapter")):
        outcome = tiny(*settings, "prior=full", "trainer.name=t")
        assert outcome.code == FAILED
        assert f"was trained with tune.parameters=full, this run has {says}" in outcome.sentence
    outcome = tiny(FULL, "tune.exclude=[visual.proj]", "prior=full", "trainer.name=t")
    assert outcome.code == FAILED
    assert "tune.exclude" in outcome.sentence


CPU_SAYS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("error", "settings", "words", "absent"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nMore"), (FULL,), ("(CUDA out of memory)",), ("checkpointing",)),
        (RuntimeError(CPU_SAYS), (FULL, "method=adamw"), ("can't allocate", "tune.checkpointing=true"), ()),
        (MemoryError(), (LORA,), ("does not fit into memory: lower batch_size",), ("()",)),
        (MemoryError(), (FULL, "tune.precision=bfloat16"), ("trainer.num_workers",), ("bfloat16",)),
        (MemoryError(), (FULL, "filter.covariance=kronecker"), ("filter.covariance=diagonal",), ()),
    ],
    ids=["gpu", "cpu", "silent", "bfloat16", "kronecker"],
)
def test_a_batch_too_large_for_memory(tiny, monkeypatch, error, settings, words, absent) -> None:
    forward = CLIPNetwork.forward

    def full(self: CLIPNetwork, inputs: Any) -> Tensor:
        if len(inputs["image"]) == 4:
            raise error
        return forward(self, inputs)

    monkeypatch.setattr(CLIPNetwork, "forward", full)
    outcome = tiny(*settings, "trainer.name=t")
    assert outcome.code == FAILED
    assert "a step of 4 samples does not fit into memory" in outcome.sentence
    for word in words:
        assert word in outcome.sentence
    for word in absent:
        assert word not in outcome.sentence


LITTLE = """
import json, resource, sys
from dataclasses import replace
from pathlib import Path
import torch
from helpers.tower_fits import make_task, write_shots
from kngd_ray.training.job import Job, run_fits

torch.set_num_threads(1)
folder = Path(sys.argv[1])
large = make_task("full-vdekf", write_shots(folder / "pictures.arrow", 2000))
small = replace(large, support=large.support.subset(torch.arange(4)))
large = replace(large, options=replace(large.options, batch_size=2000, epochs=1))
errors = []
run_fits(Job({"before": small}, {}, folder), lambda event: errors.append(event.error))
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (60 << 20), held + (60 << 20)))
run_fits(Job({"large": large, "after": small}, {}, folder), lambda event: errors.append(event.error))
print(json.dumps([[error for error in errors if error], len(list(folder.glob("fits/after/step-*")))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is limited as on Linux")
def test_memory_that_the_system_refuses(tmp_path) -> None:
    """And the next fit of the job goes on."""
    done = subprocess.run(
        [sys.executable, "-c", LITTLE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    (error,), finished = json.loads(done.stdout)
    assert error.startswith("a step of 2000 samples does not fit into memory (")
    assert "lower batch_size" in error
    assert finished == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["kalman", "adamw"])
@pytest.mark.parametrize("begins", [True, False])
def test_activations_that_are_not_finite(tiny, monkeypatch, method, precision, begins) -> None:
    forward = CLIPNetwork.forward

    def overflowing(self: CLIPNetwork, inputs: Any) -> Tensor:
        outputs = forward(self, inputs)
        return outputs * torch.inf if begins or len(inputs["image"]) == 4 else outputs

    monkeypatch.setattr(CLIPNetwork, "forward", overflowing)
    outcome = tiny(FULL, f"method={method}", f"tune.precision={precision}", "trainer.name=t")
    assert outcome.code == FAILED
    assert "NaN or infinite" in outcome.sentence
    assert ("set tune.precision=float32" in outcome.sentence) == (precision == "bfloat16")


# Searches


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_an_export_says_what_its_precision_changes(command, tiny, precision) -> None:
    assert tiny(LORA, "method=adamw", f"tune.precision={precision}", "trainer.name=half").code == 0
    outcome = command("export", command.run("half"), "--out", command.folder / "out")
    assert outcome.code == 0, outcome.err
    told = "it is in float32, and the run's trained towers work in bfloat16: logits of random pictures differ by up to"
    assert (told in outcome.err) == (" in float32)" in outcome.err) == (precision == "bfloat16")


@pytest.fixture
def tune(command, tiny, monkeypatch) -> Callable[..., Any]:
    monkeypatch.setattr("kngd_ray.tuning.run.study_figures", lambda *arguments: [])

    def run(*arguments: str, **space: Any) -> Any:
        search = {"num_samples": 2, "sampler": "random", "seeds": [0]}
        file = command.folder / "search.yaml"
        file.write_text(yaml.safe_dump({"search": search, "space": space["space"]}))
        return command("tune", file, *command.settings(*MODEL, *TINY, *arguments))

    return run


P0 = {"filter.p0": {"low": 0.001, "high": 1.0, "log": True}, "filter.towers": {"low": 0.001, "high": 0.1, "log": True}}


@pytest.mark.parametrize("objective", some_slow(["held_out_nll", "evidence"], "evidence"))
def test_a_search_over_pictures(tune, command, objective) -> None:
    outcome = tune(FULL, f"search.objective={objective}", "posterior.folds=2", "trainer.name=s", "--json", space=P0)
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["trials"] == {"finished": 2, "failed": 0, "stopped": 0}
    assert set(report["best"]["params"]) == set(P0)
    fit = command.run(report["run"]) / "fits" / "kalman-seed0"
    options = final(fit).manifest["options"]
    assert options["filter"]["towers"] == pytest.approx(report["best"]["params"]["filter.towers"])
    assert options["tune"]["parameters"] == "full"
    assert (command.run("s") / PICTURES).is_file()


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"tune.parameters": {"choices": ["lora", "full"]}}, ("a search keeps tune.parameters",)),
        ({"filter.serial": {"low": 0, "high": 4, "integer": True}}, ("filter.serial",)),
        ({"filter.covariance": {"choices": ["diagonal", "dense"]}}, ("filter.covariance", "dense")),
    ],
)
def test_a_space_that_towers_do_not_have(tune, command, space, words) -> None:
    outcome = tune(FULL, "trainer.name=s", space=space)
    assert outcome.code == USAGE
    for word in words:
        assert word in outcome.sentence
    assert not command.run("s").exists()


def test_a_search_over_what_is_trained(tune) -> None:
    space = {"tune.rank": {"choices": [1, 2]}, "tune.scaling": {"low": 0.5, "high": 2.0}}
    outcome = tune(LORA, "search.objective=evidence", "search.refit=false", "trainer.name=s", "--json", space=space)
    assert outcome.code == 0, outcome.err
    assert outcome.json["trials"]["finished"] == 2


@pytest.mark.parametrize("method", ["kalman", "adamw"])
def test_a_frozen_image_tower_is_not_run(runs, monkeypatch, method):
    """Of the text tower alone the pictures are cached features: to learn from, and to be tested on."""
    runs.report("kalman-full")  # whose zero-shot figures have filled the cache
    monkeypatch.setattr(CLIPNetwork, "encode", lambda *_: pytest.fail("the image tower was run"))
    text = (LORA, "tune.include=[transformer.*]", "tune.exclude=[]", f"method={method}", "tracking.enabled=false")
    name = f"text-{method}"
    report = train(load_config(None, [*runs.settings, *text, f"trainer.name={name}"]), Display(quiet_stdout=True))
    assert report["id"]["nll"] != report["zero_shot"]["id"]["nll"]
    assert not (runs.folder / name / PICTURES).exists()
