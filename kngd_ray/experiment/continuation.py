"""Which earlier fits a run continues from, and whether it can."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kngd_ray._run_layout import CONFIG
from kngd_ray.config import Config, flatten, parse
from kngd_ray.errors import CheckpointError
from kngd_ray.experiment.run_folder import fit_of, locate, read_config
from kngd_ray.training.options import FitOptions
from kngd_ray.training.prior import Prior
from kngd_ray.training.restoring import open_fit


def find_priors(config: Config) -> dict[int, Prior]:
    """What the fits of a method continue from.

    Args:
        config: the method's configuration.

    Returns:
        The prior of each seed; empty where there is none.

    Raises:
        CheckpointError: there is no such run or fit, it is not finished or it is damaged.
    """
    if config.prior is None:
        return {}
    place = locate(config.prior, config.trainer.storage_path)
    folders = dict.fromkeys(config.seeds, place)
    if (place / CONFIG).is_file():
        earlier = read_config(place)
        method = config.method if config.method in earlier.baselines else earlier.method
        for seed in config.seeds:
            source = seed if len(earlier.seeds) > 1 else earlier.seeds[0]
            if source not in earlier.seeds:
                known = ", ".join(map(str, earlier.seeds))
                raise CheckpointError(
                    f"the prior {place.name} has no fit of seed {seed} (its seeds: {known}): leave that one out of "
                    f"seeds, or name one of the folders in {place / 'fits'} as the prior of all."
                )
            folders[seed] = fit_of(place, method, source)
    priors = {folder: _prior(folder) for folder in set(folders.values())}
    return {seed: priors[folder] for seed, folder in folders.items()}


def _prior(fit: Path) -> Prior:
    """A fit's final checkpoint, verified; its tensors are let go."""
    found, _ = open_fit(fit)
    return Prior(found.folder, found.manifest)


def check_prior(prior: Prior, options: FitOptions, identity: Mapping[str, Any]) -> None:
    """Refuse to continue with other weights than it knows.

    Args:
        prior: the earlier fit.
        options: of the fit that is to start from it.
        identity: model and classes of that fit.

    Raises:
        CheckpointError: model, classes, prompts, adapter or covariance family differ, or there is no covariance.
    """
    obstacle = _obstacle(prior.manifest, options, identity)
    if obstacle is not None:
        raise CheckpointError(f"the prior {prior.folder} {obstacle}.")


def _obstacle(manifest: Mapping[str, Any], options: FitOptions, identity: Mapping[str, Any]) -> str | None:
    """Why a fit cannot continue from a checkpoint; None if it can."""
    earlier = parse(FitOptions, manifest["options"])
    its, now = (found["model"]["fingerprint"] for found in (manifest, identity))
    if its != now:
        return (
            f"was trained on the features of another model: fingerprint {its[:12]}, this run's has {now[:12]}; "
            "name the model it was trained with by the settings of model, as model.name"
        )
    its, now = (found["model"].get("encoded_by") for found in (manifest, identity))
    if None not in (its, now) and its != now:
        return (
            f"learned from features of another model: fingerprint {its[:12]}, this run's are of {now[:12]}; encode the"
            " pictures with the model that it learned from"
        )
    its, now = (found["model"].get("classes") for found in (manifest, identity))
    if its != now:
        return (
            "was trained with class embeddings of other classes, or in another order: model.class_embeddings and the "
            "labels of the data must be as they were"
        )
    its, now = (found["class_names"] for found in (manifest, identity))
    if its != now:
        return f"knows other classes: {_parting(its, now)}; data.classes chooses and orders them"
    its, now = ([t.replace("{name}", "{}") for t in found["templates"]] for found in (manifest, identity))
    if its != now:
        return f"was trained with data.templates={its}, this run has {now}: the classes mean others"
    if options.method == "kalman" and earlier.method != "kalman":
        return (
            f"was fitted by {earlier.method}, which leaves no covariance: name a fit of kalman, or use it with "
            f"method={earlier.method}"
        )
    about = ["adapter", "tune.parameters", "tune.include", "tune.exclude"]
    if options.tune.parameters == "lora":
        about += ["tune.rank", "tune.targets", "tune.scaling"]
    if options.method == "kalman":
        about.append("filter.covariance")
    before, after = flatten(earlier), flatten(options)
    for key in before | after:
        if any(key == name or key.startswith(f"{name}.") for name in about) and before.get(key) != after.get(key):
            return f"was trained with {key}={before.get(key)}, this run has {after.get(key)}: set it as it was"
    return None


def _parting(before: Sequence[str], after: Sequence[str]) -> str:
    """How two lists of classes differ, by their first names that do."""
    gone = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    if not gone and not new:
        n = next(n for n, name in enumerate(before) if name != after[n])
        return f"its class {n} is {before[n]!r}, this run's is {after[n]!r}, the same names in another order"
    sides = [f"{whose} {_some(names)}" for whose, names in (("this run lacks its", gone), ("it lacks", new)) if names]
    return " and ".join(sides)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
