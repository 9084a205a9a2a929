"""The command line: arguments in, exit code out; what commands do is in :mod:`kngd_ray.api`.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

import logging
import os
import sys
from typing import Annotated

import typer

from kngd_ray import __version__
from kngd_ray._option import on_the_command_line, option
from kngd_ray._streams import lasting_streams
from kngd_ray.cli import compare, doctor, encode, ensemble, evaluate, export, predict, submit, sync, train, tune
from kngd_ray.errors import KngdError, printable, redact

_INTERRUPTED = 130

app = typer.Typer(
    name="kngd-ray",
    help="Kalman natural-gradient fine-tuning of CLIP on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"kngd-ray {__version__}")
        raise typer.Exit


for _command in (
    train.train,
    tune.tune,
    evaluate.evaluate,
    ensemble.ensemble,
    export.export,
    predict.predict,
    encode.encode,
    compare.compare,
    sync.sync,
):
    app.command()(_command)
for _lenient in (submit.submit, doctor.doctor):
    # their former options are refused with the name of the setting, see cli.arguments.refuse_options
    app.command(context_settings={"ignore_unknown_options": True})(_lenient)


def main() -> None:
    """Entry point of ``kngd-ray``: 0 is done, 1 failed, 2 wrong usage, 130 interrupted."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives a session must not start another
    if logging.lastResort is not None:  # where warnings go that nobody else takes
        logging.lastResort.setFormatter(_Shown())
    with lasting_streams(), on_the_command_line():
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
                f"interrupted; finished work is kept, and {option('resume')} continues a training run or a search.",
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
