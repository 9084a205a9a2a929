"""The command line: arguments in, exit code out; what commands do is in :mod:`kngd_ray.experiment`.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kngd_ray import __version__
from kngd_ray._streams import lasting_streams
from kngd_ray.errors import KngdError, UsageError, printable, redact

_INTERRUPTED = 130

app = typer.Typer(
    name="kngd-ray",
    help="Kalman natural-gradient fine-tuning of CLIP on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG | KEY=VALUE",
        help="A YAML file, then settings over it: data.shots=16",
        show_default=False,
    ),
]
_SearchSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SEARCH.yaml | KEY=VALUE",
        help="A search file, then settings over it: search.num_samples=60 data.shots=16",
        show_default=False,
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress goes to stderr.")]
_Storage = Annotated[str, typer.Option(help="Where runs live.", envvar="KNGD_STORAGE_PATH")]
_Target = Annotated[
    str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Name or folder of a run, or a folder in it.")
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"kngd-ray {__version__}")
        raise typer.Exit


@app.command()
def train(
    settings: _Settings = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run that was cut short.")] = None,
    as_json: _Json = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and stop.")
    ] = False,
) -> None:
    """Few-shot fine-tuning on Ray Train; without settings, on the emoji and the model that come along."""
    from kngd_ray.config import load_config, to_yaml

    file, overrides = _split(settings)
    if resume is not None:
        if file is not None:
            raise UsageError(f"a resumed run keeps its settings: leave out {file}.")
        from kngd_ray.experiment.run import resumed_config

        config = resumed_config(resume, overrides)
    else:
        config = load_config(file, overrides)
    if print_config:
        typer.echo(to_yaml(config), nl=False)
        return
    from kngd_ray.experiment.run import train as run

    result = run(config, _display(as_json), resume=resume is not None)
    if as_json:
        _print_json(result)


@app.command()
def tune(
    settings: _SearchSettings = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SEARCH", help="Continue a search, or help the process that runs it.")
    ] = None,
    as_json: _Json = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole search and stop.")] = False,
) -> None:
    """Search for priors with Ray Tune and Optuna, then fit and test the best once."""
    from kngd_ray.config import to_yaml
    from kngd_ray.tuning.file import load_search, resumed_search, search_yaml

    file, overrides = _split(settings)
    if resume is not None:
        if file is not None:
            raise UsageError(f"a continued search keeps its settings: leave out {file}.")
        search = resumed_search(resume, overrides)
    elif file is None:
        raise UsageError("name a search file, such as tune_configs/noise_priors.yaml, or --resume SEARCH.")
    else:
        search = load_search(file, overrides)
    if print_config:
        typer.echo(to_yaml(search.config) + search_yaml(search), nl=False)
        return
    from kngd_ray.tuning.run import tune as run

    result = run(search, _display(as_json), resume=resume is not None)
    if as_json:
        _print_json(result)


@app.command()
def evaluate(
    target: _Target, settings: _Settings = None, storage_path: _Storage = "kngd_runs", as_json: _Json = False
) -> None:
    """Score a trained run in and out of distribution, on its own data or on other data."""
    from kngd_ray.experiment.evaluate import evaluate as run

    result = run(target, *_split(settings), storage_path, _display(as_json))
    if as_json:
        _print_json(result)


@app.command()
def ensemble(
    target: _Target,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="alpha=A | KEY=VALUE",
            help="The alpha to keep for evaluate, predict and export, chosen before looking at the test; none shows.",
            show_default=False,
        ),
    ] = None,
    points: Annotated[int, typer.Option(metavar="N", help="Values of alpha to score, from 0 to 1.")] = 11,
    storage_path: _Storage = "kngd_runs",
    as_json: _Json = False,
) -> None:
    """Test accuracy over alpha of a run's weights averaged with the pretrained ones; alpha=0.5 keeps that average.

    The curve is over the test sets: it is for looking. Choose alpha without it.
    """
    from kngd_ray.experiment.ensemble import ensemble as run

    file, overrides = _split(settings)
    if file is not None:
        raise UsageError(f"ensemble takes its settings from the run: leave out {file}, or write alpha={file}.")
    result = run(target, overrides, points, storage_path, _display(as_json))
    if as_json:
        _print_json(result)


@app.command()
def export(
    target: _Target,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new or empty folder.", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also the classifier of pictures, as ONNX.")] = False,
    storage_path: _Storage = "kngd_runs",
    as_json: _Json = False,
) -> None:
    """Write a run as an open_clip checkpoint, LoRA merged, and as an ONNX classifier."""
    from kngd_ray.experiment.export import export as run

    result = run(target, out, storage_path, _display(as_json), onnx=onnx)
    if as_json:
        _print_json(result)


@app.command()
def predict(
    target: _Target,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Picture files, or folders of them; parquet files of a run on features."),
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also a gallery, the least certain first.", show_default=False),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values in place of the table.")] = False,
    storage_path: _Storage = "kngd_runs",
    as_json: _Json = False,
) -> None:
    """Class of pictures, its probability with an interval, and how unlike the training pictures they are."""
    from kngd_ray.experiment import predict as command

    if as_csv and as_json:
        raise UsageError("--csv and --json both print on standard output: leave one of them out.")
    result = command.predict(target, images, storage_path, _display(as_json or as_csv), html=html, table=not as_csv)
    if as_csv:
        sys.stdout.write(command.as_csv(result))
    if as_json:
        _print_json(result)


@app.command()
def encode(
    dataset: Annotated[str, typer.Argument(help='Parquet file, folder of pictures, or "embedded".')],
    settings: _Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also features and class embeddings as files.", show_default=False),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Compute frozen features of a whole data set into the cache, with Ray Data; --out writes them as files, too."""
    from kngd_ray.experiment.encode import encode as run

    result = run(dataset, *_split(settings), _display(as_json), out=out)
    if as_json:
        _print_json(result)


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Name of an MLflow experiment.")],
    parent: Annotated[
        str | None, typer.Option(metavar="RUN", help="Only what belongs to this run; of a search, its trials.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Column, repeatable: ood/mean/brier.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN|METHOD", help="What differences are from: adamw, else zero-shot.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking store: that of train's default.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page: compare-EXPERIMENT.html.", show_default=False)
    ] = None,
    as_json: _Json = False,
) -> None:
    """MLflow runs side by side: paired by seed, with intervals, a Pareto front, and one HTML page."""
    from kngd_ray.comparison.compare import compare as run

    result = run(
        experiment, _display(as_json), parent=parent, metrics=metric or [], baseline=baseline, uri=uri, out=out
    )
    if as_json:
        _print_json(result)


