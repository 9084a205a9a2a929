"""Every wrong setting is one sentence that names it, what is allowed and, for a slip of the pen, what was meant."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kngd_ray.config import Config, load_config, to_yaml
from kngd_ray.errors import UsageError


def refusal(*settings: str, file: Path | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(file, list(settings))
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert caught.value.exit_code == 2
    return sentence


def test_an_option_of_a_choice_that_is_replaced_after_it() -> None:
    """It was dropped without a word, and the fit took the default."""
    for before, after in [
        ("adapter.width=32", "adapter=bottleneck"),
        ("observation.0.r0=7", "observation=log_likelihood,cosine"),
    ]:
        assert "is set before" in refusal(before, after)
        load_config(overrides=[after, before])
    settled = load_config(overrides=["adapter.width=32", "adapter={kind: bottleneck, width: 16}"])
    assert settled.adapter[0].width == 16
    assert load_config(overrides=["observation.0.r0=7", "observation=categorical"]).observation[0].r0 == 7


def test_wrong_setting(subtests: pytest.Subtests) -> None:
    for setting, words in [
        # misspelt: the nearest valid name
        ("data.shot=4", ["unknown key 'data.shot'", "did you mean data.shots?", "valid:", "train_domain"]),
        ("shot=4", ["unknown key 'shot'", "did you mean data.shots?"]),
        ("shots=4", ["unknown key 'shots'", "did you mean data.shots?"]),
        ("epoch=4", ["unknown key 'epoch'", "did you mean epochs?"]),
        ("filter.covariance.shrinkag=3", ["did you mean filter.covariance.shrinkage?"]),
        ("observation.0.r=1", ["unknown key 'observation.0.r'", "r0"]),
        ("tracking.url=x", ["did you mean tracking.uri?"]),
        ("filter.=3", ["unknown key 'filter.'"]),
        # unknown kinds and names
        ("filter.covariance=densse", ["filter.covariance is 'densse'", "did you mean dense?", "diagonal"]),
        ("adapter=bottelneck", ["adapter.0 is 'bottelneck'", "did you mean bottleneck?"]),
        ("observation=cosine,probabilty", ["observation.1", "did you mean probability?"]),
        ("noise.process=drift", ["noise.process is 'drift'", "random_walk"]),
        ("noise.process=5", ["noise.process is 5", "random_walk"]),
        ("filter.covariance=5", ["filter.covariance is 5", "valid: ", "dense, diagonal"]),
        ("filter.covariance={kind: [1]}", ["filter.covariance is [1]"]),
        ("filter.covariance={kind: {a: 1}}", ["filter.covariance is"]),
        ("adapter=null", ["adapter.0 is nothing"]),
        ("method=kalmann", ["method='kalmann'", "did you mean kalman?"]),
        ("baselines=adam", ["did you mean adamw?"]),
        ("preset=kf_clipp", ["there is no preset 'kf_clipp'", "did you mean kf_clip?", "a YAML file"]),
        ("preset=none.yaml", ["there is no configuration file none.yaml"]),
        ("data.on_bad_image=ignore", ["data.on_bad_image='ignore'", "'error' or 'skip'"]),
        ("optimizer.schedule=cosin", ["did you mean cosine?"]),
        # ill-typed
        ("data.shots=many", ["data.shots='many'", "valid integer"]),
        ("epochs=2.5", ["epochs=2.5", "fractional part"]),
        ("epochs=true", ["epochs=true", "expected int"]),
        ("epochs=null", ["epochs=None", "integer"]),
        ("data.shots=0-4", ["data.shots='0-4'", "integer"]),
        ("data.shots=12:30", ["data.shots='12:30'", "integer"]),
        ("filter.p0=12:30", ["filter.p0='12:30'", "number"]),
        ("seeds=4-0", ["seeds=4-0", "from less to more"]),
        ("seeds=0-99999", ["seeds=0-99999", "at most 10,000"]),
        ("trainer.use_gpu=maybe", ["trainer.use_gpu='maybe'", "true, auto or false"]),
        ("tracking.experiment=null", ["tracking.experiment=null", "quote it"]),
        ("filter.p0=true", ["filter.p0=true", "expected float"]),
        ("seeds=true", ["seeds=", "expected"]),
        ("seeds=a,b", ["seeds=['a', 'b']", "integer"]),
        ("seeds={}", ["seeds="]),
        ("tracking.enabled=maybe", ["tracking.enabled='maybe'", "boolean"]),
        ("trainer.name={a: 1}", ["trainer.name={'a': 1}", "string"]),
        ("data=3", ["data: expected settings of the form key: value, found 3"]),
        ("model=embedded", ["model: expected settings", "embedded"]),
        # out of range
        ("data.shots=0", ["shots is 0", "1 or more"]),
        ("data.test_fraction=1", ["test_fraction is 1.0", "between 0 and 1"]),
        ("data.classes=cat", ["classes names 1", "two or more"]),
        ("data.classes=cat,cat", ["twice"]),
        ("data.templates=[]", ["templates is empty"]),
        ("epochs=-1", ["epochs is -1", "0 or more"]),
        ("batch_size=-1", ["batch_size is -1", "0 for all shots"]),
        ("filter.p0=0", ["filter: p0 is 0.0", "above 0"]),
        ("filter.p0=.inf", ["filter.p0=inf", "finite"]),
        ("optimizer.lr=inf", ["optimizer.lr=inf", "finite"]),
        ("noise.process.q=.nan", ["noise.process.q=nan", "finite"]),
        ("noise.process.q=-1", ["noise.process: q is -1.0", "0 or more"]),
        ("observation.0.r0=0", ["observation.0: r0 is 0.0", "above 0"]),
        ("optimizer.lr=0", ["optimizer: lr is 0.0", "above 0"]),
        ("optimizer.momentum=1", ["momentum is 1.0", "[0, 1)"]),
        ("optimizer.weight_decay=-1", ["weight_decay is -1.0", "0 or more"]),
        ("posterior.folds=1", ["posterior: folds is 1", "2 or more, or 0"]),
        ("posterior.draws=0", ["draws is 0", "at least 1"]),
        ("posterior.temperature=-1", ["temperature is -1.0", "0 or more"]),
        ("seeds=[]", ["seeds is empty"]),
        ("seeds=1,1", ["seeds is [1, 1]", "must differ"]),
        (f"seeds={2**63}", [f"seeds is [{2**63}]", "below 2^63"]),
        ("seeds=-1", ["seeds is [-1]", "0 or more"]),
        ("baselines=adamw,adamw", ["baselines is ['adamw', 'adamw']", "each method once"]),
        ("prior=''", ["prior is empty", "name a run"]),
        ("adapter=[]", ["adapter is empty", "class_residual"]),
        ("observation=[]", ["observation is empty", "cosine"]),
        ("trainer.num_workers=-1", ["num_workers is -1", "0 or more"]),
        ("trainer.num_workers=[2,1]", ["num_workers is [2, 1]", "a pair [least, most]"]),
        ("trainer.num_workers=[0,2]", ["num_workers is [0, 2]", "of 1 or more"]),
        ("trainer.num_workers=[1,2,3]", ["num_workers is [1, 2, 3]", "a number, or a pair"]),
        ("trainer.num_workers=[]", ["num_workers is []", "a number, or a pair"]),
        ("trainer.num_workers=many", ["trainer.num_workers=['many']", "integer"]),
        ("trainer.cpus_per_worker=0", ["cpus_per_worker is 0", "more than 0"]),
        ("trainer.name=a/b", ["name is 'a/b'", "slashes"]),
        ("trainer.name=..", ["leading dot"]),
        # lists
        ("adapter.5.width=3", ["adapter.5.width", "1 elements", "from 0"]),
        ("adapter={width: 3}", ["adapter.0.width is an option of adapter.0=bottleneck", "adapter.0 is class_residual"]),
        # malformed
        ("shots", ["'shots' is neither"]),
        ("=3", ["'=3' is neither"]),
        ("epochs=[1", ["the value of epochs is not valid YAML", "quote it"]),
        ("trainer.name=[", ["the value of trainer.name is not valid YAML", "quote it"]),
        # of which a part would be dropped
        ("data.classes=[a, b] #c", ["the value of data.classes", "what follows a # is a comment there", "quote it"]),
        ("data.train_domain='a' #b", ["the value of data.train_domain", "is a comment there", "quote it"]),
        ("data.classes=[a #b, c]", ["the value of data.classes is not valid YAML", "quote it"]),
        ("data.classes=[&a b, c]", ["the value of data.classes", "&a is an anchor there", "quote it"]),
        ("data.train_domain=", ["data.train_domain= has no value", "null for none"]),
        ("data.train_domain= ", ["data.train_domain= has no value", "null for none"]),
        ("adapter={kind: linear, kind: bottleneck}", ["the value of adapter has 'kind' twice", "leave one"]),
    ]:
        with subtests.test(setting):
            sentence = refusal(setting)
            for word in words:
                assert word in sentence, sentence


def test_one_of_several_elements_needs_its_number() -> None:
    sentence = refusal("observation=[log_likelihood,cosine]", "observation.r0=3")
    assert "observation.r0" in sentence
    assert "2 elements" in sentence


def test_a_variance_that_is_given_twice() -> None:
    sentence = refusal("filter.p0=0.3", "filter.logit_variance=1000")
    assert "p0 is 0.3 and logit_variance 1000.0" in sentence
    assert "leave out p0 (of weights) or logit_variance (of logits)" in sentence
    assert load_config(None, ["filter.p0=0.3"]).filter.p0 == 0.3
    assert "logit_spread needs logit_variance" in refusal("filter.p0=0.3", "filter.logit_spread=1")
    assert "logit_spread needs logit_variance" in refusal("filter.logit_variance=null")


def test_bounds_of_choices() -> None:
    assert "beta is 1.0" in refusal("noise.observation=ema", "noise.observation.beta=1")
    assert "width is 0" in refusal("adapter=bottleneck", "adapter.width=0")
    assert "ratio is 2.0" in refusal("adapter=bottleneck", "adapter.ratio=2")
    assert "samples is -1" in refusal("observation=categorical", "observation.samples=-1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- epochs\n- 3", ["must hold `key: value` settings"]),
        ("just words", ["must hold `key: value` settings"]),
        ("1: 2", ["must hold `key: value` settings"]),
        ("epochs: 3\nseeds: [1, 2\n", ["not valid YAML at line 3"]),
        ("epochs: 3\nbatch_size: : 2", ["not valid YAML at line 2"]),
        ("epochs: !!python/object/apply:os.getcwd []", ["not valid YAML at line 1"]),
        ("trainer: {name: !!int x}", ["not valid YAML"]),
        ("data: {shot: 3}", ["unknown key 'data.shot'", "did you mean data.shots?"]),
        ("data:\n", ["data: expected settings", "None"]),
        ("data:\n  shots: 4\n  shots: 8\n", ["has data.shots twice, at lines 2 and 3", "leave one of them out"]),
        ("epochs: 4\nseeds: 1\n'epochs': 8\n", ["has epochs twice, at lines 1 and 3"]),
        ("data: {shots: 4}\ndata.shots: 8\n", ["has data.shots twice, at lines 1 and 2"]),
        ("data.shots: 8\nseeds: 1\ndata:\n  path: x\n  shots: 4\n", ["has data.shots twice, at lines 1 and 5"]),
        ("data: {shots: 4}\ndata: {path: x}\n", ["has data twice, at lines 1 and 2"]),
        (
            "filter: {covariance: {kind: dense}}\nfilter.covariance: diagonal\n",
            ["has filter.covariance twice, at lines 1 and 2"],
        ),
        ("adapter:\n- kind: linear\n- kind: bottleneck\n  kind: linear\n", ["has kind twice, at lines 3 and 4"]),
    ],
)
def test_wrong_file(tmp_path, text: str, words: list[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    sentence = refusal(file=path)
    for word in words:
        assert word in sentence, sentence
    if "YAML" in words[0] or "must hold" in words[0] or "twice" in words[0]:
        assert str(path) in sentence


def test_parts_of_one_setting_in_several_places_are_no_repetition(tmp_path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "filter: {covariance: diagonal}\nfilter.covariance.rule: vdekf\ndata: {shots: 4}\ndata.path: x\n"
        "adapter: [linear, bottleneck]\nadapter.1.width: 32\nnoise: {process: &q {kind: random_walk, q: 0.1}}\n"
    )
    config = load_config(path)
    assert (config.filter.covariance.rule, config.data.shots, config.data.path) == ("vdekf", 4, "x")
    path.write_text("data: {<<: {shots: 4, path: x}, shots: 8}\n")
    assert load_config(path).data.shots == 8, "a merge gives what the mapping does not say"


def test_missing_file_names_the_nearest(tmp_path) -> None:
    (tmp_path / "study.yaml").write_text("epochs: 1")
    assert "did you mean study.yaml?" in refusal(file=tmp_path / "stduy.yaml")
    assert "there is no configuration file" in refusal(file=tmp_path / "no" / "such" / "folder.yaml")
    assert "cannot be read" in refusal(file=tmp_path)


def test_bytes_that_are_no_text(tmp_path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(file=path)


# Two hundred settings that nobody thought of


def dotted(tree: dict[str, Any], above: str = "") -> list[str]:
    paths = []
    for key, value in tree.items():
        paths.append(above + key)
        if isinstance(value, dict):
            paths += dotted(value, f"{above}{key}.")
        elif isinstance(value, list):
            paths += [f"{above}{key}.{n}" for n in range(3)]
    return paths


PATHS = [*dotted(yaml.safe_load(to_yaml(Config()))), "kind", "a.b.c", "filter.covariance.rule", "adapter.0.width", ""]
VALUES = [
    "0", "1", "-1", "2.5", "1e9", ".inf", ".nan", "true", "null", "~", "''", "dense", "cosine,linear", "a b", "[]",
    "[[]]", "{}", "[1, a, null]", "{kind: dense}", "{kind: ema, beta: [1]}", "{0: 1}", "{1.5: {a: b}}", "{null: 1}",
    "{true: 1}", "[{kind: bottleneck, width: {}}]", "2024-01-05", "2024-02-30", "12:30:45", "0x1F", "0o8",
    "!!binary aGk=",
    "!!set {a}", "&x 1", "*x", "=", "<<", "- 1", "? a", "é", "%", "'{}'", "{adapter.0.width: 3}", "{kind: null}",
]  # fmt: skip


def random_tree(dice: random.Random, depth: int) -> Any:
    if depth == 0 or dice.random() < 0.3:
        return dice.choice([0, 1, -3, 2.5, "dense", "ema", "", None, True, float("inf"), [], {}])
    if dice.random() < 0.3:
        return [random_tree(dice, depth - 1) for _ in range(dice.randrange(3))]
    names = re.findall(r"\w+", " ".join(PATHS))
    return {dice.choice(names): random_tree(dice, depth - 1) for _ in range(dice.randrange(4))}


def test_nothing_but_a_usage_error(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for seed in range(200):
        with subtests.test(seed=seed):
            check_random_settings(tmp_path, seed)


def check_random_settings(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    settings = [f"{dice.choice(PATHS)}={dice.choice(VALUES)}" for _ in range(dice.randrange(1, 4))]
    tree = random_tree(dice, 4)
    path = tmp_path / "random.yaml"
    path.write_text(yaml.safe_dump(tree))
    for file, overrides in ((None, settings), (path, []), (path, settings)):
        try:
            config = load_config(file, overrides)
        except UsageError:
            continue
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(config))
        assert load_config(again) == config


def test_noise_of_a_likelihood_needs_one() -> None:
    with pytest.raises(UsageError, match="no observation has a likelihood that sets its noise"):
        load_config(overrides=["observation=cosine", "noise.observation=categorical"])
    assert load_config(overrides=["observation=probability", "noise.observation=categorical"])


def test_the_gate_is_closed_by_a_word_that_yaml_leaves_alone() -> None:
    assert load_config(overrides=["filter.gate=skip", "filter.gate=none"]).filter.gate.kind == "none"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("filter.gate.quantile=0.9", "filter.gate.quantile is an option of filter.gate=inflate or skip"),
        ("noise.process.gamma=0.9", "noise.process.gamma is an option of noise.process=ornstein_uhlenbeck"),
        ("filter.covariance.rank=4", "filter.covariance.rank is an option of filter.covariance=diagonal_low_rank"),
    ],
)
def test_an_option_of_another_choice_names_it(setting: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}.*set that as well"):
        load_config(overrides=[setting])
