"""Settings made to hurt: YAML that unfolds, nests, runs or fills the disk's names is refused by a sentence, soon."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hostile import MARK, Outcome, read_apart

from kngd_ray.config import Config, load_config, override, parse
from kngd_ray.errors import UsageError

LEVELS = 9
DEEP = 10**5


def laughs(opening: str, closing: str) -> str:
    """Ten references to ten references to ten references, and so on."""
    lines = [f"a0: &a0 {opening}{', '.join(['lol'] * 10)}{closing}"]
    for n in range(1, LEVELS):
        inner = ", ".join([f"*a{n - 1}"] * 10)
        lines += [f"a{n}: &a{n} {opening}{inner}{closing}"]
    return "\n".join(lines)


def mapping_laughs() -> str:
    lines = ["a0: &a0 {k: lol}"]
    lines.extend(f"a{n}: &a{n} {{" + ", ".join(f"k{m}: *a{n - 1}" for m in range(10)) + "}" for n in range(1, LEVELS))
    return "\n".join(lines)


def merge_laughs() -> str:
    lines = ["a0: &a0 {k: lol}"]
    lines.extend(f"a{n}: &a{n} {{<<: [" + ", ".join([f"*a{n - 1}"] * 10) + "]}" for n in range(1, LEVELS))
    return "\n".join(lines)


FILES: dict[str, tuple[str, Callable[[], str | bytes]]] = {
    "laughs in lists": ("more than 100,000 entries", lambda: laughs("[", "]")),
    "laughs in mappings": ("more than 100,000 entries", mapping_laughs),
    "laughs in merge keys": ("more than 100,000 entries", merge_laughs),
    "a list in itself": ("refers to what it is part of", lambda: "data: &x [*x]"),
    "a mapping in itself": ("refers to what it is part of", lambda: "data: &x {path: *x}"),
    "a merge of itself": ("refers to what it is part of", lambda: "data: &x {<<: *x}"),
    "lists without a bottom": ("nested more than 50", lambda: "epochs: " + "[" * DEEP),
    "closed lists without a bottom": ("nested more than 50", lambda: "epochs: " + "[" * DEEP + "]" * DEEP),
    "mappings without a bottom": ("nested more than 50", lambda: "epochs: " + "{a: " * DEEP),
    "blocks without a bottom": ("nested more than 50", lambda: "\n".join(" " * n + "a:" for n in range(1000))),
    "dashes without a bottom": ("nested more than 50", lambda: "epochs:\n" + "- " * DEEP),
    "a key of a hundred thousand dots": ("not valid YAML", lambda: ".".join("a" * DEEP) + ": 1"),
    "a key of five hundred dots": ("unknown key", lambda: ".".join("a" * 500) + ": 1"),
    "a million keys": ("larger than 4 MiB", lambda: "".join(f"k{n}: 1\n" for n in range(10**6))),
    "a hundred thousand short keys": ("more than 100,000 entries", lambda: "x: {" + "0," * 101_000 + "}"),
    "an endless text": ("larger than 4 MiB", lambda: "preset: " + "x" * (5 << 20)),
    "a number of a hundred thousand digits": ("a number of more than", lambda: "epochs: " + "9" * 10**5),
    "a hexadecimal number of as many": ("a number of more than", lambda: "epochs: 0x" + "f" * 10**5),
    "a number to base sixty": ("epochs='1:59", lambda: "epochs: 1" + ":59" * 10**5),
    "a long text for a number": ("epochs='xxx", lambda: "epochs: " + "x" * 10**5),
    "a python object": ("not valid YAML", lambda: f"epochs: !!python/object/apply:os.mkdir [{MARK}]"),
    "a python name": ("not valid YAML", lambda: "epochs: !!python/name:os.system"),
    "a python module": ("not valid YAML", lambda: "epochs: !!python/module:os"),
    "a tag of somebody": ("not valid YAML", lambda: "epochs: !ruby/object:Gem {}"),
    "no number by tag": ("not valid YAML", lambda: "epochs: !!int ''"),
    "no truth by tag": ("not valid YAML", lambda: "epochs: !!bool perhaps"),
    "no date by tag": ("not valid YAML", lambda: "epochs: !!timestamp soon"),
    "a null character": ("not valid YAML", lambda: 'trainer: {name: "a\0b"}'),
    "a null character by escape": ("no name or path", lambda: 'trainer: {name: "a\\0b"}'),
    "half a character by escape": ("no name or path", lambda: 'trainer: {name: "a\\ud800b"}'),
    "no UTF-8": ("cannot be read", lambda: b"epochs: 3 # \xff\xfe\n"),
    "UTF-16": ("cannot be read", lambda: "epochs: 3".encode("utf-16")),
    "a path for a name": ("slashes", lambda: "trainer: {name: ../../etc}"),
    "a path for a name, above": ("leading dot", lambda: "trainer: {name: ..}"),
    "anchors that are used well": ("", lambda: "data: {classes: &x [cat, dog]}\ntargets: []\n"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Every file read as a configuration, apart; a search file is read by the same function."""
    root = tmp_path_factory.mktemp("settings")
    cases = []
    for number, (_, make) in enumerate(FILES.values()):
        made = make()
        path = root / f"{number}.yaml"
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
        cases.append(("config", path))
    yield dict(zip(FILES, read_apart(cases, root, megabytes=600), strict=True))
    assert not (root / MARK).exists()


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_by_a_sentence(outcomes: dict[str, Outcome], name: str) -> None:
    says = FILES[name][0]
    outcome = outcomes[name]
    assert outcome.end == ("refused" if says else "loaded"), outcome
    assert says in outcome.sentence, outcome
    assert "\n" not in outcome.sentence
    assert len(outcome.sentence) < 3000
    assert outcome.megabytes < 500


