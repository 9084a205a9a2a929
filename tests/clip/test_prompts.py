import pytest

from kngd_ray.clip._prompts import expand, resolve_templates
from kngd_ray.errors import UsageError


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


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {0}", "a {name}", "", "openai"])
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
