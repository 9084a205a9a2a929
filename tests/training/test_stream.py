"""Fits of a stream: what each batch is predicted by, what becomes of the belief between two, how it goes on."""

from dataclasses import replace

import pytest
import torch
from helpers.cones import SCALE
from helpers.ordered import BATCH, DRIFT, PROCESSES, options, ranked, shuffled, stream_task
from helpers.ranks import run_ranks
from helpers.resuming import Killed, kill_after
from torch.nn.functional import cross_entropy, normalize

from kngd_ray.config import load_config, override
from kngd_ray.errors import CheckpointError, UsageError
from kngd_ray.estimator import KalmanCLIP
from kngd_ray.estimator._in_memory import foreseen
from kngd_ray.filters import Transition
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask, begin, fit
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.predict import TAU_GRID, PosteriorOptions
from kngd_ray.training.resumable import latest, run_fit
from kngd_ray.training.stream import Foresight, Look, Met, Stage, Stream, prequential, retention
from kngd_ray.tuning import SearchOptions, Workload, fit_alone, fit_together, score_trials


def records(task: FitTask, **how):
    found = []
    method = fit(task, on_step=found.append, **how)
    return method, found


def met(task: FitTask) -> list[Met]:
    return [record.met for record in records(task)[1] if record.met is not None]


@pytest.mark.parametrize("method", ["kalman", "kalman_diagonal", "adamw"])
def test_a_batch_is_predicted_before_it_is_learned_from(method) -> None:
    """Other labels in batch t change what batch t is told to be, and no prediction up to it: tau neither."""
    how = options(*([f"preset={method}"] if method.startswith("kalman") else [f"method={method}"]))
    task = stream_task(how)
    t, labels = 1, task.support.labels.clone()
    own = slice(t * BATCH, (t + 1) * BATCH)
    labels[own] = (labels[own] + 1) % 4
    a, b = met(task), met(replace(task, support=Support(task.support.features, labels)))
    assert len(a) == len(b) == 3
    assert a[:t] == b[:t]
    assert a[t].tau == b[t].tau
    assert a[t].nll != b[t].nll
    assert a[t + 1].nll != b[t + 1].nll, "later ones have learned of it"
    other = task.support.labels.clone()
    other[-1] = (other[-1] + 1) % 4  # of the last batch: nothing that was predicted before knows
    c = met(replace(task, support=Support(task.support.features, other)))
    assert c[:-1] == a[:-1]


def test_the_first_batch_is_clips_own() -> None:
    task = stream_task()
    first = met(task)[0]
    x, y = task.support.features[:BATCH], task.support.labels[:BATCH]
    logits = SCALE * x @ task.class_embeddings.mT
    assert first.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert first.nll == pytest.approx(float(cross_entropy(logits, y)), rel=1e-6)
    assert first.tau == 3e-4, "nothing says otherwise"


@pytest.mark.parametrize("label", [0, 3])
def test_without_class_embeddings_the_first_batch_is_guessed(label) -> None:
    """All classes are alike before anything is learned: one of C is right, whichever class comes first."""
    task = stream_task()
    labels = task.support.labels.clone()
    labels[:BATCH] = label
    unknown = torch.zeros_like(task.class_embeddings)
    first = met(replace(task, class_embeddings=unknown, support=Support(task.support.features, labels)))[0]
    assert (first.accuracy, first.nll) == pytest.approx((0.25, float(torch.tensor(4.0).log())))


def test_the_first_batch_informs_the_prior() -> None:
    """As the shots of a fit do: the state before the first step is that of a fit on this batch."""
    task = stream_task(options(**DRIFT))
    alone = replace(task, support=task.support.subset(torch.arange(BATCH)))
    a, b = (begin(t, SingleProcess()).state() for t in (task, alone))
    for name, P in a.covariance.items():
        assert torch.equal(P, b.covariance[name])
    assert {name.rpartition("|")[2] for name in a.covariance} == {"B", "A", "B0", "A0"}


