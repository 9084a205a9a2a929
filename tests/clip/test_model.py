import io
import json
import logging
import pickle
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import Compose, RandomInvert

import kngd_ray
from kngd_ray.clip import _model
from kngd_ray.clip._model import ModelConfig, load_model
from kngd_ray.errors import DataError, ModelError

ASSETS = Path(kngd_ray.__file__).parent / "assets"
SMALL = "kngd-test-tiny"  # registered with open_clip below: its own smallest take 0.4 s a load


@pytest.fixture(scope="session", autouse=True)
def tiny_architecture(tmp_path_factory):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    file = tmp_path_factory.mktemp("architectures") / f"{SMALL}.json"
    file.write_text(json.dumps({"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)


@pytest.fixture(scope="module", autouse=True)
def _one_vocabulary():
    """Read once for each name: every load of another model would read it again, and take longest over that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", cache(open_clip.get_tokenizer))
        yield


@pytest.fixture(scope="session")
def emoji():
    """Pictures (a list), labels (m,) and class names of the noto test rows."""
    table = pq.read_table(ASSETS / "emoji.parquet")
    names = dict(zip(table["label"].to_pylist(), table["class_name"].to_pylist(), strict=True))
    rows = table.filter((pc.field("domain") == "noto") & (pc.field("split") == "test"))
    images = [Image.open(io.BytesIO(png)) for png in rows["image"].to_pylist()]
    return images, torch.tensor(rows["label"].to_pylist()), [names[label] for label in range(len(names))]


@pytest.fixture(scope="session")
def small(tiny_architecture):
    return load_model(ModelConfig(SMALL, "random"))


@pytest.fixture
def weights(small):
    """A state dict of the small architecture, to be spoiled freely."""
    return {name: tensor.clone() for name, tensor in small.network.state_dict().items()}


def error_of(name, pretrained=None):
    with pytest.raises(ModelError) as error:
        load_model(ModelConfig(name, None if pretrained is None else str(pretrained)))
    assert "\n" not in str(error.value)
    return str(error.value)


# What is loaded


def test_the_embedded_model(mini):
    assert (mini.name, mini.embed_dim) == ("embedded", 256)
    assert mini.logit_scale == pytest.approx(18, abs=0.01)
    assert not mini.network.training
    assert not any(parameter.requires_grad for parameter in mini.network.parameters())


def test_zero_shot_accuracy_on_emoji(mini, emoji):
    images, labels, names = emoji
    head = mini.encode_classes(names, ["a photo of a {}."])
    predicted = (mini.encode_images(images) @ head.T).argmax(dim=1)
    accuracy = (predicted == labels).float().mean().item()
    assert 0.20 <= accuracy <= 0.33  # 0.27 when it was written


@pytest.mark.slow
def test_loading_is_silent_and_configures_nothing(mini):
    code = (
        "import logging, sys\n"
        "from kngd_ray.clip._model import ModelConfig, load_model\n"
        "assert 'open_clip' not in sys.modules\n"
        "load_model(ModelConfig())\n"
        "assert not logging.getLogger().handlers and not logging.getLogger().filters\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_logs_of_others_pass_while_a_model_loads(caplog):
    with _model.quiet_open_clip():
        logging.getLogger().warning("from a test")
    assert caplog.messages == ["from a test"]


def test_random_weights_are_seeded_and_leave_the_generators_alone(small):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = load_model(ModelConfig(SMALL, "random"))
    assert torch.equal(before, torch.get_rng_state())
    assert again.fingerprint == small.fingerprint


def test_a_tag_gives_its_weights_preprocessing_and_activation(monkeypatch, tmp_path, small, weights):
    save_file(weights, tmp_path / "hub.safetensors")
    tag = {
        "hf_hub": "someone/something/",
        "mean": (0.5, 0.5, 0.5),
        "resize_mode": "squash",
        "quick_gelu": True,
    }
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag_name: tag)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "hub.safetensors"))
    model = load_model(ModelConfig(SMALL, "tagged"))
    assert model.fingerprint != small.fingerprint
    assert "mean=(0.5, 0.5, 0.5)" in repr(model.transform)
    assert any(type(module).__name__ == "QuickGELU" for module in model.network.modules())


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"own": {"quick_gelu": False, "mean": OPENAI_DATASET_MEAN, "resize_mode": "shortest"}}, None),
        ({"own": {}, "other": {"quick_gelu": True}}, r"another activation \(quick_gelu\), as of the tag other;"),
        ({"siglip": {"mean": (0.5, 0.5, 0.5)}}, "another normalisation of pictures, as of the tag siglip;"),
        (
            {"a": {"quick_gelu": True}, "b": {"std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}},
            "as of the tag a and another normalisation of pictures, as of the tag b and another resizing",
        ),
    ],
)
def test_a_file_says_what_it_leaves_open(monkeypatch, tmp_path, weights, tags, says):
    """A tag's weights in a file of their own are run by open_clip's defaults: another activation, or other pictures."""
    save_file(weights, tmp_path / "downloaded.safetensors")
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags.get(tag, {}))
    note = load_model(ModelConfig(SMALL, str(tmp_path / "downloaded.safetensors"))).left_open
    if says is None:
        assert note is None
    else:
        assert re.search(says, note)


# Folders and repositories


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What a hub repository of open_clip's holds."""
    return Path(shutil.copytree(ASSETS / "mini_clip", tmp_path_factory.mktemp("models") / "mine"))


def test_a_folder_with_architecture_and_weights(mini, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in (f"local-dir:{folder}", "local-dir:mine", "local-dir:./mine"):
        model = load_model(ModelConfig(name))
        assert (model.name, model.fingerprint) == (name, mini.fingerprint)
        assert ModelConfig(name).absolute().name == f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("name", "pretrained", "says"),
    [
        ("local-dir:min", None, "there is no folder 'min'; the nearest is local-dir:mine"),
        ("local-dir:", None, "there is no folder ''"),
        ("local-dir:mine", "openai", "model.pretrained='openai' is not for local-dir:mine, which has its own weights"),
        ("local-dir:bare", None, "lacks weights, such as open_clip_model.safetensors"),
        ("local-dir:torn", None, "torn/open_clip_config.json does not describe"),
        ("local-dir:unnamed", None, "lacks open_clip_config.json"),
        ("mine", None, "'mine' is a folder: write local-dir:mine"),
        ("someone/something", None, "a repository of Hugging Face's is named hf-hub:someone/something"),
        ("hf-hub:", None, "write hf-hub:organisation/repository"),
        ("hf-hub:someone/something", None, "is not in the local cache and cannot be downloaded"),
        ("hf-hub:someone/something", "openai", "has its own weights"),
    ],
)
def test_what_is_no_folder_or_repository(folder, monkeypatch, name, pretrained, says):
    place = folder.parent
    monkeypatch.chdir(place)
    for other, files in (("bare", ["open_clip_config.json"]), ("torn", []), ("unnamed", [])):
        (place / other).mkdir(exist_ok=True)
        for file in files:
            shutil.copy(folder / file, place / other / file)
    (place / "torn" / "open_clip_config.json").write_text("{")
    for other in ("torn", "unnamed"):
        (place / other / "a.safetensors").touch()
    assert says in error_of(name, pretrained)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": "x"},
        {"mean": [0.5, 0.5]},
        {"mean": 0},
        {"std": [0, 0, 0]},
        {"resize_mode": "crop"},
        {"mode": "L"},
        [0.5, 0.5],
    ],
)
def test_a_folder_that_says_nonsense_of_pictures(folder, tmp_path, wrong):
    """open_clip takes it, and fails at the first picture or by a bare assertion."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": wrong}))
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    says = f"preprocess_cfg in {tmp_path}/open_clip_config.json is no way to prepare pictures, {json.dumps(wrong)}"
    assert says in error_of(f"local-dir:{tmp_path}", None)


def test_a_repository_in_the_cache(mini, folder, monkeypatch):
    """As the hub's own client finds it, which here may not look elsewhere."""
    found = {"open_clip_config.json": folder / "open_clip_config.json", None: folder / "open_clip_model.safetensors"}
    for module in (open_clip.pretrained, open_clip.factory):
        monkeypatch.setattr(
            module, "download_pretrained_from_hf", lambda repository, filename=None, **_: str(found[filename])
        )
    model = load_model(ModelConfig("hf-hub:someone/something"))
    assert model.fingerprint == mini.fingerprint
    assert ModelConfig("hf-hub:someone/something").absolute().name == "hf-hub:someone/something"


# Fingerprint


def test_the_fingerprint_is_the_same_at_every_load(mini):
    again = load_model(ModelConfig())
    assert again.fingerprint == mini.fingerprint
    assert len(mini.fingerprint) == 64


def test_local_checkpoints_in_every_format_are_the_same_model(tmp_path, small, weights):
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "a.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "ddp.bin")
    for file in ("a.safetensors", "a.pt", "ddp.bin"):
        assert load_model(ModelConfig(SMALL, str(tmp_path / file))).fingerprint == small.fingerprint


@pytest.mark.parametrize("name", ["visual.conv1.weight", "logit_scale", "ln_final.bias"])
def test_one_changed_weight_changes_the_fingerprint(tmp_path, small, weights, name):
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, tmp_path / "changed.safetensors")
    assert load_model(ModelConfig(SMALL, str(tmp_path / "changed.safetensors"))).fingerprint != small.fingerprint


