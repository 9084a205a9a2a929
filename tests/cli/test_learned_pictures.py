"""Pictures that a fit has learned from are not tested on, whatever became of its data, nor learned from unnoticed."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers.features import CLASSES, SCALE, feature_table, write_features

from kngd_ray.config import load_config
from kngd_ray.data import open_images, select
from kngd_ray.training import checkpoint
from kngd_ray.training.metrics import Scores

FAILED = 1
SHOTS = 12  # of a run: 4 of each of 3 classes
OTHERS = "the data or its splits were changed since the fit"
UNTOLD = "keeps no record of its shots"


def refused(outcome: Any, *words: str) -> None:
    assert outcome.code == FAILED, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.sentence, outcome.sentence


def said(outcome: Any) -> str:
    assert outcome.code == 0, outcome.err
    return " ".join(outcome.err.split())


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_features(tmp_path)


@pytest.fixture
def settings(command, files):
    def given(*more: str, data: Any = files[0]) -> list[str]:
        model = ["model.name=precomputed", f"model.logit_scale={SCALE}", f"model.class_embeddings={files[1]}"]
        brief = ("epochs=1", "posterior.folds=0")
        return command.settings("data.train_domain=photo", *model, *brief, *more, data=data)

    return given


@pytest.fixture
def train(command, settings):
    def trained(*more: str, **where: Any) -> Any:
        outcome = command("train", "--json", *settings(*more, **where))
        assert outcome.code == 0, outcome.err
        return outcome

    return trained


@pytest.fixture
def scored(command, monkeypatch):
    """Evaluates the run `fit`: the sizes of the test sets, and what was said."""
    sizes: list[int] = []
    monkeypatch.setattr(Scores, "of", lambda p, labels, of=Scores.of: sizes.append(len(p)) or of(p, labels))

    def evaluated(*more: str) -> tuple[set[int], str]:
        sizes.clear()
        outcome = command("evaluate", command.run("fit"), *more)
        return set(sizes), said(outcome)

    return evaluated


def manifest_of(command, run: str, seed: int = 0) -> dict[str, Any]:
    (folder,) = (command.run(run) / "fits" / f"kalman-seed{seed}").glob("step-*")
    return dict(checkpoint.read_manifest(folder))


def forget(command, run: str) -> None:
    """Make a run one of an earlier version, which kept no record of its shots."""
    for place in (command.run(run) / "fits").glob("*/step-*"):
        manifest = dict(checkpoint.read_manifest(place))
        del manifest["learned"]
        sealed = manifest | {"manifest_sha256": checkpoint._checksum(manifest)}
        (place / "manifest.json").write_text(json.dumps(sealed))


def swapped(table: pa.Table) -> pa.Table:
    """The table with its train rows for testing, and the other way round."""
    sides = pc.if_else(pc.equal(table["split"], "train"), "test", "train")
    return table.set_column(table.column_names.index("split"), "split", sides)


def shifted(table: pa.Table) -> pa.Table:
    """The table with every row in the next class."""
    labels = [(label + 1) % 3 for label in table["label"].to_pylist()]
    table = table.set_column(table.column_names.index("label"), "label", pa.array(labels))
    return table.set_column(table.column_names.index("class_name"), "class_name", [[CLASSES[n] for n in labels]])


def shot_rows(settings, table: pa.Table, data: Path) -> list[int]:
    """Which rows the run `fit` learns from."""
    pq.write_table(table, data)
    config = load_config(overrides=settings()).data
    images = open_images(config, features=True)
    return [int(row) for row in images.rows[select(images, config, 0).support]]


# What is tested on


def test_its_own_data_as_it_was_gives_its_own_figures(command, train, scored) -> None:
    trained = train("trainer.name=fit").json
    sizes, told = scored()
    assert sizes == {30}
    assert "left out" not in told
    assert OTHERS not in told
    assert UNTOLD not in told
    assert command("evaluate", command.run("fit"), "--json").json["id"]["nll"] == trained["id"]["nll"]
    curve = command("ensemble", command.run("fit"), "--points", "2", "--json")
    assert curve.json["curve"][1]["id"]["nll"] == pytest.approx(trained["id"]["nll"])
    assert "left out" not in curve.err


def test_splits_that_changed_in_place(command, train, scored, files) -> None:
    train("trainer.name=fit")
    pq.write_table(swapped(feature_table()), files[0])
    sizes, told = scored()
    assert sizes == {18 - SHOTS, 18}, "the former train rows but the shots"
    assert f"{SHOTS} test pictures are left out: the fit has learned from them" in told
    assert f"{OTHERS}: {SHOTS} of the {SHOTS} shots that it would be given now are others" in told
    again = command("evaluate", command.run("fit"), "--json").json
    curve = command("ensemble", command.run("fit"), "--points", "2", "--json")
    assert curve.json["curve"][1]["id"]["nll"] == pytest.approx(again["id"]["nll"])
    assert f"{SHOTS} test pictures are left out" in curve.err
    assert OTHERS in said(curve)


def test_labels_that_changed_in_place_are_told(train, scored, files) -> None:
    train("trainer.name=fit")
    pq.write_table(shifted(feature_table()), files[0])
    sizes, told = scored()
    assert sizes == {30}
    assert OTHERS in told


def test_tests_that_changed_in_place_are_told(train, scored, files) -> None:
    """Other labels, or fewer pictures, of test rows alone."""
    table = feature_table()
    train("trainer.name=fit")
    tested = pc.equal(table["split"], "test")
    fewer = pa.concat_tables([table.filter(pc.invert(tested)), table.filter(tested).slice(4)])
    for changed in (pa.concat_tables([table.filter(pc.invert(tested)), shifted(table).filter(tested)]), fewer):
        pq.write_table(changed, files[0])
        told = scored()[1]
        assert "the test data was changed since the fit" in told
        assert OTHERS not in told
    last_first = table.filter(tested).take(list(reversed(range(pc.sum(tested).as_py()))))
    pq.write_table(pa.concat_tables([table.filter(pc.invert(tested)), last_first]), files[0])
    assert "since the fit" not in scored()[1], "another order of rows is no change"


def test_what_is_not_tested_is_no_test_that_changed(train, scored, files) -> None:
    table = feature_table()
    train("trainer.name=fit", "data.ood_domains=[]")
    other = pc.and_(pc.equal(table["split"], "test"), pc.not_equal(table["domain"], "photo"))
    pq.write_table(pa.concat_tables([table.filter(pc.invert(other)), table.filter(other).slice(2)]), files[0])
    assert "since the fit" not in scored()[1]


def test_data_that_could_not_be_trained_on_again_is_tested_on(train, scored, files) -> None:
    table = feature_table()
    train("trainer.name=fit")
    kept = pc.or_(pc.equal(table["split"], "test"), pc.not_equal(table["class_name"], CLASSES[0]))
    pq.write_table(table.filter(kept), files[0])
    told = scored()[1]
    assert f"{OTHERS}, which could not be trained again" in told
    assert "pictures to train on, fewer than" in told


@pytest.mark.parametrize("more", ["data.columns.split=null", "data.test_fraction=0.8"])
def test_splits_that_are_given_anew(settings, train, scored, files, more) -> None:
    table = feature_table()
    table = table if "columns" in more else table.drop_columns(["split"])
    shots = shot_rows(settings, table, files[0])
    train("trainer.name=fit")
    images = open_images(load_config(overrides=settings(more)).data, features=True)
    photo = (images.splits == "test") & (images.domains == "photo")
    known = sum(bool(photo[row]) for row in shots)
    assert known > 1
    sizes, told = scored(more)
    assert int(photo.sum()) - known in sizes
    assert f"{known} test pictures are left out" in told


@pytest.mark.parametrize("split", [True, False], ids=["swapped", "without a split"])
def test_a_copy_of_its_data(train, scored, tmp_path, split) -> None:
    train("trainer.name=fit")
    table = feature_table()
    pq.write_table(swapped(table) if split else table.drop_columns(["split"]), tmp_path / "copy.parquet")
    sizes, told = scored(f"data.path={tmp_path / 'copy.parquet'}")
    rows = 18 if split else 48
    assert sizes == {rows - SHOTS, rows}
    assert f"{SHOTS} test pictures are left out" in told
    assert UNTOLD not in told


def test_a_part_of_its_data(command, settings, train, scored, files, tmp_path) -> None:
    table = feature_table()
    first = set(shot_rows(settings, table, files[0])[::2])
    parts = {"a": sorted(first | set(range(0, 96, 2))), "b": sorted(set(range(1, 96, 2)) - first)}
    paths = {name: tmp_path / f"{name}.parquet" for name in parts}
    for name, rows in parts.items():
        pq.write_table(table.take(rows).drop_columns(["split"]), paths[name])
    train("trainer.name=fit", data=f"[{paths['a']},{paths['b']}]")
    learned = manifest_of(command, "fit")["learned"]["shots"]
    config = load_config(overrides=settings(data=paths["a"])).data
    images = open_images(config, test_fraction=1.0, features=True)
    known = sum(key[:16].decode() in learned for key in images.keys.tolist())
    assert 1 < known < SHOTS
    sizes, told = scored(f"data.path={paths['a']}")
    assert int((images.domains == "photo").sum()) - known in sizes
    assert f"{known} test pictures are left out" in told


def test_nothing_but_its_shots_is_refused(command, settings, train, files, tmp_path) -> None:
    table = feature_table()
    shots = shot_rows(settings, table, files[0])
    train("trainer.name=fit")
    pq.write_table(table.take(shots).drop_columns(["split"]), tmp_path / "shots.parquet")
    outcome = command("evaluate", command.run("fit"), f"data.path={tmp_path / 'shots.parquet'}")
    refused(outcome, "the fit has learned from all pictures in distribution", "data.path")


def test_a_fit_of_an_earlier_version(command, train, scored, files, tmp_path) -> None:
    """Its own data is believed where it gives the same shots again, and what is not known is said."""
    nll = train("trainer.name=fit").json["id"]["nll"]
    forget(command, "fit")
    sizes, told = scored()
    assert sizes == {30}
    assert UNTOLD not in told
    assert "other shots" not in told
    assert command("evaluate", command.run("fit"), "--json").json["id"]["nll"] == nll
    pq.write_table(feature_table().drop_columns(["split"]), tmp_path / "copy.parquet")
    assert f"the fit {UNTOLD}" in scored(f"data.path={tmp_path / 'copy.parquet'}")[1]
    assert f"the fit {UNTOLD}" in scored("data.train_domain=sketch")[1]
    pq.write_table(swapped(feature_table()), files[0])
    assert "would give this fit other shots than it learned from" in scored()[1]
    assert "would give this fit other shots" in said(command("ensemble", command.run("fit"), "--points", "2"))


# Bare numbers


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Pictures of ant and bee, as 0 and 1."""
    table = feature_table()
    table = table.filter(pc.less(table["label"], 2)).drop_columns(["split", "domain"])
    pq.write_table(table, tmp_path / "named.parquet")
    pq.write_table(table.drop_columns(["class_name"]), tmp_path / "bare.parquet")
    return tmp_path / "bare.parquet"


