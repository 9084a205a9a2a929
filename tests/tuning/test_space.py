"""What may be searched: every space that makes no sense is refused in one sentence, before anything is started."""

from math import exp

import optuna
import pytest

from kngd_ray.config import Config, flatten, load_config, override
from kngd_ray.configs import names
from kngd_ray.errors import UsageError
from kngd_ray.tuning import Space, parse_space, plain_space
from kngd_ray.tuning.file import load_search

P0 = {"low": 0.01, "high": 1.0, "log": True}
WEIGHTS = ("preset=kalman_diagonal", "observation=log_likelihood,cosine", "filter.p0=0.1")
GATE = {"choices": ["none", "skip", "inflate"]}
CONDITIONAL = {
    "noise.process.gamma": {"low": 0.8, "high": 1.0, "when": {"noise.process": "ornstein_uhlenbeck"}},
    "noise.process": {"choices": ["random_walk", "ornstein_uhlenbeck"]},
    "noise.process.q": {"low": 1e-8, "high": 1e-3, "log": True, "when": {"noise.process": ["random_walk"]}},
    "epochs": {"low": 1, "high": 10, "integer": True},
    "filter.p0": P0,
}


def checked(raw: dict, *settings: str) -> Space:
    """Of a variance of weights and two observations, unless a method brings its own."""
    space = parse_space(raw)
    space.check(load_config(overrides=settings or WEIGHTS))
    return space


@pytest.fixture(scope="module")
def base() -> Config:
    return load_config(overrides=WEIGHTS)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({}, "space is empty: name at least one setting to search"),
        ({"filter.p0": 3}, "space.filter.p0 is 3; give {low: .., high: ..} or {choices: [..]}"),
        ({1: P0}, "space has the key 1; name a setting"),
        ({"filter.p0": {"lo": 1, "high": 2}}, "unknown key 'lo'; did you mean low?"),
        ({"filter.p0": {"low": 1}}, "lacks high"),
        ({"filter.p0": {"low": "a", "high": 1}}, "low='a': input should be a valid number"),
        ({"filter.p0": {"low": 1, "high": 1}}, "low is 1 and high is 1; the range is empty"),
        ({"filter.p0": {"low": 2, "high": 1}}, "the range is empty"),
        ({"filter.p0": {"low": float("nan"), "high": 1}}, "expected a finite number"),
        ({"epochs": {"low": 1, "high": float("inf"), "integer": True}}, "expected a finite number"),
        ({"filter.p0": {"low": 0, "high": 1, "log": True}}, "a logarithmic range starts above 0"),
        ({"epochs": {"low": 1.5, "high": 3, "integer": True}}, "a range of integers has whole bounds"),
        ({"epochs": {"low": 0.5, "high": 2}}, "space.epochs cannot be 0.5"),
        ({"epochs": {"low": 1, "high": 3}}, "got a number with a fractional part; add integer: true."),
        ({"filter.serial": {"low": 0, "high": 1000}}, "space.filter.serial cannot be 381.966: "),
        ({"epochs": {"low": 1, "high": 8, "log": True}}, "; add integer: true."),
        ({"filter.p0": {**P0, "median": 0.1}}, "a prior has a median and a spread; give both"),
        ({"filter.p0": {**P0, "spread": 1.0}}, "a prior has a median and a spread; give both"),
        ({"filter.p0": {**P0, "median": 3.0, "spread": 1.0}}, "median is 3; it must lie between 0.01 and 1"),
        ({"filter.p0": {**P0, "median": 0.1, "spread": 0}}, "spread is 0; a standard deviation is above 0"),
        ({"filter.gate": {"choices": ["none"]}}, "name two or more, each once"),
        ({"posterior.temperature": {"choices": [None, 0.5]}}, "choices has null, which is no value to choose"),
        ({"filter.gate": {"choices": ["none", "skip", "none"]}}, "name two or more, each once"),
        ({"filter.gate": {"choices": ["none", "skip"], "low": 1}}, "unknown key 'low'"),
        ({"filter.gate": {"choices": ["none", "skp"]}}, "space.filter.gate cannot be skp: filter.gate is 'skp'; did"),
        ({"filter.p00": P0}, "unknown key 'filter.p00'; did you mean filter.p0?"),
        ({"fliter.p0": P0}, "space.fliter.p0 is not a setting of a fit; did you mean filter?"),
        ({"filter.p0": {"low": -1, "high": 1}}, "space.filter.p0 cannot be -1.0: filter: p0 is -1.0; a prior variance"),
        ({"filter.gate.quantile": {"low": 0.9, "high": 0.99}}, "is an option of filter.gate=inflate or skip"),
        ({"observation.5.r0": P0}, "that list has 2 elements"),
        ({"posterior.folds": {"low": 0, "high": 4, "integer": True}}, "score trials on different folds"),
        *(
            ({key: P0}, f"space.{key} is not a setting of a fit")
            for key in ("data.shots", "model.name", "trainer.name")
        ),
        *(
            ({key: {"choices": ["a", "b"]}}, "is not a setting of a fit")
            for key in ("method", "preset", "prior", "seeds")
        ),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(raw: dict, says: str) -> None:
    with pytest.raises(UsageError) as refusal:
        checked(raw)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            {"filter.p0": {**P0, "when": {"filter.gat": "skip"}}, "filter.gate": GATE},
            "lacks; did you mean filter.gate?",
        ),
        (
            {"filter.p0": {**P0, "when": {"filter.gate": "inflat"}}, "filter.gate": GATE},
            "which is not one of its choices",
        ),
        (
            {"filter.p0": {**P0, "when": {"filter.gate": {"a": 1}}}, "filter.gate": GATE},
            "which is not one of its choices",
        ),
        ({"filter.gate": {**GATE, "when": {"filter.p0": 0.1}}, "filter.p0": P0}, "which is not one of its choices"),
        ({"filter.p0": {**P0, "when": {"filter.gate": []}}, "filter.gate": GATE}, "allows no value of filter.gate"),
        *(
            ({"filter.p0": {**P0, "when": nothing}}, f"space.filter.p0.when is {nothing!r}; give the settings")
            for nothing in (0, [], "", False)
        ),
        ({"filter.p0": {**P0, "when": "skip"}}, "give the settings that it depends on, as key: value"),
        ({"filter.gate": {**GATE, "when": {"filter.gate": "skip"}}}, "refers to itself through filter.gate"),
        (
            {
                "filter.gate": {**GATE, "when": {"noise.observation": "ema"}},
                "noise.observation": {"choices": ["fixed", "ema"], "when": {"filter.gate": "skip"}},
            },
            "refers to itself through filter.gate, noise.observation",
        ),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(raw: dict, says: str) -> None:
    with pytest.raises(UsageError, match=r"^space\.") as refusal:
        checked(raw)
    assert says in str(refusal.value)


