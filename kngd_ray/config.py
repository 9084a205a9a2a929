"""The one configuration tree: typed, layered, and refusing what it does not know.

A configuration is built from layers, later ones winning: the defaults of the dataclasses, a preset,
a YAML file, ``key=value`` overrides. Keys are dotted paths into :class:`Config`. Two conveniences:

* A *choice* (a covariance family, an adapter, an observation model, ...) is a mapping with a
  ``kind`` and that kind's own options, and a bare name is short for it:
  ``filter.covariance=dense``, then ``filter.covariance.rule=vdekf``. When a later layer changes the
  kind, options of the earlier kind that the new one does not have are dropped; those of one command line are refused.
* A list with one element can be addressed without its index: ``adapter.width=32``. Bare names in a list keep the
  options that a layer below gave to that kind: ``observation=cosine`` is a preset's cosine, with its r0.

Values are YAML 1.2, read as the setting's type asks: ``trainer.name=007`` is a text and ``data.shots=010`` ten. A list
may be written with commas, and whole numbers in a row as a range: ``seeds=0-4,7``.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from kngd_ray import configs
from kngd_ray._layered import DEFAULTS, Node, T, assign, build, flat, kind_at, layers_of, merge, plain, shortened
from kngd_ray._run_layout import DEFAULT_STORAGE
from kngd_ray._yaml import LimitError, RepeatedError, dumped, typed
from kngd_ray.clip import ModelConfig, check_without_towers
from kngd_ray.configs._presets import preset_layers, read_config
from kngd_ray.data import DataConfig
from kngd_ray.errors import UsageError, printable
from kngd_ray.filters import Calibrated, ZeroShot
from kngd_ray.training.options import FitOptions, check_streamed, streamed
from kngd_ray.training.posterior_options import PosteriorOptions


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Where and how a run executes.

    Attributes:
        num_workers: ranks of the Ray Train job; 0 runs in this process, without Ray. A pair ``[least, most]`` starts
            as many as fit, and adapts when a node is lost or joins.
        use_gpu: give each rank a GPU. ``auto`` does if there are any, with no more ranks than GPUs.
        cpus_per_worker: CPU cores that each rank reserves.
        address: Ray cluster to join. None joins $RAY_ADDRESS or a cluster of yours on this machine, else starts one;
            ``local`` always starts one.
        storage_path: folder of all runs, shared by all nodes; by default $KNGD_STORAGE_PATH, else ``kngd_runs``.
        name: name of this run and of its folder; None generates one. ``--resume`` takes it.
        checkpoint_every: steps between checkpoints; the end of a fit always writes one.
        max_failures: how often a job is restarted after a worker has died.
    """

    num_workers: int | tuple[int, ...] = 2
    use_gpu: bool | Literal["auto"] = "auto"
    cpus_per_worker: float = 1.0
    address: str | None = None
    storage_path: str = field(default_factory=lambda: os.environ.get("KNGD_STORAGE_PATH") or DEFAULT_STORAGE)
    name: str | None = None
    checkpoint_every: int = 100
    max_failures: int = 2

    def __post_init__(self) -> None:
        pair = (self.num_workers,) if isinstance(self.num_workers, int) else tuple(self.num_workers)
        if len(pair) not in (1, 2) or pair[0] > pair[-1] or (len(pair) == 2 and pair[0] < 1):
            raise ValueError(
                f"num_workers is {list(pair)}; it must be a number, or a pair [least, most] of 1 or more such as [1, 2]"
            )
        object.__setattr__(self, "num_workers", pair[0] if pair[0] == pair[-1] else pair)
        counts = {"checkpoint_every": self.checkpoint_every, "max_failures": self.max_failures}
        for name, count in {"num_workers": pair[0], **counts}.items():
            if count < 0:
                raise ValueError(f"{name} is {count}; it must be 0 or more")
        if not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker is {self.cpus_per_worker}; a rank needs more than 0")
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise ValueError(f"name is {self.name!r}; it names a folder, without slashes or a leading dot")
        if self.name is not None and printable(self.name) != self.name:
            raise ValueError(f"name is {self.name!r}; a name has no control characters")

    @property
    def least_workers(self) -> int:
        """The smallest number of ranks; 0 runs without Ray."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The largest number of ranks."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[-1]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow tracking.

    Attributes:
        enabled: log to MLflow.
        uri: tracking store; by default $MLFLOW_TRACKING_URI, else a database file in this folder.
        experiment: MLflow experiment.
        log_model: log a pyfunc model that predicts from picture bytes.
        system_metrics: log the use of processor, memory, disk and network of the machine that started the run, and of
            its GPUs if ``nvidia-ml-py`` is installed.
        registered_model: registered model that gets the model of the first seed as a new version, with the alias
            ``champion`` if none of the same task is better. None registers nothing, except for the winner of a search.
    """

    enabled: bool = True
    uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    experiment: str = "kngd_ray"
    log_model: bool = True
    system_metrics: bool = True
    registered_model: str | None = None

    def __post_init__(self) -> None:
        for key, name in (("experiment", self.experiment), ("registered_model", self.registered_model)):
            if name is not None and printable(name) != name:
                raise ValueError(f"{key} is {name!r}; a name has no control characters")
        if self.registered_model is not None and not re.fullmatch(r"[^/:.%\"'\s][^/:%\"']*", self.registered_model):
            raise ValueError(
                f"registered_model is {self.registered_model!r}; a name there has no slashes, colons or quotes"
            )


