"""Written models, read by the programs that they are for."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from kngd_ray.clip import CLIPNetwork, ModelConfig, TuneOptions, export, load_model
from kngd_ray.clip.adapters import Bottleneck, ClassResidual, Linear
from kngd_ray.clip.export import export_onnx, export_open_clip, rounding_of
from kngd_ray.errors import ModelError, StorageError

NAMES = ["cat", "red_car", "dog"]
TEMPLATES = ("a photo of a {}.", "an icon of a {}.")


def tuned(model, options, adapters=(), **more):
    network = CLIPNetwork(model, NAMES, TEMPLATES, options, adapters, **more)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return network


def pictures(model, m=3):
    return torch.randn(m, 3, *model.preprocess_cfg["size"], generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("model", ["vit", "custom", "mini"])
@pytest.mark.parametrize(
    "options",
    [
        TuneOptions(
            parameters="lora", include=("*",), targets=("q", "v", "out", "mlp", "proj", "pointwise"), alpha=0.5
        ),
        TuneOptions(parameters="full", include=("*",), precision="bfloat16"),
    ],
    ids=["lora", "full"],
)
def test_open_clip_loads_the_tuned_model(model, options, request, tmp_path):
    pretrained = request.getfixturevalue(model)
    network = tuned(pretrained, options)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = export_open_clip(network, pretrained, tmp_path / "new" / "folder")
    assert result.difference < 1e-3
    assert result.notes == ()
    assert result.path == tmp_path / "new" / "folder" / "open_clip_model.safetensors"
    assert sorted(file.name for file in result.path.parent.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    loaded = open_clip.create_model(f"local-dir:{result.path.parent}").eval()
    x = pictures(pretrained)
    tokens = pretrained.tokenize(["a photo of a cat.", "an old ship"])
    with torch.no_grad(), network.blended(options.alpha):
        expected = [network.clip.encode_image(x), network.clip.encode_text(tokens)]
        found = [loaded.encode_image(x), loaded.encode_text(tokens)]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert torch.equal(loaded.logit_scale, pretrained.network.logit_scale)
    wanted = {key: list(v) if isinstance(v, tuple) else v for key, v in pretrained.preprocess_cfg.items()}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in loaded.visual.preprocess_cfg.items()} == wanted


@pytest.mark.parametrize("model", ["vit", "custom", "mini"])
def test_what_was_exported_comes_back_by_local_dir(model, request, tmp_path):
    """With its tokenizer and its preprocessing, and as the source of another run."""
    pretrained = request.getfixturevalue(model)
    network = tuned(pretrained, TuneOptions(parameters="full", include=("*",)), (Linear(),))
    export_open_clip(network, pretrained, tmp_path / "mine")
    ours = load_model(ModelConfig(f"local-dir:{tmp_path / 'mine'}"))
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    assert torch.equal(ours.transform(picture), pretrained.transform(picture))
    assert ours.embed_dim == pretrained.embed_dim
    assert ours.fingerprint != pretrained.fingerprint
    x, prompts = pictures(pretrained), ["a photo of a cat.", "an old ship"]
    assert torch.equal(ours.tokenize(prompts), pretrained.tokenize(prompts))
    with torch.no_grad():
        expected = normalize(network.head.adapters[0].image(network.encode(x)), dim=-1)
        assert torch.allclose(normalize(ours.network.encode_image(x), dim=-1), expected, atol=1e-5)
    again = CLIPNetwork(ours, NAMES, TEMPLATES, TuneOptions(parameters="lora"))
    with torch.no_grad():
        assert torch.allclose(again.encode(x), expected, atol=1e-5)


def test_a_named_architecture_takes_the_file(vit, tmp_path):
    network = tuned(vit, TuneOptions(parameters="lora", include=("*",)))
    path = export_open_clip(network, vit, tmp_path).path
    x = pictures(vit)
    named = open_clip.create_model(vit.name, pretrained=str(path)).eval()
    ours = load_model(ModelConfig(vit.name, str(path)))
    with torch.no_grad():
        expected = normalize(network.clip.encode_image(x), dim=-1)
        for loaded in (named, ours.network):
            assert torch.allclose(normalize(loaded.encode_image(x), dim=-1), expected, atol=1e-5)


@pytest.mark.parametrize("model", ["vit", "mini"])
def test_a_linear_image_adapter_goes_into_the_projection(model, request, tmp_path):
    pretrained = request.getfixturevalue(model)
    network = tuned(pretrained, TuneOptions(alpha=0.5), (Linear(),))
    result = export_open_clip(network, pretrained, tmp_path, 1.5)
    assert result.notes == ()
    loaded = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    x = pictures(pretrained)
    with torch.no_grad(), network.blended(0.5):
        z = normalize(loaded.encode_image(x), dim=-1)
        logits = loaded.logit_scale.exp() * z @ network.classifier().mT
        assert torch.allclose(logits, 1.5 * network({"image": x}), atol=1e-3)


def test_what_has_no_place_in_a_checkpoint_is_told(vit, tmp_path):
    adapters = (Linear(tower="both"), Linear(), Bottleneck(), ClassResidual())
    notes = export_open_clip(tuned(vit, TuneOptions(), adapters), vit, tmp_path).notes
    assert [note.split(" adapter")[0] for note in notes] == [
        "the linear",
        "the linear",  # behind one that is left out
        "the bottleneck",
        "the class_residual",
    ]
    network = tuned(vit, TuneOptions(parameters="full", include=("*",)), pairs=True)
    assert "pretrained texts" in export_open_clip(network, vit, tmp_path).notes[0]


def test_the_written_configuration_is_whole(mini, tmp_path):
    export_open_clip(tuned(mini, TuneOptions()), mini, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert config["model_cfg"] == mini.architecture
    assert config["preprocess_cfg"]["mean"] == list(mini.preprocess_cfg["mean"])


def test_a_file_that_gives_other_logits_is_refused(vit, tmp_path):
    network = tuned(vit, TuneOptions(parameters="full"))
    with torch.no_grad():
        network.clip.visual.proj[0, 0] = torch.nan
    with pytest.raises(ModelError, match="logits that differ from the network's by nan"):
        export_open_clip(network, vit, tmp_path)


def test_a_folder_that_cannot_be_made(vit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"open_clip_model\.safetensors"):
        export_open_clip(tuned(vit, TuneOptions()), vit, tmp_path / "file")


@pytest.mark.parametrize("model", ["vit", "mini"])
def test_the_classifier_is_one_graph_for_any_batch(model, request):
    """What ONNX export starts from, whether or not its packages are installed."""
    pretrained = request.getfixturevalue(model)
    options = TuneOptions(parameters="lora", include=("*",), alpha=0.5, checkpointing=model == "vit")
    network = tuned(pretrained, options, (Linear(), ClassResidual()))
    classifier = export._classifier(network, 1.5)
    graph = torch.export.export(
        classifier, (pictures(pretrained),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
    ).module()
    x = pictures(pretrained, 5)
    with torch.no_grad(), network.blended(0.5):
        assert torch.allclose(graph(x), 1.5 * network({"image": x}), atol=1e-3)


@pytest.mark.parametrize("part", ["visual*", "transformer*", "*"])
def test_what_towers_in_full_precision_change(vit, part):
    """Of a fit in bfloat16, written files are not what predicts: by how much is measured on pictures, or features."""
    options = TuneOptions(parameters="lora", include=(part,), targets=("q", "v", "mlp"), precision="bfloat16")
    network = tuned(vit, options, (ClassResidual(),))
    full = tuned(vit, replace(options, precision="float32"), (ClassResidual(),))
    x = network.example(4)
    with torch.no_grad():
        found, plain = (each.classify(x.get("image", x.get("feature"))) for each in (network, full))
        graph = export._classifier(network, 1.0)
        written = graph(x["image"]) if "image" in x else graph.head(x["feature"], graph.class_embeddings)
    for texts, expected in ((True, plain), (False, written)):
        rounding = rounding_of(network, texts=texts)
        assert (rounding > 1e-3) == (texts or part != "transformer*")
        assert rounding == pytest.approx(float((found - expected).abs().max()), rel=0.05)
        assert rounding_of(full, texts=texts) == 0
    assert network.options == options


def test_onnx_says_what_to_install(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package onnx: pip install kngd_ray\[export\]"):
        export_onnx(tuned(vit, TuneOptions()), tmp_path, 32)


@pytest.mark.parametrize("model", ["vit", pytest.param("mini", marks=pytest.mark.slow)])
def test_onnx_gives_the_networks_logits(model, request, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pretrained = request.getfixturevalue(model)
    network = tuned(pretrained, TuneOptions(parameters="lora", include=("*",), alpha=0.5), (Linear(), ClassResidual()))
    result = export_onnx(network, tmp_path, pretrained.preprocess_cfg["size"], sharpening=1.5)
    assert result.difference < 1e-3
    session = runtime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    x = pictures(pretrained, 5)
    logits = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    with torch.no_grad(), network.blended(0.5):
        assert torch.allclose(logits, 1.5 * network({"image": x}), atol=1e-3)
