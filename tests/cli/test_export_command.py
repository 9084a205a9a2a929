"""A fit written as files, and read by the programs that they are for."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import open_clip
import pytest
import torch
from helpers.hub_server import Hub
from huggingface_hub import ModelCard
from PIL import Image
from torch.nn.functional import normalize

from kngd_ray.clip import ModelConfig, load_model
from kngd_ray.config import load_config
from kngd_ray.console import Display
from kngd_ray.errors import ModelError
from kngd_ray.experiment import export as export_module
from kngd_ray.experiment.run import train
from kngd_ray.training.classifier import Classifier
from kngd_ray.training.settled import read_settled, save_settled

pytestmark = pytest.mark.slow  # minutes on two cores; what it covers is also seen, in less detail, by quicker tests

onnxruntime = pytest.importorskip("onnxruntime")
TOWERS = ("method=adamw", "tune.parameters=full", "data.classes=[flower,bird]", "data.shots=1", "epochs=1")
ALPHA = 0.5


@pytest.fixture(scope="module")
def full(tmp_path_factory, small_data, shared_cache):
    """A run that trains the image tower, its alpha settled afterwards."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [f"data.path={small_data}", f"data.cache_dir={shared_cache}", "data.train_domain=noto"]
    settings += [f"trainer.storage_path={folder}", "trainer.num_workers=0", "tracking.enabled=false"]
    settings += [*TOWERS, "trainer.name=full", "optimizer.lr=0.001", "tune.include=[visual]", "adapter=[linear]"]
    train(load_config(None, settings), Display(quiet_stdout=True))
    fit = folder / "full" / "fits" / "adamw-seed0"
    settled = read_settled(fit)
    save_settled(fit, type(settled)(settled.calibration, settled.posterior, ALPHA))
    return fit


def pixels(classifier) -> torch.Tensor:
    colours = ["red", "olive", "navy"]
    return torch.stack([classifier.model.transform(Image.new("RGB", (90, 70), colour)) for colour in colours])


