"""``kngd-ray tune`` without Ray: what it prints, what it leaves, and that it may be cut short anywhere."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from kngd_ray.config import load_config, plain
from kngd_ray.errors import FilterError
from kngd_ray.training.fit import FitTask
from kngd_ray.tuning import JOURNAL, SearchStudy, fitting
from kngd_ray.tuning.file import load_search
from kngd_ray.tuning.records import SearchRecords

SEARCH: dict[str, Any] = {
    "preset": "kalman_diagonal",
    "epochs": 2,
    "search": {"num_samples": 6, "batch": 3, "seeds": [0, 1], "sampler": "random", "objective": "held_out_nll"},
    "space": {
        "filter.p0": {"low": 0.001, "high": 1.0, "log": True},
        "observation.0.r0": {"low": 0.1, "high": 10.0, "log": True},
        "filter.gate": {"choices": ["none", "skip"]},
        "filter.gate.quantile": {"low": 0.9, "high": 0.999, "when": {"filter.gate": "skip"}},
    },
}
KEYS = {"name", "trials", "trials_per_minute", "seconds", "best", "run", "test"}
# What an unbroken search and a resumed one have in common.
SAME = ("trials", "best", "run")


@pytest.fixture
def tune(command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a search of the small data, without pictures and by default without its winner's fit, which take long."""
    monkeypatch.setattr("kngd_ray.tuning.run.study_figures", lambda *arguments: [])

    def run(*arguments: str, refit: bool = False):
        file = command.folder / "search.yaml"
        file.write_text(yaml.safe_dump(SEARCH))
        return command("tune", file, *command.settings(f"search.refit={str(refit).lower()}", *arguments))

    return run


@pytest.fixture
def resume(command) -> Callable[..., Any]:
    return lambda name, *more: command(
        "tune", "--resume", name, f"trainer.storage_path={command.runs}", *more, "--json"
    )


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[FitTask], bool]], None]:
    """Makes fits fail whose task is so."""
    begin = fitting.fit

    def poison(bad: Callable[[FitTask], bool]) -> None:
        def fit(task: FitTask, **options: Any):
            if bad(task):
                raise FilterError("10 steps in a row were refused.")
            return begin(task, **options)

        monkeypatch.setattr(fitting, "fit", fit)

    return poison


def history(folder: Path) -> list[Any]:
    search = load_search(folder.parent.parent / "search.yaml", [])
    study = SearchStudy(folder, search.space, search.options)
    study.close()
    return [(r.number, r.state, r.settings, r.objective) for r in study.results()]


