"""``kngd-ray evaluate``: all figures of a trained fit, on its own data or on other data of the same classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kngd_ray._layered import flat
from kngd_ray._run_layout import IN_MEMORY
from kngd_ray.config import parse_override
from kngd_ray.configs import read_yaml
from kngd_ray.console import Display
from kngd_ray.data import EMBEDDED
from kngd_ray.errors import DataError, UsageError
from kngd_ray.experiment.backend import HERE, Backend
from kngd_ray.experiment.learned import CHANGED, check_names, tell_changes, untested
from kngd_ray.experiment.prepared import prepare
from kngd_ray.experiment.run_folder import check_place, find_fit, read_config
from kngd_ray.experiment.task import open_task, open_tests
from kngd_ray.tracking import reliability_diagram
from kngd_ray.training.evaluation import ID
from kngd_ray.training.evaluation import evaluate as score
from kngd_ray.training.learned import read_learned
from kngd_ray.training.metrics import aurc, ood_auroc
from kngd_ray.training.predict import entropy
from kngd_ray.training.restoring import open_fit, restore_predictor
from kngd_ray.training.resumable import check_scored
from kngd_ray.training.settled import read_settled


def evaluate(
    target: str,
    file: Path | None,
    overrides: Sequence[str],
    storage_path: str,
    display: Display,
    backend: Backend = HERE,
) -> dict[str, Any]:
    """Score a fit.

    Args:
        target: run, fit or checkpoint.
        file: configuration file over the run's configuration, or None.
        overrides: ``key=value`` settings over the run's configuration: other data, another domain.
        storage_path: where runs live.
        display: where figures are shown.
        backend: encodes.

    Returns:
        ``id`` and ``ood`` as ``train`` reports them, without pictures that the fit has learned from. Each has
        ``aurc``, and an OOD domain ``auroc``: how well predictive entropy tells its pictures from the in-distribution
        ones.

    Raises:
        UsageError: the fit learned from data in memory, and no other data are named.
        DataError: the data cannot be read, or it is not known what the fit has learned from and it cannot be drawn.
    """
    fit = find_fit(target, storage_path)
    checkpoint, fit_folder = open_fit(fit)
    run = fit_folder.parents[1]
    config = replace(read_config(run, overrides, file), seeds=(checkpoint.manifest["seed"],))
    given = _given(file, overrides)
    trained_on = read_config(run).data
    manifest, learned = checkpoint.manifest, trained_on.trained_domain
    if "data.train_domain" in given and learned is not None and config.data.train_domain != learned:
        display.say(
            f"the fit learned the domain {learned}: figures in distribution are of"
            f" {config.data.train_domain or 'all domains'}"
        )
    if config.data.path == IN_MEMORY:
        raise UsageError(f"{run.name} learned from pictures in memory: name data to score it on by data.path.")
    own = _same(config.data.path, trained_on.path)
    as_it_was = own and not any(key.startswith("data.") and key != "data.cache_dir" for key in given)
    if own:
        only = config.data.classes if "data.classes" in given else None
        config = replace(config, data=replace(config.data, classes=trained_on.classes))
        known = read_learned(manifest) is not None
        try:
            task = open_task(config, manifest, only, draw=as_it_was or not known)
        except DataError as error:
            if not (as_it_was and known):
                raise
            task, as_it_was = open_task(config, manifest, only, draw=False), False
            display.say(f"{CHANGED}, which could not be trained again ({error})")
    else:
        if not given & {"data.train_domain", "data.order"}:  # of the shipped pictures it is one that no setting names
            config = replace(config, data=replace(config.data, train_domain=trained_on.trained_domain))
        task = open_tests(config, given, manifest)
    if own or "data.classes" not in given:
        check_names(task, manifest, own=own)
    task = untested(task, [manifest], display.say, as_it_was=as_it_was)
    for note in task.notes:
        display.say(note)
    with backend.session(config.trainer), display.pictures("encoding") as progress:
        prepared = prepare(task, backend, progress)
    check_scored(manifest, prepared.identity, checkpoint.folder)
    if as_it_was:
        tell_changes(prepared, manifest, display.say)
    settled = read_settled(fit_folder)
    predictor = restore_predictor(
        checkpoint,
        prepared.evaluator,
        settled.posterior,
        alpha=settled.alpha,
        class_embeddings=prepared.class_embeddings,
    )
    tests = prepared.tests(config.seeds[0], config.tune)
    evaluation = score(predictor, tests, settled.calibration)
    report = evaluation.report()
    uncertainty = {name: entropy(p) for name, p in evaluation.probabilities.items()}
    for name, p in evaluation.probabilities.items():
        figures = report[ID] if name == ID else report["ood"][name]
        figures["aurc"] = aurc(uncertainty[name], p.argmax(1) != tests[name].labels)
        if name != ID:
            figures["auroc"] = ood_auroc(uncertainty[ID], uncertainty[name])
    domains = [name for name in tests if name != ID]
    for key in ("aurc", "auroc") if domains else ():
        report["ood"]["mean"][key] = float(torch.tensor([report["ood"][d][key] for d in domains]).mean())
    picture = fit_folder / "reliability.png"
    reliability_diagram(
        {name: (p, tests[name].labels) for name, p in evaluation.probabilities.items()},
        picture,
        fit_folder.name,
    )
    display.table(
        f"{run.name}, {fit_folder.name}",
        [(checkpoint.manifest["options"]["method"], report)],
        [],
    )
    display.say(f"reliability diagram: {picture}")
    return {"checkpoint": str(checkpoint.folder), **report}


def _given(file: Path | None, overrides: Sequence[str]) -> set[str]:
    """The dotted keys of the settings over a run's configuration.

    Raises:
        UsageError: a setting that would change nothing.
    """
    layers = [read_yaml(file) if file is not None else {}, dict(map(parse_override, overrides))]
    given = [key for layer in layers for key, _ in flat(layer, "")]
    for key in given:
        if not key.startswith(("data.", "model.", "trainer.")):
            raise UsageError(
                f"evaluate takes the fit and its posterior from the run: leave out {key}, "
                "only settings of data, model and trainer can change."
            )
        if key in _DRAWN:
            raise UsageError(f"evaluate draws no shots: leave out {key}.")
        check_place(key)
    return set(given)


_DRAWN = ("data.shots", "data.draw")


def _same(path: str | tuple[str, ...], other: str | tuple[str, ...]) -> bool:
    """Whether two data sets are the same files."""

    def files(path: str | tuple[str, ...]) -> set[Path | str]:
        names = [path] if isinstance(path, str) else path
        return {name if name == EMBEDDED else Path(name).expanduser().resolve() for name in names}

    return files(path) == files(other)
