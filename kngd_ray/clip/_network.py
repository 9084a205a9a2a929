"""The whole of CLIP as one trainable module: towers, class texts and adapters, from pictures to logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from kngd_ray.clip import lora
from kngd_ray.clip._copies import copied
from kngd_ray.clip._head import CLIPHead, check_alpha
from kngd_ray.clip._model import ClipModel
from kngd_ray.clip._prompts import expand
from kngd_ray.clip._towers import choose, recompute
from kngd_ray.clip._transfer import PictureTransform, channels_last, sent, tower_products
from kngd_ray.clip._tuning import TuneOptions
from kngd_ray.clip.adapters import AdapterConfig

TEXTS_AT_ONCE = 256


class CLIPNetwork(nn.Module):
    """Class logits from pictures, its towers adapted or trained as the options say.

    Only what is trained requires gradients. The network stays in evaluation mode whatever it is told, so
    that batch-norm statistics and dropout keep as they were pretrained; samples are independent of one another.

    Args:
        model: the pretrained model. It is copied, and never written to.
        class_names: C names; an underscore counts as a space.
        templates: sentences with one ``{}`` each, or the name of a set of them.
        options: what is trained.
        adapters: options of the adapters on the embeddings, applied in this order.
        seed: of all random weights.
        pairs: also return the embeddings of pictures and of their own class's text, tuned and pretrained.
        class_embeddings: (C, d) if they are known already, else they are encoded.

    Attributes:
        clip: the open_clip model that is tuned.
        adapters: as given.
        head: zero-shot head on the pretrained class embeddings, with the adapters.
        options: as given.
        adapted: names of the layers of ``clip`` that LoRA has adapted.
        embed_dim: d.
        classes: C.
        logit_scale: factor from cosines to logits.
        image_trained: whether a weight of the image tower is trained.
        text_trained: whether a weight of the text tower is trained.
        pairs: as given.
        started: weights of the adapters by name where the fit began, if that was a head that had been fitted; empty
            where it was CLIP's own. Ensembles with the pretrained towers keep them.
    """

    prompt_tokens: Tensor  # (C, L) of the first template
    prompt_embeddings: Tensor  # (C, d) of them by the pretrained text tower
    all_tokens: Tensor  # (C, templates, L)

    def __init__(
        self,
        model: ClipModel,
        class_names: Sequence[str],
        templates: str | Sequence[str],
        options: TuneOptions,
        adapters: Sequence[AdapterConfig] = (),
        seed: int = 0,
        pairs: bool = False,
        *,
        class_embeddings: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.options, self.pairs = options, pairs
        self.embed_dim, self.classes, self.logit_scale = model.embed_dim, len(class_names), model.logit_scale
        self.adapters = tuple(adapters)
        self._model = model
        self.started: dict[str, Tensor] = {}
        # In a tuple, so that it is no submodule: its parameters are not this network's.
        self._pretrained = (model.network,)
        self.clip = copied(model.network)
        self.adapted = choose(self.clip, options, seed)
        trained = [name for name, weight in self.clip.named_parameters() if weight.requires_grad]
        self.image_trained = any(name.startswith("visual.") for name in trained)
        self.text_trained = any(not name.startswith("visual.") for name in trained)
        if options.checkpointing:
            recompute(self.clip, model.name, image=self.image_trained, text=self.text_trained)
        if class_embeddings is None:
            class_embeddings = model.encode_classes(class_names, templates)
        self.head = CLIPHead(class_embeddings, model.logit_scale, adapters, seed)
        check_alpha(options.alpha, self.head.averages)
        prompts = torch.stack([model.tokenize(row) for row in expand(class_names, templates)])
        self.register_buffer("prompt_tokens", prompts[:, 0].contiguous(), persistent=False)
        self.register_buffer("all_tokens", prompts if self.live_text else None, persistent=False)
        self.register_buffer("prompt_embeddings", self._own_texts() if pairs else None, persistent=False)
        self.to(model.device).eval()

    @property
    def class_embeddings(self) -> Tensor:
        """(C, d) pretrained class embeddings, before the adapters."""
        return self.head.class_embeddings

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """What turns an RGB picture into the image tower's input (3, H, W) at evaluation."""
        return self._model.transform

    @property
    def pictures(self) -> PictureTransform:
        """The same in two parts: to bytes, and from bytes to what the tower takes."""
        return self._model.pictures

    def received(self, pixels: Tensor) -> Tensor:
        """Pictures as the image tower takes them, where it is.

        Args:
            pixels: (m, 3, H, W) bytes, or as the tower takes them; (m, d) embeddings are only moved.

        Returns:
            (m, 3, H, W) or (m, d).
        """
        return channels_last(self.pictures.normalised(sent(pixels, self.class_embeddings.device)))

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """open_clip's description of the transform, see :attr:`ClipModel.preprocess_cfg`."""
        return self._model.preprocess_cfg

    @property
    def live_text(self) -> bool:
        """Whether every forward pass encodes the class prompts again, as the text tower is trained."""
        return self.text_trained and not self.pairs

    def train(self, mode: bool = True) -> "CLIPNetwork":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits of a batch, and with ``pairs`` the embeddings behind them.

        With pairs the logits are of the pretrained class embeddings and the adapters, and the columns are
        logits (m, C), z (m, d), t (m, d), z0 (m, d), t0 (m, d): unit embeddings of each picture and of the
        first prompt of its class, by the towers that are tuned and by the pretrained ones.

        Args:
            inputs: ``image`` (m, 3, H, W); or ``feature`` (m, d), unit embeddings by the pretrained image
                tower, where the image tower is not trained (where it is, they save its pretrained pass for
                pairs). For pairs also ``label`` (m,) int64 and, if the text tower is trained, ``text`` (m, L),
                see :meth:`tokens`.

        Returns:
            (m, C), with pairs (m, C + 4 d).
        """
        # Logits in full precision, whatever autocast the caller is under; the towers have their own below.
        with torch.autocast(self.class_embeddings.device.type, enabled=False):
            z = self._image_embeddings(inputs)
            if not self.pairs:
                return self.head(z, self.classifier())
            logits = self.head(z)
            if not self.image_trained:
                z0 = z.detach()
            elif "feature" in inputs:
                z0 = inputs["feature"]
            else:
                with torch.no_grad():
                    z0 = self._unit(self._pretrained[0].encode_image, inputs["image"])
            t0 = self.prompt_embeddings[inputs["label"]]
            t = self._unit(self.clip.encode_text, inputs["text"]) if self.text_trained else t0
            return torch.cat([logits, z, t, z0, t0], dim=1)

    def encode(self, images: Tensor) -> Tensor:
        """Unit embeddings (m, d) of transformed pictures (m, 3, H, W) by the tuned image tower.

        One that is as pretrained runs in full precision, as for the features that stand for pictures in a fit.
        """
        return self._unit(self.clip.encode_image, images, tuned=self.image_trained)

    def tokens(self, labels: Tensor) -> Tensor:
        """Tokens (m, L) of the first prompt of each label's class, labels (m,) int64."""
        return self.prompt_tokens[labels.to(self.prompt_tokens.device)]

    def inputs(self, labels: Tensor, **parts: Tensor) -> dict[str, Tensor]:
        """What :meth:`forward` takes of a batch.

        Args:
            labels: (m,) int64.
            **parts: ``image``, ``feature`` or both.

        Returns:
            The parts, with the labels and their tokens where pairs need them.
        """
        if not self.pairs:
            return parts
        where = self.class_embeddings.device
        text = {"text": self.tokens(labels)} if self.text_trained else {}
        return {**parts, "label": labels.to(where), **text}

    def example(self, m: int) -> dict[str, Tensor]:
        """Inputs of m samples that stand for any: seeded noise for pictures or embeddings, and the first classes."""
        labels = torch.arange(m, device=self.class_embeddings.device) % self.classes
        if not self.image_trained:
            return self.inputs(labels, feature=self.head.example(m))
        size = self.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(m, 3, height, width, generator=torch.Generator().manual_seed(0))
        return self.inputs(labels, image=channels_last(images.to(next(self.clip.parameters()))))

    def classify(self, images: Tensor, class_embeddings: Tensor | None = None) -> Tensor:
        """Logits of pictures alone, with or without pairs.

        Args:
            images: (m, 3, H, W) transformed pictures; or (m, d) unit embeddings, where the image tower is not trained.
            class_embeddings: (C', d) instead of those of :meth:`classifier`.

        Returns:
            (m, C').
        """
        with torch.autocast(images.device.type, enabled=False):
            z = images if images.dim() == 2 else self.encode(images)
            return self.head(z, self.classifier() if class_embeddings is None else class_embeddings)

    def classifier(self) -> Tensor:
        """Class embeddings (C, d) that :meth:`forward` compares pictures with, before the adapters.

        They are those of the tuned text tower where it is trained and there are no pairs. Whoever only
        predicts computes them once: ``network.classify(images, classifier)``.
        """
        if not self.live_text:
            return self.class_embeddings
        prompts = self._unit(self.clip.encode_text, self.all_tokens.flatten(0, 1))
        return normalize(prompts.unflatten(0, (self.classes, -1)).mean(dim=1), dim=-1)

    @torch.no_grad()
    def classifier_for(self, class_names: Sequence[str], templates: str | Sequence[str]) -> Tensor:
        """Class embeddings of any classes by the tuned text tower, without gradient.

        Args:
            class_names: C' names; an underscore counts as a space.
            templates: sentences with one ``{}`` each, or the name of a set of them.

        Returns:
            (C', d) unit embeddings, where the network is.
        """
        if not self.text_trained:
            return self._model.encode_classes(class_names, templates).to(self.class_embeddings)
        prompts = expand(class_names, templates)
        tokens = self._model.tokenize([prompt for row in prompts for prompt in row])
        features = torch.cat([
            self._unit(self.clip.encode_text, batch.to(self.class_embeddings.device))
            for batch in tokens.split(TEXTS_AT_ONCE)
        ])
        return normalize(features.unflatten(0, (len(prompts), -1)).mean(dim=1), dim=-1)

    @torch.no_grad()
    def blend(self, alpha: float) -> None:
        """Average the trained weights with those where the fit began in place: theta_0 + alpha (theta - theta_0).

        Args:
            alpha: 0 is the pretrained towers under the head of the start, 1 changes nothing.

        Raises:
            UsageError: alpha is not in [0, 1], or an adapter has no pretrained weights.
        """
        check_alpha(alpha, self.head.averages or bool(self.started))
        if alpha == 1:
            return
        for update in lora.updates(self.clip):
            update.up.mul_(alpha)  # the pretrained B is 0, and A is of no effect then
        pretrained = dict(self._pretrained[0].named_parameters())
        for name, weight in self.clip.named_parameters():
            if weight.requires_grad and name in pretrained:
                weight.copy_(pretrained[name].to(weight).lerp(weight, alpha))
        if not self.started:
            self.head.blend(alpha)
        for name, weight in self.head.named_parameters():
            if name in self.started:
                weight.copy_(self.started[name].to(weight).lerp(weight, alpha))

    @contextmanager
    def blended(self, alpha: float) -> Iterator[None]:
        """Average as :meth:`blend` does, and put the trained weights back afterwards, bit for bit.

        Args:
            alpha: 0 is the pretrained model, 1 the trained one.

        Yields:
            Nothing.
        """
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        gamma = self.head.gamma
        kept = [weight.detach().clone() for weight in trained] if alpha != 1 else []
        self.blend(alpha)
        try:
            yield
        finally:
            self.head.gamma = gamma
            with torch.no_grad():
                for weight, before in zip(trained, kept, strict=bool(kept)):
                    weight.copy_(before)

    @torch.no_grad()
    def _own_texts(self) -> Tensor:
        """Embeddings (C, d) of each class's first prompt by the pretrained text tower."""
        device, tower = self._model.device, self._model.network.encode_text
        batches = self.prompt_tokens.split(TEXTS_AT_ONCE)
        return torch.cat([self._unit(tower, batch.to(device)) for batch in batches])

    def _image_embeddings(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Unit embeddings (m, d) of a batch, as given where the image tower is as pretrained."""
        if not self.image_trained and "feature" in inputs:
            return inputs["feature"]
        return self.encode(inputs["image"])

    def _unit(self, tower: Callable[[Tensor], Tensor], x: Tensor, *, tuned: bool = True) -> Tensor:
        """Unit embeddings in full precision by a tower, which if it is tuned is in the precision of the options."""
        half = torch.autocast(x.device.type, torch.bfloat16, enabled=tuned and self.options.precision == "bfloat16")
        with half, tower_products(x.device):
            y = tower(x)
        with torch.autocast(x.device.type, enabled=False):
            return normalize(y.float() if y.dtype in (torch.bfloat16, torch.float16) else y, dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CLIPNetwork":
        """Move; the pretrained image tower that pairs need comes along as a copy if it has to."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.pairs and self.image_trained:
            here, there = next(self.clip.parameters()), next(self._pretrained[0].parameters())
            if (here.device, here.dtype) != (there.device, there.dtype):
                self._pretrained = (copied(self._pretrained[0]).to(here.device, here.dtype),)
        return self


# What a fit trains: adapters on features, or towers and adapters on pictures.
Head = CLIPHead | CLIPNetwork