def statuses(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["status"] for path in folder.glob("records/*/meta.json")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_json_and_what_is_left(tune, command) -> None:
    outcome = tune("trainer.name=s", "seeds=0,1", "--json", refit=True)
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert set(report) == KEYS
    assert report["name"] == "s"
    assert report["trials"] == {"finished": 6, "failed": 0, "stopped": 0}
    assert "no test picture" not in outcome.err
    assert report["trials_per_minute"] == pytest.approx(60 * 6 / report["seconds"], rel=0.05)
    best = report["best"]
    assert set(best) == {"trial", "params", "objective"}
    assert set(best["objective"]) == {"held_out_nll"}
    assert best["objective"]["held_out_nll"] == min(
        objective["held_out_nll"] for *_, objective in history(command.run("s"))
    )
    assert report["run"] == f"s-trial-{best['trial']}"
    trained = json.loads((command.run(report["run"]) / "results.json").read_text())
    assert report["test"] == trained
    assert set(trained["id"]["accuracy"]) == {"mean", "low", "high"}, "fitted on the seeds of the configuration"
    assert json.loads((command.run("s") / "results.json").read_text()) == report
    names = {path.name for path in command.run("s").iterdir() if not path.name.startswith(".")}
    written = {"config.yaml", "search.yaml", "task.json", "champion.yaml", "results.json"}
    assert names == {*written, JOURNAL, "drivers", "records"}
    assert list((command.run("s") / "drivers").iterdir()) == []


def test_several_objectives_report_their_front(tune) -> None:
    report = tune("search.objective=held_out_accuracy,held_out_nll", "--json").json
    assert set(report) == KEYS | {"front"}
    assert report["front"][0] == report["best"]
    accuracies = [one["objective"]["held_out_accuracy"] for one in report["front"]]
    assert accuracies == sorted(accuracies, reverse=True)


def test_ways_to_run_trials_agree(tune) -> None:
    local, batched = (
        tune(f"search.trial={trial}", "search.objective=held_out_nll,evidence", "--json").json["best"]
        for trial in ("local", "batched")
    )
    assert batched["params"] == local["params"]
    assert batched["objective"] == pytest.approx(local["objective"], rel=1e-4)


def test_the_champion_is_a_preset(tune, command) -> None:
    report = tune("trainer.name=s", "--json").json
    champion = command.run("s") / "champion.yaml"
    first = champion.read_text().splitlines()[0]
    assert first.startswith(f"# Trial {report['best']['trial']} of the search s: held_out_nll ")
    assert first.endswith("chosen on the training shots alone.")
    found = [command("train", *how, *data(command), "--json").json for how in ([champion], [f"preset={champion}"])]
    assert found[0]["id"] == found[1]["id"]
    given = plain(load_config(champion))
    for key, value in report["best"]["params"].items():
        assert str(_at(given, key)) == str(value), key
    assert (given["epochs"], given["batch_size"], given["posterior"]["folds"]) == (2, 32, 2)


def data(command) -> list[str]:
    """The settings that a champion does not hold: data, and where it runs."""
    return [s for s in command.settings() if s.startswith(("data.", "trainer.", "tracking."))]


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part) if part.isdecimal() else part]
    return tree["kind"] if isinstance(tree, dict) else tree


def test_a_person_sees_the_best_and_the_table_and_may_use_the_searchs_name(tune, command) -> None:
    """By its name a search is its winner's run."""
    outcome = tune("trainer.name=s", refit=True)
    assert "6 finished, 0 failed, 0 stopped" in outcome.out
    assert re.search(r"best: trial \d", outcome.out)
    assert "zero-shot" in outcome.out
    assert "trial 5" in outcome.err
    run = json.loads((command.run("s") / "results.json").read_text())["run"]
    at = ("--storage-path", command.runs, "--json")
    assert command("evaluate", "s", *at).json == command("evaluate", run, *at).json
    assert command("evaluate", command.run("s"), "--json").code == 0
    picture = command.folder / "picture.png"
    picture.write_bytes(pq.read_table(command.data)["image"][0].as_py())
    assert command("predict", "s", picture, *at).json == command("predict", run, picture, *at).json
    assert command.train("preset=kalman_diagonal", "prior=s").code == 0


# Cut short


def test_resuming_a_finished_search_changes_nothing(tune, resume, command) -> None:
    report = tune("trainer.name=s", "--json", refit=True).json
    journal, results = ((command.run("s") / name).read_bytes() for name in (JOURNAL, "results.json"))
    run = contents(command.run(report["run"]))
    again = resume("s")
    assert again.code == 0, again.err
    assert again.json == report
    assert (command.run("s") / JOURNAL).read_bytes() == journal
    assert (command.run("s") / "results.json").read_bytes() == results
    assert contents(command.run(report["run"])) == run
    assert set(statuses(command.run("s")).values()) == {"FINISHED"}


def test_prolonging_a_search(tune, resume, command) -> None:
    short = tune(
        "trainer.name=s", "search.start=[]", "search.seed=2", "search.num_samples=3", "--json", refit=True
    ).json
    longer = resume("s", "search.num_samples=6").json
    whole = tune("trainer.name=whole", "search.start=[]", "search.seed=2", "--json", refit=True).json
    assert longer["trials"] == {"finished": 6, "failed": 0, "stopped": 0}
    assert history(command.run("s")) == history(command.run("whole"))
    assert longer["best"] == whole["best"]
    assert longer["best"]["trial"] != short["best"]["trial"], "or this shows nothing"
    assert longer["run"] == f"s-trial-{longer['best']['trial']}"
    assert longer["test"]["id"] == whole["test"]["id"]
    assert resume("s").json == longer, "it keeps its new length"


