"""An estimator as the settings and the folder of a run, which the commands take."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kngd_ray._layered import plain
from kngd_ray._run_layout import CONFIG, FITS, IN_MEMORY, fit_name
from kngd_ray.clip import AnyModel, ModelConfig, PrecomputedModel, read_class_embeddings
from kngd_ray.config import Config, load_config, override, parse, to_yaml
from kngd_ray.errors import CheckpointError, ModelError, UsageError
from kngd_ray.estimator._conventions import settings_of
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


_ELSEWHERE = ("tune", "seeds", "baselines", "prior", "data", "model", "protocol", "targets", "trainer", "tracking")
_CROPS = ("tune.views", "tune.augment", "tune.crop_scale")


def config_of(preset: str, settings: Any, templates: Any, source: ModelConfig, *, embedded: bool) -> Config:
    """The configuration of an estimator's fit.

    Args:
        preset: its name or file.
        settings: over it, as the estimator takes them.
        templates: prompts.
        source: the model.
        embedded: whether classes have embeddings that were given.

    Returns:
        The configuration.

    Raises:
        UsageError: a setting that an estimator does not take, or a preset of another method or of towers.
    """
    given = settings_of(settings)
    for key in given:
        if key not in _CROPS and key.partition(".")[0] in (*_ELSEWHERE, "preset", "method"):
            raise UsageError(f"settings has {key}, which KalmanCLIP does not take there: leave it out.")
    model = plain(source)
    if embedded:
        model["class_embeddings"] = "given"  # where they are is no setting of the fit
    config = load_config(
        forced={"preset": preset, "model": model, "data": {"templates": list(listed_templates(templates))}}
    )
    if config.tune.images:
        raise UsageError(f"preset {preset} trains towers: that is for kngd-ray train.")
    if config.method != "kalman":
        raise UsageError(f"preset {preset} is for {config.method}: KalmanCLIP runs the Kalman filter.")
    return override(config, given)


def saved_embeddings(fit: Path) -> npt.NDArray[Any] | None:
    """The class embeddings of a saved fit; None of pictures, and where there are none.

    Raises:
        CheckpointError: their file is damaged.
    """
    path = fit / CLASS_EMBEDDINGS
    if not path.is_file():
        return None
    try:
        return read_class_embeddings(path)
    except ModelError as error:
        raise CheckpointError(f"{path} is damaged, and with it the saved classifier.") from error


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