def test_the_default_is_searched_by_the_variance_of_its_logits() -> None:
    raw = {"filter.logit_variance": {"low": 30.0, "high": 3e4, "log": True}, "filter.mean.gamma": {"low": 0, "high": 1}}
    config = load_config(overrides=["filter.logit_spread=0"])
    space = parse_space(raw)
    space.check(config)
    assert space.point(config) == {"filter.logit_variance": 1000.0, "filter.mean.gamma": 0.7}
    parse_space({"filter.p0": P0}).check(config)  # or of weights, which takes the place of it


@pytest.mark.parametrize(
    ("settings", "key", "cause"),
    [
        ([], "filter.towers", "tune.parameters=adapter"),
        ([], "tune.rank", "tune.parameters=adapter"),
        ([], "posterior.draws", "posterior.predict=linearised"),
        (["method=adamw"], "optimizer.momentum", "method=adamw"),
    ],
)
def test_what_other_settings_leave_without_effect_is_refused(settings, key, cause) -> None:
    space = parse_space({
        key: {"low": 0.1, "high": 0.9} if "momentum" in key else {"low": 1, "high": 3, "integer": True}
    })
    with pytest.raises(UsageError, match=rf"space\.{key} has no effect with {cause}"):
        space.check(load_config(None, settings))
    space.check(load_config(None, settings), begun=True)  # of an earlier version, whose trials are there


def test_what_the_method_does_not_look_at_is_refused() -> None:
    with pytest.raises(UsageError, match=r"space\.optimizer\.lr has no effect with method=kalman"):
        checked({"optimizer.lr": P0})
    checked({"optimizer.lr": P0}, "method=adamw")
    for key in ("filter.p0", "noise.process.q", "observation.0.r0", "posterior.temperature"):
        with pytest.raises(UsageError, match=rf"space\.{key} has no effect with method=adamw"):
            checked({key: P0}, "method=adamw")


def test_what_another_dimension_brings_into_effect_is_not_refused() -> None:
    draws = {"low": 8, "high": 64, "integer": True}
    checked({"posterior.draws": draws, "posterior.predict": {"choices": ["draws", "mean"]}})
    with pytest.raises(UsageError, match=r"space\.posterior\.draws has no effect with posterior\.predict=mean"):
        checked({"posterior.draws": draws}, "posterior.predict=mean")


def test_a_condition_without_content_is_none() -> None:
    for nothing in ({}, None):
        assert checked({"filter.p0": {**P0, "when": nothing}}) == checked({"filter.p0": P0})


def test_plain_space_reads_back() -> None:
    space = checked(CONDITIONAL)
    plain = plain_space(space)
    assert parse_space(plain) == space
    assert list(plain).index("noise.process") < list(plain).index("noise.process.gamma"), "after what it depends on"


def test_a_trial_has_the_dimensions_that_its_choices_call_for(base: Config) -> None:
    space = checked(CONDITIONAL)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = [space.suggest(study.ask()) for _ in range(30)]
    for values in found:
        walks = values["noise.process"] == "random_walk"
        assert ("noise.process.q" in values) == walks
        assert ("noise.process.gamma" in values) != walks
        assert isinstance(values["epochs"], int)
        override(base, values)
    assert {values["noise.process"] for values in found} == {"random_walk", "ornstein_uhlenbeck"}
    assert {values["epochs"] for values in found} >= {1, 10}, "both ends are in the range"


