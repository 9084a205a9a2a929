"""What is searched: ranges and choices of settings by their dotted keys, some only where others say so.

In a search file ::

    space:
      filter.p0: {low: 1.0e-3, high: 10.0, log: true}
      epochs: {low: 1, high: 10, integer: true}
      noise.process: {choices: [random_walk, ornstein_uhlenbeck]}
      noise.process.q: {low: 1.0e-8, high: 1.0e-3, log: true, when: {noise.process: random_walk}}
      filter.logit_variance: {low: 10, high: 20000, log: true, median: 1000, spread: 2}

The last one has a prior, normal in the value or where the range is logarithmic in its logarithm: what is believed of a
setting before a shot is seen, by which the objective ``log_posterior`` weighs what the shots say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import log
from typing import Any, Protocol

from kngd_ray.config import Config, flatten, override, parse
from kngd_ray.errors import UsageError, nearest
from kngd_ray.training.effect import without_effect
from kngd_ray.training.options import FitOptions

Value = str | int | float | bool
_CONDITION = "when"
_BETWEEN = (3 - 5**0.5) / 2  # of the way from a whole number to another: irrational, so that no third lies there


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: the least.
        high: the greatest.
        log: whether equal ratios, instead of equal differences, are equally likely.
        integer: whole numbers only.
        median: of the value's prior; None is a flat one.
        spread: standard deviation of that prior, of the value or, where `log`, of its logarithm.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False
    median: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; the range is empty")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; a logarithmic range starts above 0")
        if self.integer and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; a range of integers has whole bounds")
        if (self.median is None) != (self.spread is None):
            raise ValueError("a prior has a median and a spread; give both, or neither for a flat one")
        if self.median is not None and not self.low <= self.median <= self.high:
            raise ValueError(f"median is {self.median:g}; it must lie between {self.low:g} and {self.high:g}")
        if self.spread is not None and not self.spread > 0:
            raise ValueError(f"spread is {self.spread:g}; a standard deviation is above 0")

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that a setting must admit for it to admit all."""
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    def nearest(self, value: Any) -> Value | None:
        """The value of the range that is nearest to one; None if that is no number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        clipped = min(max(value, self.low), self.high)
        return round(clipped) if self.integer else float(clipped)

    def log_prior(self, value: float) -> float:
        """Log-density of a value under the prior, up to a constant; nats."""
        if self.median is None or self.spread is None:
            return 0.0
        distance = log(value / self.median) if self.log else value - self.median
        return -0.5 * (distance / self.spread) ** 2


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of some values.

    Attributes:
        choices: the values; of a setting that is a list, its short form, as in ``log_likelihood,cosine``.
    """

    choices: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(set(self.choices)) < 2 or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices is {list(self.choices)}; name two or more, each once")

    @property
    def ends(self) -> tuple[Value, ...]:
        """All of them."""
        return self.choices

    def nearest(self, value: Any) -> Value | None:
        """The value itself, or None if it is not among them."""
        return value if value in self.choices else None


@dataclass(frozen=True)
class Dimension:
    """One setting in the search space.

    Attributes:
        key: dotted key of the setting.
        domain: its values.
        when: the values that other dimensions must have for this one to exist.
    """

    key: str
    domain: Range | Choice
    when: Mapping[str, tuple[Value, ...]]

    def exists(self, values: Mapping[str, Value]) -> bool:
        """Whether the values of the dimensions before it call for it."""
        return all(values.get(parent) in allowed for parent, allowed in self.when.items())