def test_a_choice_of_classes_does_not_name_numbers(command, train, files, bare) -> None:
    train("trainer.name=fit", "data.classes=[bee,ant]")
    refusal = "row 0 has a number for a label and no class name, and the run's data.classes chose among the names"
    refused(command("evaluate", command.run("fit"), f"data.path={bare}"), "bare.parquet", refusal, "data.classes")
    named = command("evaluate", command.run("fit"), f"data.path={bare.with_name('named.parquet')}", "--json").json
    given = f"data.path={bare}", "data.classes=[ant,bee]"
    assert command("evaluate", command.run("fit"), *given, "--json").json["id"] == named["id"]
    table = feature_table()
    pq.write_table(table.filter(pc.less(table["label"], 2)).drop_columns(["class_name"]), files[0])
    for name in ("evaluate", "ensemble"):
        refused(command(name, command.run("fit")), "rows.parquet", refusal)


def test_names_that_were_given_to_numbers_serve_again(command, train, files, bare) -> None:
    pq.write_table(feature_table().drop_columns(["class_name"]), files[0])
    trained = train("trainer.name=fit", f"data.classes=[{','.join(CLASSES)}]").json
    outcome = command("evaluate", command.run("fit"), f"data.path={bare}", "--json")
    named = command("evaluate", command.run("fit"), f"data.path={bare.with_name('named.parquet')}", "--json").json
    assert outcome.json["id"] == named["id"]
    forget(command, "fit")
    refused(command("evaluate", command.run("fit"), f"data.path={bare}"), "has a number for a label")
    assert command("evaluate", command.run("fit"), "--json").json["id"]["nll"] == trained["id"]["nll"]