def test_a_condition_on_a_condition() -> None:
    raw = {
        "filter.gate.quantile": {"low": 0.9, "high": 0.99, "when": {"filter.gate": "skip"}},
        "filter.gate": {**GATE, "when": {"noise.observation": "ema"}},
        "noise.observation": {"choices": ["fixed", "ema"]},
    }
    space = checked(raw)
    assert [d.key for d in space.dimensions] == ["noise.observation", "filter.gate", "filter.gate.quantile"]
    fixed = optuna.trial.FixedTrial({"noise.observation": "fixed"})
    assert space.suggest(fixed) == {"noise.observation": "fixed"}


def test_a_preset_lies_in_the_space_or_at_its_border(base: Config) -> None:
    raw = {
        **CONDITIONAL,
        "epochs": {"low": 7, "high": 9, "integer": True},
        "filter.p0": {"low": 1e-3, "high": 0.02},
        "observation": {"choices": ["log_likelihood,cosine", "categorical"]},
        "observation.0.r0": P0,
        "adapter": {"choices": ["linear", "bottleneck"]},
    }
    assert checked(raw).point(base) == {
        "noise.process": "random_walk",
        "noise.process.q": 1e-8,
        "epochs": 7,
        "filter.p0": 0.02,
        "observation": "log_likelihood,cosine",
        "observation.0.r0": 1.0,
    }, "an adapter that is none of the choices is left to the sampler"
    assert checked(raw).open_at(checked(raw).point(base)) == ["adapter"]
    assert checked(raw).moved(base, checked(raw).point(base)) == {
        "noise.process.q": 0.0,
        "epochs": 5,
        "filter.p0": 0.1,
    }


@pytest.mark.parametrize("name", names("searches"))
def test_the_first_trials_of_shipped_searches_are_their_presets(name: str) -> None:
    search = load_search(name, ["data.path=x"])
    for point in search.points[:1]:
        assert not search.space.open_at(point)
        preset, trial = flatten(search.config), flatten(override(search.config, point))
        assert {
            key: (preset[key], trial.get(key))
            for key in preset
            if preset[key] != trial.get(key) and not (preset[key] == 0 and trial.get(key) <= 1e-4)
        } == {}, "but for a variance of 0, which no logarithmic range holds"
        assert preset.keys() == trial.keys()


def test_what_has_an_effect_under_another_choice_may_be_searched() -> None:
    base = ("preset=kalman_diagonal", "noise.observation=categorical", "observation=log_likelihood")
    choices = {"choices": ["log_likelihood", "cosine,log_likelihood"]}
    checked({"observation": choices, "observation.0.r0": {**P0, "when": {"observation": choices["choices"][1]}}}, *base)
    checked({"observation": choices, "observation.0.r0": P0}, *base)
    with pytest.raises(
        UsageError, match=r"^space\.observation\.0\.r0 has no effect with noise\.observation=categorical"
    ):
        checked({"observation.0.r0": P0}, *base)


def test_the_elements_of_a_list_come_after_the_list(base: Config) -> None:
    """Settings in a mapping have no order: a number is that of the list that the mapping has."""
    for settings in (
        {"observation.0.r0": 9.0, "observation": "cosine,log_likelihood"},
        {"observation": "cosine,log_likelihood", "observation.0.r0": 9.0},
    ):
        found = override(base, settings).observation
        assert [(model.kind, model.r0) for model in found] == [("cosine", 9.0), ("log_likelihood", 1.0)]


def test_the_only_element_of_a_list_needs_no_number() -> None:
    config = load_config(overrides=["adapter=bottleneck", "adapter.width=48"])
    space = parse_space({"adapter.width": {"low": 16, "high": 64, "integer": True}})
    space.check(config)
    assert space.point(config) == {"adapter.width": 48}


def test_log_prior_is_a_normal_density_of_the_value_or_its_logarithm() -> None:
    space = parse_space({
        "filter.p0": {**P0, "median": 0.1, "spread": 2.0},
        "filter.mean.gamma": {"low": 0.0, "high": 2.0, "median": 0.7, "spread": 0.5},
        "filter.gate": GATE,
        "observation.0.r0": P0,
    })
    assert space.log_prior({"filter.p0": 0.1, "filter.mean.gamma": 0.7, "filter.gate": "skip"}) == 0
    assert space.log_prior({"filter.p0": 0.1 * exp(3), "observation.0.r0": 1.0}) == pytest.approx(-0.5 * 1.5**2)
    assert space.log_prior({"filter.p0": 0.1 * exp(-1), "filter.mean.gamma": 1.7}) == pytest.approx(-0.125 - 2.0)
    assert plain_space(parse_space(plain_space(space))) == plain_space(space)
