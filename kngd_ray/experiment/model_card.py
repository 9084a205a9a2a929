"""The model card, in Markdown, of a fit or of all fits of a method."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kngd_ray import __version__
from kngd_ray.clip import EMBEDDED_MODEL, public_name
from kngd_ray.config import Config, flatten
from kngd_ray.console import cell
from kngd_ray.data import EMBEDDED
from kngd_ray.experiment.prepared import TaskData
from kngd_ray.storage import write_text
from kngd_ray.training.calibration import Calibration

FILE = "model_card.md"

_FIGURES = (("accuracy", "accuracy %", 100), ("nll", "NLL", 1), ("ece", "ECE", 1), ("brier", "Brier", 1))
_PRIORS = {"kalman": ("observation", "filter", "noise"), "adamw": ("optimizer",), "sgd": ("optimizer",)}
_NAMED = 50  # classes that are listed
_FEW = 16  # shots below which the figures hang on which pictures were drawn


def write_card(
    folder: Path,
    name: str,
    config: Config,
    prepared: TaskData,
    report: Mapping[str, Any],
    zero_shot: Mapping[str, Any],
    *,
    steps: int,
    calibrations: Mapping[int, Calibration],
    compared: bool,
) -> str:
    """Write the card.

    Args:
        folder: where.
        name: of the fit, or of the run's method.
        config: its configuration.
        prepared: data and model.
        report: its figures, over seeds if there are several.
        zero_shot: those of the pretrained model.
        steps: of each fit.
        calibrations: tau, sharpening and temperature by seed.
        compared: whether predictions have a novelty percentile.

    Returns:
        What the model is and its figures, as a note to be read beside others.
    """
    model, figures = _model(config, prepared, steps), _figures(config, report, zero_shot, calibrations)
    parts = [
        f"# {_plain(name)}",
        model,
        _data(config, prepared),
        _priors(config),
        figures,
        _use(config, compared),
        _limits(config, report),
        _licences(config),
    ]
    write_text(folder / FILE, "\n\n".join(parts) + "\n")
    return "\n\n".join([model, figures, f"The artifact `{FILE}` says the rest."])


def _model(config: Config, prepared: TaskData, steps: int) -> str:
    model = prepared.model
    what, of = "a CLIP model adapted to a few labelled pictures per class", "pictures"
    source = f"CLIP model: {_plain(public_name(model.name))}"
    if config.model.pretrained is not None:
        source += f", weights {_plain(Path(config.model.pretrained).name)}"
    if config.model.precomputed:
        what, of = "a classifier of features that were computed elsewhere, from a few per class", "features"
        source = f"features were precomputed: {model.embed_dim} numbers each, logit scale {model.logit_scale:g}, "
        named = config.model.class_embeddings
        source += "no class embeddings" if named is None else f"class embeddings {_plain(Path(named).name)}"
    trained = {
        "adapter": "trained are adapters on embeddings of features and classes"
        if config.model.precomputed
        else "the towers are frozen; trained are adapters on their embeddings",
        "lora": "trained are LoRA in the towers and the adapters",
        "norm": "trained are scales and biases of the towers' normalisation and the adapters",
        "full": "trained are the towers' own weights and the adapters",
    }[config.tune.parameters]
    adapters = ", ".join(adapter.kind for adapter in config.adapter) or "none"
    return _lines(
        f"An image classifier: {what}.",
        "",
        f"- {source}, fingerprint `{model.fingerprint[:16]}`",
        f"- {trained}; adapters: {adapters}",
        f"- method: {config.method}, preset {_plain(Path(str(config.preset)).name)}, {steps} steps of up to "
        f"{config.batch or 'all'} {of}, {config.epochs} passes",
        *(
            []
            if config.prior is None
            else [f"- continued from {_plain(Path(config.prior).name)}: its posterior is the prior"]
        ),
        f"- made by kngd_ray {__version__}; all settings are in `config.yaml` beside this card",
    )


def _data(config: Config, prepared: TaskData) -> str:
    images, splits = prepared.images, prepared.splits
    first = splits[config.seeds[0]]
    paths = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    names = ", ".join("the emoji of this package" if p == EMBEDDED else _plain(Path(p).name) for p in paths)
    labels = images.labels[first.support]
    counts = np.bincount(labels, minlength=len(images.class_names))
    fewer = f" (of some classes there were only {counts.min()})" if counts.min() < config.data.shots else ""
    domains = ", ".join(sorted({_plain(str(d)) for d in images.domains[first.support]}))
    classes = ", ".join(_plain(c) for c in images.class_names[:_NAMED])
    more = f" and {len(images.class_names) - _NAMED} more" if len(images.class_names) > _NAMED else ""
    ood = ", ".join(f"{_plain(str(d))} ({len(rows)})" for d, rows in first.ood.items()) or "none"
    seeds = f"seed{'s' if len(config.seeds) > 1 else ''} {', '.join(map(str, config.seeds))}"
    shots = (
        f"- trained on {config.data.shots} pictures per class{fewer}, {len(labels)} in all, of domain {domains}; "
        f"support sets drawn with {seeds}"
    )
    if config.protocol == "stream":
        by = (
            "as they came"
            if config.data.order is None
            else f"{', '.join(map(_plain, config.data.order))}, with {seeds}"
        )
        shots = f"- trained on a stream of {len(labels)} pictures of domain {domains}, in the order: {by}"
    return _lines(
        "## Data",
        "",
        f"- data set: {names}",
        f"- classes ({len(images.class_names)}): {classes}{more}",
        shots,
        f"- tested in distribution on {len(first.id_test)} other pictures of that domain",
        f"- tested out of distribution on: {ood}",
        *(
            ["- lengths were scaled to 1; a row with its features is called a picture here"]
            if config.model.precomputed
            else [
                f"- undecodable pictures left out: {prepared.skipped}",
                f"- prompts: {'; '.join(_plain(t) for t in config.data.templates)}",
            ]
        ),
    )


def _priors(config: Config) -> str:
    wanted = _PRIORS[config.method]
    kept = {k: v for k, v in flatten(config).items() if k.partition(".")[0] in wanted}
    title = "## Priors" if config.method == "kalman" else "## Optimiser"
    rows = [f"| `{key}` | {_plain(f'{v:g}' if isinstance(v, float) else str(v))} |" for key, v in kept.items()]
    return _lines(title, "", "| setting | value |", "|---|---|", *rows)


def _figures(
    config: Config, report: Mapping[str, Any], zero_shot: Mapping[str, Any], calibrations: Mapping[int, Calibration]
) -> str:
    several = isinstance(report["id"]["accuracy"], Mapping)
    one = "One seed" if len(config.seeds) == 1 else "Means over seeds that all drew the same shots"
    spread = (
        "Mean and 95 % interval over seeds (Student's t)."
        if several
        else f"{one}: no interval can be given. Another support set would give different figures."
    )
    probe = config.model.precomputed and config.model.class_embeddings is None
    before = "chance" if probe else "zero-shot"
    rows = []
    for title, path in _sets(report):
        for who, found in ((before, zero_shot), (config.method, report)):
            figures = _at(found, path)
            shown = " | ".join(cell(figures[key], factor) for key, _, factor in _FIGURES)
            rows.append(f"| {title} | {who} | {shown} |")
    taus = ", ".join(f"{c.tau:g}" for c in calibrations.values())
    by_factor = ", ".join(f"{c.sharpening:.2f}" for c in calibrations.values())
    sharper = (
        f", logits multiplied by {by_factor} as held-out shots say"
        if any(c.sharpening != 1 for c in calibrations.values())
        else ""
    )
    posterior = config.posterior
    asked = posterior.temperature is None and all(c.chosen for c in calibrations.values())
    chosen = "chosen on the training pictures" if asked else "given, not chosen"
    used = config.method == "kalman" and posterior.predict != "mean"
    by = f"`{posterior.predict}`, posterior temperature tau {taus}, {chosen}" if used else "by the weights alone"
    by += sharper
    held = [c.held_out_accuracy for c in calibrations.values() if c.held_out_accuracy is not None]
    return _lines(
        "## Figures",
        "",
        spread,
        "",
        f"| test set | | {' | '.join(title for _, title, _ in _FIGURES)} |",
        f"|---|---|{'---|' * len(_FIGURES)}",
        *rows,
        "",
        f"Predictions: {by}. No {'other ' if sharper else ''}temperature scaling is applied to these figures.",
        *([f"Accuracy on held-out training pictures: {100 * float(np.mean(held)):.1f} %."] if held else []),
    )


def _use(config: Config, compared: bool) -> str:
    posterior = config.method == "kalman"
    said = ["the class, and the probabilities of all classes"]
    if posterior:
        said.append(
            "a 90 % interval of the class's probability, if shots could be held out: about where four times the shots "
            "would take it, for pictures like the training pictures; for others it is wider than necessary"
        )
    if compared:
        said.append(
            "`novelty`: its percentile, 0 to 1, the share of held-out training pictures of which the fit is surer"
        )
    said.append("`uncertainty`: entropy of the prediction, nats")
    return _lines("## Output", "", *(f"- {line}" for line in said))


def _limits(config: Config, report: Mapping[str, Any]) -> str:
    limits = [
        "It knows its classes only: a picture of anything else also gets one of them.",
        "Neither it nor the training data of the CLIP model was examined for bias against persons or groups.",
    ]
    if config.data.shots < _FEW and config.data.time is None:
        limits.append(
            f"It has seen {config.data.shots} pictures per class: other pictures would change all figures above."
        )
    ood = report["ood"].get("mean")
    if ood is None:
        limits.append("It was not tested out of distribution: its accuracy on other kinds of pictures is unknown.")
    else:
        a, b = (100 * _mean(figures["accuracy"]) for figures in (report["id"], ood))
        limits.append(
            f"On unseen domains its accuracy is {b:.1f} %, against {a:.1f} % on its own, and its "
            f"calibration error {_mean(ood['ece']):.3f} against {_mean(report['id']['ece']):.3f}."
        )
    if config.method != "kalman":
        limits.append("It has no posterior: it gives no intervals and no novelty percentiles.")
    return _lines("## Limits", "", *(f"- {line}" for line in limits))


def _licences(config: Config) -> str:
    if config.model.precomputed:
        weights = "unknown to kngd_ray, as is the model that computed the features."
    elif config.model.name == EMBEDDED_MODEL:
        weights = "Apache-2.0; `kngd_ray/assets/mini_clip/NOTICE.md` says what they were made from."
    else:
        weights = (
            "unknown to kngd_ray: whoever published them says what they may be used for. Look before you pass this on."
        )
    path = config.data.path
    pictures = (
        "several, by drawing style; `kngd_ray/assets/NOTICE.md` names them."
        if path == EMBEDDED
        else "unknown to kngd_ray, as are the rights of the persons shown."
    )
    return _lines("## Licences", "", f"- CLIP's weights: {weights}", f"- training pictures: {pictures}")


def _sets(report: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    ood = [("out of distribution, mean" if d == "mean" else _plain(d), ("ood", d)) for d in report["ood"]]
    # a mean of one says nothing more
    return [("in distribution", ("id",)), *(ood[1:] if len(ood) == 2 else ood)]


def _at(report: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for key in path:
        report = report[key]
    return report


def _mean(figure: float | Mapping[str, float]) -> float:
    return float(figure["mean"] if isinstance(figure, Mapping) else figure)


def _plain(text: str) -> str:
    """Text from outside as Markdown that shows it and does nothing else."""
    flat = " ".join(text.split())
    return (
        re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", flat).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )


def _lines(*lines: str) -> str:
    return "\n".join(lines)
