"""What is pushed to a hub, and the sentence where it cannot be: against a server on loopback that plays the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hub_server import Hub
from huggingface_hub import ModelCard

from kngd_ray.experiment.hub import write_card

TOKEN = "hf_" + "a" * 34
PUSH = """
import sys
from pathlib import Path
from kngd_ray.errors import KngdError
from kngd_ray.experiment.hub import check_push, push
try:
    check_push(sys.argv[2])
    print(push(Path(sys.argv[1]), sys.argv[2]))
except KngdError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def hub():
    hub = Hub(TOKEN)
    yield hub
    hub.close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(bytes(range(256)) * 100)
    write_card(folder, "# pets\n\nwith `code` and: colons", {"classes.json": ("class names",)}, {"license": "mit"})
    return folder


def pushed(hub: Hub, export: Path, repository: str = "someone/pets", **environment: str):
    """The client reads its settings when it is imported: each case is a process of its own."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(export.parent)}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(export), repository],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_push_is_one_commit_to_a_private_repository(hub: Hub, export: Path) -> None:
    done = pushed(hub, export)
    assert (done.returncode, done.stdout.strip()) == (0, f"{hub.endpoint}/someone/pets"), done.stderr
    assert hub.private["someone/pets"]
    assert hub.files["someone/pets"] == {path.name: path.read_bytes() for path in export.iterdir()}
    (export / "classes.json").write_text("{}")
    assert pushed(hub, export).returncode == 0, "the repository is there already"
    assert len(hub.files["someone/pets"]) == 3


CASES = [
    # what is wrong, the exit code, what is said
    ({"HF_TOKEN": ""}, None, 2, "needs a Hugging Face token with write access: run `hf auth login`, or set HF_TOKEN."),
    ({"HF_HUB_OFFLINE": "1"}, None, 2, "HF_HUB_OFFLINE is set: unset it."),
    ({"HF_TOKEN": "hf_" + "b" * 34}, None, 1, "could not be pushed: the hub does not know the token"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, None, 1, "http://127.0.0.1:9 cannot be reached: check the network"),
    ({}, 403, 1, "the token has no right to write there: take one that has, or another name"),
    ({}, 500, 1, "the hub answered 500: try again later"),
]


@pytest.mark.parametrize(("environment", "refuse", "code", "said"), CASES)
def test_a_push_that_fails_is_one_sentence_and_keeps_the_export(hub, export, environment, refuse, code, said) -> None:
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    hub.refuse = refuse
    done = pushed(hub, export, "someone/else", **environment)
    hub.refuse = None
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert code == 2 or f"the export is in {export}, and `hf upload someone/else {export} .` sends it" in done.stderr
    assert not any(token in done.stdout + done.stderr for token in (TOKEN, "hf_" + "b" * 34))
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    assert "someone/else" not in hub.files


@pytest.mark.parametrize("name", ["pets", "a/b/c", "some one/pets", "", "a/.."])
def test_what_names_no_repository(hub: Hub, export: Path, name: str) -> None:
    done = pushed(hub, export, name)
    assert done.returncode == 2
    assert f"push {name!r} names no repository: write ORGANISATION/NAME." in done.stderr


def test_the_card_has_what_the_hub_sorts_by(tmp_path: Path) -> None:
    tricky = "x: [1]\n---\nlicense: mine"
    facts = {"library_name": "open_clip", "tags": ["clip"], "base_model": tricky, "license": None}
    write_card(tmp_path, "# a\n\n---\nnot: yaml", {"w.safetensors": ("towers", "no adapter")}, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"library_name": "open_clip", "tags": ["clip"], "base_model": tricky}
    assert card.text.strip() == "# a\n\n---\nnot: yaml\n\n## Files\n\n- `w.safetensors`: towers; no adapter"