def onnx_probabilities(folder, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "classifier.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]).softmax(1)


def test_towers_at_the_kept_alpha(command, full) -> None:
    out = command.folder / "new" / "export"
    outcome = command("export", full.parents[1], "--out", out, "--onnx", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert (report["fit"], report["alpha"]) == (str(full), ALPHA)
    for kind, name in (("open_clip", "open_clip_model.safetensors"), ("onnx", "classifier.onnx")):
        assert report[kind]["path"] == str(out / name)
        assert (out / name).is_file()
        assert report[kind]["difference"] < 1e-3
    assert "figures on this card are those of alpha=1, and these weights are at 0.5" in (out / "README.md").read_text()
    classes = json.loads((out / "classes.json").read_text())
    assert classes["class_names"] == ["flower", "bird"]
    assert classes["templates"] == ["a photo of a {}."]
    classifier = Classifier.load(full)
    images = pixels(classifier)
    expected = classifier.predictor.predict(images, 0.0).probabilities
    torch.testing.assert_close(onnx_probabilities(out, images), expected, rtol=1e-3, atol=1e-4)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    prompts = [classes["templates"][0].format(name) for name in classes["class_names"]]
    with torch.no_grad():
        z = normalize(model.encode_image(images), dim=-1)
        t = normalize(model.encode_text(open_clip.get_tokenizer(f"local-dir:{out}")(prompts)), dim=-1)
        found = (model.logit_scale.exp() * z @ t.mT).softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    picture = Image.new("RGB", (90, 70), "red")
    torch.testing.assert_close(transform(picture), images[0], rtol=0, atol=0.02)
    pretrained = classifier.model.network.visual.state_dict()
    trained = classifier.predictor.head.clip.visual.state_dict()
    assert any(not torch.equal(trained[name], pretrained[name]) for name in pretrained)


def test_adapters_are_in_the_classifier_alone(command) -> None:
    command.train("trainer.name=a", "adapter=[class_residual,bottleneck]")
    out = command.folder / "out"
    refused = command("export", command.run("a"), "--out", out)
    assert refused.code == 2
    assert "class_residual, bottleneck" in refused.sentence
    assert "--onnx" in refused.sentence
    assert not out.exists()
    report = command("export", command.run("a"), "--out", out, "--onnx", "--json").json
    assert report["open_clip"] is None
    assert {path.name for path in out.iterdir()} == {"classifier.onnx", "classes.json", "README.md"}
    classifier = Classifier.load(command.run("a") / "fits" / "kalman-seed0")
    images = pixels(classifier)
    with torch.no_grad():
        features = normalize(classifier.model.network.encode_image(images), dim=-1)
    assert classifier.calibration.sharpening > 1
    expected = replace(classifier.calibration, tau=0.0).predict(classifier.predictor, features).probabilities
    torch.testing.assert_close(onnx_probabilities(out, images), expected, rtol=1e-3, atol=1e-4)
    told = "mean of the belief" in " ".join(report["onnx"]["notes"])
    assert told == (read_settled(command.run("a") / "fits" / "kalman-seed0").calibration.tau > 0)


def test_an_export_says_that_it_is_surer_than_the_run(command) -> None:
    command.train("trainer.name=b", "posterior.temperature=1", "posterior.predict=linearised")
    out = command.folder / "out"
    outcome = command("export", command.run("b"), "--out", out, "--onnx")
    assert "mean of the belief" in outcome.err
    assert "logits within" in outcome.err
    classifier = Classifier.load(command.run("b") / "fits" / "kalman-seed0")
    images = pixels(classifier)
    with torch.no_grad():
        features = normalize(classifier.model.network.encode_image(images), dim=-1)
    found, p = (
        onnx_probabilities(out, images),
        classifier.calibration.predict(classifier.predictor, features).probabilities,
    )
    assert (found.amax(1) > p.amax(1) + 1e-4).all()
    assert "mean of the belief" in (out / "README.md").read_text()


def test_a_linear_adapter_is_folded_into_the_tower(command) -> None:
    command.train("trainer.name=l", "adapter=linear", "method=adamw")
    out = command.folder / "out"
    outcome = command("export", "l", "--storage-path", command.runs, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "logits within" in outcome.err
    classifier = Classifier.load(command.run("l") / "fits" / "adamw-seed0")
    model = open_clip.create_model(f"local-dir:{out}").eval()
    images = pixels(classifier)
    with torch.no_grad():
        plain = normalize(classifier.model.network.encode_image(images), dim=-1)
        expected = normalize(classifier.predictor.head.adapters[0].image(plain), dim=-1)
        found = normalize(model.encode_image(images), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_only_an_empty_folder_is_written_to(command, full) -> None:
    taken = command.folder / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("keep")
    for out in (taken, taken / "mine.txt"):
        outcome = command("export", full, "--out", out)
        assert outcome.code == 2
        assert outcome.sentence == f"{out} is not an empty folder: name another one with --out."
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    assert command("export", "nothing", "--out", command.folder / "new").code == 1
    assert not (command.folder / "new").exists()


def test_an_export_with_its_card_comes_back_from_a_hub(command, full) -> None:
    hub = Hub("hf_" + "a" * 34)
    out = command.folder / "out"
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(command.folder / "hub")}
    program = [sys.executable, "-m", "kngd_ray.cli"]
    settings = ["export", str(full.parents[1]), "--out", str(out), "--push", "someone/pets", "--json"]
    done = subprocess.run([*program, *settings], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == f"{hub.endpoint}/someone/pets"
    assert hub.files["someone/pets"] == {path.name: path.read_bytes() for path in out.iterdir()}
    card = ModelCard.load(out / "README.md")
    assert (card.data.library_name, card.data.license) == ("open_clip", "apache-2.0")
    assert card.text.strip().startswith("# full, adamw-seed0")
    assert "- `open_clip_model.safetensors`: both towers" in card.text
    load = "import kngd_ray.clip as c; print(c.load_model(c.ModelConfig('hf-hub:someone/pets')).fingerprint)"
    done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == load_model(ModelConfig(f"local-dir:{out}")).fingerprint, done.stderr
    hub.close()


def test_lora_for_peft_and_its_refusal(command, full) -> None:
    refused = command("export", full, "--out", command.folder / "no", "--peft")
    assert refused.code == 2
    assert "trained no LoRA (tune.parameters=full)" in refused.sentence
    assert not (command.folder / "no").exists()
    towers = [setting for setting in TOWERS if "parameters" not in setting]
    command.train("trainer.name=lora", *towers, "tune.parameters=lora", "tune.include=[visual]")
    report = command("export", command.run("lora"), "--out", command.folder / "out", "--peft", "--json").json
    assert report["peft"]["difference"] < 1e-3
    found = {path.name for path in (command.folder / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "open_clip_model.safetensors"} < found


@pytest.mark.parametrize("exists", [False, True])
def test_an_export_that_fails_leaves_nothing(command, full, monkeypatch, exists) -> None:
    out = command.folder / "out"
    if exists:
        out.mkdir()

    def failing(*_):
        raise ModelError("no ONNX today")

    monkeypatch.setattr(export_module, "export_onnx", failing)
    outcome = command("export", full, "--out", out, "--onnx")
    assert outcome.code == 1
    assert outcome.sentence == "no ONNX today."
    assert out.exists() == exists
    assert not exists or not list(out.iterdir())