@dataclass(frozen=True, kw_only=True)
class Config(FitOptions):
    """All settings of ``kngd-ray train``: the options of the fit, and these.

    Attributes:
        preset: shipped preset or YAML file that the other settings override; None is the preset named like the method.
        seeds: one fit per seed, each on its own support set.
        baselines: methods that are fitted as well, with their own presets, on the same data, seeds and adapter.
        prior: run, fit or checkpoint whose posterior is the prior of this run; None starts from CLIP. Each seed
            continues from the same seed of that run, or all from the only one. ``kalman`` starts from its mean and
            covariance, and ``filter.p0`` only sets how far ``ornstein_uhlenbeck`` relaxes. A gradient method starts
            from the weights of its own fit in that run, or else from those of the run's method.
        data: data set and few-shot task.
        model: CLIP model.
        posterior: how the posterior enters predictions.
        protocol: what is tested besides the run's classes, in and out of distribution. ``fsl`` (few-shot learning):
            nothing else. ``dg`` (domain generalisation): nothing else, but an OOD domain is required. ``bng`` (base to
            new): trains on the first half of the classes and classifies the second by its texts alone. ``cdg``
            (cross-data-set): classifies the data sets in `targets` by their texts. ``stream``: the shots arrive in
            batches, ordered by ``data.order`` or ``data.time``, and each batch is predicted before it is learned.
        targets: data sets of ``cdg``, each a parquet file or a folder with its own class names. Without a split, all
            pictures are tested on.
        trainer: where the run executes.
        tracking: where it is logged.
    """

    preset: str | None = None
    seeds: tuple[int, ...] = (0,)
    baselines: tuple[Literal["adamw", "sgd"], ...] = ()
    prior: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    posterior: PosteriorOptions = field(default_factory=PosteriorOptions)
    protocol: Literal["fsl", "dg", "bng", "cdg", "stream"] = "fsl"
    targets: tuple[str, ...] = ()
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ValueError("seeds is empty; name at least one")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0 or max(self.seeds) >= 2**63:
            raise ValueError(f"seeds is {list(self.seeds)}; seeds must differ, be 0 or more, and below 2^63")
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError(f"baselines is {list(self.baselines)}; name each method once")
        if self.prior is not None and not self.prior.strip():
            raise ValueError("prior is empty; name a run, a fit's folder or a checkpoint's, or leave it out")
        if self.protocol == "cdg" and not self.targets:
            raise ValueError(
                "protocol is cdg without targets; name the data sets to test on: targets=[flowers.parquet]"
            )
        ordered = [f"data.{name}" for name in ("order", "time") if getattr(self.data, name) is not None]
        check_streamed(self, self.protocol, ordered[0] if ordered else None)
        if self.model.precomputed:
            prompts = self.data.templates != DataConfig.templates
            check_without_towers(self.model, self.tune, self.adapter, prompts=prompts, protocol=self.protocol)
        if self.targets and self.protocol != "cdg":
            raise ValueError(f"targets are for protocol=cdg, and protocol is {self.protocol}; leave one of them out")

    @property
    def fit_options(self) -> FitOptions:
        """The part of the configuration that decides a fit; of a stream, a batch is not all of it."""
        options = FitOptions(**{f.name: getattr(self, f.name) for f in fields(FitOptions)})
        return streamed(options) if self.protocol == "stream" else options