def test_a_changed_transform_or_configuration_changes_the_fingerprint(small):
    architecture = {"embed_dim": 256}
    fingerprint = _model._fingerprint(small.network, small.transform, architecture)
    other = Compose([RandomInvert(), *small.transform.transforms])
    assert _model._fingerprint(small.network, other, architecture) != fingerprint
    assert _model._fingerprint(small.network, small.transform, {"embed_dim": 257}) != fingerprint
    assert _model._fingerprint(small.network, small.transform, architecture) == fingerprint


def test_the_colour_of_padding_changes_the_fingerprint(small):
    """open_clip does not print it, and cached features would be taken for those of another padding."""
    black, grey = (
        image_transform_v2(PreprocessCfg(size=32, resize_mode="longest", fill_color=fill), is_train=False)
        for fill in (0, 127)
    )
    assert repr(black) == repr(grey)
    wide = Image.new("RGB", (64, 16))
    assert not torch.equal(black(wide), grey(wide))
    fingerprints = {_model._fingerprint(small.network, transform, {}) for transform in (black, grey)}
    assert len(fingerprints) == 2


# Features


def test_features_are_unit_norm_and_independent_of_the_batch(mini, emoji):
    images, _, names = emoji
    together = mini.encode_images(images[:24])
    assert together.shape == (24, 256)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(24), rtol=0, atol=1e-5)
    torch.testing.assert_close(mini.encode_images(images[:24], batch_size=7), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(mini.encode_images(images[23::-1]).flip(0), together, rtol=0, atol=1e-5)
    assert torch.equal(mini.encode_images(images[:24]), together)

    texts = mini.encode_texts(names)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(len(names)), rtol=0, atol=1e-5)
    torch.testing.assert_close(mini.encode_texts(names, batch_size=1), texts, rtol=0, atol=1e-5)


