"""``kngd-ray evaluate``: all figures of a trained fit, on its own data or on other data of the same classes."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kngd_ray.commands.display import Display
from kngd_ray.commands.prepare import open_task, prepare
from kngd_ray.commands.run_folder import CONFIG, find_fit
from kngd_ray.commands.train import open_ray
from kngd_ray.config import load_config
from kngd_ray.tracking import reliability_diagram
from kngd_ray.training.classifier import open_fit, read_calibration, restore_predictor
from kngd_ray.training.evaluation import ID
from kngd_ray.training.evaluation import evaluate as score
from kngd_ray.training.metrics import aurc, ood_auroc
from kngd_ray.training.predict import entropy
from kngd_ray.training.resumable import check_same


def evaluate(
    target: str, file: Path | None, overrides: Sequence[str], storage_path: str, display: Display
) -> dict[str, Any]:
    """Score a fit.

    Args:
        target: run, fit or checkpoint.
        file: configuration file over the run's configuration, or None.
        overrides: ``key=value`` settings over the run's configuration: other data, another domain.
        storage_path: where runs live.
        display: where figures are shown.

    Returns:
        ``id`` and ``ood`` as ``train`` reports them, each with ``aurc``, and per OOD domain
        ``auroc``: how well predictive entropy tells its pictures from the in-distribution ones.
    """
    fit = find_fit(target, storage_path)
    checkpoint, fit_folder = open_fit(fit)
    files = [fit_folder.parents[1] / CONFIG, *([file] if file is not None else [])]
    config = replace(load_config(files, overrides), seeds=(checkpoint.manifest["seed"],))
    task = open_task(config)
    workers = config.trainer.num_workers
    with open_ray(config.trainer) if workers else nullcontext(), display.pictures("encoding") as progress:
        prepared = prepare(task, use_ray=workers > 0, progress=progress)
    check_same(checkpoint.manifest, prepared.identity, checkpoint.folder)
    calibration, posterior = read_calibration(fit_folder)
    predictor = restore_predictor(checkpoint, prepared.class_embeddings, prepared.model.logit_scale, posterior)
    tests = prepared.tests(config.seeds[0])
    evaluation = score(predictor, tests, calibration)
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
        f"{fit_folder.parents[1].name}, {fit_folder.name}",
        [(checkpoint.manifest["options"]["method"], report)],
        [],
    )
    display.say(f"reliability diagram: {picture}")
    return {"checkpoint": str(checkpoint.folder), **report}