def test_a_search_file_is_read_in_the_same_way(tmp_path: Path) -> None:
    from kngd_ray.tuning.file import load_search

    path = tmp_path / "search.yaml"
    path.write_text(mapping_laughs())
    with pytest.raises(UsageError, match="more than 100,000 entries"):
        load_search(path, [])
    path.write_text("space: {epochs: {low: 1, high: 3}}")
    with pytest.raises(UsageError, match="nested more than 50"):
        load_search(path, ["search.seeds=" + "[" * DEEP])


OVERRIDES = {
    "epochs=" + "[" * DEEP: "nested more than 50",
    "epochs=" + "{a: " * 1000: "nested more than 50",
    ".".join("a" * 10_000) + "=1": "settings",
    "epochs=&x [*x]": "part of",
    "epochs=" + "9" * 10_000: "a number of more than 100",
    'trainer.name="a\\0b"': "no name or path",
    "trainer.name=../up": "slashes",
    "epochs=!!python/object/apply:os.getcwd []": "not valid YAML",
    "epochs=!!int ''": "not valid YAML",
    "epochs=" + "x" * 10_000: "epochs='xxx",
}


@pytest.mark.parametrize("setting", OVERRIDES, ids=[key[:30] for key in OVERRIDES])
def test_a_hostile_override_is_refused_by_a_sentence(setting: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, [setting])
    assert OVERRIDES[setting] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_from_other_places_have_a_bottom_too() -> None:
    bottomless: dict[str, object] = {}
    bottomless["data"] = bottomless
    for read in (lambda: parse(Config, bottomless), lambda: override(Config(), {".".join("a" * 10_000): 1})):
        with pytest.raises(UsageError):
            read()


def test_a_device_as_configuration_ends() -> None:
    with pytest.raises(UsageError, match="larger than 4 MiB"):
        load_config(Path("/dev/zero"))


def test_bytes_that_are_no_text_on_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kngd_ray.cli", "train", b"data.path=\xff\xfe.parquet"],
        capture_output=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"kngd-ray: ")
    assert len(done.stderr.splitlines()) == 1