# Priors


def warning(count: str, run: str) -> str:
    return f"warning: {count} shots were already learned from by the prior {run} and count twice"


def test_shots_that_a_prior_knows_are_counted(train) -> None:
    train("trainer.name=first")
    assert warning("all 12", "first") in said(train("prior=first", "trainer.name=same"))
    assert warning("12 of the 15", "first") in said(train("prior=first", "data.shots=5", "trainer.name=more"))
    assert warning("all 6", "first") in said(train("prior=first", "data.shots=2", "trainer.name=fewer"))
    told = said(train("prior=first", "data.train_domain=sketch", "trainer.name=other"))
    assert "learned from" not in told
    assert "keeps no record" not in told


def test_all_ancestors_count(command, train) -> None:
    train("trainer.name=first")
    train("trainer.name=second", "prior=first", "data.train_domain=sketch")
    assert warning("all 12", "second") in said(train("trainer.name=third", "prior=second"))
    first, second, third = (manifest_of(command, run)["learned"] for run in ("first", "second", "third"))
    assert second["earlier"] == first["shots"]
    assert len(third["earlier"]) == len(first["shots"] + second["shots"])
    assert first["complete"]
    assert third["complete"]


def test_what_a_prior_has_learned_from_is_not_tested_on(command, train, tmp_path) -> None:
    pq.write_table(swapped(feature_table()), tmp_path / "swapped.parquet")
    train("trainer.name=first", data=tmp_path / "swapped.parquet")
    outcome = train("trainer.name=fit", "prior=first")
    assert f"{SHOTS} test pictures are left out: the prior has learned from them" in said(outcome)
    again = command("evaluate", command.run("fit"), "--json")
    assert again.json["id"]["nll"] == outcome.json["id"]["nll"]
    assert f"{SHOTS} test pictures are left out: the fit has learned from them" in again.err


