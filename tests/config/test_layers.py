"""Layers of settings: what wins, how choices and lists are written, and the way back to YAML."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from kngd_ray.clip.adapters import Bottleneck, ClassResidual, Linear
from kngd_ray.config import (
    Config,
    TrainerConfig,
    baseline_config,
    flatten,
    load_config,
    override,
    parse,
    parse_override,
    to_yaml,
)
from kngd_ray.configs import names
from kngd_ray.configs._presets import read_preset
from kngd_ray.errors import UsageError
from kngd_ray.filters import Calibrated, Dense, Diagonal, Ema, Fixed, Kronecker, RandomWalk, ZeroShot
from kngd_ray.observations import Categorical, Cosine, LogLikelihood, Probability
from kngd_ray.training.options import FilterOptions, FitOptions
from kngd_ray.training.predict import PosteriorOptions


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# What wins


def test_the_default_is_the_preset_of_the_default_method() -> None:
    assert load_config().method == load_config().preset == "kalman"
    assert load_config() == load_config(None, ["preset=kalman"])


def test_defaults_of_the_dataclasses_are_one_variance_a_weight_in_units_of_weights() -> None:
    """The presets of towers build on them, and are not to change with the preset that is the default."""
    defaults = Config()
    assert defaults.adapter == (ClassResidual(),)
    assert defaults.observation == (LogLikelihood(r0=1.0), Cosine(r0=1.0))
    assert defaults.filter == FilterOptions(covariance=Diagonal(rule="ekf"))
    assert defaults.filter.weight_variance == 0.1


def test_each_layer_wins_over_those_below(file) -> None:
    assert load_config().batch_size == 0
    assert load_config(None, ["preset=loko"]).batch_size == 8
    assert load_config(None, ["preset=loko"]).epochs == 1
    path = file("preset: loko\nepochs: 7")
    assert load_config(path).epochs == 7
    assert load_config(path).batch_size == 8, "what the file does not say is the preset's"
    assert load_config(path, ["epochs=9"]).epochs == 9
    assert load_config(path, ["epochs=9", "epochs=11"]).epochs == 11
    assert load_config(path, ["epochs=9"], forced={"epochs": 2}).epochs == 2


def test_a_preset_named_later_replaces_one_named_earlier(file) -> None:
    path = file("preset: loko\nepochs: 7")
    config = load_config(path, ["preset=kf_clip"])
    assert config.preset == "kf_clip"
    assert config.epochs == 7
    assert config.observation == (Cosine(r0=2.5, per="logit"),)


def test_a_method_brings_its_own_preset_unless_one_is_named() -> None:
    assert load_config(None, ["method=sgd"]).optimizer.lr == 0.02
    assert load_config(None, ["method=sgd"]).preset == "sgd"
    config = load_config(None, ["method=sgd", "preset=adamw"])
    assert (config.method, config.preset, config.optimizer.lr) == ("sgd", "adamw", 3e-3)


def test_a_preset_file_may_build_on_another(file, tmp_path: Path) -> None:
    """Its own `preset` was passed over, and the rest taken of the library's defaults."""
    inner, outer = tmp_path / "inner.yaml", tmp_path / "outer.yaml"
    inner.write_text("preset: kf_clip\nepochs: 2\n")
    outer.write_text(f"preset: {inner}\nbatch_size: 5\n")
    config = load_config(None, [f"preset={outer}"])
    assert replace(config, preset="kf_clip") == load_config(None, ["preset=kf_clip", "epochs=2", "batch_size=5"])
    assert config.preset == str(outer)
    inner.write_text(f"preset: {outer}\n")
    with pytest.raises(
        UsageError, match=r"presets name one another in a circle: .*outer\.yaml -> .*inner\.yaml -> .*outer"
    ):
        load_config(None, [f"preset={outer}"])


@pytest.mark.parametrize(("method", "preset"), [("adamw", "kalman"), ("kalman", "adamw"), ("sgd", "kf_clip")])
def test_a_preset_of_another_kind_of_method_is_refused(method: str, preset: str) -> None:
    """AdamW for the filter's one step, or the filter on defaults that nobody chose."""
    with pytest.raises(
        UsageError, match=f"^preset {preset} is for method=(kalman|adamw), and method is {method}: leave"
    ):
        load_config(None, [f"method={method}", f"preset={preset}"])


