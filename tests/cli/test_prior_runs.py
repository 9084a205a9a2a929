"""``train prior=``: runs that continue from earlier ones, and those that cannot."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from kngd_ray.training import checkpoint

FAILED, USAGE = 1, 2


def refused(outcome: Any, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.sentence, outcome.sentence
    assert "('" not in outcome.sentence, "a sentence, not a tuple"


def trained(command, *settings: str) -> Any:
    outcome = command.train(*settings)
    assert outcome.code == 0, outcome.err
    return outcome


def ended(command, run: str, fit: str = "kalman-seed0") -> checkpoint.Checkpoint:
    """The final checkpoint of a fit."""
    (folder,) = (command.run(run) / "fits" / fit).glob("step-*")
    return checkpoint.load(folder)


def same(one: checkpoint.Checkpoint, other: checkpoint.Checkpoint, *, covariance: bool = True) -> bool:
    pairs = [(one.state.weights, other.state.weights)]
    pairs += [(one.state.covariance, other.state.covariance)] if covariance else []
    return all(set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def content(found: checkpoint.Checkpoint) -> str:
    return hashlib.sha256(json.dumps(found.manifest["files"], sort_keys=True).encode()).hexdigest()


# What continues

STILL = ("epochs=0", "posterior.folds=0")  # a fit that ends where it begins


def test_a_second_domain_is_learned_from_the_posterior_of_the_first(command) -> None:
    trained(command, "trainer.name=first")
    outcome = trained(command, "trainer.name=second", "prior=first", "data.train_domain=twemoji")
    assert "continued from first" in " ".join(outcome.out.split())
    first, second = ended(command, "first"), ended(command, "second")
    assert second.manifest["prior"] == content(first)
    assert first.manifest["prior"] is None
    assert not same(first, second)
    assert yaml.safe_load((command.run("second") / "config.yaml").read_text())["prior"] == str(command.run("first"))
    scored = command("evaluate", command.run("second"), "--json")
    assert scored.code == 0, scored.err
    assert set(scored.json["ood"]) == {"mean", "noto"}
    picture = command.folder / "picture.png"
    picture.write_bytes(pq.read_table(command.data)["image"][0].as_py())
    assert command("predict", command.run("second"), picture).code == 0


@pytest.mark.parametrize("family", ["diagonal", "dense"])
def test_it_starts_at_the_mean_and_the_covariance(command, family: str) -> None:
    covariance = f"filter.covariance={family}"
    own = ("preset=kf_clip", "adapter=bottleneck", "adapter.width=4", covariance, "posterior.folds=0")
    trained(command, *own, "epochs=1", "trainer.name=first")
    settings = (*own, "filter.logit_variance=7", "prior=first")
    trained(command, *settings, *STILL, "trainer.name=still")
    assert same(ended(command, "first"), ended(command, "still"))


def test_each_seed_continues_from_its_own(command) -> None:
    trained(command, "trainer.name=three", "seeds=0,1,2", "epochs=1", "posterior.folds=0")
    trained(command, "trainer.name=still", "prior=three", "seeds=1,2", *STILL)
    for fit in ("kalman-seed1", "kalman-seed2"):
        assert same(ended(command, "three", fit), ended(command, "still", fit))
    refused(
        command.train("prior=three", "seeds=1,7", "trainer.name=refused"),
        FAILED,
        "the prior three has no fit of seed 7 (its seeds: 0, 1, 2)",
        "leave that one out of seeds",
    )
    assert not command.run("refused").exists()


@pytest.mark.parametrize("place", ["", "fits/kalman-seed4", "fits/kalman-seed4/step-*"], ids=["run", "fit", "step"])
def test_a_single_fit_serves_all_seeds(command, place: str) -> None:
    trained(command, "trainer.name=one", "seeds=4", "epochs=1", "posterior.folds=0")
    (prior,) = command.run("one").glob(place) if place else [command.run("one")]
    trained(command, "trainer.name=still", f"prior={prior}", "seeds=0,1", *STILL)
    for fit in ("kalman-seed0", "kalman-seed1"):
        assert same(ended(command, "one", "kalman-seed4"), ended(command, "still", fit))


def test_a_baseline_goes_on_from_its_own_fit_or_from_the_mean(command) -> None:
    trained(command, "trainer.name=both", "baselines=adamw", "epochs=1", "posterior.folds=0")
    trained(command, "trainer.name=alone", "epochs=1", "posterior.folds=0")
    for prior, fit in (("both", "adamw-seed0"), ("alone", "kalman-seed0")):
        settings = ("method=adamw", "adapter.bias=true", f"prior={prior}")
        trained(command, *settings, f"trainer.name=from-{prior}", *STILL)
        assert same(ended(command, prior, fit), ended(command, f"from-{prior}", "adamw-seed0"), covariance=False)
    trained(command, "trainer.name=second", "prior=both", "baselines=adamw", "epochs=1", "posterior.folds=0")
    for fit in ("adamw-seed0", "kalman-seed0"):
        assert ended(command, "second", fit).manifest["prior"] == content(ended(command, "both", fit))


def test_calibration_starts_there_too(command) -> None:
    trained(command, "trainer.name=first", "epochs=1")
    trained(command, "trainer.name=with", "prior=first", "epochs=0", "posterior.predict=mean")
    trained(command, "trainer.name=without", "epochs=0", "posterior.predict=mean")
    nll = {
        run: json.loads((command.run(run) / "fits/kalman-seed0/calibration.json").read_text())["calibration"]
        for run in ("with", "without")
    }
    assert nll["with"]["held_out_nll"] < nll["without"]["held_out_nll"] - 0.01


# Resuming


def test_resumed_its_own_checkpoint_wins(command, monkeypatch) -> None:
    trained(command, "trainer.name=first")
    trained(command, "trainer.name=second", "prior=first", "data.train_domain=twemoji")
    before = ended(command, "second")
    monkeypatch.chdir(command.run("second"))  # the prior was named as a run, and is kept as a folder
    outcome = command("train", "--resume", command.run("second"))
    assert outcome.code == 0, outcome.err
    after = ended(command, "second")
    assert after.folder == before.folder
    assert after.manifest == before.manifest


def test_resumed_with_another_prior_it_is_refused(command) -> None:
    trained(command, "trainer.name=first", "epochs=1", "posterior.folds=0")
    trained(command, "trainer.name=second", "prior=first", "epochs=1", "posterior.folds=0")
    shutil.rmtree(command.run("first"))
    gone = command("train", "--resume", command.run("second"))
    refused(gone, FAILED, "there is no run", str(command.run("first")))
    trained(command, "trainer.name=first", "epochs=2", "posterior.folds=0")
    before = ended(command, "second").manifest
    refused(command("train", "--resume", command.run("second")), FAILED, "belongs to another task: its prior is")
    refused(command("train", "--resume", command.run("second"), "prior=other"), USAGE, "leave out 'prior=other'")
    assert ended(command, "second").manifest == before


# Refusals


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("earlier")


@pytest.fixture
def first(command, earlier: Path) -> Path:
    """A run to start from, made once."""
    if not (earlier / "first").exists():
        trained(command, f"trainer.storage_path={earlier}", "trainer.name=first", "epochs=1", "posterior.folds=0")
    return earlier / "first"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.classes=bird,building,flower"], ["its class 1 is 'flower', this run's is 'building'", "another order"]),
        (["data.classes=bird,flower"], ["knows other classes: this run lacks its 'building'", "data.classes"]),
        (["data.templates=['a drawing of a {}.']"], ["data.templates=['a photo of a {}.']", "a drawing"]),
        (["adapter=linear"], ["adapter.0=class_residual, this run has linear"]),
        (["method=adamw"], ["adapter.0.bias=True, this run has False: set it as it was"]),
        (["adapter=[{kind: class_residual, bias: true}, linear]"], ["adapter.1=None, this run has linear"]),
        (["filter.covariance=dense"], ["filter.covariance=kronecker, this run has dense"]),
        (["filter.covariance.shrinkage=3"], ["filter.covariance.shrinkage=0.3, this run has 3.0"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_a_prior_of_something_else(command, first: Path, settings: list[str], words: list[str]) -> None:
    outcome = command.train(f"prior={first}", "trainer.name=refused", *settings)
    refused(outcome, FAILED, f"the prior {first}", *words)
    assert not command.run("refused").exists(), "refused at the door"


def test_a_prior_with_other_classes_of_the_data(command, first: Path, written) -> None:
    """The data set's own names count, not their number."""
    data = written({"building": "boat"})
    outcome = command.train(f"prior={first}", data=data)
    refused(outcome, FAILED, "this run lacks its 'building' and it lacks 'boat'")


