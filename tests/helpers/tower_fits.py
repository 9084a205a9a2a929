"""Whole fits of tiny towers on real pictures, which tests of feeding and resuming run on any number of ranks."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from helpers.resuming import IDENTITY, Killed, kill_after
from helpers.towers import CLASSES, GRADIENT, KALMAN, NAME, tiny_model
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from kngd_ray.clip import CLIPNetwork, ModelConfig, TuneOptions
from kngd_ray.clip.adapters import ClassResidual
from kngd_ray.data import DataConfig, PictureFile, decode, open_images
from kngd_ray.filters import Diagonal, OrnsteinUhlenbeck
from kngd_ray.observations import LogLikelihood
from kngd_ray.sharding import Group
from kngd_ray.training import fit as fit_module
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask, Towers, build_head
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.resumable import run_fit
from kngd_ray.training.start import HeadStart
from kngd_ray.training.views import crops_of

SHOTS, BATCH, EPOCHS = 7, 3, 2  # batches of 3, 3 and 1: at the end of an epoch ranks without any
STEPS = 6
_START = {
    "tune": TuneOptions(parameters="lora", targets=("q", "v", "mlp"), views=2),
    "adapter": (ClassResidual(bias=True),),
    "observation": (LogLikelihood(),),
}
STARTED: dict[str, FitOptions] = {  # where a head ended
    "start-lora": FitOptions(
        **_START,
        filter=FilterOptions(covariance=Diagonal(rule="vdekf"), tower_logit_variance=3.0),
        noise=NoiseOptions(process=OrnsteinUhlenbeck(gamma=0.9)),
    ),
    "start-adamw": FitOptions(**_START, method="adamw"),
}
FITS: dict[str, FitOptions] = {
    name: replace(options, epochs=EPOCHS, batch_size=BATCH)
    for name, options in {
        **KALMAN,
        **STARTED,
        "adamw-cite": GRADIENT["clip_cite-full"],
        "adamw": GRADIENT["cross_entropy-lora"],
    }.items()
}


def write_shots(path: Path, count: int = SHOTS) -> Pictures:
    """A few emoji, with labels of the tiny model's classes."""
    images = open_images(DataConfig())
    rows = np.random.default_rng(0).permutation(len(images))[:count]
    PictureFile.write(path, images, rows)
    return Pictures(path, torch.arange(count), torch.arange(count) % len(CLASSES))


def make_task(name: str, shots: Pictures) -> FitTask:
    """A fit of six steps."""
    model, templates = tiny_model(), ("a photo of a {}.",)
    embeddings = model.encode_classes(CLASSES, templates)
    towers = Towers(ModelConfig(NAME, "random"), CLASSES, templates)
    return started(FitTask(FITS[name], 0, shots, embeddings, model.logit_scale, towers=towers))


def started(task: FitTask) -> FitTask:
    """The same with the fit of the head that it starts from, if it does."""
    model, shots = tiny_model(), task.support
    assert isinstance(shots, Pictures)

    @torch.no_grad()
    def embedded(view: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
        z = torch.cat([model.network.encode_image(pixels) for pixels in shots.pixels(view)])
        return normalize(z, dim=1)

    made = crops_of(task.options, model, len(shots))
    crops = None
    if made is not None:  # of the keys by which runs keep them
        keys = [shots.file.keys[place] for place in shots.positions.tolist()]
        pictures = [decode(shots.file.read(place), shots.file.place(place)) for place in shots.positions.tolist()]
        views = [[model.transform(view) for view in made.of(*of)] for of in zip(pictures, keys, strict=True)]
        with torch.no_grad():
            crops = torch.stack([normalize(model.network.encode_image(torch.stack(of)), dim=1) for of in views])
    return replace(task, head=HeadStart.of(task.options, Support(embedded(model.transform), shots.labels, crops)))


@contextmanager
def in_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Networks and their pixels are of this dtype."""
    inputs = CLIPNetwork.inputs

    def made(task: FitTask, device: torch.device | str = "cpu") -> Any:
        head = build_head(task, device)
        if not isinstance(head, CLIPNetwork):
            return head  # of features that a head is fitted on first: it stays as they are
        head.to(dtype)
        if head.pairs:  # encoded as the network was built, in float32, which devices round differently
            with torch.no_grad():
                head.prompt_embeddings = head._unit(head.clip.encode_text, head.prompt_tokens)
        return head

    def given(self: CLIPNetwork, labels: Tensor, **parts: Tensor) -> dict[str, Tensor]:
        return inputs(self, labels, **{name: part.to(dtype) for name, part in parts.items()})

    with mock.patch.object(fit_module, "build_head", made), mock.patch.object(CLIPNetwork, "inputs", given):
        yield


RANKED = ("start-lora", "full-ekf", "cite-vdekf", "lora-kronecker", "adamw-cite")  # those that several ranks run


def run_fits(group: Group, folder: Path, shots: Pictures, kill: int | None, dtype: torch.dtype) -> dict[str, Path]:
    """Run fits in a folder, or what is left of it; ends early after step `kill`."""
    ends = {}
    with in_dtype(dtype):
        for name in RANKED:
            on_step = None if kill is None else kill_after(kill)
            with suppress(Killed):
                ends[name] = run_fit(
                    make_task(name, shots), folder / name, IDENTITY, group, "cpu", checkpoint_every=2, on_step=on_step
                )
    return ends


def run_runs(
    group: Group,
    runs: Sequence[tuple[Path, int | None]],
    copies: Mapping[Path, Path],
    shots: Pictures,
    dtype: torch.dtype,
) -> list[dict[str, Path]]:
    """Several times :func:`run_fits`, some of them in copies of what others left."""
    found = []
    for folder, kill in runs:
        if folder in copies and group.rank == 0:
            shutil.copytree(copies[folder], folder)
        group.sum(torch.zeros(1))  # nobody goes on before it is there
        found.append(run_fits(group, folder, shots, kill, dtype))
    return found
