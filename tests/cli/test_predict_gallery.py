"""Predictions with all that is known of their uncertainty: in a table, as JSON, and as a page."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
from PIL import Image

KALMAN = ("trainer.name=p", "posterior.temperature=0.3", "posterior.folds=3")


def folder_of(command, names: dict[str, int]):
    """Pictures of the data under names of the test's own."""
    column = pq.read_table(command.data)["image"]
    folder = command.folder / "pictures"
    for name, row in names.items():
        cell = column[row].as_py()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cell if isinstance(cell, bytes) else cell["bytes"])
    return folder


class Page(HTMLParser):
    """Sources of pictures in order, text, and every tag with what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.names, self.said = set(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        attributes = dict(attrs)
        assert not {"onerror", "onclick", "href"} & set(attributes)
        if tag == "img":
            self.sources.append(attributes["src"])
            self.names.append(attributes["alt"])

    def handle_data(self, data) -> None:
        self.said += data


def test_a_folder_as_table_json_and_gallery(command) -> None:
    assert command.train(*KALMAN).code == 0
    bad = "<img src=x onerror=alert(1)> & $title.png"
    folder = folder_of(
        command, {"a.png": 0, "deep/b.png": 20, bad: 45, ".hidden.png": 3, "@eaDir/a.png": 5, "notes.txt": 4}
    )
    (folder / "broken.jpg").write_bytes(b"no picture")
    elsewhere = command.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "linked").symlink_to(elsewhere)
    page = command.folder / "out.html"
    outcome = command("predict", command.run("p"), folder, "--html", page, "--json")
    assert outcome.code == 0, outcome.err
    rows = outcome.json
    assert [row["image"] for row in rows] == [str(folder / name) for name in (bad, "a.png", "deep/b.png")]
    assert "undecodable pictures left out: 1" in outcome.err
    assert "the picture cannot be decoded (no known format)" in outcome.err
    assert "skipped because of their suffix: .txt (1)" in outcome.err
    apart = f"links and a system's folders left out: 2, the first is {folder / '@eaDir'}; name those meant\n"
    assert apart in outcome.err
    for row in rows:
        assert 0 <= row["probability_low"] <= row["probability"] <= row["probability_high"] <= 1
        assert row["probability_low"] < row["probability_high"]
        assert 0 <= row["novelty"] <= 1
    read = Page(page.read_text())
    assert not read.tags & {"script", "link", "iframe", "object"}
    ordered = sorted(rows, key=lambda row: (row["novelty"], row["uncertainty"]), reverse=True)
    assert read.names == [row["image"] for row in ordered]
    for source in read.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 224
    assert not re.search(r"https?://", page.read_text())
    assert f"{ordered[0]['probability']:.3f}" in read.said
    again = command("predict", command.run("p"), folder / "a.png", "--html", page)
    assert again.code == 0, "a page is replaced"
    assert "novelty" in " ".join(again.out.split())


def test_a_run_of_an_earlier_version_still_predicts(command) -> None:
    command.train(*KALMAN)
    (settled,) = command.run("p").glob("fits/*/calibration.json")
    raw = json.loads(settled.read_text())
    assert len(raw.pop("novelty")["quantiles"]) == 12
    settled.write_text(json.dumps(raw))
    folder = folder_of(command, {"a.png": 0, "b.png": 20})
    page = command.folder / "out.html"
    outcome = command("predict", command.run("p"), folder, "--html", page, "--json")
    assert [row["novelty"] for row in outcome.json] == [None, None]
    uncertain = {row["image"]: row["uncertainty"] for row in outcome.json}
    assert Page(page.read_text()).names == sorted(uncertain, key=uncertain.get, reverse=True)


def test_without_a_posterior_nothing_is_made_up(command) -> None:
    command.train("method=adamw", "trainer.name=p")
    folder = folder_of(command, {"a.png": 0})
    (row,) = command("predict", command.run("p"), folder / "a.png", "--json").json
    assert (row["probability_low"], row["probability_high"], row["novelty"]) == (None, None, None)
    assert "–" in command("predict", command.run("p"), folder / "a.png").out


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("taken.txt", 2, "is not an HTML file"),
        ("taken.html", 2, "is a file that kngd-ray did not write"),
        ("no/where.html", 1, "there is no folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_first(command, name, code, says) -> None:
    taken = [command.folder / "taken.txt", command.folder / "taken.html"]
    for file in taken:
        file.write_text("mine")
    outcome = command("predict", "nothing", "nothing.png", "--html", command.folder / name)
    assert outcome.code == code
    assert says in outcome.sentence
    assert [file.read_text() for file in taken] == ["mine", "mine"]


def test_a_folder_of_nothing_but_broken_pictures(command) -> None:
    command.train(*KALMAN)
    folder = folder_of(command, {})
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no picture")
    outcome = command("predict", command.run("p"), folder)
    assert outcome.code == 1
    assert "none of the pictures" in outcome.sentence


def test_nothing_is_cut_off_where_there_is_no_terminal(command) -> None:
    assert command.train(*KALMAN).code == 0
    name = f'{"a long way down/" * 12}a, picture "of" all.png'
    folder = folder_of(command, {name: 0, "b.png": 20})
    table = command("predict", command.run("p"), folder)
    assert table.code == 0, table.err
    (line,) = (line for line in table.out.splitlines() if "all.png" in line)
    assert str(folder / name) in line
    outcome = command("predict", command.run("p"), folder, "--csv")
    assert outcome.code == 0, outcome.err
    rows = list(csv.DictReader(io.StringIO(outcome.out)))
    said = command("predict", command.run("p"), folder, "--json").json
    assert [row["image"] for row in rows] == [row["image"] for row in said]
    for row, expected in zip(rows, said, strict=True):
        assert set(row) == set(expected) - {"probabilities"}
        assert row["class"] == expected["class"]
        for key in set(row) - {"image", "class"}:
            assert float(row[key]) == expected[key]
    both = command("predict", command.run("p"), folder, "--csv", "--json")
    assert both.code == 2
    assert "leave one of them out" in both.sentence


@pytest.mark.parametrize("given", ["https://host/cat.jpg", "s3://bucket/cats/"])
def test_addresses_keep_their_slashes(command, given) -> None:
    outcome = command("predict", "p", given)
    assert outcome.code == 1
    assert f"{given} is an address, and nothing is downloaded" in outcome.sentence
    for setting in (f"data.path={given}", f"model.pretrained={given}"):
        outcome = command.train(*(["model.name=ViT-B-32"] if "pretrained" in setting else []), setting)
        assert outcome.code == 1
        assert f"{given.rstrip('/')}" in outcome.sentence
        assert "is an address" in outcome.sentence
