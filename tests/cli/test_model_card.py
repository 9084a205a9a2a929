"""The model card of every fit says what the run knows, and what it does not."""

import json
from dataclasses import replace

import pytest
from helpers.emoji import CLASSES

from kngd_ray.clip import ModelConfig
from kngd_ray.config import load_config
from kngd_ray.experiment.model_card import _licences, _limits, _plain


def card_of(command, run: str, record: str) -> str:
    return (command.run(run) / "records" / record / "artifacts" / "model_card.md").read_text()


@pytest.mark.usefixtures("painted")
def test_card_of_several_seeds_and_of_each(command) -> None:
    outcome = command.train("trainer.name=c", "seeds=0,1", "baselines=adamw", "posterior.temperature=0.3", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    card = card_of(command, "c", "kalman")
    assert card.startswith("# c, kalman\n")
    for heading in ("Data", "Priors", "Figures", "Output", "Limits", "Licences"):
        assert f"\n## {heading}\n" in card
    accuracy = report["id"]["accuracy"]
    half = (accuracy["high"] - accuracy["low"]) / 2
    assert f"| in distribution | kalman | {100 * accuracy['mean']:.1f}±{100 * half:.1f} |" in card
    assert all(name in card for name in CLASSES)
    assert "4 pictures per class, 12 in all, of domain noto; support sets drawn with seeds 0, 1" in card
    assert "| `filter.p0` |" in card
    assert "Predictions: `linearised`, posterior temperature tau 0.3, 0.3, given, not chosen" in card
    assert "Apache-2.0" in card
    assert "training pictures: unknown" in card
    assert "`novelty`" in card
    single = card_of(command, "c", "kalman-seed1")
    assert "One seed: no interval can be given" in single
    assert "seed 1" in single
    adamw = card_of(command, "c", "adamw")
    assert "## Optimiser" in adamw
    assert "`optimizer.lr`" in adamw
    assert "It has no posterior" in adamw
    assert "Predictions: by the weights alone." in adamw
    assert "`novelty`" not in adamw


def test_what_is_not_known_is_said() -> None:
    config = replace(load_config(), model=ModelConfig("ViT-B-32", "laion2b"))
    assert "CLIP's weights: unknown to kngd_ray" in _licences(config)
    assert "was not tested out of distribution" in _limits(config, {"id": {}, "ood": {}})


def test_the_card_is_published_with_the_record(command) -> None:
    command.train("trainer.name=c")
    meta = json.loads((command.run("c") / "records" / "kalman-seed0" / "meta.json").read_text())
    assert meta["status"] == "FINISHED"
    assert card_of(command, "c", "kalman-seed0")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", r"&lt;script&gt;alert\(1\)&lt;/script&gt;"),
        ("two\n# lines", r"two \# lines"),
        ("[x](http://y)", r"\[x\]\(http://y\)"),
    ],
)
def test_names_from_outside_are_shown_and_do_nothing(text, shown) -> None:
    assert _plain(text) == shown