def test_modes_of_pictures_do_not_matter(mini, emoji):
    colour = emoji[0][0].convert("RGB")
    palette = colour.quantize(16)
    torch.testing.assert_close(
        mini.encode_images([palette]), mini.encode_images([palette.convert("RGB")]), rtol=0, atol=1e-6
    )
    grey = Image.fromarray(np.full((5, 300), 128, np.uint8))
    assert mini.encode_images([colour, grey, colour.convert("RGBA")]).isfinite().all()


def test_features_can_train_an_adapter(mini, emoji):
    features = mini.encode_images(emoji[0][:2])
    weight = torch.eye(256, requires_grad=True)
    (features @ weight).sum().backward()
    assert weight.grad is not None


def test_nothing_gives_no_rows(mini):
    assert mini.encode_images([]).shape == (0, 256)
    assert mini.encode_texts([]).shape == (0, 256)


def test_classes_are_the_mean_direction_of_their_prompts(mini):
    classes = mini.encode_classes(["sea_animal", "fruit"], ["a {}", "many {}", "{} icon"])
    prompts = mini.encode_texts(["a fruit", "many fruit", "fruit icon"])
    mean = prompts.mean(dim=0)
    torch.testing.assert_close(classes[1], mean / mean.norm(), rtol=0, atol=1e-5)
    torch.testing.assert_close(classes.norm(dim=1), torch.ones(2), rtol=0, atol=1e-5)


LONG = "a very long name of a class that says much more than any text tower would read " * 3


@pytest.mark.parametrize(
    ("names", "templates", "says"),
    [
        (
            ["dog", "sea_bird", "sea bird"],
            "a {}.",
            "'sea_bird' and 'sea bird' have one prompt to embedded, 'a sea bird.'",
        ),
        (["IT", "it"], "a {}.", "'a IT.' and 'a it.', read as one"),
        (["SeaLake", "sea lake"], "a {words}.", "'SeaLake' and 'sea lake'"),
        (
            [LONG + "a", LONG + "b", "dog"],
            "a {}.",
            "reads 32, so its name is cut off, and so are those of 1 other",
        ),
        (["dog", "cat"], f"{LONG} {{}}", "the class 'dog' are too long"),
        (["dog", "['cat']"], "a {}.", "which is a Python list"),
    ],
)
def test_classes_that_are_not_told_apart_are_refused(mini, names, templates, says):
    with pytest.raises(DataError) as error:
        mini.encode_classes(names, templates)
    assert says in str(error.value)
    assert mini.encode_classes(names, templates, known=True).shape == (len(names), 256)


def test_what_is_cut_behind_the_name_is_said(mini):
    templates = [f"a {{}} {LONG}", "the {}"]
    assert mini.notes(["dog"], ["a {}"]) == []
    (line,) = mini.notes(["dog", "cat"], templates)
    assert "prompts of 2 of 2 classes are longer than the 32 tokens" in line
    assert line.endswith("cut off behind the name: dog, cat")
    assert mini.encode_classes(["dog", "cat"], templates).shape == (2, 256)


