"""Frozen CLIP towers: where their weights come from, and what exactly was loaded.

A model is named in one of six ways::

    name = "embedded"                                 the mini CLIP of this package, no network
    name = "ViT-B-16"   pretrained = "openai"         a tag of open_clip, fetched from its hub once
    name = "ViT-B-16"   pretrained = "vit.safetensors"   a local checkpoint file
    name = "ViT-B-16"   pretrained = "random"         untrained, the same weights every time
    name = "local-dir:exported"                       a folder with architecture and weights, as ``export`` writes it
    name = "hf-hub:org/repository"                    the same, fetched from the hub of Hugging Face once

Everything a feature depends on is hashed into :attr:`ClipModel.fingerprint`, so that features can be
cached on disk and never be taken for those of another model.
"""

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from kngd_ray._allocator import keep_freed_memory
from kngd_ray._rgb import to_rgb
from kngd_ray.clip._config import ModelConfig
from kngd_ray.clip._context import Reading
from kngd_ray.clip._copies import copied
from kngd_ray.clip._locate import Source, first_line, locate
from kngd_ray.clip._precomputed import PrecomputedModel, check_distinct
from kngd_ray.clip._prompts import called_missing, check_names, said_otherwise
from kngd_ray.clip._transfer import PictureTransform, channels_last, sent, tower_products
from kngd_ray.clip.builds import torchvision_errors
from kngd_ray.errors import ModelError

Item = TypeVar("Item")
_TEXTS_AT_ONCE = 256


