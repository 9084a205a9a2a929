"""How classes are called in prompts, from the data to the numbers that a run reports again."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.emoji import CLASSES, small_table

import kngd_ray

MINI_CLIP = Path(kngd_ray.__file__).parent / "assets" / "mini_clip"


def renamed(command, *names: str) -> Path:
    """The data with other names of its classes."""
    table = small_table()
    kept = [names[CLASSES.index(name)] for name in table["class_name"].to_pylist()]
    path = command.folder / "renamed.parquet"
    pq.write_table(table.set_column(table.schema.get_field_index("class_name"), "class_name", pa.array(kept)), path)
    return path


def test_a_name_that_looks_like_code_is_said_in_words_wherever_the_fit_is_used(command) -> None:
    data = renamed(command, "SeaBird", "flower", "F-16A")
    outcome = command.train("trainer.name=words", data=data)
    assert outcome.code == 0, outcome.err
    assert "prompts say class names that look like code in words, SeaBird as 'Sea Bird'" in outcome.err
    (fit,) = command.run("words").glob("fits/*")
    (manifest,) = fit.glob("step-*/manifest.json")
    kept = json.loads(manifest.read_text())
    assert (kept["templates"], kept["class_names"]) == (["a photo of a {words}."], ["SeaBird", "flower", "F-16A"])
    trained = json.loads((command.run("words") / "results.json").read_text())
    evaluated = command("evaluate", command.run("words"), "--json")
    assert evaluated.code == 0, evaluated.err
    assert f"{evaluated.json['id']['nll']:.6f}" in {f"{nll:.6f}" for nll in found(trained, "nll")}


def test_a_run_of_an_earlier_version_keeps_its_prompts(command, monkeypatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("kngd_ray.experiment.task.worded", lambda templates, names: templates)
        assert command.train("trainer.name=old", data=renamed(command, "SeaBird", "flower", "F-16A")).code == 0
    trained = json.loads((command.run("old") / "results.json").read_text())
    outcome = command("evaluate", command.run("old"), "--json")
    assert "look like code" not in outcome.err
    assert f"{outcome.json['id']['nll']:.6f}" in {f"{nll:.6f}" for nll in found(trained, "nll")}


def found(report, key):
    """All figures of a name in nested results."""
    if isinstance(report, dict):
        for name, value in report.items():
            if name == key and isinstance(value, float):
                yield value
            yield from found(value, key)
    elif isinstance(report, list):
        for value in report:
            yield from found(value, key)


@pytest.mark.parametrize(
    ("names", "settings", "says"),
    [
        (("sea_bird", "sea bird", "dog"), (), "'sea_bird' and 'sea bird' have one prompt"),
        (("SeaBird", "sea bird", "dog"), (), "'SeaBird' and 'sea bird' have one prompt"),
        (("['bird']", "cat", "dog"), (), "which is a Python list"),
        (("bird", "cat", "dog"), (f"data.templates=['{'so very ' * 20}long a {{}}.']",), "its name is cut off"),
    ],
)
def test_classes_that_are_not_told_apart_end_a_run_before_it_begins(command, names, settings, says) -> None:
    outcome = command.train(*settings, data=renamed(command, *names))
    assert outcome.code == 1
    assert says in outcome.sentence


def test_a_model_in_a_folder(command, monkeypatch) -> None:
    shutil.copytree(MINI_CLIP, command.folder / "mine")
    outcome = command.train("trainer.name=own", "model.name=local-dir:mine")
    assert outcome.code == 0, outcome.err
    monkeypatch.chdir(command.runs)
    assert command("evaluate", command.run("own")).code == 0, "from another folder"