def load_config(
    file: Path | Mapping[str, Any] | Sequence[Path | Mapping[str, Any]] | None = None,
    overrides: Sequence[str] = (),
    *,
    forced: Mapping[str, Any] | None = None,
    complete: bool = False,
) -> Config:
    """Build a configuration from its layers.

    Args:
        file: YAML file, several of which the later win, the content of one, or None.
        overrides: ``key=value`` strings, values in YAML.
        forced: a nested mapping above all other layers.
        complete: the files hold all settings, those of their preset too, which is not read again.

    Returns:
        The validated configuration.

    Raises:
        UsageError: unknown key, ill-typed or out-of-range value, malformed override, missing file or preset, or a
            file that describes a search.
    """
    given = [file] if isinstance(file, (Path, Mapping)) else file or []
    layers = [read_config(source) if isinstance(source, Path) else source for source in given]
    assignments = [parse_override(text) for text in overrides]
    named: dict[str, Any] = {}
    for chosen in (*layers, dict(assignments), forced or {}):
        named |= {key: chosen[key] for key in ("method", "preset") if chosen.get(key) is not None}
        tune = chosen.get("tune")
        for trained in (tune.get("parameters") if isinstance(tune, Mapping) else None, chosen.get("tune.parameters")):
            named |= {"parameters": trained} if trained is not None else {}
    preset = named.get("preset", _default_preset(named.get("method", Config.method), named.get("parameters")))
    if not complete and (
        "preset" in named or preset in configs.names("presets")
    ):  # a misspelt method is reported as a method
        layers = [*preset_layers(str(preset), named.get("method")), *layers]
    layers.insert(0, plain(Config()))
    with _depth_errors():
        tree: Node = {}
        for number, layer in enumerate(layers):
            for path, value in _taken_back(_spread(layer.items()), tree):
                tree = assign(tree, path.split("."), value, number, path)
            tree = merge(tree, layer, number)
        assignments = [*_taken_back(_spread(assignments), tree), *assignments]
        for number, (path, value) in enumerate(assignments, start=len(layers)):
            tree = assign(tree, path.split("."), value, number, path)
        _refuse_dropped(assignments, len(layers), tree)
        tree = merge(tree, {**(forced or {}), "preset": preset}, len(layers) + len(assignments))
        return build(Config, tree, "")


@contextmanager
def _depth_errors() -> Iterator[None]:
    """Turn settings without a bottom into a sentence.

    Raises:
        UsageError: they are nested too deeply.
    """
    try:
        yield
    except RecursionError as error:
        raise UsageError("the settings refer to themselves, or are nested too deeply.") from error


def _refuse_dropped(assignments: Sequence[tuple[str, Any]], first: int, tree: Node) -> None:
    """Refuse an option that a later choice of another kind has dropped: which one it was for, nobody can tell.

    Args:
        assignments: of one command line.
        first: the layer of the first of them.
        tree: all layers up to the last of them.

    Raises:
        UsageError: there is one.
    """
    kept = layers_of(tree)
    for number, (path, _) in enumerate(assignments):
        after = assignments[number + 1 :]
        above = next(
            (of for of, given in after if path.startswith(f"{of}.") and path not in dict(flat(given, of))), None
        )
        if first + number not in kept and above is not None:
            raise UsageError(f"{path} is set before {above}, which then replaces it: set {above} first.")


