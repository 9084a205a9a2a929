"""What stands for a CLIP model where features are given: class embeddings, and what is refused of them."""

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from helpers.features import CLASSES, WIDTH, class_embeddings

from kngd_ray.clip import ModelConfig, PrecomputedModel, given_precomputed, load_model, load_precomputed
from kngd_ray.errors import ModelError


def given(array, classes=CLASSES, width=WIDTH, scale=100.0):
    return given_precomputed(np.asarray(array), classes, width, scale, "the array")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "classes.npy"


def loaded(file, classes=CLASSES, width=WIDTH):
    return load_precomputed(ModelConfig("precomputed", class_embeddings=str(file)), classes, width)


def test_classes_are_found_by_name(file):
    texts = class_embeddings()
    np.save(file, 7 * texts.astype(np.float64))
    model = loaded(file)
    assert (model.embed_dim, model.logit_scale, model.zero_shot) == (WIDTH, 100.0, True)
    found = model.encode_classes(["cow", "ant"])
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.from_numpy(texts[[2, 0]]), atol=1e-6)
    with pytest.raises(ModelError, match="no embedding for the class 'dog'"):
        model.encode_classes(["dog"])


def test_prompts_are_averaged_as_the_text_tower_does(vit):
    templates = ["a photo of a {}.", "a sketch of a {}.", "art of a {}."]
    prompts = vit.encode_texts([t.format(name) for name in CLASSES for t in templates]).view(3, 3, -1)
    expected = vit.encode_classes(CLASSES, templates)
    stretched = prompts * torch.tensor([1.0, 5.0, 0.2])[None, :, None]  # each prompt counts once, whatever its length
    found = given(stretched.numpy(), width=vit.embed_dim).encode_classes(CLASSES)
    assert torch.allclose(found, expected, atol=1e-6)


def test_what_was_written_is_the_same_model(file):
    model = given(np.random.default_rng(0).normal(size=(3, 4, WIDTH)))
    model.save(file)
    assert loaded(file).fingerprint == model.fingerprint
    assert model.identity == {"fingerprint": model.fingerprint, "embed_dim": WIDTH, "classes": list(CLASSES)}


def test_fingerprints_differ_with_what_counts():
    texts = class_embeddings()
    models = [given(texts), given(texts[::-1]), given(texts, scale=20.0), PrecomputedModel(CLASSES, None, WIDTH, 100.0)]
    models.append(PrecomputedModel(CLASSES, None, WIDTH + 1, 100.0))
    assert len({model.fingerprint for model in models}) == len(models)
    assert given(texts).fingerprint == given(texts[:, None]).fingerprint == models[0].fingerprint


def test_without_class_embeddings_all_are_zero(file):
    model = load_precomputed(ModelConfig("precomputed", logit_scale=30.0), CLASSES, 5)
    assert (model.zero_shot, model.logit_scale) == (False, 30.0)
    assert torch.equal(model.encode_classes(CLASSES), torch.zeros(3, 5))
    assert "classes" not in model.identity
    model.save(file)
    assert not file.exists()