def test_a_preset_may_be_a_file(file) -> None:
    base = file("epochs: 3\nmethod: adamw", "base.yaml")
    config = load_config(file("batch_size: 5"), [f"preset={base}"])
    assert (config.epochs, config.batch_size, config.method) == (3, 5, "adamw")
    assert config.preset == str(base)


def test_several_files_the_later_wins(file) -> None:
    files = [file("epochs: 3\nbatch_size: 6", "a.yaml"), file("epochs: 4", "b.yaml")]
    assert (load_config(files).epochs, load_config(files).batch_size) == (4, 6)


def test_an_empty_file_changes_nothing(file) -> None:
    assert load_config(file("# nothing yet\n")) == load_config()


def test_dotted_keys_in_a_file_mean_what_they_mean_on_the_command_line(file) -> None:
    settings = ["adapter=bottleneck", "adapter.width=8", "observation.0.r0=2", "filter.covariance.shrinkage=3"]
    path = file("adapter: bottleneck\nadapter.width: 8\nobservation.0.r0: 2\nfilter.covariance.shrinkage: 3")
    assert load_config(path) == load_config(None, settings)


# Choices


def test_a_bare_name_is_short_for_its_kind() -> None:
    for setting in ("dense", "{kind: dense}"):
        assert load_config(None, [f"filter.covariance={setting}"]).filter.covariance == Dense()
    assert load_config(None, ["filter.covariance.kind=dense"]).filter.covariance == Dense()
    assert load_config(None, ["noise.observation=ema", "noise.observation.beta=0.5"]).noise.observation == Ema(beta=0.5)


def test_an_option_keeps_the_kind() -> None:
    diagonal = load_config(None, ["preset=kalman_diagonal", "filter.covariance.rule=vdekf"])
    assert diagonal.filter.covariance == Diagonal(rule="vdekf")
    kronecker = load_config(None, ["filter.covariance.shrinkage=3"])
    assert kronecker.filter.covariance == Kronecker(columns="function", shrinkage=3.0)
    assert load_config(None, ["noise.process.q=1e-4"]).noise.process == RandomWalk(q=1e-4)


def test_a_new_kind_drops_options_of_earlier_layers(file) -> None:
    config = load_config(None, ["filter.covariance.shrinkage=3", "filter.covariance=dense"])
    assert config.filter.covariance == Dense()
    config = load_config(None, ["filter.covariance=diagonal"])
    assert config.filter.covariance == Diagonal(), "columns and shrinkage were the preset's"
    config = load_config(None, ["preset=loko", "noise.observation=fixed"])
    assert config.noise.observation == Fixed(), "beta and form were the preset's"
    path = file("preset: loko\nnoise: {observation: fixed}")
    assert load_config(path).noise.observation == Fixed()
    assert load_config(path, ["noise.observation=ema"]).noise.observation == Ema(beta=0.95, form="diagonal")


def test_shared_options_outlive_a_new_kind() -> None:
    config = load_config(None, ["observation=cosine", "observation.r0=7", "observation.0=probability"])
    assert config.observation == (Probability(r0=7.0),)


def test_gamma_is_not_shared_by_prior_means() -> None:
    """Of one it is CLIP's own logits at 1, of the other where they are calibrated."""
    assert load_config(None, ["filter.mean=zero_shot"]).filter.mean == ZeroShot(gamma=1.0)
    assert load_config(None, ["filter.mean=zero_shot", "filter.mean.gamma=0.5"]).filter.mean == ZeroShot(gamma=0.5)
    assert load_config(None, ["preset=loko"]).filter.mean == ZeroShot(gamma=0.85)
    assert load_config(None, ["preset=loko", "filter.mean=calibrated"]).filter.mean == Calibrated()
    assert load_config(None, ["preset=loko", "filter.mean=zero_shot"]).filter.mean == ZeroShot(gamma=0.85), "the same"
    for nested in ("filter={mean: zero_shot}", "filter.mean={kind: zero_shot}", "filter.mean.kind=zero_shot"):
        assert load_config(None, [nested]).filter.mean == ZeroShot(gamma=1.0)
    assert override(load_config(), {"filter.mean": "zero_shot"}).filter.mean == ZeroShot(gamma=1.0)