class ClipModel:
    """A frozen image tower and text tower that share one embedding space of dimension d.

    Attributes:
        name: The name it was loaded by.
        fingerprint: sha256 (hex) of all weights and buffers, the model configuration and the picture
            transforms; the same on every device.
        embed_dim: d.
        logit_scale: Factor from cosines to logits (the inverse temperature).
        device: Where the towers are; features always come back on the CPU.
        architecture: open_clip's configuration of the towers.
        pictures: The transform in two parts: to bytes, and from bytes to what the tower takes.
        zero_shot: That its text tower tells classes apart before anything is learned.
        left_open: What the file of its weights does not say, in a sentence; None where nothing is left open.
    """

    def __init__(
        self,
        name: str,
        network: Any,  # one of open_clip's untyped CLIP classes
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[..., Tensor],  # of texts, and of a context_length other than the tower's
        architecture: dict[str, Any],
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,  # if it is known: to take it reads all weights
        left_open: str | None = None,
    ) -> None:
        self.name = name
        self.left_open = left_open
        self.zero_shot = True
        self.device = torch.device(device)
        self.architecture = architecture
        self.embed_dim: int = architecture["embed_dim"]
        self.fingerprint = fingerprint or _fingerprint(network, transform, architecture)
        self._network = network.eval().requires_grad_(False).to(self.device)
        self._transform = transform
        self.pictures = PictureTransform(transform)
        self._tokenizer = tokenizer
        self.logit_scale = float(self._network.logit_scale.exp())

    def __repr__(self) -> str:
        return f"ClipModel({self.name!r}, embed_dim={self.embed_dim}, fingerprint={self.fingerprint[:12]!r})"

    def copied(self, device: torch.device | str) -> "ClipModel":
        """The same model with weights of its own, which may be trained."""
        network = copied(self._network)
        return ClipModel(
            self.name,
            network,
            self._transform,
            self._tokenizer,
            self.architecture,
            device,
            self.fingerprint,
            self.left_open,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from other models, as JSON data."""
        return {"fingerprint": self.fingerprint, "embed_dim": self.embed_dim}

    @property
    def network(self) -> Any:
        """The open_clip model itself: frozen, in evaluation mode, and not to be written to."""
        return self._network

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """What turns an RGB picture into the image tower's input (3, H, W) at evaluation."""
        return self._transform

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """open_clip's description of the transform: ``size``, ``mean``, ``std``, ``interpolation`` and more."""
        return dict(self._network.visual.preprocess_cfg)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens (n, L) int64 of n texts, cut off or padded to the context of the text tower."""
        return self._tokenizer(list(texts))

    def encode_images(self, images: Sequence[Image.Image], *, batch_size: int = 64) -> Tensor:
        """Encode pictures.

        Args:
            images: m pictures of any size and mode.
            batch_size: Pictures that go through the tower at once; no influence on the features
                beyond float rounding.

        Returns:
            Features (m, d), float32 rows of unit norm on the CPU.
        """

        def prepare(batch: Sequence[Image.Image]) -> Tensor:
            # RGB first: resizing a palette picture would interpolate palette indices.
            return torch.stack([self.pictures.decoded(to_rgb(image)) for image in batch])

        def encode(pixels: Tensor) -> Tensor:
            return self._network.encode_image(channels_last(self.pictures.normalised(pixels)))

        return self._encode(images, prepare, encode, batch_size)

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = _TEXTS_AT_ONCE) -> Tensor:
        """Encode texts, cut to the context of the text tower.

        Args:
            texts: n texts.
            batch_size: Texts that go through the tower at once; no influence on the features beyond
                float rounding.

        Returns:
            Features (n, d), float32 rows of unit norm on the CPU.
        """
        return self._encode(texts, self.tokenize, self._network.encode_text, batch_size)

    def encode_classes(
        self, class_names: Sequence[str], templates: str | Sequence[str], *, known: bool = False
    ) -> Tensor:
        """Encode classes as the mean direction of their prompts: the weights of a zero-shot head.

        A DataError tells of classes that the text tower does not tell apart, or whose names it cuts off.

        Args:
            class_names: C names; an underscore counts as a space.
            templates: Sentences with one ``{}`` each, or the name of a set of them.
            known: They are those of a fit: what it learned may tell classes apart whose texts are one.

        Returns:
            Features (C, d), float32 rows of unit norm on the CPU.
        """
        reading = Reading(self._tokenizer, class_names, templates)
        if not known:
            check_names(class_names)
            reading.check(self.name)
        features = self._encode(reading.tokens, lambda tokens: tokens, self._network.encode_text, _TEXTS_AT_ONCE)
        mean = features.view(len(class_names), -1, self.embed_dim).mean(dim=1)
        embeddings = normalize(mean, dim=-1)
        if not known:
            check_distinct(embeddings.numpy(), class_names, f"the text tower of {self.name}")
        return embeddings

    def notes(self, class_names: Sequence[str], templates: str | Sequence[str]) -> list[str]:
        """Remarks on weights and prompts: what a file leaves open, names put in words, prompts that are cut off.

        Args:
            class_names: the classes.
            templates: of their prompts.

        Returns:
            Lines.
        """
        found = (
            self.left_open,
            called_missing(class_names),
            said_otherwise(class_names, templates),
            Reading(self._tokenizer, class_names, templates).note(),
        )
        return [line for line in found if line is not None]

    def _encode(
        self,
        items: Sequence[Item] | Tensor,
        prepare: Callable[[Any], Tensor],
        tower: Callable[[Tensor], Tensor],
        batch_size: int,
    ) -> Tensor:
        features = [torch.empty(0, self.embed_dim)]
        for start in range(0, len(items), batch_size):
            with torch.inference_mode(), tower_products(self.device):
                batch = sent(prepare(items[start : start + batch_size]), self.device)
                features.append(tower(batch).float().cpu())
        # Outside inference_mode, whose tensors autograd refuses: these are the inputs of adapters.
        return normalize(torch.cat(features), dim=-1)


AnyModel = PrecomputedModel | ClipModel
"""What embeds classes; the second has towers that embed pictures and texts as well."""


@torchvision_errors()
def load_model(config: ModelConfig, device: torch.device | str = "cpu") -> ClipModel:
    """Load a CLIP model, frozen and in evaluation mode; the last one is read and hashed once in a process.

    Needs no network for ``embedded``, local files and ``random``. Nothing is unpickled beyond tensors,
    and the state of the global random generators is left as it was. A :class:`ModelError` tells of an
    unknown model, tag or file, and of weights that cannot be fetched, read or put into that architecture.

    Args:
        config: Which model and which weights.
        device: Where the towers go.

    Returns:
        The model.
    """
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    source = locate(config)
    version = tuple(number for file in source.files for number in _version(file))
    known = _last.get((source.key, version))
    if known is None:
        with quiet_open_clip():
            network, transform, tokenizer, architecture = _build(source)
            if source.checkpoint is not None:
                _load_weights(network, source.checkpoint, source.name)
        known = ClipModel(source.name, network, transform, tokenizer, architecture, left_open=source.left_open)
        _last.clear()
        _last[source.key, version] = known
    # towers are trained in place, so that nobody is given those that are kept
    return known.copied(device)


_last: dict[tuple[str, tuple[int, ...]], ClipModel] = {}


def _version(path: Path) -> tuple[int, ...]:
    """What tells a file from one that is written in its place."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _build(source: Source) -> tuple[torch.nn.Module, Any, Any, dict[str, Any]]:
    """Instantiate network (its weights untrained, but seeded), picture transform and tokenizer.

    Raises:
        ModelError: A tower or tokenizer of another library is not installed or not cached.
    """
    import open_clip

    _check_preprocessing(source)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = open_clip.create_model(
                source.open_clip_name,
                load_weights=False,
                pretrained_text=False,  # else text towers of the hub fetch weights that are replaced anyway
                force_preprocess_cfg=source.tag,
                # Some tags were trained with OpenAI's activation; open_clip warns and goes on without it.
                force_quick_gelu=source.tag.get("quick_gelu", False),
            )
        tokenizer = open_clip.get_tokenizer(source.open_clip_name)
        architecture = open_clip.get_model_config(source.open_clip_name)
    except Exception as error:  # towers and tokenizers of other libraries fetch their files here
        raise ModelError(
            f"model {source.name} cannot be built ({first_line(error)}): install what is named there, or "
            "set model.name to a model without files of other libraries, such as 'ViT-B-32'"
        ) from error
    transform = _transform_by(network.visual.preprocess_cfg)
    architecture["quick_gelu"] = architecture.get("quick_gelu", False) or source.tag.get("quick_gelu", False)
    return network, transform, tokenizer, architecture


def _transform_by(preprocessing: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """open_clip's transform of pictures at evaluation."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform: Callable[[Image.Image], Tensor] = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    return transform


def _check_preprocessing(source: Source) -> None:
    """Try on a picture what a folder's configuration says of pictures: open_clip asserts it, or fails at the first one.

    Raises:
        ModelError: It makes no numbers of pictures.
    """
    if source.config is None:
        return
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    stated = json.loads(source.config.read_text(encoding="utf-8")).get("preprocess_cfg") or {}
    try:
        preprocessing = {**merge_preprocess_dict(PreprocessCfg(), stated), "size": 8}  # the architecture says the size
        seen = _transform_by(preprocessing)(Image.new("RGB", (8, 8), "white"))
        # for a lone 0 open_clip takes OpenAI's numbers in silence; [0, 0, 0] is what it says
        usable = len(seen) == 3 and bool(seen.isfinite().all()) and all(preprocessing[key] for key in ("mean", "std"))
    except Exception:  # whatever torchvision and Pillow make of the values
        usable = False
    if not usable:
        raise ModelError(
            f"model.name={source.name!r}: preprocess_cfg in {source.config} is no way to prepare pictures, "
            f"{json.dumps(stated)[:300]}: correct it, or fetch or export it again"
        )


def _load_weights(network: torch.nn.Module, path: Path, name: str) -> None:
    """Load a checkpoint into a network; their weights must match exactly.

    Raises:
        ModelError: The file is corrupt, is more than tensors, or belongs to another architecture.
    """
    import open_clip

    _check_archive(path)
    try:
        # Not strict: it then returns the names that strict loading would bury in a long message.
        keys = open_clip.load_checkpoint(network, str(path), strict=False, weights_only=True)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}): check its permissions and size, or fetch it again"
        ) from error
    except Exception as error:  # open_clip assumes much of a checkpoint while it converts old layouts
        difference = _first_difference(network, path)
        if difference is None:
            raise ModelError(
                f"{path} is corrupt or holds Python objects besides tensors, which are never unpickled: "
                "fetch it again, or save its state dict as .safetensors"
            ) from error
        reason = difference or first_line(error)
        raise ModelError(f"{path} is not a checkpoint of {name}: {reason}") from error
    if keys.missing_keys:
        raise ModelError(f"{path} is not a checkpoint of {name}: it has no {keys.missing_keys[0]!r}")
    if keys.unexpected_keys:
        raise ModelError(f"{path} is not a checkpoint of {name}: {name} has no {keys.unexpected_keys[0]!r}")


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than it is; torch, whose ``.pt`` are archives, never compresses.

    Raises:
        ModelError: It does.
    """
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # torch says what is wrong with it
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ModelError(f"{path} unpacks to more than it holds, as no checkpoint of torch does: fetch it again")


def _first_difference(network: torch.nn.Module, path: Path) -> str | None:
    """The first tensor that a checkpoint lacks or has in another shape; None if it cannot be read."""
    from open_clip.factory import load_state_dict

    try:
        found = load_state_dict(str(path), weights_only=True)
    except Exception:
        return None
    for key, tensor in network.state_dict().items():
        if key not in found:
            return f"it has no {key!r}"
        if (shape := getattr(found[key], "shape", ())) != tensor.shape:
            return f"its {key!r} has shape {tuple(shape)}, not {tuple(tensor.shape)}"
    return ""


def _fingerprint(network: torch.nn.Module, transform: object, architecture: dict[str, Any]) -> str:
    """Hash what the features depend on; see :class:`ClipModel`."""
    steps = re.sub(r" at 0x[0-9a-f]+", "", repr(transform))  # functions print their address
    # open_clip's padding does not print its colour, and has none but black in what was hashed without it
    steps += "".join(f" fill={s.fill}" for s in getattr(transform, "transforms", ()) if getattr(s, "fill", None))
    digest = hashlib.sha256(json.dumps([architecture, steps], sort_keys=True).encode())
    # The state dict leaves out buffers that are computed from the configuration, which is hashed itself.
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Keep open_clip from configuring the root logger and from logging its steps there."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "open_clip" not in Path(record.pathname).parts

    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # without any handler, logging.info() installs one for stderr
    root.addFilter(from_elsewhere)
    try:
        yield
    finally:
        root.removeFilter(from_elsewhere)
        root.removeHandler(handler)
