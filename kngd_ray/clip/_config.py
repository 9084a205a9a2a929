"""Which model a run learns on: a CLIP model and its weights, or features that were computed elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from kngd_ray.clip._tuning import TuneOptions
from kngd_ray.clip.adapters import AdapterConfig, ClassResidual

EMBEDDED_MODEL = "embedded"
PRECOMPUTED = "precomputed"
RANDOM = "random"
LOCAL_DIR = "local-dir:"
HF_HUB = "hf-hub:"

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
LOGIT_SCALE = 100.0  # that of OpenAI's models, and of most others after training


@dataclass(frozen=True)
class ModelConfig:
    """The CLIP model to adapt, or a description of the model that computed the features.

    Attributes:
        name: A model name of open_clip, ``embedded`` for the mini CLIP of this package, or ``precomputed`` for data
            sets of features. ``local-dir:FOLDER`` is a model in a folder, as ``export`` writes it, and
            ``hf-hub:ORGANISATION/REPOSITORY`` one on the hub of Hugging Face; both have their own weights.
        pretrained: A pretrained tag of that model, the path of a local checkpoint (``.safetensors``,
            or ``.pt``, ``.pth`` and ``.bin`` with nothing but tensors in it), or ``random`` for seeded
            untrained weights. None for the models that have no others.
        class_embeddings: Of ``precomputed``, a ``.npy`` file (C, d) with the text embeddings of all classes of the data
            in order of their labels, or (C, T, d) of T prompts. None learns a linear classifier from the shots alone.
        logit_scale: Of ``precomputed``, the factor from cosines to logits. None takes it from the features' file, where
            ``encode`` writes it, or else is 100.
    """

    name: str = EMBEDDED_MODEL
    pretrained: str | None = None
    class_embeddings: str | None = None
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("class_embeddings", "logit_scale"):
            if not self.precomputed and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for name=precomputed, and name is {self.name}, which has its own: leave one of them out"
                )
        if self.precomputed and self.pretrained is not None:
            raise ValueError(
                f"pretrained is {self.pretrained!r}, and name=precomputed has no towers with weights: leave it out, or "
                "set name to the architecture of these weights"
            )
        if self.logit_scale is not None and not (isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit_scale is {self.logit_scale}; it must be a positive number, such as 100")

    @property
    def precomputed(self) -> bool:
        """Whether features are given, and no tower computes any."""
        return self.name == PRECOMPUTED

    def absolute(self) -> "ModelConfig":
        """The same model, for a process that works in another folder."""
        found = self
        if self.name.startswith(LOCAL_DIR) and self.name != LOCAL_DIR:
            found = replace(found, name=f"{LOCAL_DIR}{_absolute(self.name.removeprefix(LOCAL_DIR))}")
        if self.pretrained is not None and Path(self.pretrained).suffix in CHECKPOINT_SUFFIXES:
            found = replace(found, pretrained=_absolute(self.pretrained))
        if self.class_embeddings is not None:
            found = replace(found, class_embeddings=_absolute(self.class_embeddings))
        return found


def public_name(name: str) -> str:
    """A model's name for files that others read: of a folder its last part, as its place says more than it should."""
    return Path(name).name if name.startswith(LOCAL_DIR) else name


def check_without_towers(
    model: ModelConfig, tune: TuneOptions, adapters: Sequence[AdapterConfig], *, prompts: bool, protocol: str
) -> None:
    """Refuse what needs towers, or class embeddings, where features are given without them.

    Args:
        model: Precomputed.
        tune: What is trained.
        adapters: On which embeddings.
        prompts: Whether templates are given.
        protocol: What is tested beside.

    Raises:
        ValueError: Towers are to be trained, texts to be encoded, or class embeddings that are not there adapted.
    """
    if tune.images:
        raise ValueError(
            f"tune.parameters is {tune.parameters}, which trains towers, and model.name=precomputed has none: set "
            "tune.parameters=adapter, or model.name to a CLIP model and data.path to pictures"
        )
    if prompts:
        raise ValueError(
            "data.templates are prompts for a text tower, and model.name=precomputed has none: leave them out, "
            "and make model.class_embeddings from them"
        )
    if protocol == "cdg":
        raise ValueError(
            "protocol is cdg, which encodes the targets' classes with a text tower, and "
            "model.name=precomputed has none: use another protocol, or a CLIP model and pictures"
        )
    if model.class_embeddings is not None:
        return
    if protocol == "bng":
        raise ValueError("protocol is bng, which recognises new classes by their texts: give model.class_embeddings")
    if not any(isinstance(adapter, ClassResidual) for adapter in adapters):
        raise ValueError(
            f"adapter is {', '.join(a.kind for a in adapters) or 'none'}, which works on "
            "model.class_embeddings: give them, or set adapter=class_residual"
        )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