def test_a_variance_in_a_mapping_takes_the_place_of_the_other() -> None:
    assert load_config(None, ["filter={p0: 0.5}"]).filter == load_config(None, ["filter.p0=0.5"]).filter


def test_an_option_that_the_new_kind_lacks_is_refused_in_its_own_layer() -> None:
    for settings in (
        ["filter.covariance=dense", "filter.covariance.rule=vdekf"],
        ["filter.covariance={kind: dense, rule: vdekf}"],
    ):
        with pytest.raises(UsageError, match=r"^filter\.covariance\.rule is an option of filter\.covariance=diagonal"):
            load_config(None, settings)


# Lists


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["adapter=linear"], (Linear(),)),
        (["adapter=linear,class_residual"], (Linear(), ClassResidual(bias=True))),
        (["adapter=linear, class_residual"], (Linear(), ClassResidual(bias=True))),
        (["adapter=[linear, bottleneck]", "adapter.1.width=8"], (Linear(), Bottleneck(width=8))),
        (["adapter=linear,bottleneck", "adapter.1.width=8"], (Linear(), Bottleneck(width=8))),
        (["adapter=bottleneck", "adapter.width=8"], (Bottleneck(width=8),)),
        (["adapter=bottleneck", "adapter.0.width=8"], (Bottleneck(width=8),)),
        (["adapter=[{kind: bottleneck, width: 8}]", "adapter={ratio: 0.25}"], (Bottleneck(width=8, ratio=0.25),)),
        (["adapter={kind: bottleneck, width: 8}"], (Bottleneck(width=8),)),
        (["preset=kf_clip", "adapter.centred=true"], (ClassResidual(bias=True, centred=True),)),
        (["adapter=bottleneck", "adapter.width=8", "adapter.0.ratio=1"], (Bottleneck(width=8, ratio=1.0),)),
        (["adapter.0=linear"], (Linear(),)),
        (["adapter.bias=false"], (ClassResidual(),)),
        (["adapter.kind=linear"], (Linear(),)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_lists_of_choices(settings: list[str], expected: tuple[Any, ...]) -> None:
    assert load_config(None, settings).adapter == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("observation=cosine", (Cosine(r0=2.5, per="logit"),)),
        ("observation=[cosine]", (Cosine(r0=2.5, per="logit"),)),
        ("observation=log_likelihood,cosine", (LogLikelihood(), Cosine(r0=2.5, per="logit"))),
        ("observation=cosine, cosine", (Cosine(r0=2.5, per="logit"), Cosine())),
        ("observation=[{kind: cosine}]", (Cosine(),)),
        ("observation=log_likelihood", (LogLikelihood(),)),
    ],
)
def test_a_name_that_the_list_had_keeps_its_options(setting: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    assert load_config(None, ["preset=kf_clip", setting]).observation == expected
    one = ["adapter={kind: bottleneck, width: 8}", "adapter=linear,bottleneck"]
    assert load_config(None, one).adapter == (Linear(), Bottleneck(width=8)), "a choice is a list of one"
    own = tmp_path / "own.yaml"
    own.write_text("filter: {covariance: dense}")
    assert load_config(None, [f"preset={own}"]).observation[1] == Cosine(r0=1.0)
    bare = load_config(None, [f"preset={own}", "observation=cosine"]).observation
    assert bare == (Cosine(),), "the defaults of a list say nothing of its kinds"


@pytest.mark.parametrize("given", ["dense,diagonal", "[dense, {kind: diagonal}]"])
def test_several_names_are_no_choice(given: str) -> None:
    with pytest.raises(UsageError, match=r"^filter\.covariance is \['dense', 'diagonal'\] \(valid: block_diagonal"):
        load_config(None, ["preset=kalman_diagonal", f"filter.covariance={given}"])


def test_elements_by_number() -> None:
    both = "observation=[{kind: log_likelihood, r0: 1.0}, {kind: cosine, r0: 3.0}]"
    config = load_config(None, [both, "observation.0.r0=2", "observation.1=categorical"])
    assert config.observation == (LogLikelihood(r0=2.0), Categorical(r0=3.0)), "of the second, r0 stays"


@pytest.mark.parametrize(
    ("setting", "seeds"), [("0,1,2", (0, 1, 2)), ("[3, 1]", (3, 1)), ("4", (4,)), ("' 5 , 6'", (5, 6))]
)
def test_lists_of_numbers(setting: str, seeds: tuple[int, ...]) -> None:
    assert load_config(None, [f"seeds={setting}"]).seeds == seeds


def test_a_number_in_a_list() -> None:
    assert load_config(None, ["seeds=0,1", "seeds.1=4"]).seeds == (0, 4)


def test_lists_of_texts() -> None:
    config = load_config(None, ["data.classes=cat,dog", "data.ood_domains=sketch"])
    assert config.data.classes == ("cat", "dog")
    assert config.data.ood_domains == ("sketch",)
    assert load_config(None, ["data.path=[a, b]"]).data.path == ("a", "b")
    prompt = "a photo of a {}, a kind of pet."
    assert load_config(None, [f"data.templates='{prompt}'"]).data.templates == (prompt,)
    assert load_config(None, ["data.templates=openai_imagenet"]).data.templates == ("openai_imagenet",)


# There and back


SOME = [
    [],
    ["preset=loko", "seeds=0,1"],
    ["preset=kf_clip", "adapter=bottleneck,linear", "adapter.0.width=3", "baselines=adamw,sgd"],
    ["method=sgd", "data.classes=a,b", "data.ood_domains=[]", "trainer.address=auto", "trainer.name=x"],
    ["observation=categorical", "observation.samples=2", "filter.covariance=dense", "posterior.temperature=0.5"],
]


@pytest.mark.parametrize("settings", SOME, ids=" ".join)
def test_yaml_loads_back(file, settings: list[str]) -> None:
    config = load_config(None, settings)
    assert load_config(file(to_yaml(config))) == config
    assert set(yaml.safe_load(to_yaml(config))) == set(Config.__dataclass_fields__)


def test_parse_validates_plain_data() -> None:
    assert parse(TrainerConfig, {"num_workers": 3}) == TrainerConfig(num_workers=3)
    with pytest.raises(UsageError, match="did you mean num_workers"):
        parse(TrainerConfig, {"num_worker": 3})


@pytest.mark.parametrize(
    ("given", "kept", "least", "most", "shown"),
    [
        ("3", 3, 3, 3, 3),
        ("0", 0, 0, 0, 0),
        ("[1, 2]", (1, 2), 1, 2, "1,2"),
        ("1,4", (1, 4), 1, 4, "1,4"),
        ("[2, 2]", 2, 2, 2, 2),
        ("[2]", 2, 2, 2, 2),
    ],
)
def test_workers_are_a_number_or_a_range(
    file, given: str, kept: int | tuple[int, int], least: int, most: int, shown: int | str
) -> None:
    config = load_config(None, [f"trainer.num_workers={given}"])
    trainer = config.trainer
    assert trainer.num_workers == kept
    assert trainer == TrainerConfig(num_workers=kept)
    assert (trainer.least_workers, trainer.most_workers) == (least, most)
    assert flatten(config)["trainer.num_workers"] == shown
    assert load_config(file(to_yaml(config))) == config


def test_flat_names() -> None:
    flat = flatten(load_config(None, ["seeds=0,1", "noise.observation=ema", "data.classes=a,b"]))
    assert flat["filter.covariance"] == "kronecker"
    assert flat["filter.covariance.columns"] == "function"
    assert flat["filter.logit_variance"] == 1000.0
    assert flat["filter.p0"] is None
    assert flat["filter.mean"] == "calibrated"
    assert flat["filter.mean.gamma"] == 0.7
    assert flat["noise.process"] == "random_walk"
    assert flat["noise.process.q"] == 0.0
    assert flat["noise.observation"] == "ema"
    assert flat["noise.observation.beta"] == 0.9
    assert flat["observation.0"] == "categorical"
    assert flat["observation.0.r0"] == 1.0
    assert flat["adapter.0"] == "class_residual"
    assert flat["adapter.0.bias"] is True
    assert flat["seeds"] == "0,1"
    assert flat["data.classes"] == "a,b"
    assert flat["trainer.num_workers"] == 2
    assert all(not isinstance(value, (dict, list, tuple)) for value in flat.values())


def test_overrides_are_yaml() -> None:
    assert parse_override("a.b=[1, x]") == ("a.b", [1, "x"])
    assert parse_override("a=null") == ("a", None)
    assert parse_override("a=''") == ("a", "")
    assert parse_override("a=b=c") == ("a", "b=c")
    assert parse_override("data.path=*.parquet") == ("data.path", "*.parquet")
    assert parse_override("a=!!str 007") == ("a", "007")


@pytest.mark.parametrize(
    "text",
    [
        "run #2", "/sets/set.parquet #2", "it's #1", "5 #b", "a#b", "#x", "# x", "&x", "&x 1", "& co", "*.parquet",
        "!x", "|x", ">x", ">", "%x", "@home", "`x`", "--- x", "---",
    ],
)  # fmt: skip
def test_what_yaml_would_drop_of_a_text_stays(text: str) -> None:
    """As it is typed, so that no comment cuts a path short and no mark turns a domain into null."""
    assert parse_override(f"a={text}") == ("a", text)
    assert load_config(None, [f"data.train_domain={text}"]).data.train_domain == text


def test_quotes_lists_and_mappings_are_still_yaml() -> None:
    assert parse_override("a='b #c'") == ("a", "b #c")
    assert parse_override("a=['#b', c#d, &e 1, *e] ") == ("a", ["#b", "c#d", 1, 1])
    assert parse_override("a={kind: '#x', b: [1]}") == ("a", {"kind": "#x", "b": [1]})
    assert parse_override("a=|\n b #c\n d") == ("a", "b #c\nd")


# Presets and baselines


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            "kalman",
            {
                "method": "kalman",
                "epochs": 1,
                "batch_size": 0,
                "adapter": (ClassResidual(bias=True),),
                "observation": (Categorical(r0=1.0),),
                "covariance": Kronecker(columns="function", shrinkage=0.3, offset=0.01, bias=0.1),
                "variance": (None, 1000.0, 2.0),
                "mean": Calibrated(gamma=0.7, rise=0.5, fall=0.05),
                "at_mode": True,
                "iterations": 60,
                "tempering": "none",
                "r": Fixed(),
                "posterior": PosteriorOptions(
                    predict="linearised", tau_median=3e-4, tau_spread=1.5, sharpening_spread=0.1
                ),
            },
        ),
        (
            "kalman_diagonal",
            {
                "method": "kalman",
                "epochs": 5,
                "adapter": (ClassResidual(centred=True),),
                "observation": (LogLikelihood(r0=1.0),),
                "covariance": Diagonal(rule="ekf"),
                "iterations": 3,
                "tempering": "passes",
                "r": Fixed(),
                "posterior": PosteriorOptions(predict="linearised", tau_median=0.01, tau_spread=1.0),
            },
        ),
        (
            "kf_clip",
            {
                "method": "kalman",
                "epochs": 1,
                "adapter": (ClassResidual(bias=True),),
                "observation": (Cosine(r0=2.5, per="logit"),),
                "covariance": Kronecker(columns="function", shrinkage=1.0, offset=0.01, bias=0.5),
                "iterations": 1,
                "tempering": "none",
                "r": Fixed(),
                "posterior": PosteriorOptions(predict="linearised", tau_median=0.01, tau_spread=1.0),
            },
        ),
        (
            "loko",
            {
                "method": "kalman",
                "epochs": 1,
                "adapter": (ClassResidual(centred=True),),
                "observation": (Probability(r0=0.05),),
                "covariance": Diagonal(rule="ekf"),
                "iterations": 4,
                "tempering": "none",
                "r": Ema(beta=0.95, form="diagonal"),
                "posterior": PosteriorOptions(predict="linearised", tau_median=0.03, tau_spread=1.0),
            },
        ),
    ],
)
def test_filter_presets_are_what_their_comments_say(preset: str, expected: dict[str, Any]) -> None:
    config = load_config(None, [f"preset={preset}"])
    found = {
        "method": config.method,
        "epochs": config.epochs,
        "adapter": config.adapter,
        "observation": config.observation,
        "covariance": config.filter.covariance,
        "at_mode": config.at_mode,
        "iterations": config.filter.iterations,
        "tempering": config.noise.tempering,
        "r": config.noise.observation,
        "posterior": config.posterior,
        "batch_size": config.batch_size,
        "variance": (config.filter.p0, config.filter.logit_variance, config.filter.logit_spread),
        "mean": config.filter.mean,
    }
    assert {name: found[name] for name in expected} == expected
    assert config.noise.process == RandomWalk(q=0.0)


