"""``kngd-ray compare`` on runs of ``kngd-ray train``: what is put side by side, what is left out, what is refused."""

import base64
import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from kngd_ray.comparison.compare import compare
from kngd_ray.comparison.rows import find_rows, group_rows, name_rows
from kngd_ray.comparison.tables import build_tables
from kngd_ray.config import load_config
from kngd_ray.console import Display
from kngd_ray.experiment.run import train
from kngd_ray.tracking import LoggedRun, Record, publish

EXPERIMENT = "side by side"
RUNS = {
    "main": ("seeds=0,1,2", "baselines=adamw"),
    "wide": ("seeds=0,1,2", "filter.logit_variance=3000"),
    "again": ("seeds=0,1,2", "filter.logit_variance=3000"),
    "paper": ("seeds=1", "preset=kf_clip", "epochs=2"),
    "few": ("seeds=0,1", "data.shots=2"),
}


class Store:
    """A tracking store with real runs, and how to make more."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.uri = f"sqlite:///{folder}/mlflow.db"

    def train(self, name: str, *settings: str, data: Path, experiment: str = EXPERIMENT) -> dict[str, Any]:
        torch.set_num_threads(1)
        overrides = [
            f"data.path={data}",
            "data.train_domain=noto",
            "data.shots=4",
            f"data.cache_dir={self.cache}",
            "trainer.num_workers=0",
            f"trainer.storage_path={self.folder / 'runs'}",
            f"trainer.name={name}",
            f"tracking.uri={self.uri}",
            f"tracking.experiment={experiment}",
            "tracking.log_model=false",
            "posterior.folds=2",
            *settings,
        ]
        return train(load_config(overrides=overrides), Display(quiet_stdout=True))

    def records(self, name: str) -> list[dict[str, Any]]:
        """Final metrics of the fits of a run, as its folder keeps them."""
        folders = sorted((self.folder / "runs" / name / "records").glob("*-seed*"))
        return [json.loads((folder / "metrics.json").read_text()) for folder in folders]

    def publish(self, name: str, experiment: str, *records: dict[str, Any]) -> None:
        """Log runs that `train` cannot be made to leave."""
        for options in records:
            options = dict(options)
            metrics, status = options.pop("metrics", {}), options.pop("status", "FINISHED")
            id = options.pop("id")
            record = Record.open(self.folder / name, id, **{"name": id, "params": {}, "tags": {}, **options})
            record.log_metrics(metrics)
            if status != "RUNNING":
                record.finish(status)
        publish(self.folder / name, self.uri, experiment)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path, small_data: Path) -> Store:
    store = Store(tmp_path_factory.mktemp("compared"), shared_cache)
    for name, settings in RUNS.items():
        store.train(name, *settings, data=small_data)
    return store


@pytest.fixture
def comparison(command, store):
    """The command on the store."""

    def run(*arguments: Any, experiment: str = EXPERIMENT) -> Any:
        return command("compare", experiment, "--uri", store.uri, *arguments)

    return run


def rows_of(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in group["rows"]}


def test_streams_have_their_own_columns_and_are_compared_in_one_order(comparison, store, small_data) -> None:
    """Zero-shot figures, by which others are grouped, know nothing of the order."""
    for name, order in {"there": "[noto,twemoji]", "back": "[twemoji,noto]"}.items():
        settings = ("protocol=stream", f"data.order={order}", "data.train_domain=null", "data.shots=2")
        store.train(name, *settings, "seeds=0", "baselines=adamw", data=small_data, experiment="streams")
    outcome = comparison("--json", experiment="streams")
    assert outcome.code == 0, outcome.err
    groups = outcome.json["groups"]
    assert len(groups) == 2
    assert {"a stream of noto,twemoji" in group["title"] for group in groups} == {True, False}
    for group in groups:
        assert set(rows_of(group)) >= {"zero-shot", "kalman", "adamw"}
        for method in ("kalman", "adamw"):
            figures = rows_of(group)[method]["figures"]
            name = "there" if "noto,twemoji" in group["title"] else "back"
            report = json.loads((store.folder / "runs" / name / "results.json").read_text())
            report = report if method == "kalman" else report["baselines"][0]
            for figure in ("accuracy", "nll", "final"):
                assert figures[f"stream/{figure}"]["mean"] == pytest.approx(report["stream"][figure]), "of all batches"
    shown = comparison(experiment="streams").out
    assert "prequential" in shown
    assert "forgotten" in shown


def test_groups_and_names(comparison) -> None:
    outcome = comparison("--json")
    assert outcome.code == 0, outcome.err
    many, few = outcome.json["groups"]
    assert "4 shots" in many["title"]
    assert "2 shots" in few["title"]
    # temperature scaling makes no other domain of twemoji, nor of the mean
    assert many["title"].endswith(", tested out of distribution on twemoji, the shipped CLIP")
    assert many["rows"][0]["name"] == "zero-shot"
    assert set(rows_of(many)) == {
        "zero-shot",
        "adamw",
        "kalman filter.logit_variance=1000.0",
        "kalman (wide/kalman)",
        "kalman (again/kalman)",
        "kalman kf_clip",
    }, "3000 is what most runs of the method have"
    assert "kalman: filter.logit_variance=3000.0, unless the name says otherwise" in many["notes"]
    assert set(rows_of(few)) == {"zero-shot", "kalman"}
    assert outcome.json["left_out"] == {}


def test_figures_and_differences_are_those_of_the_fits(comparison, store) -> None:
    rows = rows_of(comparison("--json").json["groups"][0])
    adamw = [m for m in store.records("main") if m not in kalman_of(store)]
    for metric, figure in rows["kalman filter.logit_variance=1000.0"]["figures"].items():
        kalman = [m[metric] for m in kalman_of(store)]
        base = [m[metric] for m in adamw]
        assert list(figure["values"].values()) == kalman
        assert figure["mean"] == pytest.approx(sum(kalman) / 3)
        difference = figure["difference"]
        differences = [a - b for a, b in zip(kalman, base, strict=True)]
        assert difference["seeds"] == [0, 1, 2]
        assert difference["mean"] == pytest.approx(sum(differences) / 3)
        if max(differences) == min(differences):
            assert difference["low"] is None
        else:
            ends = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
            bound = 1 if metric.endswith(("accuracy", "ece")) else math.inf
            expected = (max(ends.low, -bound), min(ends.high, bound))
            assert (difference["low"], difference["high"]) == pytest.approx(expected)
        sign = 1 if metric.endswith("accuracy") else -1
        assert difference["wins"] == sum(sign * d > 0 for d in differences)
        assert difference["wins"] + difference["ties"] + difference["losses"] == 3
    zero_shot = rows["zero-shot"]["figures"]["id/nll"]["values"]
    assert list(zero_shot.values()) == [m["zero_shot/id/nll"] for m in adamw]
    assert rows["adamw"]["figures"]["id/nll"]["difference"] is None


def kalman_of(store: Store) -> list[dict[str, Any]]:
    folders = sorted((store.folder / "runs" / "main" / "records").glob("kalman-seed*"))
    return [json.loads((folder / "metrics.json").read_text()) for folder in folders]


def test_one_seed_gives_no_interval_and_no_rank(comparison) -> None:
    group = comparison("--json").json["groups"][0]
    figure = rows_of(group)["kalman kf_clip"]["figures"]["id/nll"]
    assert figure["low"] is None
    assert figure["difference"]["seeds"] == [1]
    assert figure["difference"]["low"] is None
    assert group["ranked_on_seeds"] == [0, 1, 2]
    assert not rows_of(group)["kalman kf_clip"]["front"]
    assert any("not ranked, as some seeds are missing: kalman kf_clip" in note for note in group["notes"])
    assert any(row["front"] for row in group["rows"])


def test_seeds_that_drew_the_same_shots_decide_nothing(comparison, store, small_data, command) -> None:
    """Classes have five pictures to train on: as many shots are the same ones for every seed."""
    settings = ("data.shots=5", "seeds=0,1,2", "method=adamw", "epochs=2", "batch_size=4")
    store.train("alike", *settings, data=small_data, experiment="alike")
    store.train("alike-faster", *settings, "optimizer.lr=0.01", data=small_data, experiment="alike")
    report = json.loads((store.folder / "runs" / "alike" / "results.json").read_text())
    assert isinstance(report["id"]["nll"], float), "a mean, without ends"
    assert "over seeds that all drew the same shots" in _card(store, "alike")
    (group,) = comparison("--json", experiment="alike").json["groups"]
    assert len(group["rows"]) == 3
    for row in group["rows"]:
        for figure in row["figures"].values():
            assert (figure["low"], figure["high"]) == (None, None)
            assert figure["difference"] is None or figure["difference"]["p"] is None
    spread = [row["figures"]["id/nll"]["values"] for row in group["rows"] if row["name"] != "zero-shot"]
    assert all(len({round(value, 6) for value in values.values()}) == 3 for values in spread), "batches differ"
    shown = " ".join(comparison(experiment="alike").out.split())
    assert "over 3 seeds with the same shots (no interval)" in shown
    assert "all seeds learned from the same shots, so no interval: adamw" in shown
    assert "excludes 0" not in shown
    outcome = command.train(*settings, "seeds=0,1")
    assert "all 2 seeds have the same shots: their figures say nothing of others, and have no interval" in outcome.err
    assert "seeds 0, 1; means over seeds that have the same shots, no interval" in outcome.out


def _card(store: Store, name: str) -> str:
    (card,) = (store.folder / "runs" / name / "records" / "adamw").rglob("model_card.md")
    return card.read_text()


def test_the_terminal_shows_figures_differences_and_sentences(comparison, command) -> None:
    outcome = comparison()
    assert outcome.code == 0
    assert "difference from adamw" in outcome.out
    assert re.search(r"Best ID NLL: .* (higher|lower) than|Best ID NLL: adamw", outcome.out)
    assert re.search(r"\d-\d-\d", outcome.out)
    assert "page: compare-side_by_side.html" in outcome.err
    assert (command.folder / "compare-side_by_side.html").is_file()


def test_baselines(comparison) -> None:
    def of(*arguments: str) -> list[str]:
        return [group["baseline"] for group in comparison("--json", *arguments).json["groups"]]

    assert of() == ["adamw", "zero-shot"]
    assert of("--baseline", "zero-shot") == ["zero-shot", "zero-shot"]
    assert of("--baseline", "wide") == ["kalman (wide/kalman)", "zero-shot"]
    assert of("--baseline", "main/adamw") == ["adamw", "zero-shot"]
    assert of("--baseline", "kalman kf_clip")[0] == "kalman kf_clip"
    assert of("--baseline", "few") == ["adamw", "kalman"]


def test_parent_is_a_run_a_method_or_an_id(comparison) -> None:
    def of(parent: str) -> set[str]:
        (group,) = comparison("--json", "--parent", parent).json["groups"]
        return {row["method"] for row in group["rows"]}

    assert of("main") == {"zero-shot", "adamw", "kalman"}
    assert of("main/kalman") == {"zero-shot", "kalman"}
    rows = rows_of(comparison("--json").json["groups"][0])
    assert of(rows["adamw"]["run_id"]) == {"zero-shot", "adamw"}


def test_other_metrics(comparison) -> None:
    outcome = comparison("--json", "--metric", "ood/twemoji/brier", "--metric", "calibration/tau")
    group = outcome.json["groups"][0]
    assert group["metrics"] == {"ood/twemoji/brier": "less", "calibration/tau": None}
    assert any("the better direction is unknown for calibration/tau" in note for note in group["notes"])
    assert [h.split(":")[0] for h in group["headlines"]] == ["Best twemoji Brier"]
    assert group["front"] == ["id/accuracy", "ood/mean/accuracy", "id/nll"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--metric", "id/acuracy"], 2, ["id/acuracy", "did you mean id/accuracy?"]),
        (["--metric", "zzz"], 2, ["zzz", "id/accuracy"]),
        (["--parent", "mian"], 2, ["mian", "did you mean main?"]),
        (["--baseline", "adam"], 2, ["adam", "did you mean adamw?"]),
        (["--baseline", "main"], 2, ["several rows", "adamw"]),
        (["--out", "nowhere/page.html"], 1, ["nowhere", "no folder"]),
        (["--out", "notes.txt"], 2, ["notes.txt", "is not an HTML file"]),
        (["--out", "mine.html"], 2, ["mine.html", "did not write", "another name"]),
        (["--out", "."], 2, ["is not an HTML file"]),
        (["--out", "/dev/null"], 2, ["is not an HTML file"]),
    ],
)
def test_wrong_usage(comparison, command, arguments: list[str], code: int, words: list[str]) -> None:
    (command.folder / "notes.txt").write_text("mine")
    (command.folder / "mine.html").write_text("<!doctype html><title>mine</title>")
    outcome = comparison(*arguments)
    assert outcome.code == code
    for word in words:
        assert word in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(path.name for path in command.folder.iterdir()) == ["mine.html", "notes.txt"]
    assert (command.folder / "notes.txt").read_text() == "mine"
    assert (command.folder / "mine.html").read_text() == "<!doctype html><title>mine</title>"


def test_nothing_to_read_from(command, comparison) -> None:
    outcome = command("compare", "kngd_ray")
    assert outcome.code == 1
    assert "there is no tracking database" in outcome.sentence
    assert list(command.folder.iterdir()) == []
    assert "did you mean 'side by side'?" in comparison(experiment="side by sid").err
    assert "has no runs yet" in comparison(experiment="Default").sentence


def test_the_page_needs_nothing_else_and_allows_no_other_script(comparison, command) -> None:
    assert comparison("--out", "page.html").code == 0
    text = (command.folder / "page.html").read_text()
    assert not re.search(r"(src|href)=|@import|url\(|https?://", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert text.count("<svg") > 10
    assert "$" not in text
    assert comparison("--out", "page.html").code == 0, "a page is replaced"


def test_names_from_outside_are_text(comparison, command, store) -> None:
    nasty = "<script>alert(1)</script>[bold]&'\""
    tags = {"kngd_ray.method": nasty, "kngd_ray.preset": nasty, "kngd_ray.run": nasty}
    fit = {"name": nasty, "tags": tags, "params": {"seeds": 0, "data.shots": nasty}, "metrics": {"id/nll": 1.0}}
    store.publish("nasty", "nasty", {"id": "a", **fit}, {"id": "b", **fit})
    outcome = comparison("--out", "page.html", experiment="nasty")
    assert outcome.code == 0, outcome.err
    text = (command.folder / "page.html").read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)") > 2
    assert "[bold]" in outcome.out


def test_unfinished_runs_are_left_out_counted_and_said(comparison, store) -> None:
    tags = {"kngd_ray.method": "kalman", "kngd_ray.preset": "kalman"}
    fit = {"tags": tags, "metrics": {"id/nll": 1.0}, "parent": "p"}
    store.publish(
        "odd",
        "odd",
        {"id": "p", "tags": tags, "status": "FAILED"},
        {"id": "s0", **fit, "params": {"seeds": 0}},
        {"id": "s1", **fit, "params": {"seeds": 1}, "status": "FAILED"},
        {"id": "q", "tags": tags, "status": "RUNNING"},
        {"id": "foreign", "metrics": {"loss": 1.0}},
    )
    outcome = comparison("--json", experiment="odd")
    assert outcome.json["left_out"] == {
        "unfinished fits (failed)": 1,
        "unfinished fits (running)": 1,
        "runs that are not kngd-ray's": 1,
    }
    (row,) = outcome.json["groups"][0]["rows"]
    assert (row["seeds"], row["unfinished"]) == ([0], {"failed": 1})
    assert "left out are runs that are not kngd-ray's: 1, unfinished fits (failed): 1" in outcome.err
    assert "has no finished run below 'q'" in comparison("--parent", "q", experiment="odd").sentence


def test_the_same_pictures_elsewhere_and_others_at_the_same_place(comparison, store, small_data, tmp_path) -> None:
    copy = tmp_path / "copy.parquet"
    shutil.copy(small_data, copy)
    for name, data in (("here", small_data), ("copied", copy)):
        store.train(name, data=data, experiment="places")
    table = pq.read_table(copy)
    swapped = ["twemoji" if domain == "noto" else "noto" for domain in table["domain"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("domain"), "domain", pa.array(swapped)), copy)
    store.train("changed", data=copy, experiment="places")
    groups = comparison("--json", experiment="places").json["groups"]
    runs = [[row["run"].split("/")[0] for row in group["rows"][1:]] for group in groups]
    assert [sorted(names) for names in runs] == [["copied", "here"], ["changed"]]
    assert len({group["title"] for group in groups}) == 2


def search_records(trials: int) -> list[dict[str, Any]]:
    search = {"kngd_ray.kind": "search", "kngd_ray.run": "noise"}
    records: list[dict[str, Any]] = [
        {"id": "search", "name": "noise", "tags": search, "params": {"search.objective": "held_out_nll,evidence"}}
    ]
    records += [
        {
            "id": f"trial-{number}",
            "name": f"noise/trial-{number}",
            "parent": "search",
            "tags": {"kngd_ray.kind": "trial", "kngd_ray.run": "noise", "kngd_ray.method": "kalman"},
            "params": {"filter.p0": 0.1 * (number + 1), "noise.process.q": 0.0, "seeds": "0,1,2"},
            "metrics": {
                "objective/held_out_nll": abs(number - 4) / 10 + 0.5,
                "objective/evidence": -1.0 - number / 10,
            },
            "status": "FAILED" if number == 3 else "FINISHED",
        }
        for number in range(trials)
    ]
    return records


def test_a_search_is_compared_by_its_objectives(comparison, store, small_data) -> None:
    store.publish("noise", "searched", *search_records(8))
    store.train("kept", data=small_data, experiment="searched")
    methods = comparison("--json", experiment="searched")
    assert methods.json["left_out"] == {"trials of searches": 8}
    assert [row["method"] for row in methods.json["groups"][0]["rows"]] == ["zero-shot", "kalman"]
    outcome = comparison("--json", "--parent", "noise", experiment="searched")
    assert outcome.json["left_out"] == {"unfinished trials (failed)": 1}
    (group,) = outcome.json["groups"]
    assert group["title"] == "search noise, 7 finished trials"
    assert list(group["metrics"].items()) == [("objective/held_out_nll", "less"), ("objective/evidence", "more")]
    assert group["baseline"] is None
    names = [row["name"] for row in group["rows"]]
    assert names[0] == "trial-4 filter.p0=0.5", "the best by the first objective; what all share is not said"
    assert sorted(row["name"].split()[0] for row in group["rows"] if row["front"]) == [
        "trial-0",
        "trial-1",
        "trial-2",
        "trial-4",
    ]
    assert group["headlines"][0].startswith("Best held out NLL: trial-4")
    assert "trial-4" in comparison("--parent", "noise", experiment="searched").out
    refused = comparison("--parent", "noise", "--baseline", "adamw", experiment="searched")
    assert refused.code == 2
    assert "leave out --baseline" in refused.sentence


def run(id: str, **options: Any) -> LoggedRun:
    tags = {"kngd_ray.method": "kalman", "kngd_ray.preset": "kalman", **options.pop("tags", {})}
    params = {"seeds": "0", "data.shots": "4", **options.pop("params", {})}
    return LoggedRun(id, id, "FINISHED", tags=tags, params=params, metrics=options.pop("metrics", {}), **options)


def zero_shot(nll: float) -> dict[str, float]:
    return {"zero_shot/id/nll": nll, "zero_shot/id/accuracy": 0.5}


def test_rows_without_a_common_seed_are_grouped_by_their_settings() -> None:
    runs = [
        run("a", params={"data.path": "x"}, metrics=zero_shot(1.0)),
        run("b", params={"data.path": "x", "seeds": "1"}, metrics=zero_shot(1.1)),
        run("c", params={"data.path": "y", "seeds": "2"}, metrics=zero_shot(1.0)),
    ]
    groups = group_rows(find_rows(runs, None).rows)
    assert [[row.run for row in group if row.id] for group in groups] == [["a", "b"], ["c"]]


def test_rounding_of_another_device_does_not_part_rows() -> None:
    runs = [run("a", metrics=zero_shot(1.0)), run("b", metrics=zero_shot(1.000001)), run("c", metrics=zero_shot(1.01))]
    groups = group_rows(find_rows(runs, None).rows)
    assert [[row.run for row in group if row.id] for group in groups] == [["a", "b"], ["c"]]


def across(id: str, targets: str, nll: float, **more: str) -> LoggedRun:
    """A run that is tested on other data sets besides its own."""
    found = {f"zero_shot/protocol/targets/{name}/nll": nll for name in ("mean", *targets.split(","))}
    return run(id, params={"protocol": "cdg", "targets": targets, **more}, metrics=zero_shot(1.0) | found)


def test_runs_on_the_same_data_are_compared_whatever_else_they_are_tested_on() -> None:
    runs = [across("cdg", "a.parquet", 2.0), run("fsl", metrics=zero_shot(1.0)), across("two", "a.parquet,b", 2.0)]
    assert grouped(*runs) == [["cdg", "fsl"], ["two"]], "means over other targets are other figures"
    assert grouped(*runs[:2], across("replaced", "a.parquet", 2.1)) == [["cdg", "fsl"], ["replaced"]]
    assert grouped(runs[0], across("b", "b", 2.0, seeds="1"), run("f", params={"seeds": "2"})) == [["cdg", "f"], ["b"]]
    tables = build_tables(find_rows(runs, None), runs, ["zero_shot/protocol/targets/mean/nll"], None)
    assert [table.title.rpartition(", ")[2] for table in tables] == ["targets=a.parquet", "targets=a.parquet,b"]
    (found, *_) = group_rows(find_rows(runs, None).rows)
    assert "protocol/targets/mean/nll" in found[0].seeds[0], "though the newer row has none"


def grouped(*runs: LoggedRun) -> list[list[str]]:
    return [[row.run for row in group if row.id] for group in group_rows(find_rows(runs, None).rows)]


FEATURES = {"model.name": "precomputed", "model.class_embeddings": "None", "data.columns.label": "label"}


def on_features(id: str, path: str, data: str | None, **more: str) -> LoggedRun:
    """A run without class embeddings: as it starts, all classes are alike on any data."""
    return run(id, params={**FEATURES, "data.path": path, **more}, metrics=zero_shot(1.609), data=data)


def test_data_that_was_replaced_and_data_that_was_copied_are_told_by_their_digest() -> None:
    runs = [
        on_features("A", "d", "1" * 32),
        on_features("B", "d", "2" * 32),
        on_features("C", "d2", "2" * 32, **{"data.columns.label": "y", "data.classes": "a,b"}),
        on_features("other domain", "d", "2" * 32, **{"data.train_domain": "sketch"}),
    ]
    assert grouped(*runs) == [["A"], ["B", "C"], ["other domain"]]
    titles = [table.title for table in build_tables(find_rows(runs, None), runs, ["zero_shot/id/nll"], None)]
    assert sorted(title.partition("embeddings")[2] for title in titles) == ["", ", data 11111111", ", data 22222222"]


def test_data_that_differs_where_zero_shot_figures_do_not_look() -> None:
    runs = [run(id, metrics=zero_shot(1.0), data=data) for id, data in zip("abc", ("1", "2", "1"), strict=True)]
    assert grouped(*runs) == [["a", "c"], ["b"]], "labels of the training rows, for one"
    assert grouped(*runs, run("d", metrics=zero_shot(1.1), data="1")) == [["a", "c"], ["b"], ["d"]]


def test_rows_of_earlier_versions_have_no_digest_and_are_grouped_as_before() -> None:
    old, new = on_features("old", "d", None), on_features("new", "d", "1")
    assert grouped(old, new, on_features("elsewhere", "e", None)) == [["old", "new"], ["elsewhere"]]
    assert grouped(run("a", metrics=zero_shot(1.0)), run("b", metrics=zero_shot(1.0), data="1")) == [["a", "b"]]


def test_features_of_pictures_have_a_digest_of_their_own_and_zero_shot_figures_in_common() -> None:
    texts = {**FEATURES, "model.class_embeddings": "texts.npy"}
    pictures = run("pictures", metrics=zero_shot(1.0), data="1")
    assert grouped(pictures, run("features", params=texts, metrics=zero_shot(1.0), data="2")) == [
        ["pictures", "features"]
    ]


def test_a_digest_of_the_fits_is_that_of_their_parent() -> None:
    fits = [run(f"s{n}", parent="gone", params={"seeds": str(n)}, data="1") for n in range(2)]
    (row,) = find_rows(fits, None).rows
    assert row.data == "1"


def test_where_a_run_ran_is_no_part_of_its_name() -> None:
    runs = [run(id, params={"trainer.num_workers": id, "tracking.uri": id, "data.cache_dir": id}) for id in "ab"]
    rows = find_rows(runs, None).rows
    assert name_rows(rows) == []
    assert [row.name for row in rows] == ["kalman (a)", "kalman (b)"]


def test_runs_of_earlier_versions_and_of_a_deleted_parent() -> None:
    runs = [
        run("p", params={"seeds": "0,1"}),
        run("s0", parent="p"),
        run("s1", parent="p", params={"seeds": "1"}),
        run("orphan", parent="gone"),
        run("t0", parent="search", tags={"kngd_ray.kind": "trial"}),
        run("t0-seed0", parent="t0", tags={"kngd_ray.kind": "fit"}),
    ]
    found = find_rows(runs, None)
    assert {row.run: sorted(row.seeds) for row in found.rows} == {"p": [0, 1], "orphan": [0]}
    assert found.left_out == {"trials of searches": 1}


def test_the_last_batch_of_a_stream_of_an_earlier_version_is_not_shown_for_the_whole() -> None:
    """Whose figures had one name: MLflow's latest value was that of the highest step."""
    logged = {"stream/accuracy": 0.9, "stream/nll": 0.2, "stream/size": 16.0, "stream/final": 0.8, "id/nll": 0.3}
    tags = {"kngd_ray.method": "kalman", "kngd_ray.kind": "fit"}
    params = {"seeds": "0", "protocol": "stream"}
    before = LoggedRun("a", "r/kalman-seed0", "FINISHED", params=params, metrics=logged, tags=tags)
    found = find_rows([before], None)
    assert set(found.rows[0].seeds[0]) == {"stream/size", "stream/final", "id/nll"}
    assert list(found.left_out.values()) == [1]
    now = {**logged, "stream/batch/size": 16.0}
    after = find_rows([LoggedRun("b", "r/kalman-seed0", "FINISHED", params=params, metrics=now, tags=tags)], None)
    assert after.rows[0].seeds[0] == now
    assert not after.left_out


def test_many_trials_are_read_and_shown_in_seconds(store, tmp_path, monkeypatch) -> None:
    store.publish("many", "many", *search_records(40))
    monkeypatch.chdir(tmp_path)
    result = compare("many", Display(), parent="noise", uri=store.uri)
    assert len(result["groups"][0]["rows"]) == 39
