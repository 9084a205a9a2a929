"""Files that other programs read: an open_clip checkpoint, and the classifier in ONNX; both checked once written."""

import copy
import json
import math
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from kngd_ray.clip._checked import CHECKED, Exported, difference_of, logits_of, merged, random_pictures, size_of
from kngd_ray.clip._head import CLIPHead
from kngd_ray.clip._model import ClipModel, quiet_open_clip
from kngd_ray.clip._network import CLIPNetwork
from kngd_ray.clip.adapters import Adapter, Linear
from kngd_ray.errors import ModelError
from kngd_ray.storage import storage_errors, temporary_beside, write_text

__all__ = ["CONFIG", "ONNX", "WEIGHTS", "Exported", "export_onnx", "export_open_clip", "rounding_of"]

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
ONNX = "classifier.onnx"

_ONE_FILE = 2**31 - 2**24  # bytes of weights that fit into a protobuf with its graph


def export_open_clip(network: CLIPNetwork, model: ClipModel, folder: Path, sharpening: float = 1.0) -> Exported:
    """Write both towers as an open_clip checkpoint, LoRA merged and weights averaged by the options' alpha.

    ``open_clip.create_model(f"local-dir:{folder}")`` loads it, and so does ``open_clip.create_model(name,
    pretrained=path)`` where the model has a name of open_clip's. Linear adapters of the image embedding go into
    the tower's last projection; other adapters have no place in such a file. Where there are none, what the run
    believes of the zero-shot logits, gamma, and its sharpening go into the logit scale.

    Args:
        network: as trained.
        model: the pretrained model that it is of.
        folder: where ``open_clip_model.safetensors`` and ``open_clip_config.json`` go; made if missing.
        sharpening: what the run's predictions multiply the logits by.

    Returns:
        What was written, with the difference that the loaded file makes to the logits of random pictures with
        the class prompts, by the towers and the adapters that it holds.

    Raises:
        ModelError: The file, loaded again, does not give the network's logits.
    """
    import open_clip

    with merged(network) as clip:
        folded, notes = _fold(clip, network)
        size = size_of(model)
        pictures = random_pictures(size)
        prompts = network.prompt_tokens[: 4 * CHECKED]
        expected = logits_of(network.clip, pictures, prompts, folded)
        factor = sharpening * network.head.gamma
        if len(folded) == len(network.adapters) and factor > 0:  # nothing left out: the checkpoint is the classifier
            clip.logit_scale.add_(math.log(factor))
            expected *= factor
    path = folder / WEIGHTS
    with storage_errors(path, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in clip.state_dict().items()},
            str(temporary),
        )
        temporary.replace(path)
    config = {"model_cfg": model.architecture, "preprocess_cfg": model.preprocess_cfg}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    with quiet_open_clip():
        loaded = open_clip.create_model(f"local-dir:{folder}").eval()
    difference = difference_of(logits_of(loaded, pictures, prompts, []), expected, network.logit_scale, path)
    if model.architecture.get("quick_gelu"):
        notes.append("open_clip.create_model with a model's name needs force_quick_gelu=True for these weights")
    if network.pairs and network.text_trained:
        notes.append("the run classified by the pretrained texts and its adapters; this text tower is the tuned one")
    return Exported(path, difference, tuple(notes))


def export_onnx(
    network: CLIPNetwork, folder: Path, image_size: int | tuple[int, int], sharpening: float = 1.0
) -> Exported:
    """Write the image tower with the class head and its adapters as ONNX, for batches of any size.

    Its input ``images`` (m, 3, H, W) are transformed pictures, its output ``logits`` (m, C).

    Args:
        network: as trained; its weights are averaged by the options' alpha.
        folder: where ``classifier.onnx`` goes; made if missing.
        image_size: H and W, or both.
        sharpening: what the run's predictions, and so the logits of the file, are multiplied by.

    Returns:
        What was written; checked if onnxruntime is installed.

    Raises:
        ModelError: The packages for it are not installed, or the file does not give the network's logits.
    """
    if missing := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise ModelError(f"ONNX export needs the package {missing[0]}: pip install kngd_ray[export]")
    pictures = random_pictures(image_size)
    classifier = _classifier(network, sharpening)
    path = folder / ONNX
    large = sum(t.nbytes for t in [*classifier.parameters(), *classifier.buffers()]) > _ONE_FILE
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(
            classifier,
            (pictures,),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=large,
            dynamo=True,
            verbose=False,
        )
    if find_spec("onnxruntime") is None:
        return Exported(path, None, ("not checked: onnxruntime is not installed",))
    onnxruntime = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for batch in (pictures, pictures[:1]):  # the batch size must not be a constant of the graph
        with torch.no_grad():
            expected = classifier(batch)
        logits = torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
        differences.append(difference_of(logits, expected, network.logit_scale, path))
    return Exported(path, max(differences))


