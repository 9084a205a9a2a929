"""Weights between the pretrained and the trained model: their curve, and one of them kept."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from kngd_ray.config import load_config
from kngd_ray.console import Display
from kngd_ray.experiment.prepared import prepare
from kngd_ray.experiment.run import train
from kngd_ray.experiment.run_folder import read_config
from kngd_ray.experiment.task import open_task
from kngd_ray.training.evaluation import evaluate
from kngd_ray.training.restoring import open_fit, restore_predictor
from kngd_ray.training.settled import read_settled

FIGURES = ("accuracy", "nll", "ece", "brier")
TOWERS = ("method=adamw", "tune.parameters=lora", "data.classes=[bird,flower]", "data.shots=1", "epochs=1")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, small_data, shared_cache):
    """A run that trains LoRA, with steps large enough to tell alphas apart; nothing is kept in it but alpha."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [f"data.path={small_data}", f"data.cache_dir={shared_cache}", "data.train_domain=noto"]
    settings += [f"trainer.storage_path={folder}", "trainer.num_workers=0", "tracking.enabled=false"]
    train(load_config(None, [*settings, *TOWERS, "trainer.name=lora", "optimizer.lr=0.02"]), Display(quiet_stdout=True))
    return folder / "lora"


def same(found, expected) -> None:
    for figure in FIGURES:
        assert found[figure] == pytest.approx(expected[figure], rel=1e-4, abs=1e-6), figure


@pytest.mark.usefixtures("painted")
def test_a_run_of_adapters_from_end_to_end(command) -> None:
    plain = "posterior.sharpening_spread=0"  # else at alpha = 0 zero-shot is sharpened as the fit is
    trained = command("train", "--json", *command.settings("trainer.name=a", "seeds=0,1", plain)).json
    run = command.run("a")
    kept = [path.read_bytes() for path in sorted(run.glob("fits/*/calibration.json"))]
    outcome = command("ensemble", "a", "--storage-path", command.runs, "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert set(report) == {"fits", "alpha", "kept", "curve", "figure"}
    assert report["fits"] == [str(run / "fits" / f"kalman-seed{seed}") for seed in (0, 1)]
    assert [point["alpha"] for point in report["curve"]] == pytest.approx([n / 10 for n in range(11)])
    for part in ("id", "ood"):
        for point, figures in ((0, trained["zero_shot"]), (-1, trained)):
            mine, theirs = report["curve"][point][part], figures[part]
            if part == "ood":
                mine, theirs = mine["twemoji"], theirs["twemoji"]
            for figure in FIGURES:
                assert mine[figure]["mean"] == pytest.approx(theirs[figure]["mean"], abs=1e-6)
    assert (report["alpha"], report["kept"]) == (1.0, False)
    assert [path.read_bytes() for path in sorted(run.glob("fits/*/calibration.json"))] == kept
    assert report["figure"] == str(run / "ensemble.png")
    Image.open(report["figure"]).verify()
    assert "do not choose alpha from it" in outcome.err


def test_a_kept_alpha_is_used_from_then_on(command) -> None:
    command.train("trainer.name=k", "seeds=0,1", "tracking.enabled=true")
    run = command.run("k")
    before = [read_settled(run / "fits" / f"kalman-seed{seed}") for seed in (0, 1)]
    fit = run / "fits" / "kalman-seed1"
    one = command("ensemble", fit, "alpha=0.33", "--points", "2", "--json").json
    assert [point["alpha"] for point in one["curve"]] == [0, 0.33, 1]
    assert (one["alpha"], one["kept"], one["figure"]) == (0.33, True, str(fit / "ensemble.png"))
    assert read_settled(fit) == replace(before[1], alpha=0.33)
    assert read_settled(run / "fits" / "kalman-seed0") == before[0]
    shown = command("ensemble", run, "--points", "3")
    assert "use alpha=0.33 and 1" in shown.err
    assert "in use" not in shown.out
    same(command("evaluate", fit, "--json").json["id"], one["curve"][1]["id"])
    both = command("ensemble", run, "alpha=0.5", "--points", "3")
    assert "* 0.5" in both.out
    assert "* in use" in both.out
    assert "MLflow keeps what the run logged, figures and model of alpha=1, and so does kngd-ray compare" in both.err
    assert [read_settled(run / "fits" / f"kalman-seed{seed}").alpha for seed in (0, 1)] == [0.5, 0.5]
    assert "MLflow keeps" not in command("ensemble", run, "alpha=1", "--points", "2").err


@pytest.mark.slow
def test_towers_are_averaged_with_the_pretrained_ones(command, lora) -> None:
    report = command("ensemble", lora, "--points", "3", "--json").json
    checkpoint, fit = open_fit(lora / "fits" / "adamw-seed0")
    config = read_config(lora)
    prepared = prepare(open_task(config))
    tests, calibration = prepared.tests(0, config.tune), read_settled(fit).calibration
    predictor = restore_predictor(checkpoint, prepared.model, config.posterior, alpha=1.0)
    networks = [n for n in predictor.head.modules() if hasattr(n, "up")]
    assert networks
    assert max(float(n.up.detach().abs().max()) for n in networks) > 1e-3
    for point in report["curve"]:
        with predictor.head.blended(point["alpha"]):
            expected = evaluate(predictor, tests, calibration).report()
        same(point["id"], expected["id"])
        same(point["ood"]["twemoji"], expected["ood"]["twemoji"])
    nll = [point["id"]["nll"] for point in report["curve"]]
    assert len(set(nll)) == 3
    features = prepared.tests(0)["id"]
    with predictor.head.blended(0.0), torch.no_grad():  # the pretrained towers, below the head that the fit began with
        logits = predictor.head.head(features.features)
    assert nll[0] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, features.labels)), rel=1e-3)


def test_gradient_fits_and_other_adapters(command) -> None:
    settings = command.settings("method=adamw", "adapter=[linear,class_residual]", "trainer.name=g", "epochs=2")
    trained = command("train", "--json", *settings).json
    curve = command("ensemble", command.run("g"), "--points", "2", "--json").json["curve"]
    same(curve[0]["id"], trained["zero_shot"]["id"])
    same(curve[1]["id"], trained["id"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["alpha=1.5"], r"alpha is 1.5; it must lie in \[0, 1\]"),
        (["alpha=half"], "alpha is half; it must lie in"),
        (["alpha=true"], "alpha is True; it must lie in"),
        (["alpha=.nan"], "alpha is nan; it must lie in"),
        (["data.shots=1"], "leave out data.shots, only alpha"),
        (["0.5"], "leave out 0.5, or write alpha=0.5"),
        (["--points", "1"], "--points is 1"),
    ],
)
def test_bad_input_is_refused(command, lora, arguments, says) -> None:
    outcome = command("ensemble", lora, *arguments)
    assert outcome.code == 2
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(outcome.sentence)


def test_what_cannot_be_averaged_is_refused(command) -> None:
    command.train("adapter=bottleneck", "method=adamw", "epochs=1", "trainer.name=b")
    outcome = command("ensemble", command.run("b"), "alpha=0.5")
    assert outcome.code == 2
    assert "bottleneck" in outcome.sentence
    assert read_settled(command.run("b") / "fits" / "adamw-seed0").alpha is None
    assert command("ensemble", "nothing", "--storage-path", command.runs).code == 1