@pytest.mark.parametrize("preset", ["adamw", "sgd"])
def test_gradient_presets_are_what_their_comments_say(preset: str) -> None:
    config = load_config(None, [f"preset={preset}"])
    assert config.method == config.preset == preset
    assert config.epochs == 30
    assert config.adapter == (ClassResidual(),), "which beside a run is the run's, its bias included"
    assert baseline_config(load_config(), preset).adapter == load_config().adapter == (ClassResidual(bias=True),)
    assert config.optimizer.schedule == {"adamw": "constant", "sgd": "cosine"}[preset]
    assert (config.optimizer.momentum == 0.9) or preset == "adamw"


def test_every_preset_loads_and_is_tested() -> None:
    towers = [
        "adamw_full",
        "adamw_lora",
        "adamw_norm",
        "clip_cite",
        "clip_lora",
        "kalman_cite",
        "kalman_full",
        "kalman_lora",
        "kalman_norm",
        "sgd_full",
        "sgd_lora",
        "sgd_norm",
    ]
    assert names("presets") == sorted(["adamw", "kalman", "kalman_diagonal", "kf_clip", "loko", "sgd", *towers])
    for name in names("presets"):
        assert load_config(None, [f"preset={name}"]).preset == name
        # and of the filters of heads, how their posterior predicts; of towers, that a fold of a cross-validation
        # is not one more fit
        settings = set(read_preset(name)) - (
            {"posterior"} if name in ("kalman", "kalman_diagonal", "kf_clip", "loko", *towers) else set()
        )
        assert settings <= set(FitOptions.__dataclass_fields__), "a preset decides a fit, nothing else"