@torch.no_grad()
def rounding_of(network: CLIPNetwork, *, texts: bool) -> float:
    """Measure what is lost by a precision that written files do not have: their towers are in float32.

    Args:
        network: as trained.
        texts: whether the file has the text tower; the ONNX classifier has the class embeddings that the network uses.

    Returns:
        Largest absolute difference between its logits of random pictures and those of the file's towers.
    """
    options = network.options
    if options.precision == "float32":
        return 0.0
    inputs = network.example(CHECKED)
    pictures, embeddings = inputs["image" if network.image_trained else "feature"], network.classifier()
    found = network.classify(pictures, embeddings)
    try:
        network.options = replace(options, precision="float32")
        expected = network.classify(pictures, network.classifier() if texts else embeddings)
    finally:
        network.options = options
    return float((found - expected).abs().max())


class _Classifier(nn.Module):
    """Transformed pictures (m, 3, H, W) to logits (m, C), with fixed class embeddings.

    Args:
        clip: an open_clip model, of which the image tower is used.
        head: the head with its adapters.
        class_embeddings: (C, d).
        sharpening: what the head's logits are multiplied by.
    """

    class_embeddings: Tensor

    def __init__(self, clip: Any, head: CLIPHead, class_embeddings: Tensor, sharpening: float) -> None:
        super().__init__()
        self.visual = clip.visual
        self.head = head
        self.sharpening = sharpening
        self.register_buffer("class_embeddings", class_embeddings)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (m, C) of pictures (m, 3, H, W)."""
        logits: Tensor = self.head(normalize(self.visual(images), dim=-1), self.class_embeddings)
        return self.sharpening * logits


def _classifier(network: CLIPNetwork, sharpening: float) -> _Classifier:
    """The network as trained, averaged and merged, on the CPU in float32."""
    with merged(network) as clip, torch.no_grad():
        head = copy.deepcopy(network.head).cpu().float()
        weights = network.classifier().cpu().float().clone()
    return _Classifier(clip, head, weights, sharpening).eval().requires_grad_(False)


def _fold(clip: Any, network: CLIPNetwork) -> tuple[list[Adapter], list[str]]:
    """Put linear adapters of the image embedding into the last projection of the image tower.

    The embedding is normalised afterwards, so that normalising it before as well makes no difference.

    Args:
        clip: the towers to write, which are changed.
        network: with the adapters.

    Returns:
        The adapters that were put there, and a note for each that was not.
    """
    visual = clip.visual
    last = getattr(getattr(visual, "head", None), "proj", None)
    folded: list[Adapter] = []
    notes: list[str] = []
    blocked = False  # by an adapter of the image before it, which stays outside
    adapter: Adapter
    for config, trained in zip(network.adapters, network.head.adapters, strict=True):
        adapter = copy.deepcopy(trained).cpu().float()  # type: ignore[assignment]
        linear = isinstance(config, Linear) and config.tower == "image" and not blocked
        with torch.no_grad():
            if linear and isinstance(proj := getattr(visual, "proj", None), nn.Parameter):
                proj.copy_(adapter.image(proj))
            elif linear and isinstance(last, nn.Linear):
                last.weight.copy_(adapter.image(last.weight.mT).mT)
                if last.bias is not None:
                    last.bias.copy_(adapter.image(last.bias))
            else:
                notes.append(f"the {config.kind} adapter is left out: an open_clip checkpoint has no place for it")
                of_image = type(adapter).image is not Adapter.image and getattr(config, "tower", "image") != "text"
                blocked = blocked or of_image
                continue
        folded.append(adapter)
    return folded, notes
