"""``kngd-ray export``: a fit as files that other programs read."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kngd_ray._option import option
from kngd_ray.clip import EMBEDDED_MODEL, CLIPHead, CLIPNetwork, ModelConfig, TuneOptions, expand, load_model
from kngd_ray.clip import peft as peft_layout
from kngd_ray.clip.adapters import Linear
from kngd_ray.clip.export import CONFIG, ONNX, WEIGHTS, Exported, export_onnx, export_open_clip, rounding_of
from kngd_ray.config import parse
from kngd_ray.console import Display
from kngd_ray.errors import UsageError
from kngd_ray.experiment import model_card
from kngd_ray.experiment.hub import CARD, check_push, write_card
from kngd_ray.experiment.hub import push as to_hub
from kngd_ray.experiment.run_folder import find_fit
from kngd_ray.storage import storage_errors, write_text
from kngd_ray.tracking import artifacts_of
from kngd_ray.training.options import FitOptions
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.restoring import identity_of, open_fit, restore_predictor
from kngd_ray.training.resumable import SOURCE, check_same
from kngd_ray.training.settled import read_settled

CLASSES = "classes.json"
_OPEN_CLIP = (WEIGHTS, CONFIG)
_CLASSES_SAY = "class names in the order of the logits, prompts, preprocessing"
_ARE = {
    "open_clip": "both towers, for open_clip; its architecture is in " + CONFIG,
    "onnx": "the image tower with the classes and all adapters",
    "peft": "the towers' LoRA alone, for peft; its settings are in " + peft_layout.CONFIG,
}
_AT_MEAN = "its logits are those at the mean of the belief: predict counts its covariance too, and is less sure"
_IN_HALF = (
    "it is in float32, and the run's trained towers work in bfloat16: logits of random pictures differ by up to {:.1g}"
)
_PEFT = (peft_layout.WEIGHTS, peft_layout.CONFIG)


def export(
    target: str,
    out: Path,
    storage_path: str,
    display: Display,
    *,
    onnx: bool = False,
    peft: bool = False,
    push: str | None = None,
) -> dict[str, Any]:
    """Write a fit's towers as an open_clip checkpoint and, on request, its classifier as ONNX and its LoRA for peft.

    A model card lies beside them.

    Weights are those that ``predict`` has its mean at: LoRA merged, averaged with the pretrained ones by the fit's
    alpha. The belief about them stays behind.

    A fit of adapters has the pretrained towers. Its linear adapters of the image go into the last projection of the
    image tower; where it has none, only the ONNX classifier holds what was learned and only that is written.

    Args:
        target: run (its first fit is taken), fit or checkpoint.
        out: folder for the files, new or empty.
        storage_path: where runs live.
        display: where the files are listed.
        onnx: write the ONNX classifier too.
        peft: write LoRA in peft's layout too.
        push: repository of Hugging Face's hub, ``organisation/name``, to which the files go once they are written.

    Returns:
        ``fit``, ``alpha``, and for ``open_clip``, ``onnx`` and ``peft``, None if not written, the file, the largest
        absolute ``difference`` of its logits from the fit's, in float32, and ``notes``; ``pushed``, the address, or
        None.

    Raises:
        UsageError: `out` is a file or holds something, or the fit has nothing for an open_clip checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: name another one with {option('out')}.")
    if push is not None:
        check_push(push)
    checkpoint, fit_folder = open_fit(find_fit(target, storage_path))
    manifest = checkpoint.manifest
    options = parse(FitOptions, manifest["options"])
    source = parse(ModelConfig, manifest[SOURCE])
    if source.precomputed:
        raise UsageError(
            f"{fit_folder.name} learned from features that were computed elsewhere, and has no towers to export: "
            "train on pictures with a CLIP model, or use the fit by predict, evaluate and MLflow."
        )
    towers = options.tune.images or any(isinstance(a, Linear) and a.tower == "image" for a in options.adapter)
    if not towers and not onnx:
        kinds = ", ".join(adapter.kind for adapter in options.adapter)
        raise UsageError(
            f"{fit_folder.name} trained no towers, and an open_clip checkpoint has no place for its adapters "
            f"({kinds}): add {option('onnx', True)} to export the classifier with them."
        )
    if peft and options.tune.parameters != "lora":
        raise UsageError(
            f"{fit_folder.name} trained no LoRA (tune.parameters={options.tune.parameters}), and peft's layout holds"
            f" nothing else: leave out {option('peft')}."
        )
    model = load_model(source)
    identity = identity_of(model, source, manifest["class_names"], manifest["templates"])
    check_same(manifest, identity, checkpoint.folder)
    settled = read_settled(fit_folder)
    alpha = options.tune.alpha if settled.alpha is None else settled.alpha
    # restored at the average, so that the export has none to make
    head = restore_predictor(checkpoint, model, PosteriorOptions(predict="mean"), alpha=alpha).head
    if isinstance(head, CLIPNetwork):
        network = head
        network.options = replace(network.options, alpha=1.0)
    else:
        network = CLIPNetwork(model, manifest["class_names"], manifest["templates"], TuneOptions(), options.adapter)
        assert isinstance(head, CLIPHead)
        network.head = head  # with its state besides the weights, such as gamma
    network.requires_grad_(False)
    size, sharpening = model.preprocess_cfg["size"], settled.calibration.sharpening
    size = size if isinstance(size, int) else tuple(size)
    with _new_files(out):
        written = {
            "open_clip": export_open_clip(network, model, out, sharpening) if towers else None,
            "onnx": export_onnx(network, out, size, sharpening) if onnx else None,
            "peft": peft_layout.export_peft(network, model, out, _on_a_hub(source)) if peft else None,
        }
        if alpha and checkpoint.state.covariance and settled.posterior.predict != "mean" and settled.calibration.tau:
            written |= {kind: _noted(written[kind], _AT_MEAN) for kind in ("open_clip", "onnx")}
        rounding = {kind: rounding_of(network, texts=kind != "onnx") for kind in written}
        rounding |= {kind: sharpening * rounding[kind] for kind in ("open_clip", "onnx")}  # so are their logits
        in_half = {kind: _IN_HALF.format(lost) for kind, lost in rounding.items() if lost}
        written |= {kind: _noted(written[kind], note) for kind, note in in_half.items()}
        classes = {
            "class_names": list(manifest["class_names"]),
            "templates": list(manifest["templates"]),
            "prompts": expand(manifest["class_names"], manifest["templates"]),
            "preprocess": model.preprocess_cfg,
        }
        write_text(out / CLASSES, json.dumps(classes, indent=1) + "\n")
        # the card was written at the end of the run, and ensemble may have chosen another alpha since
        other = f"figures on this card are those of alpha={options.tune.alpha:g}, and these weights are at {alpha:g}"
        remark = None if alpha == options.tune.alpha else other
        _write_card(out, fit_folder, source, written, remark)
    display.say(f"{fit_folder.name} at alpha={alpha:g}, in {out}:")
    for kind, exported in written.items():
        if exported is not None:
            whole = exported.path.name == ONNX or not {*exported.notes} - {_AT_MEAN, *in_half.values()}
            what = ("the fit's" if whole else "its towers'") + (" in float32" if kind in in_half else "")
            checked = "" if exported.difference is None else f" (logits within {exported.difference:.1e} of {what})"
            display.say(f"{exported.path.name}{checked}")
            for note in exported.notes:
                display.say(f"  {note}")
    if towers:
        display.say(f"to train, tune and evaluate with these towers, use model.name=local-dir:{out}")
    display.say(f"{CLASSES} ({_CLASSES_SAY})")
    display.say(f"{CARD} (model card{'' if remark is None else f'; {remark}'})")
    report = {"fit": str(fit_folder), "alpha": alpha, **{kind: _described(e) for kind, e in written.items()}}
    if push is None:
        return {**report, "pushed": None}
    with display.working(f"pushing to {push}"):
        address = to_hub(out, push)
    display.say(f"pushed to {address}")
    return {**report, "pushed": address}


