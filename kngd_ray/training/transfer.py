"""A fit as a classifier of classes that it was not trained on: what it learned of pictures, with other texts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kngd_ray.clip import CLIPHead
from kngd_ray.clip.adapters import Adapter
from kngd_ray.training.calibration import AnyPredictor
from kngd_ray.training.network_predictor import NetworkPredictor
from kngd_ray.training.pixels import Pixels
from kngd_ray.training.predict import Predictor


def transferred(
    predictor: AnyPredictor,
    class_names: Sequence[str],
    templates: Sequence[str],
    class_embeddings: Tensor,
    gamma: float = 1.0,
) -> AnyPredictor:
    """A predictor over other classes by the same weights.

    Towers and the adapters of embeddings serve any class. A class residual, which is about single classes, is left out,
    and with it the head's gamma, which makes room for it: a fit that trained nothing else classifies others as the
    pretrained model does.

    Args:
        predictor: of the fit.
        class_names: the C' other classes.
        templates: their prompts, which a text tower that was trained encodes anew.
        class_embeddings: (C', d) unit embeddings of the other classes by the pretrained text tower.
        gamma: factor of their logits where a class residual is left out.

    Returns:
        The predictor, with the posterior of the weights that carry over; of towers only where it predicts by draws.
    """
    if isinstance(predictor, NetworkPredictor):
        return _NetworkTransfer(predictor, class_names, templates, class_embeddings, gamma)
    assert isinstance(predictor.head, CLIPHead)
    head = _over(predictor.head, class_embeddings, gamma)
    belief = predictor.belief if carries_over(predictor) else None
    return Predictor(head, predictor.family, belief, predictor.options)


def carries_over(predictor: AnyPredictor) -> bool:
    """Whether anything that a fit trained serves classes that it was not trained on.

    Args:
        predictor: of the fit.

    Returns:
        False where other classes are ranked as by the pretrained model.
    """
    if isinstance(predictor, NetworkPredictor):
        return True
    assert isinstance(predictor.head, CLIPHead)
    return not all(map(_knows_classes, predictor.head.adapters))


class _LeftOut(Adapter):
    """An adapter that does nothing; its weights are there because the belief is about them too.

    Args:
        adapter: the one that is left out.
    """

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        for name, part in adapter.named_children():
            self.add_module(name, part)
        for name, weight in adapter.named_parameters(recurse=False):
            self.register_parameter(name, weight)


class _NetworkTransfer(NetworkPredictor):
    """Predictions of a network for other classes: where its own are linearised, at the mean.

    The linearised covariance is one of the logits of its own classes, and says nothing of others.

    Args:
        predictor: of its own classes.
        class_names: the others.
        templates: their prompts.
        class_embeddings: (C', d) by the pretrained text tower.
        gamma: as of :func:`transferred`.
    """

    def __init__(
        self,
        predictor: NetworkPredictor,
        class_names: Sequence[str],
        templates: Sequence[str],
        class_embeddings: Tensor,
        gamma: float,
    ) -> None:
        belief = None if predictor.linearises else predictor.belief
        super().__init__(predictor.head, predictor.family, belief, predictor.options)
        self._names, self._templates = class_names, templates
        self._class_embeddings = class_embeddings.to(predictor.head.class_embeddings)
        self._over = _over(predictor.head.head, self._class_embeddings, gamma)

    def _logits(self, inputs: Pixels | Tensor) -> Tensor:
        network = self.head
        t = self._class_embeddings
        if network.text_trained:  # once for all pictures, but for every draw of the weights
            t = network.classifier_for(self._names, self._templates)
        with torch.no_grad(), torch.autocast(t.device.type, enabled=False):
            found = [self._over(network.encode(network.received(pixels)), t).cpu() for pixels in self._pixels(inputs)]
        return torch.cat(found)


def _over(head: CLIPHead, class_embeddings: Tensor, gamma: float) -> CLIPHead:
    """The head over other classes; it has the same parameters under the same names.

    Args:
        head: trained.
        class_embeddings: (C', d).
        gamma: its gamma, if an adapter is left out.

    Returns:
        A head that shares its weights.
    """
    other = CLIPHead(class_embeddings, head.logit_scale)
    about_classes = [_knows_classes(adapter) for adapter in head.adapters]
    other.gamma = gamma if any(about_classes) else head.gamma
    other.adapters = nn.ModuleList([
        _LeftOut(adapter) if left_out else adapter
        for adapter, left_out in zip(head.adapters, about_classes, strict=True)
    ])
    return other


def _knows_classes(adapter: nn.Module) -> bool:
    """Whether an adapter has weights for single classes: it adapts cosines, not embeddings."""
    assert isinstance(adapter, Adapter)
    return type(adapter).cosines is not Adapter.cosines
