"""What a run says of its data before it learns, and whose pictures its figures are of."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers.emoji import CLASSES, small_table

from kngd_ray.experiment.run_folder import read_config

FAILED = 1


def renamed(table: pa.Table, column: str, names: dict[str, str]) -> pa.Table:
    """A table with other values in a column of names."""
    values = pa.array([names.get(name, name) for name in table[column].to_pylist()])
    return table.set_column(table.schema.get_field_index(column), column, values)


def test_the_first_lines_say_what_states_the_splits(command, tmp_path: Path) -> None:
    table = small_table()
    (tmp_path / "pets/data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = table.filter(pc.equal(table["split"], split)).drop_columns(["split"])
        pq.write_table(rows, tmp_path / f"pets/data/{split}-00000-of-00001.parquet")
    outcome = command.train("data.train_domain=null", "data.shots=2", "epochs=1", data=tmp_path / "pets")
    assert outcome.err.splitlines()[:3] == [
        "read 2 parquet files: data/test-00000-of-00001.parquet, data/train-00000-of-00001.parquet",
        "pictures: train 30 (train-00000-of-00001.parquet); test 24 (test-00000-of-00001.parquet)",
        "shots are drawn over 2 domains, 3 of noto, 3 of twemoji: data.train_domain chooses one",
    ]


def test_files_of_a_cache_are_read_by_the_names_of_their_links(command, tmp_path: Path) -> None:
    """As the hub's client lays them out: blobs have hashes for names, and links to them have the splits."""
    table, folder = small_table(), tmp_path / "snapshots/abc"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    links = []
    for split in ("train", "test"):
        rows = table.filter(pc.equal(table["split"], split)).drop_columns(["split"])
        pq.write_table(rows, tmp_path / f"blobs/{split.encode().hex()}")
        links.append(folder / f"{split}-00000-of-00001.parquet")
        links[-1].symlink_to(f"../../blobs/{split.encode().hex()}")
    given = ",".join(map(str, links))
    assert command.train("trainer.name=linked", "epochs=1", data=given).code == 0
    assert read_config(command.run("linked")).data.path == tuple(map(str, links))
    outcome = command("evaluate", "linked", "--storage-path", command.run("linked").parent)
    assert outcome.code == 0
    assert "(test-00000-of-00001.parquet)" in outcome.err
    assert "changed" not in outcome.err


def test_classes_without_test_pictures_are_named(command, tmp_path: Path) -> None:
    table = small_table()
    names, domains, splits = (table[name].to_pylist() for name in ("class_name", "domain", "split"))
    lost = [n for n, row in enumerate(zip(names, domains, splits, strict=True)) if row == (CLASSES[0], "noto", "test")]
    kept = table.take([n for n in range(len(table)) if n not in lost])
    pq.write_table(kept, tmp_path / "lost.parquet")
    outcome = command.train("epochs=1", data=tmp_path / "lost.parquet")
    assert f"no test picture is of {CLASSES[0]!r}" in outcome.err
    assert "no test picture of domain" not in outcome.err


@pytest.fixture
def trained(command) -> Any:
    outcome = command.train("trainer.name=e", "epochs=1")
    assert outcome.code == 0, outcome.err
    return command("evaluate", command.run("e"), "--json").json


def test_evaluation_tells_classes_by_their_names(command, trained, tmp_path: Path, subtests) -> None:
    table, other = small_table(), tmp_path / "other.parquet"

    def evaluated(table: pa.Table, *settings: str) -> Any:
        pq.write_table(table, other)
        return command("evaluate", command.run("e"), f"data.path={other}", "--json", *settings)

    with subtests.test("in another order"):
        turned = table.set_column(table.schema.get_field_index("label"), "label", pc.subtract(2, table["label"]))
        assert evaluated(turned).json["id"] == trained["id"]
    some = table.filter(pc.not_equal(table["class_name"], CLASSES[0]))
    with subtests.test("some of them"):
        report = evaluated(some).json
        own = command("evaluate", command.run("e"), "--json", f"data.classes={','.join(CLASSES[:0:-1])}").json
        assert (report["id"], report["ood"]) == (own["id"], own["ood"])
        assert report["id"]["nll"] != trained["id"]["nll"]
    with subtests.test("one of them"):
        assert "accuracy" in evaluated(table.filter(pc.equal(table["class_name"], CLASSES[1]))).json["id"]
    unknown = renamed(table, "class_name", {"bird": "brid"})
    with subtests.test("others"):
        outcome = evaluated(unknown)
        assert (outcome.code, outcome.out) == (FAILED, "")
        assert "the data has 'brid' (the nearest name is 'bird'): leave them out" in outcome.sentence
        assert evaluated(unknown, "data.classes=flower,building").json["id"] == evaluated(some).json["id"]


def test_classes_that_a_run_has_not_chosen_are_named(command, tmp_path: Path) -> None:
    """Its own list chooses among those of other data: one that is written otherwise would be missing unnoticed."""
    assert command.train("trainer.name=c", f"data.classes={','.join(CLASSES[:2])}", "epochs=0").code == 0
    other = tmp_path / "other.parquet"
    for name, nearest in ((CLASSES[0], ""), (CLASSES[0].title(), f" (the nearest name is {CLASSES[0]!r})")):
        pq.write_table(renamed(small_table(), "class_name", {CLASSES[0]: name}), other)
        outcome = command("evaluate", command.run("c"), f"data.path={other}")
        assert outcome.code == 0, outcome.err
        left_out = [CLASSES[2]] if name == CLASSES[0] else [name, CLASSES[2]]
        shown = ", ".join(repr(each) + (nearest if each == name else "") for each in left_out)
        assert f"pictures of classes that the fit does not know are left out: {shown}\n" in outcome.err


def test_domains_with_names_of_figures(command, tmp_path: Path) -> None:
    """Called as they like, domains have the figures of their own pictures, and the mean is that of all."""
    table = small_table(domains=("noto", "twemoji", "openmoji"))
    reports = []
    for number, names in enumerate(({}, {"twemoji": "id", "openmoji": "mean"})):
        pq.write_table(renamed(table, "domain", names), tmp_path / f"{number}.parquet")
        reports.append(command.train("--json", "epochs=1", data=tmp_path / f"{number}.parquet").json)
    plain, other = reports
    assert list(other["ood"]) == ["mean", "domain id", "domain mean"]
    assert other["id"] == plain["id"]
    found = other["ood"]
    assert plain["ood"] == {
        "mean": found["mean"],
        "twemoji": found["domain id"],
        "openmoji": found["domain mean"],
    }


def test_one_class_is_refused_before_anything_is_learned(command, tmp_path: Path) -> None:
    table = small_table()
    pq.write_table(table.filter(pc.equal(table["class_name"], "bird")), tmp_path / "one.parquet")
    outcome = command.train(data=tmp_path / "one.parquet")
    assert (outcome.code, outcome.out) == (FAILED, "")
    assert "the data has one class, 'bird': a classifier needs two or more" in outcome.sentence
    assert not command.runs.exists()


def test_runs_of_before_the_settings_are_read_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: kalman\npreset: kalman\n")
    assert (read_config(tmp_path).data.draw, read_config(tmp_path).data.val) == ("first", "test")
    assert read_config(tmp_path, ["data.draw=random"]).data.draw == "random"
    (tmp_path / "config.yaml").write_text("data: {draw: random, val: train}\n")
    assert (read_config(tmp_path).data.draw, read_config(tmp_path).data.val) == ("random", "train")
