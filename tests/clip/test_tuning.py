"""The options of training towers, and the names that patterns select."""

import pytest

from kngd_ray.clip import TuneOptions
from kngd_ray.clip._tuning import matches, select
from kngd_ray.errors import ModelError

NAMES = ["visual.conv1", "visual.transformer.resblocks.0.attn", "visual.transformer.resblocks.10.attn", "ln_final"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parameters": "some"}, "parameters is 'some'; it must be one of adapter, lora, norm, full"),
        ({"augment": "flip"}, "augment is 'flip'"),
        ({"precision": "float16"}, "precision is 'float16'; it must be one of float32, bfloat16"),
        ({"include": "visual"}, r"include is 'visual'; it must be a list, such as \['visual'\]"),
        ({"include": ()}, "include is empty"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("q", "w")}, "targets has 'w'; each must be one of q, k, v, out, mlp, proj, pointwise"),
        ({"rank": 0}, "rank is 0"),
        ({"scaling": 0.0}, "scaling is 0.0"),
        ({"scaling": float("inf")}, "scaling is inf"),
        ({"scaling": float("nan")}, "scaling is nan"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale is \(0.0, 1.0\)"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"crop_scale": (0.5,)}, "crop_scale"),
        ({"alpha": 1.5}, r"alpha is 1.5; it must lie in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_refused_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        TuneOptions(**wrong)


def test_only_adapters_do_without_images():
    assert not TuneOptions().images
    assert TuneOptions(parameters="lora").images
    assert TuneOptions(parameters="full").images


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("*", NAMES),
        ("visual.*", NAMES[:3]),
        ("visual", NAMES[:3]),
        ("visual.transformer.resblocks.1", []),
        ("visual.transformer.resblocks.1?", NAMES[2:3]),
        ("*.attn", NAMES[1:3]),
        ("vis", []),
        ("ln_final", NAMES[3:]),
    ],
)
def test_patterns(pattern, selected):
    assert [name for name in NAMES if matches(name, [pattern])] == selected


def test_excluded_names_are_left_out():
    options = TuneOptions(include=("ln_final", "visual"), exclude=("*.attn",))
    assert select(NAMES, options, "layer") == ["visual.conv1", "ln_final"]


@pytest.mark.parametrize("also", [(), ("ln_final",)])
def test_a_pattern_without_match_names_the_nearest(also):
    with pytest.raises(ModelError) as error:
        select(NAMES, TuneOptions(include=(*also, "visual.transfomer.*")), "layer")
    assert str(error.value).startswith(
        "tune.include: no layer matches 'visual.transfomer.*'; the nearest are visual.transformer or "
    )


def test_everything_excluded_is_an_error():
    with pytest.raises(ModelError, match=r"tune\.exclude: every weight that tune.include selects is excluded by vis"):
        select(NAMES, TuneOptions(exclude=("visual",)), "weight")