def test_the_first_trials_of_a_search_outlive_their_presets(tune, resume, command) -> None:
    mine = command.folder / "mine.yaml"
    mine.write_text("filter: {p0: 0.25}\n")
    begun = ("trainer.name=s", f"search.start=[{mine}]", "search.num_samples=2", "--json")
    assert tune(*begun).code == 0
    first = history(command.run("s"))[0]
    assert first[2]["filter.p0"] == 0.25
    mine.unlink()
    outcome = resume("s", "search.num_samples=3")
    assert outcome.code == 0, outcome.err
    assert outcome.json["trials"]["finished"] == 3
    assert history(command.run("s"))[0] == first


def test_single_shots_cannot_be_held_out(tune, command) -> None:
    """Nothing would be learned of the classes of a fold: the narrowest prior would win."""
    for objective in ("held_out_nll", "held_out_accuracy"):
        outcome = tune("trainer.name=one", "data.shots=1", f"search.objective={objective}")
        assert outcome.code == 2
        assert f"search.objective is {objective}, and no class has two shots" in outcome.sentence
    assert not command.run("one").exists()


def test_a_search_goes_on_with_its_own_data_only(tune, resume, command) -> None:
    """Trials on easier data would win for that alone."""
    own = command.folder / "own.parquet"
    shutil.copyfile(command.data, own)
    begun = ("trainer.name=s", "search.num_samples=2", "data.train_domain=noto", f"data.path={own}")
    assert tune(*begun, "--json").code == 0
    before = (command.run("s") / JOURNAL).read_bytes()
    table = pq.read_table(own)
    first = pc.index(table["split"], "train").as_py()
    pq.write_table(table.take([n for n in range(len(table)) if n != first]), own)
    outcome = resume("s", "search.num_samples=4")
    assert outcome.code == 2
    assert "the search s was begun with other training shots" in outcome.sentence
    assert (command.run("s") / JOURNAL).read_bytes() == before
    shutil.copyfile(command.data, own)
    assert resume("s", "search.num_samples=3").json["trials"]["finished"] == 3


def interrupt_at(monkeypatch, owner: type, name: str, call: int, after: bool) -> None:
    """Ctrl-C at the n-th call of a method, before or after it does its work."""
    method, calls = getattr(owner, name), []

    def interrupted(self, *arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        found = method(self, *arguments, **options)
        if len(calls) == call and after:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, interrupted)


@pytest.fixture(scope="module")
def unbroken() -> list[Any]:
    """The report and the trials of the search that nobody interrupts, once it was run."""
    return []


@pytest.fixture
def whole(unbroken: list[Any], tune, command) -> list[Any]:
    if not unbroken:
        report = tune("trainer.name=whole", "search.trial=local", "--json").json
        unbroken += [report, history(command.run("whole"))]
    return unbroken


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (SearchStudy, "claim", 2, True),
        (SearchStudy, "finish", 4, False),
        pytest.param(SearchRecords, "end", 4, False, marks=pytest.mark.slow),
        pytest.param(SearchRecords, "summary", 1, False, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_search_goes_on(tune, resume, command, monkeypatch, whole, owner, name, call, after) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, owner, name, call, after)
        outcome = tune("trainer.name=cut", "search.trial=local")
    assert outcome.code == 130
    assert "kngd-ray tune --resume cut" in outcome.err
    assert "Traceback" not in outcome.err
    assert "RUNNING" not in statuses(command.run("cut")).values()
    assert statuses(command.run("cut"))["search"] == "KILLED"
    resumed = resume("cut").json
    report, trials = whole
    assert {key: resumed[key] for key in SAME} == {key: report[key] for key in SAME}
    assert history(command.run("cut")) == trials
    found = statuses(command.run("cut"))
    assert set(found.values()) == {"FINISHED"}
    assert len(found) == 7


# Failing trials