def _write_card(
    out: Path, fit_folder: Path, source: ModelConfig, written: Mapping[str, Exported | None], remark: str | None
) -> None:
    """The fit's model card, with a remark on it, the folder's contents and the hub's metadata."""
    kept = artifacts_of(fit_folder.parents[1], fit_folder.name) / model_card.FILE
    text = kept.read_text(encoding="utf-8") if kept.is_file() else f"# {fit_folder.name}"
    text += "" if remark is None else f"\n\n**Note:** {remark}.\n"
    files = {e.path.name: (_ARE[kind], *e.notes) for kind, e in written.items() if e is not None}
    facts = {
        "library_name": "open_clip" if written["open_clip"] is not None else "onnx",
        "pipeline_tag": "zero-shot-image-classification" if written["open_clip"] else "image-classification",
        "tags": ["clip", "few-shot", "kngd_ray"],
        "base_model": _on_a_hub(source),
        "license": "apache-2.0" if source.name == EMBEDDED_MODEL else None,
    }
    write_card(out, text, {**files, CLASSES: (_CLASSES_SAY,)}, facts)


def _on_a_hub(source: ModelConfig) -> str | None:
    """The hub's name of a pretrained model, if it was named by it."""
    return source.name.removeprefix("hf-hub:") if source.name.startswith("hf-hub:") else None


def _noted(exported: Exported | None, note: str) -> Exported | None:
    return None if exported is None else replace(exported, notes=(*exported.notes, note))


def _described(exported: Exported | None) -> dict[str, Any] | None:
    if exported is None:
        return None
    return {"path": str(exported.path), "difference": exported.difference, "notes": list(exported.notes)}


@contextmanager
def _new_files(folder: Path) -> Iterator[None]:
    """Write files into a new or empty folder, and remove them all on failure."""
    made = not folder.exists()
    try:
        yield
    except BaseException:
        with storage_errors(folder):
            for name in (*_OPEN_CLIP, ONNX, f"{ONNX}.data", *_PEFT, CLASSES, CARD):
                (folder / name).unlink(missing_ok=True)
            if made and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
