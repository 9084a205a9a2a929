"""A saved estimator as the folder of a run, which the commands take."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kngd_ray._run_layout import CONFIG, FITS, IN_MEMORY, fit_name
from kngd_ray.clip import AnyModel, ModelConfig, PrecomputedModel
from kngd_ray.config import Config, parse, to_yaml
from kngd_ray.estimator._in_memory import write
from kngd_ray.estimator._naming import listed_templates
from kngd_ray.storage import write_text
from kngd_ray.training.checkpoint import Checkpoint
from kngd_ray.training.classifier import CLASS_EMBEDDINGS
from kngd_ray.training.resumable import SOURCE
from kngd_ray.training.settled import Settled, save_settled


def write_run(place: Path, kept: Checkpoint, settled: Settled, model: AnyModel, config: Config) -> None:
    """Write a fit, and the settings with which commands find it and its model.

    Args:
        place: a new or empty folder.
        kept: weights and covariance.
        settled: calibration and posterior.
        model: that the fit was made with.
        config: settings of the fit.
    """
    fit = place / FITS / fit_name(config.method, kept.manifest["seed"])
    embeddings = fit.absolute() / CLASS_EMBEDDINGS
    if isinstance(model, PrecomputedModel) and model.zero_shot:
        source = {**kept.manifest[SOURCE], "class_embeddings": str(embeddings)}
        kept = replace(kept, manifest={**kept.manifest, SOURCE: source})
    write(fit, kept)
    if isinstance(model, PrecomputedModel):
        model.save(embeddings)
    save_settled(fit, settled)
    write_text(place / CONFIG, to_yaml(_as_run(config, kept, place.absolute())))


def saved_params(params: Mapping[str, Any], source: ModelConfig) -> dict[str, Any]:
    """Parameters of an estimator as JSON takes them.

    Args:
        params: as they are.
        source: of the model that the fit was made with.

    Returns:
        Those with which it is made again.
    """
    device, seed, found = params["device"], params["random_state"], source.absolute()
    return {
        **params,
        "model": found.name,
        "pretrained": found.pretrained,
        "logit_scale": found.logit_scale,
        "class_embeddings": None,  # are in the folder
        "templates": list(listed_templates(params["templates"])),
        "class_names": None,  # are in the checkpoint
        "device": None if device is None else str(device),
        "random_state": int(seed) if isinstance(seed, int | np.integer) else None,
    }


def fit_in(place: Path) -> Path:
    """The fit in a saved folder."""
    fits = sorted((place / FITS).glob("*"))
    return fits[0] if fits else place  # as it was saved before its folder was that of a run


def _as_run(config: Config, kept: Checkpoint, place: Path) -> Config:
    source = parse(ModelConfig, kept.manifest[SOURCE])
    data = replace(config.data, path=IN_MEMORY)
    if not source.precomputed:
        data = replace(data, templates=tuple(kept.manifest["templates"]))
    trainer = replace(config.trainer, num_workers=0, name=place.name, storage_path=str(place.parent))
    seeds = (kept.manifest["seed"],)
    return replace(config, model=source.absolute(), data=data, trainer=trainer, seeds=seeds)
