"""Few-shot, domain generalisation, base to new and cross-data-set: what each tests on, against figures by hand."""

import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from test_commands import FIGURES, REPORT
from torch.nn.functional import normalize

from kngd_ray.clip import CLIPHead, ModelConfig, load_model
from kngd_ray.config import load_config
from kngd_ray.data import DataConfig, FeatureCache, open_images, select
from kngd_ray.errors import UsageError
from kngd_ray.experiment import method_run
from kngd_ray.experiment.protocols import _names
from kngd_ray.training.calibration import Calibration
from kngd_ray.training.classifier import Classifier
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.metrics import Scores
from kngd_ray.training.pixels import TestPictures
from kngd_ray.training.restoring import open_fit

FOUR = ("bird", "flower", "plant", "tool")
TEMPLATE = ("a photo of a {}.",)
AS_ZERO_SHOT = "new classes are ranked as by zero-shot CLIP"


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four classes in two domains."""
    from helpers.emoji import small_table

    path = tmp_path_factory.mktemp("four") / "four.parquet"
    pq.write_table(small_table(FOUR), path)
    return path


@pytest.fixture(scope="module")
def mini():
    return load_model(ModelConfig())


@pytest.fixture
def by_hand(shared_cache, mini):
    """Scores on the test pictures of some classes, by a function of embeddings."""

    def scores(
        path, classes, *, domain=None, fraction=0.3, image=lambda z: z, without=(), gamma=1.0
    ) -> dict[str, float]:
        images = open_images(DataConfig(path=str(path), classes=classes), test_fraction=fraction)
        rows = (images.splits == "test") & ~np.isin(images.keys, without)
        if domain is not None:
            rows &= images.domains == domain
        cache = FeatureCache(shared_cache, mini.fingerprint, mini.embed_dim)
        z = normalize(image(torch.from_numpy(cache.read(images.keys[rows]))), dim=-1)
        head = CLIPHead(mini.encode_classes(images.class_names, TEMPLATE), mini.logit_scale)
        head.gamma = gamma
        with torch.no_grad():
            return Scores.of(head(z).softmax(1), torch.from_numpy(images.labels[rows].copy())).as_dict()

    return scores


def same(found, expected) -> None:
    assert {figure: found[figure] for figure in FIGURES} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def of_others(gamma: float) -> float:
    """The square root of gamma_0, from the head's gamma, which is 0.7 times a power of it."""
    rest = gamma / 0.7
    assert rest != 1.0
    return rest if rest > 1.0 else rest**10


