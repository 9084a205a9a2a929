"""A tiny CLIP whose towers are trained, and what ranks do with it."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from kngd_ray.clip import ClipModel, CLIPNetwork, ModelConfig, TuneOptions, load_model
from kngd_ray.filters import Belief, Diagonal, Forgetting, Inflate, Kronecker, OrnsteinUhlenbeck
from kngd_ray.observations import ClipCite, Cosine, LogLikelihood
from kngd_ray.sharding import Group
from kngd_ray.training.batches import Batch
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.losses import ClipCiteLoss, CrossEntropy
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions, OptimizerOptions

NAME = "kngd-test-towers"
CLASSES = ("cat", "dog", "boat")
STEPS = 3
SAMPLES = (5, 3, 1)  # of each step: at the end ranks without any

_BOTH = TuneOptions(parameters="full", include=("*",), start="zero_shot")
_IMAGE = TuneOptions(parameters="full", start="zero_shot")
_LORA = TuneOptions(parameters="lora", start="zero_shot", include=("*",), targets=("q", "v", "out", "mlp"))
_LOG = (LogLikelihood(),)

# what is trained, by which filter, from what
KALMAN: dict[str, FitOptions] = {
    "full-ekf": FitOptions(tune=_IMAGE, observation=_LOG, filter=FilterOptions(p0=1e-3)),
    "full-vdekf": FitOptions(
        tune=_IMAGE, observation=_LOG, filter=FilterOptions(p0=1e-3, covariance=Diagonal(rule="vdekf"))
    ),
    "cite-vdekf": FitOptions(
        tune=_BOTH, observation=(ClipCite(),), filter=FilterOptions(p0=1e-3, covariance=Diagonal(rule="vdekf"))
    ),
    "lora-ou": FitOptions(
        tune=_LORA,
        observation=(LogLikelihood(), Cosine(r0=1.0)),
        filter=FilterOptions(p0=1e-2, gate=Inflate()),
        noise=NoiseOptions(process=OrnsteinUhlenbeck(gamma=0.9)),
    ),
    "lora-kronecker": FitOptions(
        tune=_LORA,
        observation=_LOG,
        filter=FilterOptions(p0=1e-2, covariance=Kronecker()),
        noise=NoiseOptions(process=Forgetting()),
    ),
}
GRADIENT: dict[str, FitOptions] = {
    f"{loss.kind}-{tune.parameters}": FitOptions(
        method="adamw", tune=tune, optimizer=OptimizerOptions(lr=1e-3, loss=loss)
    )
    for loss in (CrossEntropy(), ClipCiteLoss())
    for tune in (_BOTH, _LORA)
}


@cache
def tiny_model() -> ClipModel:
    """Two transformer layers a tower, random weights, the same in every process."""
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{NAME}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
        return load_model(ModelConfig(NAME, "random"))


def make_network(options: FitOptions) -> CLIPNetwork:
    """The network of some options, in float64."""
    network = CLIPNetwork(
        tiny_model(), CLASSES, ("a photo of a {}.",), options.tune, options.adapter, seed=3, pairs=options.pairs
    ).double()
    with torch.no_grad():  # LoRA and residuals start at 0, where half of the derivatives vanish
        generator = torch.Generator().manual_seed(1)
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return network


def make_batch(network: CLIPNetwork, step: int, group: Group) -> Batch:
    """A rank's part of a step's pictures, which are noise."""
    generator = torch.Generator().manual_seed(100 + step)
    m = SAMPLES[step % len(SAMPLES)]
    pixels = torch.randn(m, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(len(CLASSES), (m,), generator=generator)
    quotient, rest = divmod(m, group.world_size)
    sizes = [quotient + (r < rest) for r in range(group.world_size)]
    own = slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))
    return Batch(network.inputs(labels[own], image=pixels[own]), labels[own], sizes, group.rank, step)


def run_kalman(group: Group, case: str, *, streamed: bool = True) -> dict[str, Any]:
    """A few steps of the filter: what it ends with."""
    network = make_network(KALMAN[case])
    method = KalmanNGD(network, KALMAN[case], seed=2, group=group, streamed=True)
    if not streamed:  # from the same prior, in which layers differ
        prior = method.belief.covariance
        method = KalmanNGD(network, KALMAN[case], seed=2, group=group)
        method.posterior.belief = Belief(method.belief.mu, prior)
    stats = [method.step(make_batch(network, step, group)) for step in range(STEPS)]
    return {
        "mu": method.belief.mu.clone(),
        "weights": flat(network),
        **{
            f"P/{name}/{key}": value for name, state in method.belief.covariance.items() for key, value in state.items()
        },
        "noise": method.noise,
        "figures": torch.tensor(
            [[s.nll, s.log_evidence, s.nis, s.innovation_rms, s.gated] for s in stats], dtype=torch.float64
        ),
        "pieces": method.state().pieces[group.rank],
        "bytes": torch.tensor([s.covariance_bytes for s in stats]),
    }


def run_gradient(group: Group, case: str) -> dict[str, Any]:
    """A few steps of AdamW: what it ends with."""
    network = make_network(GRADIENT[case])
    method = GradientDescent(network, GRADIENT[case], STEPS, group)
    stats = [method.step(make_batch(network, step, group)) for step in range(STEPS)]
    return {"weights": flat(network), "figures": torch.tensor([s.nll for s in stats], dtype=torch.float64)}


def run_towers(group: Group) -> dict[str, dict[str, Any]]:
    """All cases."""
    cases: dict[str, dict[str, Any]] = {}
    for name in KALMAN:
        cases[name] = run_kalman(group, name)
    for name in GRADIENT:
        cases[name] = run_gradient(group, name)
    return cases


def flat(network: CLIPNetwork) -> Tensor:
    """(n,) trained weights."""
    return torch.cat([p.detach().flatten() for p in network.parameters() if p.requires_grad])
