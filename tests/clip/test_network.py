"""The whole of CLIP as one module: what it returns, what is trained, and the average with the pretrained one."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, jacrev
from torch.nn.functional import normalize

from kngd_ray.clip import CLIPHead, CLIPNetwork, TuneOptions
from kngd_ray.clip.adapters import Bottleneck, ClassResidual, Linear
from kngd_ray.errors import ModelError, UsageError

NAMES = ["cat", "red_car", "dog", "tree"]
TEMPLATES = ("a photo of a {}.", "an icon of a {}.")
LABELS = torch.tensor([2, 0, 3])
BOTH = {"include": ("*",), "targets": ("q", "k", "v", "mlp", "pointwise")}
TUNINGS = {
    "adapter": TuneOptions(),
    "lora image": TuneOptions(parameters="lora"),
    "lora text": TuneOptions(parameters="lora", include=("transformer",)),
    "lora both": TuneOptions(parameters="lora", **BOTH),
    "full image": TuneOptions(parameters="full"),
    "full text": TuneOptions(parameters="full", include=("*",), exclude=("visual", "*token_embedding*")),
    "full both": TuneOptions(parameters="full", include=("*",)),
}


@pytest.fixture(params=TUNINGS)
def options(request):
    return TUNINGS[request.param]


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def build(model, options, adapters=(), **more):
    return CLIPNetwork(model, NAMES, TEMPLATES, options, adapters, **more)


def trained(network):
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def shake(network, size=0.05):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in trained(network).values():
            weight += size * torch.randn(weight.shape, generator=generator)


def inputs_of(network, images):
    return {"image": images, "label": LABELS, "text": network.tokens(LABELS)}


def zero_shot(model, images):
    with torch.no_grad():
        z = normalize(model.network.encode_image(images), dim=-1)
    return model.logit_scale * z @ model.encode_classes(NAMES, TEMPLATES).mT


@pytest.mark.parametrize("pairs", [False, True])
def test_starts_as_zero_shot(vit, images, options, pairs):
    network = build(vit, options, (Linear(), ClassResidual()), pairs=pairs)
    logits = network(inputs_of(network, images))[:, : len(NAMES)]
    assert torch.allclose(logits, zero_shot(vit, images), atol=1e-4)


def test_trains_what_is_selected(vit, options):
    network = build(vit, options, (Linear(),))
    names = set(trained(network))
    assert "head.adapters.0.residual.image.weight" in names
    towers = {name.removeprefix("clip.") for name in names if name.startswith("clip.")}
    assert network.image_trained == any(name.startswith("visual.") for name in towers)
    assert network.text_trained == any(not name.startswith("visual.") for name in towers)
    assert network.live_text == network.text_trained
    assert bool(network.adapted) == (options.parameters == "lora")
    if options.parameters == "lora":
        assert all(".lora." in name for name in towers)
    if options.parameters == "full" and options.include == ("*",):
        own = {
            name for name, _ in vit.network.named_parameters() if name not in ("logit_scale", "token_embedding.weight")
        }
        assert towers == {name for name in own if network.image_trained or not name.startswith("visual.")}


def test_every_trained_weight_gets_a_gradient(vit, images, options):
    network = build(vit, options, (Linear(),))
    shake(network)
    network(inputs_of(network, images)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in trained(network).values())


def test_the_pretrained_model_is_left_alone(vit, images, options):
    before = {name: tensor.clone() for name, tensor in vit.network.state_dict().items()}
    network = build(vit, options, pairs=True)
    shake(network)
    network(inputs_of(network, images))
    with network.blended(0.3):
        pass
    after = vit.network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(weight.requires_grad for weight in vit.network.parameters())


def test_pairs_layout(vit, images, options):
    network = build(vit, options, (ClassResidual(),), pairs=True)
    c, d = len(NAMES), vit.embed_dim
    inputs = inputs_of(network, images)
    _, z, t, z0, t0 = network(inputs).split([c, d, d, d, d], dim=1)
    assert torch.allclose(z, z0, atol=1e-5)
    assert torch.allclose(t, t0, atol=1e-5)
    prompts = [TEMPLATES[0].format(NAMES[label]).replace("_", " ") for label in LABELS]
    assert torch.allclose(t0, vit.encode_texts(prompts), atol=1e-5)

    shake(network)
    out = network(inputs)
    logits, z, t, y0, s0 = out.split([c, d, d, d, d], dim=1)
    assert out.shape == (3, c + 4 * d)
    assert torch.equal(y0, z0)
    assert torch.equal(s0, t0)
    assert torch.equal(z, z0) is not network.image_trained
    assert torch.equal(t, t0) is not network.text_trained
    assert torch.allclose(z, network.encode(images))
    tuned = normalize(network.clip.encode_text(network.tokens(LABELS)), dim=-1)
    assert torch.allclose(t, tuned, atol=1e-5)
    # The classifier starts from the pretrained texts even where the text tower is trained.
    head = CLIPHead(vit.encode_classes(NAMES, TEMPLATES), vit.logit_scale, (ClassResidual(),))
    head.load_state_dict(network.head.state_dict())
    assert torch.allclose(logits, head(z), atol=1e-4)
    assert not network.live_text
    if network.image_trained:
        given = network({**inputs, "feature": z0 + 1})
        assert torch.equal(given[:, c + 2 * d : c + 3 * d], z0 + 1)  # the pretrained pass is saved


def test_live_text_follows_the_text_tower(vit, images):
    network = build(vit, TUNINGS["full text"])
    shake(network)
    classes = network.classifier()
    assert not torch.allclose(classes, vit.encode_classes(NAMES, TEMPLATES), atol=1e-2)
    assert torch.allclose(classes, network.classifier_for(NAMES, TEMPLATES), atol=1e-5)
    assert not network.classifier_for(NAMES, TEMPLATES).requires_grad
    own = copy.deepcopy(vit)
    own._network.load_state_dict(network.clip.state_dict())
    assert torch.allclose(classes, own.encode_classes(NAMES, TEMPLATES), atol=1e-5)
    z = network.encode(images)
    assert torch.allclose(network({"image": images}), vit.logit_scale * z @ classes.mT, atol=1e-4)
    assert torch.equal(network({"image": images}), network({"feature": z, "image": images}))


def test_new_classes(vit, mini):
    new = ["bird", "old_ship"]
    for network in (build(vit, TUNINGS["lora image"]), build(vit, TUNINGS["lora both"], pairs=True)):
        found = network.classifier_for(new, "openai_imagenet")
        assert torch.allclose(found, vit.encode_classes(new, "openai_imagenet"), atol=1e-5)


def test_features_stand_for_images_only_if_the_tower_is_frozen(vit, images):
    for name, frozen in (("adapter", True), ("lora text", True), ("full image", False)):
        network = build(vit, TUNINGS[name])
        features = network.encode(images)
        if frozen:
            assert torch.allclose(network({"feature": features}), network({"image": images}))
        else:
            with pytest.raises(KeyError, match="image"):
                network({"feature": features})


def test_given_class_embeddings_are_taken(vit):
    given = normalize(torch.randn(4, vit.embed_dim), dim=-1)
    assert torch.equal(build(vit, TuneOptions(), class_embeddings=given).classifier(), given)


def test_batch_norm_stays_as_pretrained(mini):
    network = CLIPNetwork(mini, NAMES[:2], TEMPLATES[:1], TuneOptions(parameters="full"))
    assert network.train() is network
    assert not any(module.training for module in network.modules())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network({"image": torch.randn(2, 3, 160, 160)}).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert any("running_mean" in name for name in before)


@pytest.mark.parametrize("adapters", [(), (Linear(tower="both"), ClassResidual())])
def test_weight_ensembling(vit, images, options, adapters):
    network = build(vit, options, adapters)
    if not trained(network):
        return
    pretrained = {name: weight.clone() for name, weight in network.named_parameters()}
    shake(network)
    tuned = {name: weight.clone() for name, weight in network.named_parameters()}
    logits = network({"image": images})
    with network.blended(0):
        assert torch.allclose(network({"image": images}), zero_shot(vit, images), atol=1e-4)
    with network.blended(1):
        assert torch.equal(network({"image": images}), logits)
    with network.blended(0.25):
        for name, weight in trained(network).items():
            start = pretrained[name]
            if name.endswith(".down"):
                assert torch.equal(weight, tuned[name])  # the product B A is what is averaged
            else:
                assert torch.allclose(weight, start + 0.25 * (tuned[name] - start), atol=1e-6)
    assert all(torch.equal(weight, tuned[name]) for name, weight in network.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), network.blended(0.5):
        raise RuntimeError("stop")
    assert all(torch.equal(weight, tuned[name]) for name, weight in network.named_parameters())
    network.blend(0.0)
    assert torch.allclose(network({"image": images}), zero_shot(vit, images), atol=1e-4)


def test_a_bottleneck_has_nothing_to_average_with(vit):
    network = build(vit, TuneOptions(), (Bottleneck(),))
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    network.blend(1.0)
    with pytest.raises(UsageError, match=r"those of an adapter \(such as bottleneck\) do not"):
        network.blend(0.5)
    with pytest.raises(UsageError, match="such as bottleneck"):
        build(vit, TuneOptions(alpha=0.5), (Bottleneck(),))
    with pytest.raises(UsageError, match="alpha is 2"):
        network.blend(2)
    assert all(torch.equal(weight, before[name]) for name, weight in network.named_parameters())


def test_an_image_tower_that_is_not_trained_is_in_full_precision(vit, images):
    """A fit of the text tower learns from cached features, which are; pictures that it predicts were in bfloat16."""
    network = build(vit, replace(TUNINGS["lora text"], precision="bfloat16"))
    with torch.no_grad():
        features = normalize(vit.network.encode_image(images), dim=-1)
        assert torch.equal(network.classify(images), network.classify(features))
    assert not torch.equal(build(vit, TuneOptions(parameters="full", precision="bfloat16")).encode(images), features)


@pytest.mark.parametrize("pairs", [False, True])
def test_bfloat16_towers_give_float32(vit, images, pairs):
    exact = build(vit, TUNINGS["full both"], pairs=pairs)
    rough = build(vit, TuneOptions(parameters="full", include=("*",), precision="bfloat16"), pairs=pairs)
    inputs = inputs_of(exact, images)
    y, expected = rough(inputs), exact(inputs)
    assert y.dtype == torch.float32
    assert 0 < (y - expected).abs().max() < 0.5
    with torch.autocast("cpu", torch.bfloat16):  # the options alone decide
        assert torch.equal(exact(inputs), expected)
        assert torch.equal(rough(inputs), y)


def test_float64_pairs_bring_their_own_pretrained_tower(vit, images):
    network = build(vit, TUNINGS["lora both"], pairs=True).double()
    inputs = inputs_of(network, images.double())
    c, d = len(NAMES), vit.embed_dim
    y = network(inputs)
    assert y.dtype == torch.float64
    z, z0 = y[:, c : c + d], y[:, c + 2 * d : c + 3 * d]
    assert torch.allclose(z, z0, atol=1e-12)
    assert vit.network.logit_scale.dtype == torch.float32
    assert len(list(network.parameters())) == len(set(network.parameters()))


@pytest.mark.parametrize("pairs", [False, True])
def test_samples_are_independent_and_differentiable_by_torch_func(vit, images, pairs):
    network = build(vit, TUNINGS["lora image"], (ClassResidual(),), pairs=pairs).double()
    inputs = inputs_of(network, images.double())
    theta = {name: weight.detach() for name, weight in trained(network).items()}
    jacobians = jacrev(lambda weights: functional_call(network, weights, (inputs,))[:, 1])(theta)
    shares = []
    for row in range(3):
        one = {name: part[row : row + 1] for name, part in inputs.items()}
        out = network(one)[0, 1]
        shares.append(torch.autograd.grad(out, list(trained(network).values())))
    for number, name in enumerate(theta):
        assert torch.allclose(jacobians[name], torch.stack([share[number] for share in shares]), atol=1e-9)


@pytest.mark.parametrize("name", ["lora both", "full both"])
def test_checkpointing_changes_memory_alone(vit, images, name):
    plain = build(vit, TUNINGS[name])
    options = TUNINGS[name]
    again = build(
        vit, TuneOptions(parameters=options.parameters, include=("*",), targets=options.targets, checkpointing=True)
    )
    assert again.clip.visual.transformer.grad_checkpointing
    gradients = []
    for network in (plain, again):
        shake(network)
        network({"image": images}).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in trained(network).items()})
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][key], gradient, rtol=1e-4, atol=1e-5)


def test_checkpointing_that_a_tower_does_not_have(vit):
    class Deaf(torch.nn.Module):
        """A tower as open_clip's ResNets: it takes the call and does nothing."""

        def __init__(self, visual):
            super().__init__()
            self.proj = visual.proj
            self.preprocess_cfg = visual.preprocess_cfg

        def set_grad_checkpointing(self, enable=True):
            pass

    model = copy.deepcopy(vit)
    model._network.visual = Deaf(model._network.visual)
    with pytest.raises(ModelError, match="the image tower of kngd-test-vit has no gradient checkpointing"):
        build(model, TuneOptions(parameters="full", checkpointing=True))
    build(model, TuneOptions(parameters="full", include=("transformer",), checkpointing=True))