@app.command()
def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow tracking store than the run's.")] = None,
    storage_path: _Storage = "kngd_runs",
    as_json: _Json = False,
) -> None:
    """Send to MLflow what a run could not log while the server was away."""
    from kngd_ray.experiment.sync import sync as send

    result = send(run, storage_path, _display(as_json), uri=uri)
    if as_json:
        _print_json(result)


@app.command()
def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND ARGUMENTS", help="What to run there: -- train data.shots=16", show_default=False
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Ray's dashboard: $RAY_API_SERVER_ADDRESS, else port 8265 here.")
    ] = None,
    working_dir: Annotated[
        Path,
        typer.Option("--working-dir", metavar="FOLDER", help="What is sent: its code and settings, as git lists them."),
    ] = Path(),
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="PATH", help="Send this file, folder or pattern, too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and contact nobody.")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Do not wait for the job.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not ask the cluster first whether it has what the command needs.")
    ] = False,
    status: Annotated[str | None, typer.Option(metavar="JOB", help="How a job stands.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="JOB", help="Follow a job from its beginning.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="End a job.")] = None,
    as_json: _Json = False,
) -> None:
    """Run a command on a Ray cluster; ends with the job's own exit code."""
    asked = {"--status": status, "--logs": logs, "--stop": stop}
    chosen = [name for name, job in asked.items() if job is not None] + (["a command"] if command else [])
    if len(chosen) != 1:
        found = f"there are {' and '.join(chosen)}" if chosen else "there is none"
        raise UsageError(f"submit takes one of -- COMMAND, --status, --logs and --stop, and {found}.")
    from kngd_ray.cluster import submit as jobs

    display = _display(as_json)
    if status is not None:
        result = jobs.status(status, address, display)
    elif logs is not None:
        result = jobs.logs(logs, address, display)
    elif stop is not None:
        result = jobs.stop(stop, address, display)
    else:
        known = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None]
        known.remove("submit")
        options = jobs.SubmitOptions(
            address=address,
            working_dir=working_dir,
            include=include or (),
            dry_run=dry_run,
            follow=not no_follow,
            check=not no_check,
        )
        result = jobs.submit(command or [], known, options, display)
    if as_json:
        _print_json(result)
    if (command or logs) and result["exit_code"]:
        raise typer.Exit(result["exit_code"])


@app.command()
def doctor(
    settings: _Settings = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster: that of trainer.address.")] = None,
    storage_path: Annotated[str | None, typer.Option(help="Where runs would live: trainer.storage_path.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking store: that of tracking.uri.")] = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Neither join nor start Ray.")] = False,
    as_json: _Json = False,
) -> None:
    """Check what a run needs, here and on every node: versions, Ray and who it lets in, GPUs, storage, tracking, model.

    Joins the cluster that train would join, or starts Ray as train would, and leaves nothing behind; exit code 1 if a
    check failed.
    """
    from kngd_ray.config import load_config

    given = {"trainer.address": address, "trainer.storage_path": storage_path, "tracking.uri": uri}
    file, overrides = _split(settings)
    config = load_config(file, [*overrides, *(f"{key}={json.dumps(v)}" for key, v in given.items() if v is not None)])
    from kngd_ray.cluster.doctor.run import doctor as run

    result = run(config, _display(as_json), with_ray=not no_ray)
    if as_json:
        _print_json(result)
    if not result["ok"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of ``kngd-ray``: 0 is done, 1 failed, 2 wrong usage, 130 interrupted."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives a session must not start another
    if logging.lastResort is not None:  # where warnings go that nobody else takes
        logging.lastResort.setFormatter(_Shown())
    with lasting_streams():
        _run()


def _run() -> None:
    try:
        app()
    except KngdError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        code = getattr(end, "code", _INTERRUPTED)
        if code == _INTERRUPTED:  # which typer makes of Ctrl-C
            _fail(
                "interrupted; what was finished is kept, a training run or a search can be continued with --resume.",
                code,
            )
        sys.exit(code)


class _Shown(logging.Formatter):
    """What modules log, as it may be shown."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, without control characters and secrets."""
        return printable(redact(super().format(record)), "\n\t")


def _fail(sentence: str, code: int) -> None:
    sentence = printable(redact(sentence))
    ended = sentence if sentence.endswith((".", "?")) else f"{sentence}."
    sys.stderr.write(f"kngd-ray: {ended}\n")
    sys.exit(code)


def _split(settings: list[str] | None) -> tuple[Path | None, list[str]]:
    """A leading YAML file, and the key=value settings."""
    settings = settings or []
    if settings and "=" not in settings[0]:
        return Path(settings[0]), settings[1:]
    return None, settings


def _display(as_json: bool) -> Any:
    from kngd_ray.console import Display

    return Display(quiet_stdout=as_json)


def _print_json(result: Any) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