TEXTS = class_embeddings()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (TEXTS[0], "it must be floats (C, d), or (C, T, d)"),
        (TEXTS[:0], "it must be floats (C, d)"),
        (TEXTS.astype(complex), "it must be floats"),
        (TEXTS.astype(str), "it must be floats"),
        (TEXTS[:, :5], "embeddings of length 5, and the features of the data have length 8: take both from one model"),
        (TEXTS[:2], "embeddings of 2 classes, and the data has 3"),
        (np.where(np.eye(3, 8) > 0, np.nan, TEXTS), "the class 'ant' holds NaN"),
        (TEXTS * np.array([[1], [np.inf], [1]]), "the class 'bee' holds infinity"),
        (TEXTS * np.array([[1], [1], [0]]), "the class 'cow' has length zero"),
        (np.stack([TEXTS, 0 * TEXTS], 1), "the class 'ant' has length zero"),
        (np.stack([TEXTS, -TEXTS], 1), "the mean over prompts"),
        (TEXTS[[0, 1, 1]] * np.array([[1], [1], [3]]), "the classes 'bee' and 'cow' the same embedding"),
    ],
)
def test_arrays_that_are_refused(array, says):
    with pytest.raises(ModelError, match=re.escape(says)) as caught:
        given(array)
    assert "the array" in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def archive(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.npy", content)
    return stream.getvalue()


def header(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array at all",
        pickle.dumps(Trap()),
        header("(2,)", "|O") + pickle.dumps([Trap(), Trap()]),
        archive(b"x"),
        header("(1000000000000, 8)"),
        header("(3, -8)"),
        header("'abc'"),
        header("(3, 8)")[:40],
        header("(3, 8)") + b"\0" * 7,
    ],
)
def test_files_that_are_refused(tmp_path, monkeypatch, file, content):
    monkeypatch.chdir(tmp_path)
    file.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(f"model.class_embeddings: {file}")) as caught:
        loaded(file)
    assert "numpy.save" in str(caught.value) or "floats (C, d)" in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_files_that_are_none(tmp_path, file):
    with pytest.raises(ModelError, match="does not exist"):
        loaded(file)
    with pytest.raises(ModelError, match="not a regular file"):
        loaded(tmp_path)
    os.mkfifo(file)
    with pytest.raises(ModelError, match="not a regular file"):
        loaded(file)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"logit_scale": 0.0}, "logit_scale is 0.0; it must be a positive number"),
        ({"logit_scale": -1.0}, "positive"),
        ({"logit_scale": float("nan")}, "positive"),
        ({"logit_scale": float("inf")}, "positive"),
        ({"pretrained": "openai"}, "has no towers with weights"),
        ({"name": "ViT-B-32", "logit_scale": 3.0}, "logit_scale is for name=precomputed"),
        ({"name": "embedded", "class_embeddings": "x.npy"}, "class_embeddings is for name=precomputed"),
    ],
)
def test_settings_that_are_refused(settings, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ModelConfig(**{"name": "precomputed", **settings})


def test_there_is_no_tower_to_load():
    with pytest.raises(ModelError, match="has no towers"):
        load_model(ModelConfig("precomputed"))


def test_paths_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ModelConfig("precomputed", class_embeddings="a/b.npy")
    assert config.absolute().class_embeddings == str(tmp_path / "a" / "b.npy")


def shots_of(texts, count, noise, seed=0):
    """Unit features around their class embedding, in the order of classes, and their labels."""
    labels = np.repeat(np.arange(len(texts)), count)
    features = texts[labels] + noise * np.random.default_rng(seed).normal(size=(len(labels), texts.shape[1]))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return torch.from_numpy(unit.astype(np.float32)), torch.from_numpy(labels)


def random_rows(classes, seed=0):
    rows = np.random.default_rng(seed).normal(size=(classes, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("classes", "count"), [(2, 16), (3, 8), (5, 4), (12, 2), (12, 4)])
def test_shots_that_match_another_order_of_rows(classes, count):
    texts, names = random_rows(classes), [f"class {n:02}" for n in range(classes)]
    shots, labels = shots_of(texts, count, 0.05)
    turned = given(np.roll(texts, 1, axis=0), names, 32)
    (line,) = turned.row_notes(names, shots, labels)
    assert "another order of the rows of model.class_embeddings much better: zero-shot accuracy is 0%" in line
    row_of = (
        "row 0 of 'class 01', row 1 of 'class 00'" if classes == 2 else f"row 0 of {names[-1]!r}, row 1 of 'class 00'"
    )
    assert f"with rows as they are, and 100% with {row_of}" in line
    assert given(texts, names, 32).row_notes(names, shots, labels) == []
    assert turned.row_notes(names, shots[::count], labels[::count]) == [], "one shot each says nothing"


def test_all_rows_are_candidates_for_some_of_the_classes():
    texts, names = random_rows(12), [f"class {n:02}" for n in range(12)]
    shots, labels = shots_of(texts[:6], 4, 0.05)
    (line,) = given(np.roll(texts, 3, axis=0), names, 32).row_notes(names[:6], shots, labels)
    assert "with row 3 of 'class 00', row 4 of 'class 01', row 5 of 'class 02' and so on" in line


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("kind", ["right", "weak", "random", "one pair"])
def test_no_order_is_suspected_of_a_weak_head(kind, count):
    """Rows in their order, that know little of the shots or nothing; and those of which most are right."""
    classes, names = 8, [f"class {n}" for n in range(8)]
    doubted = 0
    for seed in range(20):
        texts = random_rows(classes, seed)
        shots, labels = shots_of(texts, count, 0.1 if kind == "one pair" else 0.15, seed)
        noise = np.random.default_rng(100 + seed).normal(size=texts.shape) / np.sqrt(32)
        rows = {
            "right": texts,
            "weak": texts + 2.5 * noise,
            "random": noise,
            "one pair": texts[[1, 0, *range(2, classes)]],
        }[kind]
        said = given(rows, names, 32).row_notes(names, shots, labels)
        assert not any("another order" in line for line in said)
        doubted += any("no more than by chance" in line for line in said)
    if kind == "random":
        assert doubted >= (0 if count == 2 else 16), "19 in 20 are expected, and 16 shots are too few to tell"
    else:
        assert not doubted


def test_rows_that_know_nothing_of_the_shots():
    names = [f"class {n}" for n in range(8)]
    shots, labels = shots_of(random_rows(8), 4, 0.15)
    (line,) = given(random_rows(8, seed=1), names, 32).row_notes(names, shots, labels)
    assert re.fullmatch(
        r"the shots of \d of 8 classes are nearest to their own row of model\.class_embeddings, no more than by chance:"
        " see that the rows are of the model that encoded the features, and in order of the labels",
        line,
    )


def test_the_order_of_text_labels_is_named():
    shots, labels = shots_of(class_embeddings(), 1, 0.05)
    model = given(class_embeddings())
    assert model.row_notes(CLASSES, shots, labels, text=True) == [
        "row 0 of model.class_embeddings is 'ant', row 1 'bee', row 2 'cow': text labels are sorted"
    ]
    names = [f"{letter}1" for letter in "abcdefgh"]
    many = given(random_rows(8), names, 32)
    (line,) = many.row_notes(names[:2], *shots_of(random_rows(8)[:2], 1, 0.05), text=True)
    assert line == "row 0 of model.class_embeddings is 'a1', row 1 'b1', ..., row 7 'h1': text labels are sorted"
    none = PrecomputedModel(names, None, 32, 100.0)
    assert none.row_notes(names, shots, labels, text=True) == []