def test_batches_come_in_the_order_of_the_stream() -> None:
    sampler = stream_task(options("method=adamw", "epochs=2")).sampler
    assert [sampler.chosen(step).local.tolist() for step in range(4)] == [
        list(range(8)), list(range(8)), list(range(8, 16)), list(range(8, 16))
    ]  # fmt: skip
    assert [sampler.chosen(step).scored for step in range(4)] == [True, False, True, False]


def test_tau_is_the_one_that_has_predicted_best() -> None:
    stream = Stream(PosteriorOptions(predict="linearised", tau_median=3e-4, tau_spread=1.5))
    foresight = Foresight(stream)
    assert foresight.tau == 3e-4
    scores = [-9.0] * len(TAU_GRID)
    scores[TAU_GRID.index(0.1)] = 0.0
    assert foresight.see([*scores[:3], -5.0, *scores[4:]], 8) == -5.0, "at the tau that was chosen before"
    for _ in range(4):
        foresight.see(scores, 8)
    assert foresight.tau == 0.1
    assert Foresight(stream, foresight.scores).tau == 0.1
    assert Foresight(Stream(PosteriorOptions(temperature=0.02))).tau == 0.02
    given = Foresight(Stream(PosteriorOptions(temperature=0.02)), foresight.scores)
    assert given.see([-1.0], 8) == -1.0, "options may change within a stream, and scores of other taus say nothing"
    assert Foresight(stream, given.scores).tau == 3e-4
    assert Foresight(Stream(PosteriorOptions(predict="mean"))).tau == 0.0
    assert Foresight(Stream(PosteriorOptions())).tau == 1.0, "as without held-out shots"


@pytest.mark.parametrize("process", PROCESSES)
def test_the_belief_moves_in_the_metric_of_the_prior(process) -> None:
    """P- of every process, of the P_0 that the first batch measured."""
    method, _ = records(stream_task(options(**PROCESSES[process])))
    assert isinstance(method, KalmanNGD)
    (P,) = method.belief.covariance.values()
    transition = method._transition(3)
    after = method.posterior.predicted(transition)
    (moved,) = after.covariance.values()
    if process == "still":
        assert transition == Transition(1.0, 1.0, 0.0)
        assert moved is P or all(torch.equal(moved[key], P[key]) for key in P)
        return
    if process == "forgetting":
        memory = 1 - 0.2 * 0.9**3
        assert torch.kron(moved["B"], moved["A"]).numpy() == pytest.approx(
            (torch.kron(P["B"], P["A"]) / memory).numpy(), rel=1e-5
        )
        return
    share, scale = (0.2, 1.0) if process == "drift" else (1 - 0.81, 0.81)
    assert transition == pytest.approx(Transition(0.9 if process == "relaxing" else 1.0, scale, 0.0, share))
    start = {**P, "B": P["B0"], "A": P["A0"]}
    method.posterior.belief = replace(method.belief, covariance=dict.fromkeys(method.belief.covariance, start))
    (again,) = method.posterior.predicted(transition).covariance.values()
    ratio = scale + share
    expected = ratio * torch.kron(P["B0"], P["A0"])
    assert torch.kron(again["B"], again["A"]).numpy() == pytest.approx(expected.numpy(), rel=1e-4), "of P_0 a multiple"