def test_a_failed_trial_leaves_the_others(tune, command, poisoned) -> None:
    poisoned(lambda task: task.options.filter.p0 < 0.01)
    outcome = tune("trainer.name=s", "search.trial=local", "--json")
    report = outcome.json
    assert report["trials"]["failed"] > 0
    assert report["trials"]["finished"] + report["trials"]["failed"] == 6
    assert report["best"]["params"]["filter.p0"] >= 0.01
    failed = [number for number, state, *_ in history(command.run("s")) if state == "failed"]
    assert f"trial {failed[0]} failed: on the support set of seed 0: 10 steps in a row were refused" in outcome.err
    metas = {n: json.loads((command.run("s") / f"records/trial-{n:05d}/meta.json").read_text()) for n in failed}
    assert all(meta["status"] == "FAILED" for meta in metas.values())
    assert all("10 steps in a row" in meta["tags"]["kngd_ray.failed"] for meta in metas.values())


def test_when_all_trials_fail_there_is_no_winner(tune, command, poisoned) -> None:
    poisoned(lambda task: True)
    outcome = tune("trainer.name=s", "search.trial=local", "--json")
    assert outcome.code == 1
    assert outcome.out == ""
    assert "none of 6 trials finished; the last failed because on the support set of seed 0: 10 steps" in outcome.err
    assert statuses(command.run("s"))["search"] == "FAILED"
    assert not (command.run("s") / "champion.yaml").exists()


def test_too_many_failures_end_it_and_it_can_go_on(tune, resume, command, poisoned) -> None:
    poisoned(lambda task: True)
    outcome = tune("trainer.name=s", "search.trial=local", "search.max_failures=1", "--json")
    assert outcome.code == 1
    assert "2 trials failed, more than search.max_failures=1 allows" in outcome.err
    poisoned(lambda task: False)
    report = resume("s", "search.max_failures=5").json
    assert report["trials"] == {"finished": 4, "failed": 2, "stopped": 0}


# MLflow


@dataclass(frozen=True)
class Tracked:
    """A search that was logged."""

    folder: Path
    report: dict[str, Any]
    uri: str
    client: Any

    def runs(self, kind: str) -> list[Any]:
        experiment = self.client.get_experiment_by_name("kngd_ray tests")
        return self.client.search_runs([experiment.experiment_id], f"tags.`kngd_ray.kind` = '{kind}'")

    def artifact(self, run: Any, path: str) -> Path:
        return Path(self.client.download_artifacts(run.info.run_id, path))


@pytest.fixture(scope="module")
def tracked(small_data, shared_cache, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    from mlflow import MlflowClient

    from kngd_ray.console import Display
    from kngd_ray.tuning.run import tune

    folder = tmp_path_factory.mktemp("tracked")
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(SEARCH))
    uri = f"sqlite:///{folder}/mlflow.db"
    settings = [
        f"data.path={small_data}",
        "data.train_domain=noto",
        "data.shots=4",
        f"data.cache_dir={shared_cache}",
        "trainer.num_workers=0",
        f"trainer.storage_path={folder / 'runs'}",
        "trainer.name=s",
        f"tracking.uri={uri}",
        "tracking.experiment=kngd_ray tests",
        "posterior.folds=2",
    ]
    report = tune(load_search(file, settings), Display(quiet_stdout=True))
    return Tracked(folder / "runs" / "s", report, uri, MlflowClient(uri))


def test_the_parent_and_its_children(tracked: Tracked) -> None:
    (parent,) = tracked.runs("search")
    children = tracked.runs("trial")
    assert len(children) == 6
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert parent.data.params["space.filter.p0"] == "low: 0.001, high: 1.0, log: True"
    assert parent.data.params["search.sampler"] == "random"
    assert parent.data.params["epochs"] == "2"
    assert parent.data.tags["kngd_ray.best_trial"] == str(tracked.report["best"]["trial"])
    assert parent.data.tags["kngd_ray.champion"] == tracked.report["run"]
    metrics = parent.data.metrics
    assert metrics["trials/finished"] == 6
    assert metrics["objective/held_out_nll"] == pytest.approx(tracked.report["best"]["objective"]["held_out_nll"])
    assert metrics["id/accuracy"] == pytest.approx(tracked.report["test"]["id"]["accuracy"])
    course = tracked.client.get_metric_history(parent.info.run_id, "best/held_out_nll")
    values = [point.value for point in sorted(course, key=lambda point: point.step)]
    assert len(values) == 6
    assert values == sorted(values, reverse=True)
    assert values[-1] == metrics["objective/held_out_nll"]