@pytest.mark.parametrize("words", range(24, 34))
def test_a_prompt_that_just_fits_is_not_cut(mini, words):
    """Each of these words is one token; the context is 32, with a token at each end."""
    text = " ".join(["dog"] * words)
    assert (mini.notes(["cat"], f"{{}} {text}") == []) == (words + 1 <= 30)


# Errors: what, where, what to do


def test_unknown_model_name():
    assert "'vit-b-31' is not a model of open_clip: did you mean ViT-B-32" in error_of("vit-b-31", "openai")
    assert "did you mean embedded" in error_of("embeded")


def test_embedded_takes_no_weights():
    assert "is not for the embedded model" in error_of("embedded", "openai")


def test_weights_must_be_named():
    message = error_of("ViT-B/32")
    assert "ViT-B-32 needs weights" in message
    assert "openai" in message
    assert "'random'" in message


def test_unknown_tag_lists_the_tags():
    message = error_of("ViT-B-32", "opnai")
    assert "'opnai' is neither a tag of ViT-B-32 nor a file" in message
    assert "openai, laion400m_e31" in message
    assert "it has none" in error_of(SMALL, "openai")


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "zebra.pt").touch()
    assert f"the nearest is {tmp_path / 'weights.safetensors'}" in error_of(SMALL, tmp_path / "weight.safetensors")
    assert f"the nearest is {tmp_path}" in error_of(SMALL, tmp_path)
    assert "has no checkpoint" in error_of(SMALL, tmp_path / "no" / "weights.pt")
    (tmp_path / "weights.npz").touch()
    assert "must end in .safetensors, .pt" in error_of(SMALL, tmp_path / "weights.npz")


def test_checkpoint_of_another_architecture(tmp_path, weights):
    mini_clip = ASSETS / "mini_clip" / "open_clip_model.safetensors"
    assert "'positional_embedding' has shape (32, 192), not (16, 32)" in error_of(SMALL, mini_clip)
    assert "is not a checkpoint of RN50" in error_of("RN50", mini_clip)

    save_file({**weights, "extra": torch.ones(1)}, tmp_path / "extra.safetensors")
    assert f"{SMALL} has no 'extra'" in error_of(SMALL, tmp_path / "extra.safetensors")
    del weights["ln_final.weight"]
    save_file(weights, tmp_path / "lacks.safetensors")
    assert "it has no 'ln_final.weight'" in error_of(SMALL, tmp_path / "lacks.safetensors")


def test_corrupt_files(tmp_path, weights):
    for suffix, save in ((".safetensors", save_file), (".pt", torch.save)):
        file = tmp_path / f"torn{suffix}"
        save(weights, file)
        file.write_bytes(file.read_bytes()[:1_000_000])
        message = error_of(SMALL, file)
        assert str(file) in message
        assert "fetch it again" in message
        file.write_bytes(b"")
        assert "fetch it again" in error_of(SMALL, file)


class Intruder:
    def __reduce__(self):
        return Path.touch, (Path("intruder-was-here"),)


def test_pickles_are_refused_and_not_run(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Intruder(), protocol=2))
    torch.save({"state_dict": weights, "more": Intruder()}, tmp_path / "torch.pt")
    for file in ("plain.bin", "torch.pt"):
        assert "never unpickled" in error_of(SMALL, tmp_path / file)
    assert not (tmp_path / "intruder-was-here").exists()


def test_unreachable_hub_points_to_local_files(monkeypatch):
    def fails(tag):
        raise FileNotFoundError("Failed to download file. Last error: no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fails)
    message = error_of("ViT-B-32", "openai")
    assert "cannot be downloaded (no route to host): pass a local checkpoint file through model.pretrained" in message


def test_towers_of_libraries_that_are_missing(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("Please install transformers")

    monkeypatch.setattr(open_clip, "create_model", fails)
    assert "cannot be built (Please install transformers)" in error_of("roberta-ViT-B-32", "random")


# The shipped files


def test_assets_are_complete_and_readable_by_all():
    files = ["NOTICE.md", "emoji.parquet"]
    files += [f"mini_clip/{name}" for name in ("NOTICE.md", "open_clip_config.json", "open_clip_model.safetensors")]
    for file in files:
        assert (ASSETS / file).stat().st_mode & 0o444 == 0o444
    assert len(load_file(ASSETS / "mini_clip" / "open_clip_model.safetensors")) == 338


def test_only_a_checkpoint_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelConfig(SMALL, "a/w.pt").absolute() == ModelConfig(SMALL, str(tmp_path / "a" / "w.pt"))
    for pretrained in (None, "openai", "random", str(tmp_path / "w.pt")):
        assert ModelConfig(SMALL, pretrained).absolute().pretrained == pretrained