@pytest.mark.parametrize("process", PROCESSES)
def test_a_stream_that_was_cut_short_goes_on(process, tmp_path) -> None:
    """Bitwise the same belief, the same tau, and the records of the steps that are left."""
    stages = [Stage("a", 10), Stage("b", 20)]
    support, _ = shuffled(3)
    task = stream_task(options(**PROCESSES[process]), stages=stages, tests={"a": support, "b": support})
    straight, told = records(task)
    how = {"identity": {}, "group": SingleProcess(), "device": "cpu", "checkpoint_every": 1}
    with pytest.raises(Killed):
        run_fit(task, tmp_path, **how, on_step=kill_after(2))
    rest = []
    run_fit(task, tmp_path, **how, on_step=rest.append)
    found = latest(tmp_path)
    assert found is not None
    state = straight.state()
    assert torch.equal(found.state.replicated["stream/foreseen"], state.replicated["stream/foreseen"])
    for name, P in state.covariance.items():
        assert torch.equal(found.state.covariance[name], P), name
    again = {record.step: (record.met, record.look) for record in rest}
    assert len(rest) == 3  # the step after which it was killed had no checkpoint yet
    assert again == {record.step: (record.met, record.look) for record in told if record.step in again}
    run_fit(replace(task, stream=None), tmp_path / "other", **how)
    with pytest.raises(CheckpointError, match="belongs to another task: its order is None, this one's is stream"):
        run_fit(task, tmp_path / "other", **how)
    whole = replace(task, stream=replace(task.stream, stages=[]))  # as of versions that cut no batch short
    run_fit(whole, tmp_path / "whole", **how)
    with pytest.raises(CheckpointError, match=r"belongs to another task: its ends is None, this one's is \[10\]"):
        run_fit(task, tmp_path / "whole", **how)
    looks = [record.look for record in told if record.look is not None]
    assert [look.samples for look in looks] == [10, 20]


