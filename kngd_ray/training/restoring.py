"""A finished fit from its checkpoint: the model that it was trained on, and the predictor that it holds."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kngd_ray._option import option
from kngd_ray.clip import (
    AnyModel,
    CLIPHead,
    ClipModel,
    CLIPNetwork,
    Head,
    ModelConfig,
    best_device,
    load_model,
    load_precomputed,
)
from kngd_ray.config import parse
from kngd_ray.errors import CheckpointError
from kngd_ray.filters import Belief
from kngd_ray.observations import trainable
from kngd_ray.training.calibration import AnyPredictor, assembled
from kngd_ray.training.checkpoint import MANIFEST, Checkpoint
from kngd_ray.training.checkpoint import load as load_checkpoint
from kngd_ray.training.kalman import KalmanNGD, nested
from kngd_ray.training.method import load_head
from kngd_ray.training.options import FitOptions
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.resumable import SOURCE, latest
from kngd_ray.training.settled import CALIBRATION
from kngd_ray.training.streamed import family_of

logger = logging.getLogger(__name__)


def identity_of(
    model: AnyModel, config: ModelConfig, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Any]:
    """What a head's weights belong to: a checkpoint of another identity is refused.

    Args:
        model: the loaded model.
        config: how to load it again.
        class_names: the classes, in label order.
        templates: prompts of the class embeddings.

    Returns:
        JSON data.
    """
    return {
        "model": model.identity,
        SOURCE: asdict(config.absolute()),
        "class_names": list(class_names),
        "templates": list(templates),
    }


def load_fitted(manifest: Mapping[str, Any], config: ModelConfig | None = None) -> AnyModel:
    """The model that a fit was trained on, whatever data it is now used on.

    Args:
        manifest: of a checkpoint of the fit.
        config: where the model is now; None is where it was.

    Returns:
        The model, on this machine's GPU if there is one. Its fingerprint tells whether it is still the same.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    config = config or parse(ModelConfig, manifest[SOURCE])
    if not config.precomputed:
        return load_model(config, best_device())
    known = manifest["model"]
    try:
        names, encoded_by = known.get("classes", manifest["class_names"]), known.get("encoded_by")
        return load_precomputed(config, names, int(known["embed_dim"]), encoded_by)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the manifest's model is damaged ({error}): use another checkpoint.") from error


def restore_predictor(
    checkpoint: Checkpoint,
    model: AnyModel,
    posterior: PosteriorOptions,
    *,
    alpha: float | None = None,
    class_embeddings: Tensor | None = None,
    device: torch.device | str | None = None,
) -> AnyPredictor:
    """The predictor that a checkpoint holds.

    Args:
        checkpoint: a verified checkpoint of a fit.
        model: the pretrained model that it was trained from.
        posterior: how the posterior enters.
        alpha: weight ensembling with the pretrained model; None is the fit's own setting.
        class_embeddings: (C, d) unit text embeddings of its classes, if they are known already.
        device: where a head on frozen towers is to be; None is where the model is. Trained towers stay with the model.

    Returns:
        The predictor.

    Raises:
        CheckpointError: the weights are of another architecture.
    """
    manifest = checkpoint.manifest
    options = parse(FitOptions, manifest["options"])
    if class_embeddings is None:
        class_embeddings = model.encode_classes(manifest["class_names"], manifest["templates"], known=True)
    head: Head = CLIPHead(class_embeddings, model.logit_scale, options.adapter).to(device or model.device)
    if options.tune.images:
        assert isinstance(model, ClipModel)
        head = CLIPNetwork(
            model,
            manifest["class_names"],
            manifest["templates"],
            options.tune,
            options.adapter,
            pairs=options.pairs,
            class_embeddings=class_embeddings.to(model.device),
        )
    parameters = trainable(head)
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    if shapes != manifest["parameters"]:
        name = next(n for n in {**shapes, **manifest["parameters"]} if shapes.get(n) != manifest["parameters"].get(n))
        raise CheckpointError(
            f"{checkpoint.folder} holds weights of another architecture: its {name} is "
            f"{manifest['parameters'].get(name)}, where {shapes.get(name)} is expected; use the model and classes "
            "that it was trained with."
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(checkpoint.state.weights[name])
    alpha = options.tune.alpha if alpha is None else alpha
    load_head(head, checkpoint.state)
    if options.method != "kalman":
        return assembled(head, None, None, posterior, alpha)
    if isinstance(head, CLIPNetwork):
        covariance = nested(checkpoint.state.covariance, head.class_embeddings)
        # the mean is what the network has; in the order of theta, as draws are
        belief = Belief(head.class_embeddings.new_empty(0), {name: covariance[name] for name in parameters})
        return assembled(head, family_of(head, options), belief, posterior, alpha)
    method = KalmanNGD(head, options)
    method.load(checkpoint.state)
    return assembled(head, method.family, method.belief, posterior, alpha)


def open_fit(folder: Path) -> tuple[Checkpoint, Path]:
    """The final checkpoint of a fit, or the one that is named.

    Args:
        folder: of a finished fit, or of any checkpoint.

    Returns:
        The verified checkpoint and the folder of its fit.

    Raises:
        CheckpointError: there is none that can be believed, or the fit is not finished.
    """
    folder = Path(folder)  # FittedClassifier is public, and takes text too
    if (folder / MANIFEST).is_file():
        named = load_checkpoint(folder)
        if named.state.covariance and not (folder.parent / CALIBRATION).is_file():
            logger.warning("tau is not chosen before a fit has ended: %s predicts at the mean of its belief", folder)
        return named, folder.parent
    found = latest(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no usable checkpoint.")
    step, steps = found.manifest["step"], found.manifest["steps"]
    if step < steps or not (folder / CALIBRATION).is_file():
        raise CheckpointError(
            f"{folder} is not finished (step {step} of {steps}): continue its run with {option('resume')}, or name "
            f"the checkpoint {found.folder} itself."
        )
    return found, folder