class Suggests(Protocol):
    """What a space asks of Optuna's trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...  # noqa: D102
    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int: ...  # noqa: D102
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class Space:
    """The dimensions of a search, each after those that it depends on."""

    dimensions: tuple[Dimension, ...]

    def suggest(self, trial: Suggests) -> dict[str, Value]:
        """Ask a trial for the values of all dimensions that exist.

        Args:
            trial: Optuna's.

        Returns:
            Values by dotted key.
        """
        values: dict[str, Value] = {}
        for dimension in self.dimensions:
            key, domain = dimension.key, dimension.domain
            if not dimension.exists(values):
                continue
            if isinstance(domain, Choice):
                values[key] = trial.suggest_categorical(key, domain.choices)
            elif domain.integer:
                values[key] = trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.log)
            else:
                values[key] = trial.suggest_float(key, domain.low, domain.high, log=domain.log)
        return values

    def point(self, config: Config) -> dict[str, Value]:
        """Where a configuration lies in the space, at the nearest border if outside.

        Args:
            config: the configuration.

        Returns:
            Values by dotted key of the dimensions that it has a value for.
        """
        settings = flatten(config)
        values: dict[str, Value] = {}
        for dimension in self.dimensions:
            if dimension.exists(values):
                near = dimension.domain.nearest(_setting(settings, dimension.key))
                if near is not None:
                    values[dimension.key] = near
        return values

    def moved(self, config: Config, values: Mapping[str, Value]) -> dict[str, Any]:
        """Where a point that :meth:`point` gives for a configuration is not the configuration's own.

        Args:
            config: the configuration.
            values: by dotted key.

        Returns:
            The configuration's values by dotted key.
        """
        settings = flatten(config)
        own = {key: _setting(settings, key) for key in values}
        return {key: own[key] for key in values if own[key] != values[key]}

    def open_at(self, values: Mapping[str, Value]) -> list[str]:
        """What a point such as :meth:`point` gives leaves to the sampler.

        Args:
            values: by dotted key.

        Returns:
            Keys of the dimensions that exist there, and that it has no value for.
        """
        return [d.key for d in self.dimensions if d.exists(values) and d.key not in values]

    def log_prior(self, values: Mapping[str, Value]) -> float:
        """Log-density of settings under the priors of their dimensions.

        Args:
            values: by dotted key, such as :meth:`suggest` gives.

        Returns:
            Nats, up to a constant; the most there is, 0, is at all medians.
        """
        return sum(
            d.domain.log_prior(float(values[d.key]))
            for d in self.dimensions
            if isinstance(d.domain, Range) and d.key in values
        )

    def check(self, base: Config, *, begun: bool = False) -> None:
        """Refuse a space that holds settings which a configuration cannot have.

        Args:
            base: the configuration that trials start from.
            begun: whether trials have been run: then what has no effect may stay.

        Raises:
            UsageError: a key that is not a setting of a fit, or that the method does not look at, or a bad value.
        """
        for dimension in self.dimensions:
            _check_key(dimension.key)
            if not begun:
                self._check_effect(base, dimension)
            domain = dimension.domain
            for value in domain.ends:
                self._try(base, dimension, value)
            if isinstance(domain, Range) and not domain.integer and domain.low % 1 == domain.high % 1 == 0:
                between = round(domain.low + _BETWEEN * (domain.high - domain.low), 3)
                self._try(base, dimension, between, "; add integer: true")

    def _check_effect(self, base: Config, dimension: Dimension) -> None:
        """Refuse a setting that changes nothing, whatever one of the other choices is.

        Raises:
            UsageError: it is one; says because of what.
        """
        context = self._context(dimension)
        choices = {other.key: other.domain.choices for other in self.dimensions if isinstance(other.domain, Choice)}
        points = [context, *(context | {key: value} for key, values in choices.items() for value in values)]
        causes = []
        for point in points:
            try:
                config = override(base, point)
            except UsageError:  # of two that do not go together
                continue
            causes.append(without_effect(config.fit_options, config.posterior, dimension.key, protocol=config.protocol))
        others = {other.key for other in self.dimensions}
        if (
            causes
            and causes[0] is not None
            and all(cause and cause.partition("=")[0] not in others for cause in causes)
        ):
            raise UsageError(f"space.{dimension.key} has no effect with {causes[0]}: leave it out.")

    def _try(self, base: Config, dimension: Dimension, value: Value, remedy: str = "") -> None:
        """Give a setting a value.

        Raises:
            UsageError: the setting cannot have it; says the remedy.
        """
        try:
            override(base, {**self._context(dimension), dimension.key: value})
        except UsageError as error:
            reason = str(error).rstrip(".")
            raise UsageError(f"space.{dimension.key} cannot be {value}: {reason}{remedy}.") from error

    def _context(self, dimension: Dimension) -> dict[str, Value]:
        """Values of other dimensions under which one exists, the first that are allowed."""
        context: dict[str, Value] = {}
        for other in self.dimensions:
            if other.key in dimension.when:
                context |= {**self._context(other), other.key: dimension.when[other.key][0]}
        return context


def parse_space(raw: Mapping[str, Any]) -> Space:
    """Read a space from its plain form.

    Args:
        raw: ranges and choices by dotted key.

    Returns:
        The space.

    Raises:
        UsageError: a misspelt key, an empty range, a condition on what is not a choice of the space.
    """
    if not raw:
        raise UsageError("space is empty: name at least one setting to search, such as filter.p0.")
    found = {key: _dimension(key, value) for key, value in raw.items()}
    ordered: dict[str, Dimension] = {}

    def place(key: str, below: tuple[str, ...]) -> None:
        if key in below:
            raise UsageError(f"space.{key}.when refers to itself through {', '.join(below)}.")
        dimension = found[key]
        for parent, allowed in dimension.when.items():
            if parent not in found:
                raise UsageError(
                    f"space.{key}.when names {parent!r}, which the space lacks{nearest(parent, list(found))}."
                )
            domain = found[parent].domain
            for value in allowed:
                if not isinstance(domain, Choice) or value not in domain.choices:
                    raise UsageError(f"space.{key}.when asks for {parent}={value}, which is not one of its choices.")
            place(parent, (*below, key))
        ordered.setdefault(key, dimension)

    for key in found:
        place(key, ())
    return Space(tuple(ordered.values()))


def plain_space(space: Space) -> dict[str, Any]:
    """The plain form of a space, which :func:`parse_space` reads back.

    Args:
        space: the space.

    Returns:
        Nested data by dotted key.
    """
    return {
        d.key: {
            f.name: list(value) if isinstance(value, tuple) else value
            for f in fields(d.domain)
            if (value := getattr(d.domain, f.name)) is not None
        }
        | ({_CONDITION: {parent: list(allowed) for parent, allowed in d.when.items()}} if d.when else {})
        for d in space.dimensions
    }


def _dimension(key: Any, raw: Any) -> Dimension:
    if not isinstance(key, str):
        raise UsageError(f"space has the key {key!r}; name a setting, such as filter.p0.")
    if not isinstance(raw, Mapping):
        raise UsageError(
            f"space.{key} is {raw!r}; give {{low: .., high: ..}} or {{choices: [..]}}, or set it outside of the space."
        )
    given = {name: value for name, value in raw.items() if name != _CONDITION}
    if isinstance(given.get("choices"), list) and None in given["choices"]:
        raise UsageError(f"space.{key}: choices has null, which is no value to choose: name the others.")
    try:
        domain = parse(Choice, given) if "choices" in given else parse(Range, given)
    except UsageError as error:
        raise UsageError(f"space.{key}: {error}") from error
    conditions = {} if raw.get(_CONDITION) is None else raw[_CONDITION]
    if not isinstance(conditions, Mapping):
        raise UsageError(f"space.{key}.when is {conditions!r}; give the settings that it depends on, as key: value.")
    when = {str(parent): tuple(v) if isinstance(v, list) else (v,) for parent, v in conditions.items()}
    for parent, allowed in when.items():
        if not allowed:
            raise UsageError(f"space.{key}.when allows no value of {parent}: name one or more of its choices.")
    return Dimension(key, domain, when)


def _check_key(key: str) -> None:
    head = key.partition(".")[0]
    known = [f.name for f in fields(FitOptions) if f.name != "method"] + ["posterior"]
    if head not in known:
        raise UsageError(
            f"space.{key} is not a setting of a fit{nearest(head, known)}: a trial can vary how it learns, but "
            "not its data, its model or where it runs."
        )
    if key == "posterior.folds":
        raise UsageError(f"space.{key} would score trials on different folds: set it outside of the space.")


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    """A flat setting by its key; of a list of choices its short form, and of its only element that without number."""
    if key in settings:
        return settings[key]
    kinds = [
        value for name, value in settings.items() if name.rpartition(".")[0] == key and name[len(key) + 1 :].isdecimal()
    ]
    if kinds:
        return ",".join(kinds)
    head, _, rest = key.partition(".")
    return settings.get(f"{head}.0.{rest}") if f"{head}.1" not in settings else None
