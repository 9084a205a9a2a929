"""``protocol=stream`` on the command line: what it reports and logs, how it goes on, what it refuses, its search."""

import json
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from helpers.features import SCALE, class_embeddings, feature_table, write_features

from kngd_ray.config import load_config
from kngd_ray.data import DataConfig, Split, open_images, select
from kngd_ray.errors import DataError
from kngd_ray.experiment.run import _spread
from kngd_ray.experiment.task import one_support
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.restoring import open_fit
from kngd_ray.tuning.run import _registered

ORDER = ["noto", "twemoji", "noto"]
SETTINGS = ("data.shots=2", "epochs=1", "batch_size=5", "data.train_domain=null", "data.order=[noto,twemoji,noto]")


def stream(command, *settings: str, data=None):
    given = command.settings("protocol=stream", *SETTINGS, *settings, data=data)
    return command("train", "--json", *given)


def steps_of(command, name: str, fit: str) -> list[dict]:
    lines = (command.run(name) / "records" / fit / "steps.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_tells_how_the_stream_was_predicted(command, small_data) -> None:
    outcome = stream(command, "trainer.name=s", "baselines=adamw", "noise.process.drift=0.1")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    (baseline,) = report["baselines"]
    assert report["protocol"] == {"name": "stream"}
    for part in (report, baseline):
        assert set(part["stream"]) == {"accuracy", "nll", "learned", "final", "forgetting"}
        (curve,) = part["curves"].values()
        assert curve["samples"] == [5, 6, 11, 12, 17, 18]  # 2 shots of 3 classes, three times
        assert [stage["end"] for stage in curve["stages"]] == [6, 12, 18]
        assert [look["samples"] for look in curve["tested"]] == [6, 12, 18]
        sizes = np.diff([0, *curve["samples"]])
        for figure in ("accuracy", "nll"):
            assert part["stream"][figure] == pytest.approx(np.average(curve[figure], weights=sizes))
    for figure in ("accuracy", "nll"):  # of the first batch, CLIP's own: whoever learns from it
        assert report["curves"]["0"][figure][0] == pytest.approx(baseline["curves"]["0"][figure][0])
    assert set(report["zero_shot"]["stream"]) == {"accuracy", "nll"}
    steps = steps_of(command, "s", "kalman-seed0")
    assert [step["metrics"]["stream/batch/nll"] for step in steps] == report["curves"]["0"]["nll"]
    assert steps[-1]["metrics"]["stream/tested/twemoji"] == report["curves"]["0"]["tested"][-1]["accuracy"]["twemoji"]
    metrics = json.loads((command.run("s") / "records" / "kalman-seed0" / "metrics.json").read_text())
    assert metrics["stream/accuracy"] == report["stream"]["accuracy"]
    assert (command.run("s") / "records" / "kalman-seed0" / "artifacts" / "figures" / "stream.png").is_file()
    assert json.loads((command.run("s") / "results.json").read_text())["curves"] == report["curves"]
    assert "noto > twemoji > noto: batches of 5" in outcome.err
    # tested at the end on all of its domains, and usable like any other run
    own = command("evaluate", command.run("s"), "--json").json
    assert own["id"]["nll"] == pytest.approx(report["id"]["nll"])
    checkpoint, _ = open_fit(command.run("s") / "fits" / "kalman-seed0")
    assert checkpoint.state.replicated["stream/foreseen"].shape == (12,)
    assert (
        "a stream of 18 pictures"
        in (command.run("s") / "records" / "kalman-seed0" / "artifacts" / "model_card.md").read_text()
    )


def test_a_run_that_was_cut_short_goes_on(command, monkeypatch) -> None:
    """To the same figures and curves as one that was not."""
    settings = ("noise.process.drift=0.1", "trainer.checkpoint_every=1")
    whole = stream(command, "trainer.name=whole", *settings).json
    step = KalmanNGD.step

    def interrupted(self, batch):
        if batch.step == 2:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(KalmanNGD, "step", interrupted)
        assert stream(command, "trainer.name=cut", *settings).code == 130
    outcome = command("train", "--resume", "cut", f"trainer.storage_path={command.runs}", "--json")
    assert outcome.code == 0, outcome.err
    for key in ("stream", "curves", "id"):
        assert outcome.json[key] == whole[key], key


def test_the_order_of_a_stream(small_data) -> None:
    """Domain after domain, shuffled within, each shot once; a function of the seed."""
    images = open_images(DataConfig(path=str(small_data)))
    config = DataConfig(path=str(small_data), order=tuple(ORDER), shots=2)
    split = select(images, config, 3)
    assert images.domains[split.support].tolist() == [domain for domain in ORDER for _ in range(6)]
    assert len(set(split.support.tolist())) == 18
    for part in split.support.reshape(3, 6):
        assert np.bincount(images.labels[part]).tolist() == [2, 2, 2]
    assert (images.splits[split.support] == "train").all()
    assert not np.isin(images.keys[split.id_test], images.keys[split.support]).any()
    assert np.array_equal(select(images, config, 3).support, split.support)
    assert not np.array_equal(select(images, config, 4).support, split.support)
    assert any((np.diff(images.labels[part]) < 0).any() for part in split.support.reshape(3, 6)), "classes are mixed"
    first, second = (np.flatnonzero((images.domains == domain) & (images.splits == "train")) for domain in ORDER[:2])
    drawn = [
        set(np.searchsorted(rows, part).tolist())
        for rows, part in zip((first, second), split.support.reshape(3, 6)[:2], strict=True)
    ]
    assert drawn[0] != drawn[1], "of domains with the same objects, not the same ones"
    bad = int(split.support[0])
    assert bad not in select(images, config, 3, {bad}).support


def timed(table: pa.Table, times: pa.Array) -> pa.Table:
    return table.append_column("when", times)


@pytest.mark.parametrize("kind", ["int", "float", "date"])
def test_rows_in_time_order(command, kind) -> None:
    """Of a file of features, by a column; the domains of its rows come as they come."""
    table = feature_table()
    moments = np.random.default_rng(0).permutation(len(table) // 2).repeat(2)  # two rows each
    values = {"int": moments, "float": moments / 7.0, "date": [date(2020, 1, 1) + timedelta(int(m)) for m in moments]}
    data, classes = write_features(command.folder, timed(table, pa.array(values[kind])))
    images = open_images(DataConfig(path=str(data)), features=True)
    config = DataConfig(path=str(data), time="when")
    support = select(images, config, 0).support
    assert len(support) == (images.splits == "train").sum()
    expected = sorted(np.flatnonzero(images.splits == "train").tolist(), key=lambda row: (moments[row], row))
    assert support.tolist() == expected
    if kind != "int":
        return
    model = ["model.name=precomputed", f"model.class_embeddings={classes}", f"model.logit_scale={SCALE}"]
    given = command.settings("protocol=stream", "data.time=when", "data.train_domain=null", *model, data=data)
    outcome = command("train", "--json", *given, "epochs=1", "batch_size=0", "trainer.name=t")
    assert outcome.code == 0, outcome.err
    assert set(outcome.json["stream"]) == {"accuracy", "nll"}
    assert outcome.json["curves"]["0"]["samples"][0] == 16
    features = torch.tensor(np.array(table["features"].to_pylist())[support[:16]], dtype=torch.float32)
    right = (features @ torch.from_numpy(class_embeddings()).mT).argmax(1).numpy() == images.labels[support[:16]]
    assert outcome.json["curves"]["0"]["accuracy"][0] == pytest.approx(right.mean())


def test_times_that_are_none(tmp_path, small_data) -> None:
    table = feature_table()
    count = len(table)
    train = np.array(table["split"].to_pylist()) == "train"
    gap = int(np.flatnonzero(train)[3])
    for times, says in (
        (pa.array([None if n == gap else n for n in range(count)]), f"row {gap} has no time in column 'when'"),
        (pa.array([float("nan") if n == gap else n for n in range(count)], pa.float64()), f"row {gap} has no time"),
        (pa.array(["today"] * count), "is string: it must be numbers, dates or times"),
    ):
        data, _ = write_features(tmp_path, timed(table, times))
        images = open_images(DataConfig(path=str(data)), features=True)
        with pytest.raises(DataError, match=says):
            select(images, DataConfig(path=str(data), time="when"), 0)
    with pytest.raises(DataError, match=r"has no column 'wen' \(the nearest name is 'when'\)"):
        select(images, DataConfig(path=str(data), time="wen"), 0)
    (tmp_path / "more").mkdir()
    both = []
    for folder, times in ((tmp_path, pa.array(range(count))), (tmp_path / "more", pa.array(np.arange(count) / 2))):
        both.append(str(write_features(folder, timed(table, times))[0]))
    images = open_images(DataConfig(path=tuple(both)), features=True)
    with pytest.raises(DataError, match=r"column 'when' is int64 in .* and double in .*: give all files one type"):
        select(images, DataConfig(path=tuple(both), time="when"), 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.order=[noto,twemojy]"], "data.order: there is no domain 'twemojy' (the nearest name is 'twemoji')"),
        (
            ["data.order=[noto,noto]", "data.shots=3"],
            "has 5 pictures of domain 'noto' to learn from, fewer than 6 shots",
        ),
        (["data.ood_domains=[noto]"], "leave one of them out"),
        (["data.order=null"], "protocol is stream without an order"),
        (["data.order=null", "data.time=when"], "has no column 'when'"),
        (["protocol=dg"], "data.order is for protocol=stream"),
    ],
)
def test_what_cannot_be_a_stream_is_refused(command, settings, says) -> None:
    outcome = stream(command, *settings)
    assert outcome.code in (1, 2)
    assert says in outcome.sentence
    assert not command.runs.exists()


def search_file(command, **changes):
    file = command.folder / "search.yaml"
    content = {
        "method": "kalman",
        "protocol": "stream",
        "search": {"num_samples": 3, "batch": 3, "seeds": [5], "sampler": "random", "refit": False},
        "space": {"noise.process.drift": {"low": 1e-4, "high": 1.0, "log": True}},
    }
    file.write_text(yaml.safe_dump(content | changes))
    return file


def test_a_search_on_a_stream(command) -> None:
    """Each trial is judged by the stream in its own order; the winner by a stream of the run's own seeds."""
    file = search_file(command)
    given = command.settings(*SETTINGS)
    outcome = command("tune", file, "--json", *given, "trainer.name=t", "search.refit=true", "search.num_samples=2")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    share = report["best"]["params"]["noise.process.drift"]
    run = stream(command, f"noise.process.drift={share}", "seeds=5", "trainer.name=by-hand").json
    assert report["best"]["objective"]["evidence"] == pytest.approx(-run["stream"]["nll"])
    assert set(report["test"]["stream"]) >= {"accuracy", "nll", "forgetting"}
    metrics = json.loads((command.run("t") / "records" / "search" / "metrics.json").read_text())
    assert metrics["stream/nll"] == report["test"]["stream"]["nll"]


def test_the_winner_of_another_stream_is_another_model() -> None:
    names = [
        _registered(load_config(overrides=[*settings, "tracking.experiment=e"]))
        for settings in (
            [],
            ["protocol=stream", "data.order=[noto,twemoji]"],
            ["protocol=stream", "data.order=[twemoji,noto]"],
            ["protocol=stream", "data.time=taken_at"],
        )
    ]
    assert names == [
        "e-emoji-kalman",
        "e-emoji-noto-twemoji-kalman",
        "e-emoji-twemoji-noto-kalman",
        "e-emoji-taken_at-kalman",
    ]


def test_gradient_methods_are_searched_on_a_stream_too(command) -> None:
    space = {"optimizer.lr": {"low": 1e-3, "high": 1e-2, "log": True}, "epochs": {"low": 1, "high": 3, "integer": True}}
    outcome = command("tune", search_file(command, method="adamw", space=space), "--json", *command.settings(*SETTINGS))
    assert outcome.code == 0, outcome.err
    assert outcome.json["best"]["objective"]["evidence"] < 0
    held_out = command("tune", search_file(command), *command.settings(*SETTINGS), "search.objective=held_out_nll")
    assert "protocol=stream is scored as it arrives: use evidence" in held_out.sentence


def test_the_shipped_search_is_one(command, request) -> None:
    file = request.config.rootpath / "tune_configs" / "stream.yaml"
    outcome = command("tune", file, "--print-config")
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out)["space"].keys() >= {"noise.process", "noise.process.drift"}


def test_seeds_of_one_stream_have_no_interval() -> None:
    """It would be 0 wide: all of them learn from the same rows in the same order."""

    def drawn(*orders: list[int]) -> dict[int, Split]:
        nothing = np.zeros(0, np.int64)
        return {seed: Split(np.array(order), nothing, {}) for seed, order in enumerate(orders)}

    assert one_support(drawn([3, 1, 2], [3, 1, 2]), ordered=True)
    assert not one_support(drawn([3, 1, 2], [1, 2, 3]), ordered=True), "the order is what a seed of a stream draws"
    assert one_support(drawn([3, 1, 2], [1, 2, 3]), ordered=False)
    assert not one_support(drawn([3, 1, 2], [1, 2, 4]), ordered=False)
    assert not one_support(drawn([3, 1, 2]), ordered=False), "one seed has no interval, for its own reason"
    assert not one_support(drawn([], []), ordered=False), "what is only tested on"
    several = load_config(None, ["seeds=0,1"])
    assert _spread(several, True) == "means over seeds that have the same shots, no interval"
    assert _spread(several, False).startswith("mean and 95 % interval")
    assert _spread(load_config(None, ["seeds=0"]), False) == "one seed, no interval"
