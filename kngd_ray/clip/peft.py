"""LoRA in the layout of Hugging Face's peft: what it reads back gives the same logits. peft itself is not needed.

::

    adapter_config.json          ranks and factors, and which layers
    adapter_model.safetensors    lora_A (r, i) and lora_B (o, r) of each

peft has one update W + (alpha / r) B A for a whole layer, and kngd_ray one for each of q, k and v. Stacked they are
one, exactly: A = [A_q; A_k; A_v] and B = diag(B_q, B_k, B_v), of the sum of their ranks. In torch's attention peft has
one for the output's projection as well, and adds that one twice (0.21): here it is zero, or refused.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kngd_ray._option import option
from kngd_ray.clip._checked import CHECKED, Exported, difference_of, logits_of, merged, random_pictures, size_of
from kngd_ray.clip._lora_layers import LoraAttention, LoraCustomAttention, LoraLinear, LoraPointwise
from kngd_ray.clip._model import ClipModel
from kngd_ray.clip._network import CLIPNetwork
from kngd_ray.errors import ModelError
from kngd_ray.storage import storage_errors, temporary_beside, write_text

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # of peft, before the names of the model that it wraps


class _Update(NamedTuple):
    """What is added to one weight: scaling * up @ down."""

    key: str  # peft's name of the layer
    weight: str  # open_clip's name of the weight
    down: Tensor  # (r, i)
    up: Tensor  # (o, r)


class _Layer(NamedTuple):
    """An adapted layer as peft has it."""

    name: str
    rank: int
    updates: tuple[_Update, ...]


def export_peft(network: CLIPNetwork, model: ClipModel, folder: Path, base: str | None = None) -> Exported:
    """Write the LoRA updates of both towers, averaged by the options' alpha, as peft reads them.

    ``peft.PeftModel.from_pretrained(open_clip.create_model(...), folder)`` puts them into the pretrained model.

    Args:
        network: as trained.
        model: the pretrained model that it is of.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go; made if missing.
        base: the hub's name of the pretrained model, if it has one.

    Returns:
        What was written, with the difference that the pretrained model with the file's updates makes to the logits of
        random pictures with the class prompts.

    Raises:
        ModelError: The network has no LoRA or has it where peft has none, or the file, read again, does not give the
            network's logits.
    """
    with network.blended(network.options.alpha):
        layers = list(_layers(network.clip))
        notes = [
            f"the {config.kind} adapter is left out: peft's layout has no place for it" for config in network.adapters
        ]
    with merged(network) as clip:
        pictures, prompts = random_pictures(size_of(model)), network.prompt_tokens[: 4 * CHECKED]
        expected = logits_of(clip, pictures, prompts, [])
    tensors = {
        f"{_PREFIX}{u.key}.lora_{side}.weight": t
        for layer in layers
        for u in layer.updates
        for side, t in (("A", u.down), ("B", u.up))
    }
    path = folder / WEIGHTS
    with storage_errors(path, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            str(temporary),
            {"format": "pt"},
        )
        temporary.replace(path)
    write_text(folder / CONFIG, json.dumps(_config(layers, network, base), indent=2) + "\n")
    found = logits_of(_applied(model, layers, load_file(path), network.options.scaling), pictures, prompts, [])
    return Exported(path, difference_of(found, expected, network.logit_scale, path), tuple(notes))


def _layers(clip: nn.Module) -> Iterator[_Layer]:
    """The adapted layers of the towers, on the CPU in float32.

    Raises:
        ModelError: There is none, or peft has no update for one of them.
    """
    none = True
    for name, module in clip.named_modules():
        layer: Any = module
        if getattr(layer, "lora_plain", None) is None:
            continue
        none = False
        if isinstance(layer, LoraAttention) and layer._qkv_same_embed_dim:
            yield _attention(name, layer)
        elif isinstance(layer, LoraLinear):
            down, up = _stacked(layer, layer.blocks, layer.out_features)
            yield _Layer(name, len(down), (_Update(name, f"{name}.weight", down, up),))
        elif isinstance(layer, LoraPointwise):
            down, up = _stacked(layer, ("pointwise",), layer.out_channels)
            yield _Layer(
                name, len(down), (_Update(name, f"{name}.weight", down[..., None, None], up[..., None, None]),)
            )
        else:
            what = (
                "open_clip's own attention class"
                if isinstance(layer, LoraCustomAttention)
                else "attention whose q, k and v differ in width"
            )
            raise ModelError(
                f"{name} is {what}, which peft has no LoRA for: leave out {option('peft')}, the open_clip checkpoint"
                " has the updates merged"
            )
    if none:
        raise ModelError(f"the towers have no LoRA, and peft's layout holds nothing else: leave out {option('peft')}")


def _attention(name: str, layer: LoraAttention) -> _Layer:
    """The packed projection of torch's attention, and zeros for the output's.

    Raises:
        ModelError: The output's has an update.
    """
    if "out" in layer.lora:
        raise ModelError(
            f"{name} has LoRA in the output of torch's attention (tune.targets: out), which peft adds twice: leave out"
            f" {option('peft')}, the open_clip checkpoint has the updates merged"
        )
    d = layer.embed_dim
    down, up = _stacked(layer, ("q", "k", "v"), 3 * d)
    zeros = _Update(
        f"{name}.base_layer.out_proj", f"{name}.out_proj.weight", torch.zeros_like(down), up.new_zeros(d, len(down))
    )
    return _Layer(name, len(down), (_Update(name, f"{name}.in_proj_weight", down, up), zeros))


def _stacked(layer: Any, kinds: tuple[str, ...], rows: int) -> tuple[Tensor, Tensor]:
    """The updates of equal blocks of a weight's rows as one: A (sum of r, i) and B (o, sum of r)."""
    height = rows // len(kinds)
    factors = {kind: (layer.lora[kind].down, layer.lora[kind].up) for kind in kinds if kind in layer.lora}
    factors = {kind: (down.detach().cpu().float(), up.detach().cpu().float()) for kind, (down, up) in factors.items()}
    down = torch.cat([down for down, _ in factors.values()])
    up, column = torch.zeros(rows, len(down)), 0
    for number, kind in enumerate(kinds):
        if kind in factors:
            part = factors[kind][1]
            up[number * height : (number + 1) * height, column : column + part.shape[1]] = part
            column += part.shape[1]
    return down, up


def _config(layers: list[_Layer], network: CLIPNetwork, base: str | None) -> dict[str, Any]:
    """The settings that peft reads; names are whole ones: the end of one tower's may be all of the other's."""
    rank, scaling = network.options.rank, network.options.scaling
    other = {f"^{re.escape(layer.name)}": layer.rank for layer in layers if layer.rank != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scaling * rank,
        "rank_pattern": other,
        "alpha_pattern": {name: scaling * r for name, r in other.items()},
        "target_modules": "|".join(re.escape(layer.name) for layer in layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _applied(model: ClipModel, layers: list[_Layer], tensors: dict[str, Tensor], scaling: float) -> nn.Module:
    """The pretrained model with the updates of a file, on the CPU in float32."""
    clip = copy.deepcopy(model.network).cpu().float()
    weights = dict(clip.named_parameters())
    with torch.no_grad():
        for update in (update for layer in layers for update in layer.updates):
            down, up = (tensors[f"{_PREFIX}{update.key}.lora_{side}.weight"] for side in "AB")
            weight = weights[update.weight]
            weight += (scaling * up.flatten(1) @ down.flatten(1)).view_as(weight)
    return clip