def _spread(assignments: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Settings by dotted key, those that are given in a mapping one by one, a choice by its kind."""
    return {name.removesuffix(".kind"): value for key, given in assignments for name, value in flat(given, key)}


def _taken_back(settings: Mapping[str, Any], before: Node) -> list[tuple[str, Any]]:
    """What settings replace beside what they name.

    A prior has one variance, of weights or of logits; towers too. And gamma is not the same of all prior means.

    Args:
        settings: values by dotted key, of one layer.
        before: the layers below.

    Returns:
        Dotted keys and values to be set before them; none where they name both, which is for the validation to judge.
    """
    mean, own = settings.get("filter.mean"), "filter.mean.gamma"
    other = isinstance(mean, str) and mean in _MEANS and mean != kind_at(before, "filter", "mean")
    gamma = [(own, _MEANS[mean].gamma)] if other and own not in settings else []
    return [*gamma, *_other_variances(settings)]


def _other_variances(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The prior variances that settings replace."""
    p0, logit_variance, spread = (f"filter.{name}" for name in ("p0", "logit_variance", "logit_spread"))
    towers, of_towers = "filter.towers", "filter.tower_logit_variance"
    in_weights = settings.get(p0) is not None or settings.get(towers) is not None
    taken = [(of_towers, None)] if in_weights and of_towers not in settings else []
    if settings.get(p0) is not None and logit_variance not in settings:
        return [*taken, (logit_variance, None), *([] if spread in settings else [(spread, 0.0)])]
    if taken:
        return taken
    if settings.get(logit_variance) is not None and p0 not in settings:
        return [(p0, None)]
    return []


_MEANS: Mapping[Any, ZeroShot | Calibrated] = {"zero_shot": ZeroShot(), "calibrated": Calibrated()}


def _default_preset(method: Any, parameters: Any) -> Any:
    """The preset of a method, or its own for what is trained: towers need other step sizes than adapters."""
    own = f"{method}_{parameters}"
    return own if own in configs.names("presets") else method


def baseline_config(config: Config, method: str) -> Config:
    """The configuration of a baseline beside a run: its own preset on the run's data, seeds and adapter.

    Args:
        config: the run's configuration.
        method: the baseline's method.

    Returns:
        The baseline's configuration.
    """
    shared = plain(replace(config, tracking=replace(config.tracking, registered_model=None)))
    task = ("data", "model", "posterior", "protocol", "targets", "trainer", "tracking")
    kept = ("seeds", "prior", "batch_size", "tune", "adapter", *task)
    forced = {"method": method, **{key: shared[key] for key in kept}}
    own = load_config(forced={"method": method, "tune": shared["tune"]}).posterior.sharpening_spread
    forced["posterior"] = {**shared["posterior"], "sharpening_spread": own}  # as the method has by itself
    return load_config(forced=forced)


def override(config: Config, settings: Mapping[str, Any]) -> Config:
    """A configuration with some settings changed, as overrides on the command line would.

    Args:
        config: the configuration.
        settings: values by dotted key, those of a part over those of the whole.

    Returns:
        The new configuration.

    Raises:
        UsageError: unknown key, ill-typed or out-of-range value.
    """
    with _depth_errors():
        tree: Node = merge({}, plain(config), DEFAULTS + 1)
        # a list before its elements: settings in a mapping have no order
        deeper_last = sorted(settings.items(), key=lambda setting: setting[0].count("."))
        changes = [*_taken_back(_spread(settings.items()), tree), *deeper_last]
        for number, (path, value) in enumerate(changes, start=DEFAULTS + 2):
            tree = assign(tree, path.split("."), value, number, path)
        return build(Config, tree, "")


def parse(cls: type[T], raw: Mapping[str, Any]) -> T:
    """Validate plain data, such as a manifest's, as a dataclass of the tree.

    Args:
        cls: the dataclass.
        raw: nested mappings, lists and scalars.

    Returns:
        The object.

    Raises:
        UsageError: the data does not fit.
    """
    with _depth_errors():
        return build(cls, merge({}, raw, 0), "")


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``key=value`` and read the value as YAML, which has no comments there.

    Args:
        text: the override.

    Returns:
        Dotted key and value.

    Raises:
        UsageError: there is no ``=``, no value, or one that is not YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"{text!r} is neither a command's option nor of the form key=value.")
    if not value.strip():  # as of a variable of the shell that is not set
        raise UsageError(f"{key.strip()}= has no value: give one, null for none, or \"''\" for an empty text.")
    try:
        return key.strip(), typed(value)
    except RepeatedError as error:
        raise UsageError(f"the value of {key} has {error.key!r} twice: leave one of them out.") from error
    except yaml.YAMLError as error:
        why = f" ({error.problem})" if isinstance(error, LimitError) else ""
        raise UsageError(f"the value of {key} is not valid YAML{why}: {shortened(value)}; quote it.") from error


def to_yaml(config: Any) -> str:
    """Settings as YAML; a whole configuration's are what :func:`load_config` reads back.

    Args:
        config: a dataclass of the tree, or plain data.

    Returns:
        YAML text.
    """
    return dumped(plain(config) if is_dataclass(config) else config)


def flatten(config: Any) -> dict[str, Any]:
    """Flat parameters as MLflow shows them: ``filter.covariance=diagonal``, ``filter.covariance.rule=ekf``.

    Args:
        config: a dataclass of the tree.

    Returns:
        Scalars by dotted key; a choice is its kind, its options below it.
    """
    return dict(flat(plain(config), ""))
