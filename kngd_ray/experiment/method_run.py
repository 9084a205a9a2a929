"""One method of a run: its fits by seed, their evaluation, and the MLflow records that they leave."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kngd_ray._option import option
from kngd_ray._run_layout import CONFIG, fit_name
from kngd_ray.clip import CLIPHead, PrecomputedModel
from kngd_ray.config import Config, flatten, to_yaml
from kngd_ray.errors import CheckpointError, FilterError
from kngd_ray.experiment import run_folder
from kngd_ray.experiment.aggregate import flat_metrics, over_seeds
from kngd_ray.experiment.environment import describe_data, describe_environment, source_tags
from kngd_ray.experiment.learned import learned_by
from kngd_ray.experiment.model_card import write_card
from kngd_ray.experiment.prepared import TaskData
from kngd_ray.experiment.protocols import Protocol
from kngd_ray.experiment.streams import Streamed, step_metrics, stream_of
from kngd_ray.storage import storage_errors, write_text
from kngd_ray.tracking import Record, Status, SystemMonitor, learning_curve, reliability_diagram, stream_curve
from kngd_ray.training.calibration import (
    AnyPredictor,
    Calibration,
    below_zero_shot,
    calibrate_by_head,
    posterior_of_head,
    uncalibrated,
)
from kngd_ray.training.classifier import CLASS_EMBEDDINGS
from kngd_ray.training.evaluation import ID, evaluate
from kngd_ray.training.fit import FitTask
from kngd_ray.training.kalman import FORESEEN
from kngd_ray.training.method import MethodState, left_unlearned, stopped_short
from kngd_ray.training.network_predictor import NetworkPredictor
from kngd_ray.training.novelty import Novelty, calibrate_and_compare, compare_towers
from kngd_ray.training.prior import Prior
from kngd_ray.training.restoring import restore_predictor
from kngd_ray.training.resumable import latest
from kngd_ray.training.settled import Settled, read_settled, save_settled
from kngd_ray.training.start import HeadStart
from kngd_ray.training.stream import Foresight
from kngd_ray.training.transfer import carries_over

# figures of a step that are about the ranks, not about the fit
_METRICS = {"bytes_moved": "shard/bytes_per_step", "covariance_bytes": "shard/covariance_bytes"}


class MethodRun:
    """A method's fits in a run.

    Args:
        config: the method's configuration.
        priors: by seed, what each fit starts from; none where it starts at CLIP's own weights.
        prepared: features and model.
        protocol: what the fits are tested on beside their own classes.
        folder: of the run.
    """

    def __init__(
        self, config: Config, priors: Mapping[int, Prior], prepared: TaskData, protocol: Protocol, folder: Path
    ) -> None:
        self.config = config
        self._protocol = protocol
        self._prepared = prepared
        self._folder = folder
        self.tasks = {
            seed: FitTask(
                config.fit_options,
                seed,
                prepared.shots(seed, config.tune, folder),
                prepared.class_embeddings,
                prepared.model.logit_scale,
                priors.get(seed),
                towers=prepared.towers(config.tune),
                stream=stream_of(prepared, seed),
                head=HeadStart.of(config.fit_options, prepared.support(seed)),
                learned=learned_by(prepared, seed, priors.get(seed)),
            )
            for seed in config.seeds
        }
        self.failures: dict[str, str] = {}
        self.warnings: list[str] = []
        self.unchosen = False  # whether folds of a fit could not choose what they were asked for
        several = len(config.seeds) > 1
        self._parent = self._record(self.name, config, None) if several else None
        self._records = {
            self.fit(seed): self._record(self.fit(seed), replace(config, seeds=(seed,)), self.name if several else None)
            for seed in config.seeds
        }
        self.top_record = self.name if several else self.fit(config.seeds[0])

    @property
    def name(self) -> str:
        """The method."""
        return self.config.method

    def fit(self, seed: int) -> str:
        """What the fit of a seed is called."""
        return fit_name(self.name, seed)

    def monitored(self) -> SystemMonitor:
        """A context in which the machine's load is logged to the method's own record."""
        return SystemMonitor((self._parent or self._records[self.top_record]).folder)

    def log_step(self, fit: str, record: Mapping[str, Any]) -> None:
        """Log a step; of a refused one, that it was refused.

        Args:
            fit: name of the fit.
            record: fields of a ``StepRecord``.
        """
        stats = record["stats"] or {}
        figures = {key: value for key, value in stats.items() if value is not None and key != "log_predictive"}
        metrics = {_METRICS.get(key, f"train/{key}"): value for key, value in figures.items()}
        metrics |= step_metrics(record)
        metrics |= {"time/step_ms": record["milliseconds"], "train/refused": float(record["stats"] is None)}
        self._records[fit].log_step(record["step"], metrics)

    def report(
        self, zero_shot: Mapping[int, dict[str, Any]], working: Callable[[str], AbstractContextManager[None]]
    ) -> dict[str, Any] | None:
        """Evaluate the fits that ended well, log each, and combine them over seeds.

        Args:
            zero_shot: zero-shot figures by seed.
            working: shows what is being done meanwhile.

        Returns:
            The method's part of the report, its ``run_id`` still open; None when no fit ended well.
        """
        by_seed = {}
        for seed in [seed for seed in self.tasks if self.fit(seed) not in self.failures]:
            with working(f"{self.fit(seed)}: choosing tau and evaluating"):
                try:
                    by_seed[seed] = self._evaluate(seed, zero_shot[seed])
                except FilterError as error:  # it came to its end, and what came of it predicts no numbers
                    self.failures[self.fit(seed)] = str(error)
        done, reports = list(by_seed), list(by_seed.values())
        if not done:
            return None
        refused = sum(report.pop("refused") for report in reports)
        seconds = sum(report.pop("seconds") for report in reports)
        alphas = [report.pop("alpha") for report in reports]
        alike = self._prepared.one_support
        combined = over_seeds(reports, one_support=alike)
        named = self._protocol.named
        over_zero = over_seeds([zero_shot[seed] for seed in done], one_support=alike)
        if self._parent is not None:
            self._parent.log_metrics(flat_metrics(combined))
            self._card(self._parent, self.name, replace(self.config, seeds=tuple(done)), combined, over_zero)
        return {
            "run_id": None,
            "method": self.name,
            "preset": self.config.preset,
            "seeds": done,
            "steps": self.tasks[done[0]].sampler.steps,
            "refused": refused,
            "seconds": seconds,
            "alpha": alphas,  # by seed, that the figures are of
            "zero_shot": named(over_zero),
            **named(combined),
            **({"curves": {str(seed): self._streamed(seed).curve() for seed in done}} if self._is_stream else {}),
        }

    def finish(self, status: Status) -> None:
        """Close the records; a fit that could not go on is marked as failed, whatever the status of the run.

        Args:
            status: of the run.
        """
        for fit, record in self._records.items():
            record.finish("FAILED" if fit in self.failures else status)
        if self._parent is not None:
            self._parent.finish("FAILED" if self.failures else status)

    def _record(self, record_id: str, config: Config, parent: str | None) -> Record:
        shown = run_folder.shown(config)
        tags = {
            "kngd_ray.run": self._folder.name,
            "kngd_ray.kind": "fit" if parent is not None else "method",
            "kngd_ray.method": self.name,
            "kngd_ray.preset": str(config.preset),
            **({"kngd_ray.one_support": "true"} if self._prepared.one_support else {}),
            **source_tags(),
        }
        name = f"{self._folder.name}/{record_id}"
        record = Record.open(self._folder, record_id, name=name, params=flatten(shown), tags=tags, parent=parent)
        record.log_input(**describe_data(self._prepared.images, config.data, self._prepared.model.name))
        write_text(record.artifacts / CONFIG, to_yaml(shown))
        write_text(record.artifacts / "environment.json", describe_environment())
        return record

    def _card(
        self, record: Record, name: str, config: Config, report: Mapping[str, Any], zero_shot: Mapping[str, Any]
    ) -> None:
        """Write the model card of a fit, or of the fits of all seeds, after they were settled."""
        settled = {seed: read_settled(self._folder / "fits" / self.fit(seed)) for seed in config.seeds}
        note = write_card(
            record.artifacts,
            f"{self._folder.name}, {name}",
            config,
            self._prepared,
            report,
            zero_shot,
            steps=self.tasks[config.seeds[0]].sampler.steps,
            calibrations={seed: found.calibration for seed, found in settled.items()},
            compared=all(found.novelty is not None for found in settled.values()),
        )
        record.set_tag("mlflow.note.content", note)

    @property
    def _is_stream(self) -> bool:
        return self.config.protocol == "stream"

    def _streamed(self, seed: int) -> Streamed:
        stream = self.tasks[seed].stream
        assert stream is not None
        return Streamed(stream, self._records[self.fit(seed)].steps())

    def _calibrated(
        self, task: FitTask, state: MethodState, predictor: AnyPredictor
    ) -> tuple[Calibration, Novelty | None]:
        """What the shots say of tau and T; of a stream, tau is the one that has predicted it best."""
        if task.stream is not None:
            foreseen = state.replicated.get(FORESEEN)
            tau = 0.0 if foreseen is None else Foresight(task.stream, foreseen).tau
            return Calibration(tau, 1.0, chosen=foreseen is not None), None
        posterior, device = self.config.posterior, self._prepared.device
        from_head = task.head is not None and task.prior is None  # a run that continues another has not met this head
        by_head = from_head and self.config.method == "kalman" and not posterior.folds
        if task.towers is not None and self._unasked and not by_head:
            return Calibration(0.0, 1.0), None
        try:
            if not by_head:
                return calibrate_and_compare(task, posterior, device, state)
            calibration = calibrate_by_head(task, posterior, device)
        except FilterError as error:
            by = posterior_of_head(task, posterior) if by_head else posterior
            found, warning = uncalibrated(by, error, believes=self.config.method == "kalman")
            self._warn_once(f"{self.name}: {warning}")
            self.unchosen = True
            return found, None
        return calibration, compare_towers(task, predictor, device)

    @property
    def _unasked(self) -> bool:
        """Whether nothing says by how much a belief over towers is too wide: then the mean predicts."""
        posterior = self.config.posterior
        given = posterior.temperature is not None or posterior.tau_median is not None
        return posterior.predict == "linearised" and not posterior.folds and not given

    def _warn_once(self, warning: str) -> None:
        """Keep a warning that is the same for every seed."""
        if warning not in self.warnings:
            self.warnings.append(warning)

    def _gamma_of_others(self, seed: int) -> float:
        """How much of the zero-shot logits is believed of classes that the fits do not learn."""
        start = self.tasks[seed].head
        options = self.config.fit_options if start is None else start.options
        if options.method != "kalman":
            return 1.0
        shots = self._prepared.support(seed)
        logits = CLIPHead(self._prepared.class_embeddings, self._prepared.model.logit_scale)(shots.features)
        return options.filter.mean.of_others(logits, shots.labels)

    def _evaluate(self, seed: int, zero_shot: dict[str, Any]) -> dict[str, Any]:
        name, task = self.fit(seed), self.tasks[seed]
        record, posterior = self._records[name], self.config.posterior
        fit_folder = self._folder / "fits" / name
        checkpoint = latest(fit_folder)
        if checkpoint is None or checkpoint.manifest["step"] < task.sampler.steps:
            how = option("resume", self._folder.name)
            raise CheckpointError(f"the fit {name} did not finish: continue with {how}.")
        kept = read_settled(fit_folder).alpha  # of an ensemble that was settled on after the run had ended
        device = self._prepared.device
        predictor = restore_predictor(
            checkpoint,
            self._prepared.evaluator,
            posterior,
            alpha=kept,
            class_embeddings=task.class_embeddings,
            device=device,
        )
        calibration, novelty = self._calibrated(task, checkpoint.state, predictor)
        save_settled(fit_folder, Settled(calibration, posterior, kept, novelty))
        if (warning := below_zero_shot(task, calibration, posterior.folds)) is not None:
            self.warnings.append(f"{name}: {warning}")
        if isinstance(predictor, NetworkPredictor) and predictor.left_out:
            self.warnings.append(
                f"{name}: predictions leave the text tower's part of the posterior out, which would take a pass "
                "through all prompts for each picture: what they are sure of is the head's"
            )
        if self._protocol.unseen and not carries_over(predictor):
            self._warn_once(
                f"{self.name}: the adapter has weights for the trained classes only, so new classes are ranked as by "
                "zero-shot CLIP; adapter=linear, adapter=bottleneck and tune.parameters=lora learn for all classes"
            )
        tests = self._prepared.tests(seed, self.config.tune)
        evaluation = evaluate(predictor, tests, calibration)
        report = evaluation.report()
        report |= self._protocol.figures(predictor, calibration, report[ID], self._gamma_of_others(seed))
        if self._is_stream:
            report["stream"] = self._streamed(seed).figures()
        steps = record.steps()
        seconds = sum(step.get("time/step_ms", 0.0) for step in steps) / 1e3
        refused = sum(int(step.get("train/refused", 0)) for step in steps)
        if any(step.get("train/unsettled") for step in steps):
            self.warnings.append(f"{name}: {stopped_short(self.config.filter.iterations)}")
        if unlearned := [int(step["train/unlearned"]) for step in steps if step.get("train/unlearned")]:
            self.warnings.append(f"{name}: {left_unlearned(max(unlearned), len(unlearned))}")
        record.log_metrics(
            flat_metrics(report)
            | flat_metrics(zero_shot, "zero_shot/")  # in every run: they tell `compare` which ones it may compare
            | {
                "calibration/tau": calibration.tau,
                "calibration/sharpening": calibration.sharpening,
                "calibration/temperature": calibration.scaling,
                "time/fit_s": seconds,
            }
            | ({} if calibration.held_out_nll is None else {"calibration/held_out_nll": calibration.held_out_nll})
        )
        self._card(record, name, replace(self.config, seeds=(seed,)), report, zero_shot)
        figures = record.artifacts / "figures"
        with storage_errors(figures):
            figures.mkdir(exist_ok=True)
        curves = {test: (p, tests[test].labels) for test, p in evaluation.probabilities.items()}
        reliability_diagram(curves, figures / "reliability.png", name)
        if len(steps) > 1:  # the default has one step, whose figures are metrics
            learning_curve(steps, figures / "learning_curve.png", name)
        if self._is_stream:
            stream_curve(self._streamed(seed).curve(), figures / "stream.png", name)
        model = self._prepared.model
        given = model if isinstance(model, PrecomputedModel) else None
        if given is not None:
            given.save(fit_folder / CLASS_EMBEDDINGS)
        if self.config.tracking.log_model:
            first = seed == self.config.seeds[0]
            registered = self.config.tracking.registered_model if first else None
            width = None if given is None else given.embed_dim
            record.set_model(fit_folder, self._prepared.images.class_names, registered, features=width)
        alpha = self.config.tune.alpha if kept is None else kept
        return {**report, "refused": refused, "seconds": seconds, "alpha": alpha}