@pytest.fixture
def written(command, tmp_path):
    """Writes the small data with some of its classes renamed."""

    def write(names: dict[str, str]) -> Path:
        table = pq.read_table(command.data)
        number = table.schema.get_field_index("class_name")
        column = [names.get(name, name) for name in table["class_name"].to_pylist()]
        path = tmp_path / "renamed.parquet"
        pq.write_table(table.set_column(number, "class_name", [column]), path)
        return path

    return write


def test_a_prior_on_another_model(command, first: Path) -> None:
    (folder,) = (first / "fits" / "kalman-seed0").glob("step-*")
    copy = Path(shutil.copytree(first, command.folder / "other")) / folder.relative_to(first)
    manifest = checkpoint.read_manifest(copy)
    manifest["model"]["fingerprint"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": checkpoint._checksum(manifest)}))
    refused(command.train(f"prior={copy}"), FAILED, "features of another model: fingerprint 000000000000", "model.name")


def test_a_prior_without_a_covariance(command) -> None:
    trained(command, "method=adamw", "trainer.name=gradient", "epochs=1", "posterior.folds=0")
    outcome = command.train("prior=gradient")
    refused(outcome, FAILED, "was fitted by adamw, which leaves no covariance", "method=adamw")


def test_a_prior_that_is_not_there(command, first: Path) -> None:
    refused(
        command.train("prior=frist", f"trainer.storage_path={first.parent}"),
        FAILED,
        "there is no run frist",
        "did you mean first?",
    )
    refused(command.train("prior=''"), USAGE, "prior is empty")
    refused(command.train(f"prior={first / 'fits' / 'adamw-seed0'}"), FAILED, "holds no usable checkpoint")


def test_a_prior_that_is_not_finished(command, first: Path) -> None:
    copy = Path(shutil.copytree(first, command.folder / "cut"))
    (copy / "fits" / "kalman-seed0" / "calibration.json").unlink()
    refused(command.train(f"prior={copy}"), FAILED, "is not finished", "--resume")
    shutil.rmtree(copy / "fits" / "kalman-seed0")
    refused(command.train(f"prior={copy}"), FAILED, "the run cut has no finished fit yet")


@pytest.mark.parametrize("name", ["weights.safetensors", "covariance-00000-of-00001.safetensors", "manifest.json"])
def test_a_damaged_prior(command, first: Path, name: str) -> None:
    copy = Path(shutil.copytree(first, command.folder / "damaged"))
    (file,) = copy.glob(f"fits/*/step-*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(command.train(f"prior={copy}"), FAILED, "holds no usable checkpoint")
    refused(command.train(f"prior={file.parent}"), FAILED, str(file))