def test_a_preset_is_for_its_reader_alone() -> None:
    """It is parsed once, and stays as it is whatever one who has read it does."""
    before, options = read_preset("kalman"), load_config(None, ["preset=kalman"]).fit_options
    changed = read_preset("kalman")
    for key, value in changed.items():
        if isinstance(value, dict):
            value.clear()
        changed[key] = None
    names("presets").clear()
    assert read_preset("kalman") == before
    assert load_config(None, ["preset=kalman"]).fit_options == options


@pytest.mark.parametrize("method", ["kalman", "adamw", "sgd"])
@pytest.mark.parametrize("parameters", ["lora", "norm", "full"])
@pytest.mark.parametrize("nested", [False, True])
def test_towers_have_presets_of_their_own(method: str, parameters: str, nested: bool) -> None:
    tune = {"tune": {"parameters": parameters}} if nested else None
    overrides = [f"method={method}", *([] if nested else [f"tune.parameters={parameters}"])]
    config = load_config(tune, overrides)
    assert config.preset == f"{method}_{parameters}"
    assert config.tune.parameters == parameters
    other = "kf_clip" if method == "kalman" else "adamw"
    fit = [] if method == "kalman" else overrides
    assert load_config(tune if fit else None, [*fit, f"preset={other}"]).preset == other


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], True),
        (["filter.towers=0.1"], False),
        (["filter.p0=0.1"], False),
        (["filter.towers=0.1", "filter.tower_logit_variance=2"], True),
    ],
)
def test_the_prior_of_towers_is_of_weights_or_of_logits(given: list[str], expected: bool) -> None:
    config = load_config(None, ["method=kalman", "tune.parameters=full", *given])
    assert (config.filter.tower_logit_variance is not None) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["filter.tower_logit_variance=1"], "is for trained towers"),
        (["tune.parameters=lora", "filter.tower_logit_variance=-1"], "must be finite and 0 or more"),
        (["tune.parameters=lora", "filter.tower_logit_variance=.inf"], "expected a finite number"),
        (["tune.parameters=lora", "adapter=[]"], "there is no head to fit first"),
        (["tune.parameters=lora", "tune.start=here"], "head, zero_shot|start"),
    ],
)
def test_what_a_start_and_a_prior_of_towers_cannot_be(given: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(None, ["method=kalman", *given])


def test_a_baseline_trains_what_the_run_trains() -> None:
    config = load_config(None, ["tune.parameters=full", "tune.include=visual.head*", "baselines=adamw"])
    baseline = baseline_config(config, "adamw")
    assert baseline.preset == "adamw_full"
    assert baseline.tune == config.tune


def test_a_baseline_continues_from_the_same_prior() -> None:
    assert load_config().prior is None
    assert baseline_config(load_config(None, ["prior=first"]), "adamw").prior == "first"
    spread = load_config().posterior.sharpening_spread
    assert spread > baseline_config(load_config(), "adamw").posterior.sharpening_spread == 0, "as adamw by itself"


def test_a_baseline_differs_in_its_method_alone() -> None:
    settings = [
        "preset=kf_clip",
        "adapter=bottleneck",
        "adapter.width=8",
        "seeds=1,2",
        "data.shots=2",
        "batch_size=5",
        "epochs=3",
    ]
    config = load_config(None, [*settings, "trainer.num_workers=0", "posterior.folds=2", "baselines=adamw,sgd"])
    for method in ("adamw", "sgd"):
        baseline = baseline_config(config, method)
        own = load_config(None, [f"preset={method}"])
        assert (baseline.method, baseline.preset, baseline.baselines) == (method, method, ())
        assert (baseline.epochs, baseline.optimizer) == (own.epochs, own.optimizer)
        for name in ("seeds", "batch_size", "adapter", "data", "model", "posterior", "trainer", "tracking"):
            assert getattr(baseline, name) == getattr(config, name)


# What values mean: YAML 1.2, read as the setting asks

VALUES = [
    ("data.shots", "010", 10),
    ("data.shots", "0x10", 16),
    ("data.shots", "0o17", 15),
    ("data.shots", "1_000", 1000),
    ("data.shots", "+5", 5),
    ("data.shots", "1e3", 1000),
    ("filter.p0", "1e-3", 0.001),
    ("filter.p0", ".5", 0.5),
    ("filter.p0", "010", 10.0),
    ("seeds", "0-4", (0, 1, 2, 3, 4)),
    ("seeds", "0-2,7", (0, 1, 2, 7)),
    ("seeds", "[0-2, 07]", (0, 1, 2, 7)),
    ("seeds", "010", (10,)),
    ("trainer.num_workers", "1-2", (1, 2)),
    ("data.path", "no/such/a,no/such/b", ("no/such/a", "no/such/b")),
    ("data.path", "[a, b]", ("a", "b")),
    ("data.path", "2019", "2019"),
    ("data.train_domain", "2019", "2019"),
    ("data.train_domain", "1.50", "1.50"),
    ("data.ood_domains", "2019,2020", ("2019", "2020")),
    ("data.classes", "[1, 02, yes, true, 12:30]", ("1", "02", "yes", "true", "12:30")),
    ("prior", "2024", "2024"),
    *(("trainer.name", name, name) for name in ("007", "1e3", "0x10", "no", "True", "2024-02-30", "12:30", "1_000")),
    ("trainer.name", "~", None),
    ("trainer.name", "null", None),
    ("trainer.name", "'null'", "null"),
    ("tracking.experiment", "on", "on"),
    *(("tracking.enabled", word, False) for word in ("false", "no", "off", "NO", "0")),
    *(("trainer.use_gpu", word, True) for word in ("true", "yes", "on", "True", "1")),
]


def test_a_value_is_read_as_its_setting_asks_on_the_command_line_and_in_files(file, subtests: pytest.Subtests) -> None:
    for key, text, expected in VALUES:
        with subtests.test(f"{key}={text}"):
            section, _, name = key.rpartition(".")
            nested = f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}"
            if "," in text and text[0] != "[" and section:  # in a flow mapping a comma would end the value
                nested = f"{section}:\n  {name}: {text}"
            for config in (load_config(None, [f"{key}={text}"]), load_config(file(nested))):
                found: Any = config
                for part in key.split("."):
                    found = getattr(found, part)
                assert found == expected
                assert type(found) is type(expected)
                assert load_config(file(to_yaml(config), "again.yaml")) == config


def test_a_file_whose_name_has_a_comma_is_that_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b.parquet").touch()
    assert load_config(None, ["data.path=a,b.parquet"]).data.path == "a,b.parquet"


def test_texts_that_look_like_numbers_are_written_so_that_every_reader_takes_them_for_texts(file) -> None:
    names = ("0o7", "1e3", "no", "12:30", "1_000", "null", "true", "2024-01-05")
    text = to_yaml(load_config(None, ["data.classes=['" + "','".join(names) + "']"]))
    assert tuple(yaml.safe_load(text)["data"]["classes"]) == names
    assert load_config(file(text)).data.classes == names
