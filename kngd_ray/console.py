"""What a person sees: a live display on a terminal, plain lines in a log, a table at the end."""

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from kngd_ray.errors import printable

_LINE_SECONDS = 2.0
_PATIENCE = 60.0  # seconds between lines that say no more than that something goes on
_LOG_WIDTH = 120
_ENDLESS = 100_000  # characters of a line, to find out how wide a table is

# metric of a step, name on the display, format
_SHOWN = (
    ("innovation_rms", "innovation RMS", "{:.3f}"),
    ("nis_per_observation", "NIS/M", "{:.2f}"),
    ("log_evidence", "log-evidence", "{:+.1f}"),
    ("nll", "NLL", "{:.3f}"),
    ("accuracy", "accuracy", "{:.2f}"),
)


class _Console(Console):
    """A console to which no name can send a command: every text of a line or a table comes by here."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, its control characters written out; lines of ours end where they do."""
        return super().render_str(printable(text, "\n\t"), **options)


class Display:
    """Progress on standard error, results on standard output.

    Args:
        quiet_stdout: standard output belongs to JSON; tables go to standard error.
        quiet: show nothing.
    """

    def __init__(self, *, quiet_stdout: bool = False, quiet: bool = False) -> None:
        # in a log there is no width to keep to, and a squeezed table would lose digits
        widths = [None if stream.isatty() else _LOG_WIDTH for stream in (sys.stderr, sys.stdout)]
        self.console = _Console(stderr=True, quiet=quiet, width=widths[0])
        self.out = self.console if quiet_stdout else _Console(quiet=quiet, width=widths[1])
        # in a notebook rich moves its bars by widgets, where they are installed
        notebook = self.console.is_jupyter and find_spec("ipywidgets") is not None
        self._live = not quiet and (self.console.is_terminal or notebook)

    def say(self, text: str) -> None:
        """One line of information."""
        self.console.print(printable(text, "\t"), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def pictures(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Progress of encoding; nothing is shown while there is nothing to do.

        Args:
            what: is being done.

        Yields:
            A function to call with pictures done and to do.
        """
        with self._progress("pictures") as bar:
            last = [0.0]

            def advance(done: int, total: int) -> None:
                if bar is not None:
                    _advance(bar, what, done, total, "")
                elif time.monotonic() - last[0] > _LINE_SECONDS or done == total:
                    last[0] = time.monotonic()
                    self.say(f"{what}: {done} of {total} pictures")

            yield advance

    @contextmanager
    def steps(
        self, fits: Mapping[str, int], *, refitted: Collection[str] = ()
    ) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
        """Progress of fits.

        Args:
            fits: names, and steps of each. One step of the default is a whole fit, and may take a while.
            refitted: those whose head is fitted again after their steps, which takes a while too.

        Yields:
            A function to call with a fit's name and the fields of a step record.
        """
        done = dict.fromkeys(fits, 0)

        def going() -> str:
            before = ""
            for fit, steps in fits.items():
                if 0 < done[fit] < steps:
                    return f"{fit}: step {done[fit]} of {steps}"
                if done[fit] < steps:
                    return f"{before}: fitting its head again, then {fit}" if before in refitted else f"{fit}: fitting"
                before = fit
            return f"{before}: fitting its head again" if before in refitted else "all steps are done"

        with self._progress("{task.fields[figures]}") as bar, self._alive(going) as said:
            last: dict[str, float] = {}
            if bar is not None:
                for fit, steps in fits.items():
                    _advance(bar, fit, 0, steps, "")

            def advance(fit: str, record: Mapping[str, Any]) -> None:
                figures = _figures(record)
                done[fit] = record["step"]
                said()
                if bar is not None:
                    _advance(bar, fit, record["step"], record["steps"], figures)
                elif (
                    record["refused"]
                    or record["step"] == record["steps"]
                    or time.monotonic() - last.get(fit, 0.0) > _LINE_SECONDS
                ):
                    last[fit] = time.monotonic()
                    self.say(f"{fit}: step {record['step']} of {record['steps']}, {figures}")

            yield advance

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show that something is being done, if it takes more than two seconds.

        Args:
            what: is being done.
        """
        if self._live:
            with self.console.status(escape(what)):
                yield
            return
        with self._alive(lambda: what):
            yield

    @contextmanager
    def trials(
        self, total: int
    ) -> Iterator[Callable[[int, int, Mapping[str, float], Mapping[str, float], str | None], None]]:
        """Progress of a search.

        Args:
            total: trials of the search.

        Yields:
            A function to call with trials done, number of the latest, its objectives, the best so far, why it failed.
        """
        with self._progress("{task.fields[figures]}") as bar:
            last = [0.0]

            def advance(
                done: int, number: int, objective: Mapping[str, float], best: Mapping[str, float], reason: str | None
            ) -> None:
                figures = f"best {_objectives(best)}" if best else ""
                if bar is not None:
                    _advance(bar, "trials", done, total, figures)
                if reason is not None:
                    self.say(f"trial {number} failed: {reason}")
                elif bar is None and (done == total or time.monotonic() - last[0] > _LINE_SECONDS):
                    last[0] = time.monotonic()
                    shown = _objectives(objective) or "stopped"
                    self.say(f"trial {number}: {shown}; {done} of {total} done, {figures}")

            yield advance

    def search(self, report: Mapping[str, Any]) -> None:
        """What a search came to: its trials, and the settings of the best.

        Args:
            report: name, trials, trials_per_minute and best.
        """
        counts = ", ".join(f"{number} {state}" for state, number in report["trials"].items())
        best = report["best"]
        self.out.print(
            f"search {report['name']}: {counts}; {report['trials_per_minute']:g} trials a minute", markup=False
        )
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(f"best: trial {best['trial']}")
        table.add_column(escape(_objectives(best["objective"])), justify="right")
        for key, value in best["params"].items():
            table.add_row(escape(key), escape(f"{value:.4g}" if isinstance(value, float) else str(value)))
        self.out.print(table)

    def table(self, title: str, rows: list[tuple[str, Mapping[str, Any]]], notes: list[str]) -> None:
        """Results side by side: accuracy, NLL and ECE in distribution and out of it, accuracy by domain.

        Args:
            title: of the table.
            rows: method and its report (``id`` and ``ood``), from ``kngd_ray.experiment.aggregate.over_seeds``.
            notes: lines below.
        """
        domains = list(rows[0][1]["ood"])
        groups = {"ID": [report["id"] for _, report in rows]}
        if domains:
            groups["OOD"] = [report["ood"]["mean"] for _, report in rows]
        names = [name for name, _ in rows]
        together = _results(title, names, groups)
        if self.out.measure(together, options=self.out.options.update(max_width=_ENDLESS)).maximum <= self.out.width:
            self.out.print(together)
        else:  # a narrow terminal would cut figures off
            for group, figures in groups.items():
                self.out.print(_results(title if group == "ID" else "", names, {group: figures}))
        if len(domains) > 2:  # the mean and at least two domains
            detail = Table(title="OOD accuracy % by domain", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            detail.add_column("")
            for domain in domains[1:]:
                detail.add_column(escape(domain), justify="right")
            for name, report in rows:
                detail.add_row(escape(name), *(stacked(report["ood"][d]["accuracy"], 100) for d in domains[1:]))
            self.out.print(detail)
        for note in notes:
            self.out.print(note, highlight=False, markup=False)

    @contextmanager
    def _alive(self, going: Callable[[], str]) -> Iterator[Callable[[], None]]:
        """Say in a log what is going on where nothing is said, after two seconds and then less and less often.

        Args:
            going: what is.

        Yields:
            A function to call when something else was said.
        """
        if self._live:  # there a bar is moving
            yield lambda: None
            return
        began = time.monotonic()
        heard, over = [began], threading.Event()

        def watch() -> None:
            patience = _LINE_SECONDS
            while not over.wait(max(heard[0] + patience - time.monotonic(), 0.1)):
                if time.monotonic() - heard[0] >= patience:
                    self.say(f"{going()}, {time.monotonic() - began:.0f} s")
                    heard[0], patience = time.monotonic(), min(2 * patience, _PATIENCE)

        def said() -> None:
            heard[0] = time.monotonic()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield said
        finally:
            over.set()
            watcher.join()

    @contextmanager
    def _progress(self, figures: str) -> Iterator[Progress | None]:
        if not self._live:
            yield None
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn(figures, markup=False, table_column=Column(ratio=1, no_wrap=True)),  # what room there is left
            console=self.console,
            expand=True,
        ) as bar:
            yield bar


def _results(title: str, names: Sequence[str], groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Accuracy, NLL and ECE of methods, on one test set beside another."""
    table = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for group in groups:
        for figure in ("accuracy %", "NLL", "ECE"):
            table.add_column(f"{group}\n{figure}", justify="right", no_wrap=True)
    for name, *sets in zip(names, *groups.values(), strict=True):
        figures = (c for s in sets for c in (stacked(s["accuracy"], 100), stacked(s["nll"]), stacked(s["ece"])))
        table.add_row(escape(name), *figures)
    return table


def _advance(bar: Progress, name: str, done: int, total: int, figures: str) -> None:
    name = escape(printable(name))
    known: dict[str, TaskID] = {task.description: task.id for task in bar.tasks}
    task = known.get(name)
    if task is None:
        task = bar.add_task(name, total=total, figures="")
    bar.update(task, completed=done, total=total, figures=figures)


def _figures(record: Mapping[str, Any]) -> str:
    stats = record["stats"]
    if stats is None:
        return f"refused: {record['refused']}"
    shown = [f"{name} {form.format(stats[key])}" for key, name, form in _SHOWN if stats.get(key) is not None]
    return ", ".join([*shown, f"{record['milliseconds']:.1f} ms/step"])


def _objectives(objective: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in objective.items())


def with_interval(figure: Mapping[str, float], factor: float = 1, digits: int = 3) -> str:
    """A mean and its interval as text.

    Args:
        figure: ``mean``, ``low`` and ``high``.
        factor: to the unit that is shown; 100 makes percents of shares.
        digits: after the point.

    Returns:
        ``48.7±2.4``; ``96.3 [91.0, 100.0]`` where the interval ends at a bound, and has no half.
    """
    mean, low, high = (figure[key] * factor for key in ("mean", "low", "high"))
    if abs((high - mean) - (mean - low)) < 10.0**-digits / 2:
        return f"{mean:.{digits}f}±{(high - low) / 2:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def cell(figure: float | Mapping[str, float], factor: float = 1) -> str:
    """A figure in a table.

    Args:
        figure: the number, or its mean and interval over seeds.
        factor: to the unit that is shown; 100 makes percents of shares.

    Returns:
        The number, with its interval if it has one.
    """
    digits = 1 if factor == 100 else 3
    if isinstance(figure, Mapping):
        return with_interval(figure, factor, digits)
    return f"{figure * factor:.{digits}f}"


def stacked(figure: float | Mapping[str, float], factor: float = 1) -> str:
    """A figure in a table of a terminal, the two ends of an interval below it: beside it they would push out names.

    Args:
        figure: as of :func:`cell`.
        factor: likewise.

    Returns:
        One line, or two.
    """
    return cell(figure, factor).replace(" [", "\n[")
