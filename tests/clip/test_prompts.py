import pytest

from kngd_ray.clip._prompts import (
    called_alike,
    called_missing,
    check_names,
    expand,
    in_words,
    resolve_templates,
    said_otherwise,
    same_sentences,
    worded,
)
from kngd_ray.errors import DataError, UsageError


def test_every_class_in_every_template_with_underscores_as_spaces():
    prompts = expand(["tabby_cat", "dog"], ["a photo of a {}.", "{} icon"])
    assert prompts == [["a photo of a tabby cat.", "tabby cat icon"], ["a photo of a dog.", "dog icon"]]


def test_one_string_is_one_template():
    assert expand(["dog"], "a {}") == [["a dog"]]


def test_braces_of_a_class_name_are_text():
    assert expand(["{}", "{x}"], ["a {}"]) == [["a {}"], ["a {x}"]]


@pytest.mark.parametrize(("name", "count"), [("openai_imagenet", 80), ("simple_imagenet", 7)])
def test_a_single_name_selects_a_set(name, count):
    for templates in (name, [name]):
        resolved = resolve_templates(templates)
        assert len(resolved) == count
        assert all(template.count("{}") == 1 for template in resolved)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {0}", "a {names}", "{name} {}", "", "openai"])
def test_a_template_without_exactly_one_place_is_refused(template):
    with pytest.raises(UsageError, match=r"needs exactly one \{\}") as error:
        expand(["dog"], ["a {}", template])
    assert repr(template) in str(error.value)


def test_a_set_does_not_mix_with_templates():
    with pytest.raises(UsageError, match="alone"):
        resolve_templates(["openai_imagenet", "a {}"])


def test_no_template_is_refused():
    with pytest.raises(UsageError, match="no prompt template"):
        resolve_templates([])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("AnnualCrop", "Annual Crop"),
        ("annualCrop", "annual Crop"),
        ("BirdOfPrey", "Bird Of Prey"),
        ("DenseResidential_Area", "Dense Residential Area"),
        ("Sea_Lake", "Sea Lake"),
        ("b'bird'", "bird"),
        (r"b'v\xc3\xb6gel'", "vögel"),
        ("'sea bird'", "sea bird"),
        *(
            (name, name)
            for name in ("F-16A", "BMW", "SUVs", "iPhone", "McDonald", "Boeing 737-800", "A380", "it's", "'tis", "dog")
        ),
    ],
)
def test_names_that_look_like_code_are_said_in_words(name, said):
    assert in_words(name) == said
    templates = worded(["a {}.", "{} icon", "{name}!"], [name, "x_y"])
    assert expand([name], templates) == [[f"a {said}.", f"{said} icon", f"{name.replace('_', ' ')}!"]]
    assert expand(["x_y"], templates)[0][0] == "a x y."
    assert (said_otherwise([name], templates) is None) == (said == name.replace("_", " "))


def test_templates_say_how_names_are_said():
    assert worded(("a {}.",), ["sea_bird", "dog"]) == ("a {}.",), "as ever"
    assert worded("openai_imagenet", ["dog"]) == ("openai_imagenet",)
    assert len(worded("openai_imagenet", ["SeaLake"])) == 80
    assert same_sentences(["a {words}."], "a {}.")
    assert same_sentences(worded("simple_imagenet", ["SeaLake"]), "simple_imagenet")
    assert not same_sentences(["a {words}."], "the {}.")
    line = said_otherwise(["SeaLake", "dog", *(f"Sea{c}ake" for c in "BCDFG")], ("a {words}",))
    assert "SeaLake as 'Sea Lake'" in line
    assert "and 2 more" in line


def test_a_class_called_as_missing_values_are_is_said():
    assert called_missing(["dog", "Nan", "nonesuch"]) is None
    for name in ("nan", "None", "<NA>"):
        assert f"a class called {name!r}" in called_missing(["dog", name])


@pytest.mark.parametrize("name", ["['bird']", "('bird', 'cat')", '["bird"]', "{'a': 1}", "", " "])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(DataError, match="a class is called"):
        check_names(["dog", name])
    check_names(["[x]", "bird (male)", "{}"])


def test_names_that_differ_by_case_or_spaces() -> None:
    assert called_alike(["cat", "catfish", "sea bird", "seabird"]) is None
    line = called_alike(["Cat", "cat ", "dog", "sea  bird", "Sea bird"])
    assert line is not None
    assert line.startswith(
        "names of classes differ by case, spaces or the form of accents alone, 'Cat' and 'cat ', "
        "'sea  bird' and 'Sea bird':"
    )
    assert line.endswith(": if they are one class, give it one name")
    line = called_alike(["caf\u00e9", "cafe\u0301", "tea"])  # as Linux and as macOS write it
    assert line is not None
    assert r"'caf\u00e9' and 'cafe\u0301'".replace(r"\u00e9", "\u00e9") in line