def test_a_prior_that_keeps_no_record(command, train, scored) -> None:
    train("trainer.name=first")
    forget(command, "first")
    told = said(train("trainer.name=fit", "prior=first"))
    assert "the prior first, or one before it, keeps no record of its shots" in told
    assert not manifest_of(command, "fit")["learned"]["complete"]
    assert f"a fit that this one continues {UNTOLD}" in scored()[1]


def test_more_pictures_than_a_manifest_holds(command, train, monkeypatch) -> None:
    monkeypatch.setattr("kngd_ray.experiment.learned.MOST", 2 * SHOTS - 1)
    train("trainer.name=first")
    train("trainer.name=second", "prior=first", "data.train_domain=sketch")
    learned = manifest_of(command, "second")["learned"]
    assert len(learned["shots"]) == 16 * SHOTS
    assert (learned["earlier"], learned["complete"]) == ("", False)
    monkeypatch.setattr("kngd_ray.experiment.learned.MOST", SHOTS - 1)
    train("trainer.name=third")
    assert "learned" not in manifest_of(command, "third")


def test_one_fit_that_serves_all_seeds_is_told(train) -> None:
    train("trainer.name=one", "seeds=4")
    told = said(train("trainer.name=two", "prior=one", "seeds=0,1"))
    assert "seeds 0, 1 all continue from seed 4 of one: an interval over seeds is of the new shots alone" in told
    assert "seed 5 continues from seed 4 of one" in said(train("trainer.name=five", "prior=one", "seeds=5"))
    train("trainer.name=both", "seeds=0,1")
    assert "continue from seed" not in said(train("trainer.name=own", "prior=both", "seeds=0,1"))


def test_targets_leave_out_what_a_prior_has_learned_from(command, monkeypatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(Scores, "of", lambda p, labels, of=Scores.of: sizes.append(len(p)) or of(p, labels))
    brief = ("epochs=1", "posterior.folds=0", "tune.views=0")
    assert command.train("trainer.name=first", *brief).code == 0
    table = pq.read_table(command.data)
    target = command.folder / "target.parquet"
    pq.write_table(table.drop_columns(["split", "domain"]), target)
    sizes.clear()
    outcome = command.train("prior=first", "data.train_domain=twemoji", "protocol=cdg", f"targets=[{target}]", *brief)
    assert outcome.code == 0, outcome.err
    assert len(table) - 2 * SHOTS in sizes


# Another model


def test_evaluate_says_which_setting_it_cannot_take(command, train) -> None:
    train("trainer.name=fit")
    outcome = command("evaluate", command.run("fit"), "model.logit_scale=5")
    refused(outcome, f"it was trained with model.logit_scale={SCALE:.1f}, and here it is 5.0", "leave out")
    assert "trainer.name" not in outcome.sentence