def test_base_to_new(command, four, by_hand, monkeypatch) -> None:
    outcome = command(
        "train", "--json", *command.settings("protocol=bng", "trainer.name=b", *command.nine_steps, data=four)
    )
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert set(report) == REPORT | {"protocol"}
    found = report["protocol"]
    assert set(found) == {"name", "base", "new", "hm"}
    assert found["name"] == "bng"
    assert found["base"] == report["id"]
    a, b = found["base"]["accuracy"], found["new"]["accuracy"]
    assert found["hm"] == pytest.approx(2 / (1 / a + 1 / b))
    checkpoint = open_fit(command.run("b") / "fits" / "kalman-seed0")[0]
    assert checkpoint.manifest["class_names"] == list(FOUR[:2])
    pretrained = report["zero_shot"]["protocol"]
    assert set(pretrained) == set(found)
    same(pretrained["base"], by_hand(four, FOUR[:2], domain="noto"))
    new = by_hand(four, FOUR[2:], domain="noto")
    same(pretrained["new"], new)
    # a residual of a class says nothing of others; how far zero-shot logits can be believed does
    gamma = of_others(float(checkpoint.state.replicated["head/gamma"]))
    same(found["new"], by_hand(four, FOUR[2:], domain="noto", gamma=gamma))
    assert found["new"]["accuracy"] == new["accuracy"]
    metrics = json.loads((command.run("b") / "records" / "kalman-seed0" / "metrics.json").read_text())
    assert metrics["protocol/new/accuracy"] == found["new"]["accuracy"]
    assert metrics["protocol/hm"] == found["hm"]
    assert metrics["zero_shot/protocol/new/nll"] == pretrained["new"]["nll"]
    assert "2 classes trained on, 2 others" in outcome.err
    assert "harmonic" in outcome.err
    assert AS_ZERO_SHOT in outcome.err
    own = command("evaluate", command.run("b"), "--json").json
    assert own["id"]["nll"] == pytest.approx(report["id"]["nll"])
    # a run that was cut short goes on with its half
    step = KalmanNGD.step

    def interrupted(self, batch):
        if batch.step == 4:
            raise KeyboardInterrupt
        return step(self, batch)

    cut = ("protocol=bng", "trainer.name=cut", "trainer.checkpoint_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(KalmanNGD, "step", interrupted)
        assert command.train(*cut, *command.nine_steps, data=four).code == 130
    outcome = command("train", "--resume", "cut", f"trainer.storage_path={command.runs}", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["protocol"] == found


def test_new_classes_are_not_sharpened(command, four, monkeypatch) -> None:
    """How uncertain predictions of the trained classes were says nothing of theirs."""
    found = []
    for factor in (1.0, 3.0):

        def choose(*_: object, factor: float = factor) -> tuple[Calibration, None]:
            return Calibration(0.1, 1.0, sharpening=factor), None

        monkeypatch.setattr(method_run, "calibrate_and_compare", choose)
        outcome = command("train", "--json", *command.settings("protocol=bng", f"trainer.name=f{factor:g}", data=four))
        assert outcome.code == 0, outcome.err
        found.append(outcome.json["protocol"])
    plain, sharp = found
    assert plain["new"] == sharp["new"]
    assert abs(plain["base"]["nll"] - sharp["base"]["nll"]) > 1e-3


def test_what_adapts_embeddings_carries_over(command, four, by_hand) -> None:
    """Of a class list in an order of its own, which is what is halved."""
    settings = ["protocol=bng", "method=adamw", "adapter=linear", "data.classes=[tool,plant,bird,flower]"]
    settings = command.settings(*settings, "trainer.name=l", "optimizer.lr=0.01", "posterior.folds=0", data=four)
    outcome = command("train", "--json", *settings)
    assert AS_ZERO_SHOT not in outcome.err
    report = outcome.json
    checkpoint, _ = open_fit(command.run("l") / "fits" / "adamw-seed0")
    assert checkpoint.manifest["class_names"] == ["tool", "plant"]
    ((name, W),) = checkpoint.state.weights.items()
    assert name.startswith("adapters.0")
    new = by_hand(four, FOUR[:2], domain="noto", image=lambda z: z + z @ W.mT)
    same(report["protocol"]["new"], new)
    assert abs(new["nll"] - report["zero_shot"]["protocol"]["new"]["nll"]) > 1e-3


def test_towers_carry_over(command, four) -> None:
    """Of both towers trained, against their own encoders."""
    settings = command.settings("protocol=bng", "method=adamw", "tune.parameters=lora", "tune.include=['*']", data=four)
    settings += ["trainer.name=t", "data.shots=1", "epochs=1", "optimizer.lr=0.01"]
    report = command("train", "--json", *settings).json
    classifier = Classifier.load(command.run("t") / "fits" / "adamw-seed0")
    network = classifier.predictor.head
    images = open_images(DataConfig(path=str(four), classes=FOUR[2:]))
    tests = TestPictures(images, ((images.splits == "test") & (images.domains == "noto")).nonzero()[0])
    z = torch.cat([network.encode(pixels) for pixels in tests.pixels(network.transform)])
    t = network.classifier_for(FOUR[2:], TEMPLATE)
    gamma = of_others(network.head.gamma)
    p = (gamma * network.logit_scale * z @ t.mT).softmax(1)
    same(report["protocol"]["new"], Scores.of(p.detach(), tests.labels).as_dict())
    assert report["protocol"]["new"]["nll"] != pytest.approx(report["zero_shot"]["protocol"]["new"]["nll"], rel=1e-3)


def test_several_seeds_a_baseline_and_numbers_for_labels(command, four, by_hand) -> None:
    """Labels without names are cut in half as named ones are, and every figure has its interval."""
    bare = command.folder / "bare.parquet"
    pq.write_table(pq.read_table(four).drop_columns(["class_name"]), bare)
    names = "data.classes=[bird,flower,plant,tool]"
    settings = command.settings("protocol=bng", names, "seeds=0,1", "baselines=adamw", "trainer.name=s", data=bare)
    outcome = command("train", "--json", *settings, "epochs=1", "posterior.folds=0")
    assert outcome.err.count(AS_ZERO_SHOT) == 2  # once a method, whatever the number of seeds
    report = outcome.json
    (baseline,) = report["baselines"]
    for part in (report, baseline, report["zero_shot"], baseline["zero_shot"]):
        assert part["protocol"]["name"] == "bng"
        assert set(part["protocol"]["hm"]) == {"mean", "low", "high"}
        assert set(part["protocol"]["new"]["nll"]) == {"mean", "low", "high"}
    new = by_hand(four, FOUR[2:], domain="noto")["nll"]
    assert report["zero_shot"]["protocol"]["new"]["nll"]["mean"] == pytest.approx(new, rel=1e-4)
    assert report["protocol"]["base"]["accuracy"] == report["id"]["accuracy"]


def test_cross_data_set(command, four, by_hand) -> None:
    """Another class list, once with its own split and once without; the run goes on from another folder."""
    pictures = pq.read_table(four)
    others = pictures.filter(pc.greater(pictures["label"], 1))
    (command.folder / "a").mkdir()
    pq.write_table(others, command.folder / "a" / "set.parquet")
    pq.write_table(pictures.drop_columns(["domain", "split"]), command.folder / "set.parquet")
    settings = command.settings("protocol=cdg", "targets=[a/set.parquet,set.parquet]", "trainer.name=c", "epochs=1")
    outcome = command("train", "--json", *settings)
    assert outcome.code == 0, outcome.err
    report = outcome.json
    found = report["protocol"]
    assert set(found) == {"name", "targets"}
    first, second = [name for name in found["targets"] if name != "mean"]
    assert first == "a/set"
    assert second.endswith("/set")
    pretrained = report["zero_shot"]["protocol"]["targets"]
    same(pretrained[first], by_hand(command.folder / "a" / "set.parquet", None))
    own = open_images(DataConfig(path=str(command.data)))
    shots = own.keys[select(own, DataConfig(train_domain="noto", shots=4), 0).support]  # some are in it
    same(pretrained[second], by_hand(command.folder / "set.parquet", None, fraction=1.0, without=shots))
    target = open_images(DataConfig(path=str(command.folder / "set.parquet")), test_fraction=1.0)
    inside = int(np.isin(target.keys, shots).sum())
    assert f"{second}: no split is stated" in outcome.err
    told = f"{inside} test pictures left out: the run, or one that it continues, learns from them"
    assert told in " ".join(outcome.err.split())
    for figures in (found["targets"], pretrained):
        for figure in FIGURES:
            assert figures["mean"][figure] == pytest.approx((figures[first][figure] + figures[second][figure]) / 2)
    assert "data set" in outcome.err
    command.monkeypatch.chdir(command.folder / "a")
    resumed = command("train", "--resume", "c", f"trainer.storage_path={command.runs}", "--json").json
    assert resumed["protocol"] == found


def test_domain_generalisation(command) -> None:
    outcome = command("train", "--json", *command.settings("protocol=dg", "epochs=1"))
    assert outcome.json["protocol"] == outcome.json["zero_shot"]["protocol"] == {"name": "dg"}
    assert "domains that nothing was learned from" in outcome.err
    assert len([line for line in outcome.err.splitlines() if line.strip().startswith("twemoji")]) == 1


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        (["protocol=bng"], 1, "halves of 3 classes"),
        (["protocol=cdg"], 2, "protocol is cdg without targets"),
        (["targets=[a.parquet]"], 2, "targets are for protocol=cdg, and protocol is fsl"),
        (["protocol=cdg", "targets=[a.parquet]"], 1, "the target a.parquet cannot be tested on: no such file"),
        (["protocol=cdg", "targets=[text.parquet]"], 1, "the target text.parquet cannot be tested on"),
        (["protocol=cdg", "targets=[one.parquet]"], 1, "it lacks a second class"),
        (["protocol=cdg", "targets=[embedded,embedded]"], 2, "names a data set twice"),
        (["protocol=dg", "data.ood_domains=[]"], 2, "protocol=dg needs a test domain that is not trained on"),
        (["protocol=bgn"], 2, "did you mean bng?"),
    ],
)
def test_what_cannot_be_tested_is_refused_before_training(command, four, settings, code, says) -> None:
    pictures = pq.read_table(four)
    (command.folder / "text.parquet").write_text("no pictures")
    pq.write_table(pictures.filter(pc.equal(pictures["label"], 0)), command.folder / "one.parquet")
    outcome = command.train(*settings)
    assert (outcome.code, says in outcome.sentence) == (code, True), outcome.sentence
    assert not command.runs.exists()


def test_data_sets_are_told_apart_by_their_files(tmp_path) -> None:
    file = tmp_path / "one" / "t.parquet"
    file.parent.mkdir()
    file.touch()
    (tmp_path / "two").symlink_to(file.parent)
    assert _names(["t_v1.0", "t_v1.1"]) == ["t_v1.0", "t_v1.1"]
    assert _names(["a/t.parquet", "b/t.parquet"]) == ["a/t", "b/t"]
    with pytest.raises(UsageError, match="names a data set twice"):
        _names([str(file), str(tmp_path / "two" / "t.parquet")])


def test_baselines_and_printed_settings_keep_the_protocol(command) -> None:
    printed = command("train", "protocol=cdg", "targets=[x.parquet,y]", "--print-config").out
    file = command.folder / "printed.yaml"
    file.write_text(printed)
    config = load_config(file)
    assert (config.protocol, config.targets) == ("cdg", ("x.parquet", "y"))
