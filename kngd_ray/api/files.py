"""Encode a data set, average and export weights, and send a run to MLflow."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kngd_ray._keywords import settings_of
from kngd_ray.api.settings import Named, configured_encoding, console_of, in_process, split, storage_of, target_of
from kngd_ray.console import Display
from kngd_ray.errors import UsageError

if TYPE_CHECKING:
    from kngd_ray.results import RunResult, SearchResult


def encode(
    data: Named,
    *overrides: str,
    out: Named | None = None,
    views: int = 0,
    ray: bool = False,
    quiet: bool = False,
    console: Display | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compute the frozen features of a data set and cache them; optionally write them to files.

    ::

        encoded = kngd_ray.encode("pictures/", out="encoded", model="ViT-B-32", pretrained="openai")
        kngd_ray.train("kalman", *encoded["settings"])

    Args:
        data: parquet file, folder of pictures, or ``embedded``.
        *overrides: settings as the command line takes them; a preset or a YAML file may be the first.
        out: new or empty folder for the features and the class embeddings; None fills the cache only.
        views: random crops of each picture to encode as well, of ``tune.crop_scale``. Heads on the files then learn
            from as many crops as heads on the pictures do. Time and space are `views` + 1 times those of the pictures.
        ray: encode with Ray Data.
        quiet: show nothing.
        console: where progress is shown; None is a new one.
        **settings: settings of data and model.

    Returns:
        ``pictures``, ``encoded`` and ``undecodable`` count; ``cache`` is the folder of the features. With `out` also
        ``features`` and ``class_embeddings``, its files, and the ``settings`` that use them.

    Raises:
        UsageError: a setting is wrong, the model has no towers, or `out` is not empty.
    """
    preset, given = split(None, [*overrides, *settings_of(settings)])
    config = configured_encoding(data, preset, in_process(given, preset, ray=ray))
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.encode import encode as run

    folder = None if out is None else Path(out)
    return run(config, console_of(console, quiet), RayBackend(), out=folder, views=views)


def ensemble(
    run: "Named | RunResult | SearchResult",
    *overrides: str,
    alpha: float | None = None,
    points: int = 11,
    storage_path: Named | None = None,
    ray: bool = False,
    quiet: bool = False,
    console: Display | None = None,
) -> dict[str, Any]:
    """Average a run's weights with the pretrained ones, and score the averages on the test sets.

    ::

        kngd_ray.ensemble("first", alpha=0.5)  # predict, evaluate and export now use the average

    The curve is measured on the test sets, so do not choose `alpha` from it.

    Args:
        run: a result; or name or folder of a run, or the folder of a fit or a checkpoint.
        *overrides: ``alpha=0.5``, and settings of model and trainer, as the command line takes them.
        alpha: weight of the trained weights that is kept from now on; None keeps the present one.
        points: how many values of alpha between 0 and 1 are scored.
        storage_path: where runs are stored; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.
        ray: encode on Ray with the run's workers.
        quiet: show nothing.
        console: where the curve is shown; None is a new one.

    Returns:
        ``fits``, the ``alpha`` in use, whether it was ``kept`` now, the ``curve`` and the file of its ``figure``.

    Raises:
        UsageError: alpha is outside [0, 1], or the weights cannot be averaged.
    """
    file, given = split(None, [*overrides, *([] if alpha is None else settings_of({"alpha": alpha}))])
    if file is not None:
        raise UsageError(f"ensemble takes its settings from the run: leave out {file}, or write alpha={file}.")
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.ensemble import ensemble as average

    given = in_process(given, None, ray=ray)
    return average(target_of(run), given, points, storage_of(storage_path), console_of(console, quiet), RayBackend())


def export(
    run: "Named | RunResult | SearchResult",
    out: Named,
    *,
    onnx: bool = False,
    peft: bool = False,
    push: str | None = None,
    storage_path: Named | None = None,
    quiet: bool = False,
    console: Display | None = None,
) -> dict[str, Any]:
    """Write a run as an open_clip checkpoint, as an ONNX classifier and for peft, and push it to a hub.

    ::

        kngd_ray.export("first", "exported", onnx=True)

    Args:
        run: a result; or name or folder of a run, or the folder of a fit or a checkpoint.
        out: new or empty folder.
        onnx: also write the classifier as ONNX; needs the extra ``export``.
        peft: also write LoRA in the layout of Hugging Face's peft.
        push: repository ``ORG/NAME`` on the Hugging Face hub to upload the folder to; a new one is private.
        storage_path: where runs are stored; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.
        quiet: show nothing.
        console: where the files are listed; None is a new one.

    Returns:
        ``fit``, ``alpha``, and for ``open_clip``, ``onnx`` and ``peft`` the ``path``, the largest absolute
        ``difference`` between its logits and the fit's, and ``notes``; None if it was not written. ``pushed`` is the
        address on the hub, or None.
    """
    from kngd_ray.experiment.export import export as write

    to, shown = storage_of(storage_path), console_of(console, quiet)
    return write(target_of(run), Path(out), to, shown, onnx=onnx, peft=peft, push=push)


def sync(
    run: "Named | RunResult | SearchResult",
    *,
    uri: str | None = None,
    storage_path: Named | None = None,
    quiet: bool = False,
    console: Display | None = None,
) -> dict[str, str]:
    """Send to MLflow what a run could not log while the tracking server was away.

    ::

        kngd_ray.sync("first", uri="http://127.0.0.1:5000")

    Args:
        run: a result; or name or folder of a run.
        uri: tracking store; None is the run's own.
        storage_path: where runs are stored; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.
        quiet: show nothing.
        console: where the outcome is shown; None is a new one.

    Returns:
        MLflow run ids by method and fit.
    """
    from kngd_ray.experiment.sync import sync as send

    return send(target_of(run), storage_of(storage_path), console_of(console, quiet), uri=uri)
