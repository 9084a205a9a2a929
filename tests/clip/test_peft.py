"""LoRA in peft's layout: what is written, and what peft makes of it where it is installed."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from kngd_ray.clip import CLIPNetwork, TuneOptions
from kngd_ray.clip.adapters import ClassResidual
from kngd_ray.clip.peft import CONFIG, WEIGHTS, export_peft
from kngd_ray.errors import ModelError

MOST = ("q", "k", "v", "mlp", "proj", "pointwise")  # all but the output of attention


def tuned(model, adapters=(), **options):
    """A network whose updates are not the zeros that they begin at."""
    network = CLIPNetwork(model, ["cat", "dog"], ("a photo of a {}.",), TuneOptions(**options), adapters)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return network


def lora(targets, include=("*",), **more):
    return {"parameters": "lora", "include": include, "targets": targets, "scaling": 1.5, **more}


CASES = {
    "q and v, of the image tower": ("vit", lora(("q", "v"), ("visual.*",))),
    "k alone": ("vit", lora(("k",), rank=3)),
    "of both towers, averaged": ("vit", lora(MOST, alpha=0.5)),
    "convolutions": ("mini", lora(MOST, rank=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_gives_the_logits_of_the_network(case, request, tmp_path):
    name, options = CASES[case]
    model = request.getfixturevalue(name)
    network = tuned(model, (ClassResidual(),), **options)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    written = export_peft(network, model, tmp_path / "new", "someone/clip")
    assert written.difference < 1e-3
    assert written.notes == ("the class_residual adapter is left out: peft's layout has no place for it",)
    assert sorted(file.name for file in written.path.parent.iterdir()) == [CONFIG, WEIGHTS]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "someone/clip")
    assert config["lora_alpha"] == 1.5 * config["r"]
    tensors = load_file(written.path)
    assert all(name.startswith("base_model.model.") for name in tensors)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_B." in name)


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed: pip install peft")
@pytest.mark.parametrize("case", CASES)
def test_peft_reads_it_into_open_clip(case, request, tmp_path):
    import copy

    import peft

    name, options = CASES[case]
    model = request.getfixturevalue(name)
    network = tuned(model, **options)
    export_peft(network, model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model.network), tmp_path).eval()
    pictures = torch.randn(3, 3, *model.preprocess_cfg["size"], generator=torch.Generator().manual_seed(9))
    tokens = model.tokenize(["a photo of a cat.", "an old ship"])
    with torch.no_grad(), network.blended(network.options.alpha):
        plain = normalize(model.network.encode_image(pictures), dim=-1)
        for encode, x in (("encode_image", pictures), ("encode_text", tokens)):
            expected, found = (normalize(getattr(of, encode)(x), dim=-1) for of in (network.clip, loaded))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            if encode == "encode_image":
                assert (found - plain).abs().max() > 1e-3
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(
            merged.encode_image(pictures), network.clip.encode_image(pictures), rtol=0, atol=1e-4
        )


def test_what_peft_has_no_place_for_is_refused(custom, vit, tmp_path):
    with pytest.raises(ModelError, match=r"attn is open_clip's own attention class, which peft has no LoRA for"):
        export_peft(tuned(custom, **lora(("q",))), custom, tmp_path / "a")
    with pytest.raises(ModelError, match=r"attn has LoRA in the output of torch's attention .*, which peft adds twice"):
        export_peft(tuned(vit, **lora(("q", "out"))), vit, tmp_path / "a")
    with pytest.raises(ModelError, match="the towers have no LoRA"):
        export_peft(tuned(vit, parameters="norm"), vit, tmp_path / "a")
    assert not (tmp_path / "a").exists()