def test_a_child_says_what_was_tried_and_found(tracked: Tracked) -> None:
    study = _optunas(tracked.folder)
    for child in tracked.runs("trial"):
        trial = study.trials[int(child.info.run_name.rpartition("-")[2])]
        assert child.info.run_name == f"s/trial-{trial.number:05d}"
        assert child.data.params == {key: str(value) for key, value in trial.params.items()}
        course = tracked.client.get_metric_history(child.info.run_id, "by_seed/held_out_nll")
        assert [point.step for point in course] == [0, 1]
        assert child.data.metrics["objective/held_out_nll"] == pytest.approx(trial.value)
        assert sum(point.value for point in course) / 2 == pytest.approx(trial.value)


def test_the_parent_holds_the_search(tracked: Tracked) -> None:
    (parent,) = tracked.runs("search")
    assert load_search(tracked.artifact(parent, "search.yaml"), []).space
    assert yaml.safe_load(tracked.artifact(parent, "best.yaml").read_text()) == tracked.report["best"]["params"]
    journal = JournalStorage(JournalFileBackend(str(tracked.artifact(parent, JOURNAL))))
    assert len(optuna.load_study(study_name="s", storage=journal).trials) == 6
    figures = tracked.artifact(parent, "figures")
    names = {path.stem for path in figures.glob("*.png")}
    assert names >= {"history", "importances", "parallel_coordinates", "contour"}
    assert {path.stem for path in figures.glob("*.html")} == names
    for page in figures.glob("*.html"):
        text = page.read_text()
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?(https?:)?//", text), "it asks for nothing"
        assert "Plotly.newPlot" in text
    for picture in figures.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_champion_is_registered_and_predicts(tracked: Tracked, small_data: Path) -> None:
    import mlflow
    import pandas as pd

    name = f"kngd_ray-tests-{small_data.stem}-noto-kalman"
    version = tracked.client.get_model_version_by_alias(name, "champion")
    (method,) = (run for run in tracked.runs("method") + tracked.runs("fit") if run.info.run_id == version.run_id)
    assert method.data.tags["kngd_ray.run"] == tracked.report["run"]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracked.uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    finally:
        mlflow.set_tracking_uri(before)
    pictures = pq.read_table(small_data)["image"].to_pylist()[:2]
    assert len(model.predict(pd.DataFrame({"image": pictures}))) == 2


def test_optunas_own_tools_open_it(tracked: Tracked) -> None:
    study = _optunas(tracked.folder)
    assert study.best_trial.number == tracked.report["best"]["trial"]
    assert len(optuna.importance.get_param_importances(study)) >= 1


def _optunas(folder: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return optuna.load_study(study_name=folder.name, storage=storage)


def test_a_server_that_is_away_stops_nothing(tune, command) -> None:
    """What was not sent is kept, and sent later, to wherever."""
    from mlflow import MlflowClient

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{s.getsockname()[1]}"
    outcome = tune(
        "trainer.name=s", "tracking.enabled=true", f"tracking.uri={nobody}", "tracking.log_model=false", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["trials"]["finished"] == 6
    assert "what was not logged to MLflow is kept" in outcome.err
    assert f"kngd-ray sync {command.run('s')}" in outcome.err
    uri = f"sqlite:///{command.folder}/mlflow.db"
    sent = command("sync", "s", "--storage-path", command.runs, "--uri", uri, "--json")
    assert sent.code == 0, sent.err
    assert set(sent.json) == {"search", *(f"trial-{n:05d}" for n in range(6))}
    client = MlflowClient(uri)
    runs = [client.get_run(run_id) for run_id in sent.json.values()]
    assert {run.info.status for run in runs} == {"FINISHED"}