def test_checkpointing_of_blocks_that_open_clip_cannot_recompute(custom):
    with pytest.raises(ModelError, match="image tower of kngd-test-custom has no gradient checkpointing"):
        build(custom, replace(TUNINGS["full both"], checkpointing=True))
    build(custom, replace(TUNINGS["full text"], checkpointing=True))


@pytest.mark.parametrize("pairs", [False, True])
def test_inputs_and_examples(vit, options, pairs):
    network = build(vit, options, (ClassResidual(),), pairs=pairs)
    inputs = network.inputs(LABELS, image=torch.zeros(3, 3, 32, 32))
    texts = {"text"} if network.text_trained else set()
    assert set(inputs) == ({"image", "label"} | texts if pairs else {"image"})
    example = network.example(5)
    pictures = "image" if network.image_trained else "feature"  # cached, where the image tower is frozen
    expected = {pictures if name == "image" else name for name in inputs}
    assert {name: len(part) for name, part in example.items()} == dict.fromkeys(expected, 5)
    logits = network(example)[:, : len(NAMES)]
    assert torch.allclose(network.classify(example[pictures]), logits, atol=1e-5)
    assert torch.allclose(network.classify(example[pictures], network.classifier()), logits, atol=1e-5)
    assert network.classify(example[pictures]).shape == (5, len(NAMES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "lora", "include": ("visual.transfomer.*",)}, "no layer matches 'visual.transfomer.*'"),
        (
            {"parameters": "full", "include": ("visual.conv2",)},
            "no weight matches 'visual.conv2'; the nearest are visual.conv1",
        ),
        ({"parameters": "full", "include": ("logit_scale",)}, "no weight matches 'logit_scale'"),
    ],
)
def test_selections_that_find_nothing(vit, options, message):
    with pytest.raises(ModelError) as error:
        build(vit, TuneOptions(**options))
    assert message in str(error.value)


def test_two_networks_of_one_seed_are_equal(vit, images):
    networks = [build(vit, TUNINGS["lora both"], (Bottleneck(),), seed=seed) for seed in (1, 1, 2)]
    states = [torch.cat([w.detach().flatten() for w in trained(network).values()]) for network in networks]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