def test_two_ranks_are_the_same_stream() -> None:
    alone = ranked(SingleProcess())
    for found in run_ranks(2, ranked):
        for a, b in zip(found["met"], alone["met"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        for name, weight in alone["weights"].items():
            assert found["weights"][name].numpy() == pytest.approx(weight.numpy(), rel=1e-4, abs=1e-6)


def test_forgetting_is_of_all_domains_but_the_last() -> None:
    stages = [Stage("a", 10), Stage("b", 20), Stage("a", 30)]
    looks = [Look(16, {"a": 0.9, "b": 0.1}), Look(24, {"a": 0.5, "b": 0.8}), Look(30, {"a": 0.7, "b": 0.6})]
    found = retention(stages, looks)
    assert found == pytest.approx({"learned": (0.7 + 0.8) / 2, "final": (0.7 + 0.6) / 2, "forgetting": 0.8 - 0.6})
    assert "forgetting" not in retention(stages[:1], looks[:1])
    assert retention([], looks) == {}
    assert prequential([Met(3, 1.0, 0.5, 0.0), Met(1, 0.0, 2.5, 0.0)]) == pytest.approx({"accuracy": 0.75, "nll": 1.0})


def moving(turn: float, seed: int, batches: int = 20) -> tuple[Support, torch.Tensor]:
    """Classes whose means turn by an angle from batch to batch, each in a plane of its own."""
    g = torch.Generator().manual_seed(seed)
    texts = torch.eye(12, dtype=torch.float64)[:4]
    rows, labels = [], []
    for n in range(batches):
        y = torch.randint(4, (BATCH,), generator=g)
        angle = torch.tensor(turn * n, dtype=torch.float64)
        means = angle.cos() * texts + angle.sin() * texts.roll(1, 0)  # towards where another class was
        rows.append(means[y] + 0.2 * torch.randn(BATCH, 12, generator=g, dtype=torch.float64))
        labels.append(y)
    return Support(normalize(torch.cat(rows), dim=1), torch.cat(labels)), texts


@pytest.mark.parametrize(("turn", "drifts"), [(0.0, False), (0.15, True)])
def test_a_search_finds_a_drift_where_there_is_one(turn, drifts) -> None:
    """By what the labels were predicted with as they came; both ways of running trials say the same."""
    config = override(load_config(), {"protocol": "stream", "data.order": ["a"], "batch_size": BATCH})
    search = SearchOptions(seeds=(1, 2))
    shots = {seed: moving(turn, seed)[0] for seed in search.seeds}
    work = Workload(config, search, shots, moving(turn, 0)[1], 10.0)
    shares = (0.0, 0.01, 0.3)
    trials = [{"noise.process.drift": share} for share in shares]
    *_, judged = score_trials(trials, work, fit_alone)
    assert [one.reason for one in judged] == [None] * 3
    found = [one.objective["evidence"] for one in judged]
    assert max(found) == found[2 if drifts else 0], found
    *_, again = score_trials(trials[:2], work, fit_together)
    assert [one.objective for one in again] == [one.objective for one in judged[:2]]


def test_evidence_is_the_prequential_likelihood_of_a_stream() -> None:
    config = override(load_config(), {"protocol": "stream", "data.order": ["a"], "batch_size": BATCH, **DRIFT})
    support, texts = shuffled(5)
    work = Workload(config, SearchOptions(seeds=(0,)), {0: support}, texts, SCALE)
    *_, (judged,) = score_trials([{}], work, fit_alone)
    expected = prequential(met(replace(work.task(config, 0), support=support)))["nll"]
    assert judged.objective["evidence"] == pytest.approx(-expected)


@pytest.mark.parametrize("process", PROCESSES)
def test_partial_fit_is_the_stream(process, tmp_path) -> None:
    """Over the same batches: belief, tau, and so all predictions; also when it was saved in between."""
    support, texts = shuffled(5)
    X, y, classes = support.features.float(), support.labels.numpy(), list(range(4))
    clf = KalmanCLIP(
        model="precomputed",
        class_embeddings=texts.float().numpy(),
        logit_scale=SCALE,
        settings={**PROCESSES[process], "posterior.folds": 2},
    )
    for n, start in enumerate(range(0, len(y), BATCH)):
        own = slice(start, start + BATCH)
        clf.partial_fit(X[own].numpy(), y[own], classes=classes if n == 0 else None)
        if n == 1:
            clf = KalmanCLIP.load(clf.save(tmp_path / "between"))
    task = stream_task(options(**PROCESSES[process]), Support(X, support.labels))
    task = replace(task, class_embeddings=texts.float())
    method, _ = records(task)
    state, kept = method.state(), clf.checkpoint_.state
    for name, weight in state.weights.items():
        assert kept.weights[name].numpy() == pytest.approx(weight.numpy(), rel=1e-4, abs=1e-5)
    for name, P in state.covariance.items():
        assert kept.covariance[name].numpy() == pytest.approx(P.numpy(), rel=1e-4, abs=1e-5 * float(P.abs().max())), (
            name
        )
    assert isinstance(method, KalmanNGD)
    assert task.stream is not None
    assert clf.calibration_.tau == Foresight(task.stream, method.foreseen).tau
    sharpened = replace(clf.calibration_, tau=0.9, sharpening=1.7)  # as folds of an earlier part may have chosen
    after = foreseen(task, clf.checkpoint_, sharpened, folds=2)
    assert (after.tau, after.sharpening) == (clf.calibration_.tau, 1.0)
    assert foreseen(task, clf.checkpoint_, sharpened, folds=0) == sharpened


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["protocol=stream"], "protocol is stream without an order"),
        (["data.order=[a]"], r"data\.order is for protocol=stream, but protocol is fsl"),
        (["data.time=when"], r"data\.time is for protocol=stream"),
        (["protocol=stream", "data.order=[a]", "data.time=when"], "a stream has one order"),
        (["protocol=stream", "data.order=[]"], "order is empty"),
        (["protocol=stream", "data.order=[a]", "data.train_domain=a"], "order names those of the stream"),
        (["protocol=stream", "data.order=[a]", "epochs=0"], "epochs is 0"),
        (["protocol=stream", "data.order=[a]", "tune.parameters=lora"], "adapters on frozen towers"),
    ],
)
def test_what_is_no_stream_is_refused(settings, says) -> None:
    with pytest.raises(UsageError, match=says):
        load_config(overrides=settings)


def test_a_stream_leaves_open_neither_batches_nor_rates() -> None:
    ordered = ["protocol=stream", "data.order=[a]"]
    assert load_config(overrides=ordered).fit_options.batch_size == 16
    assert load_config(overrides=[*ordered, "batch_size=5"]).fit_options.batch_size == 5
    assert load_config(overrides=[*ordered, "method=sgd"]).fit_options.optimizer.schedule == "constant"
