"""Reward functions with TRL's signature: this module imports them by name, calls them, and reads their results.

A function is called once for a whole batch, as ``f(prompts=..., completions=..., completion_ids=..., **columns,
trainer_state=..., log_extra=..., log_metric=...)`` with lists of one item for each completion. It returns such a list:
each item is a float, None (it does not grade this completion) or a ``(reward, feedback)`` pair.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

from vpd.config import ConfigError

RewardFunction: TypeAlias = Callable[..., Any]
ALWAYS_PASSED = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})


@dataclass(frozen=True, slots=True)
class Score:
    """One function's reward for one completion, and its feedback; None where it gave none."""

    reward: float | None
    feedback: str | None


class Logged:
    """What the reward functions log while they judge one batch.

    Args:
        count: The number of completions in the batch.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._extra: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Note one value for each completion, as TRL's ``log_extra``."""
        values = list(values)
        if len(values) != self.count:
            raise ValueError(
                f"log_extra({column!r}) takes a value per completion, {self.count} here, got {len(values)}."
            )
        self._extra[column] = values

    def metric(self, name: str, value: float) -> None:
        """Note a number for the whole batch, as TRL's ``log_metric``; numbers of one name are averaged."""
        self._metrics.setdefault(name, []).append(float(value))

    def details(self, index: int) -> dict[str, Any]:
        """Return what was noted for one completion: its extra values, and the batch's metrics under ``metrics``."""
        details = {column: values[index] for column, values in self._extra.items()}
        if self._metrics:
            details["metrics"] = {name: fmean(values) for name, values in self._metrics.items()}
        return details


class RewardCall:
    """One reward function with its name and weight.

    Args:
        function: A callable, or its name as ``package.module:function``.
        weight: The weight of its reward in the sum.
        columns: The names of the data's columns; the function's signature is checked against them.

    Raises:
        ConfigError: The function cannot be imported or called, or needs an argument that nobody passes.
    """

    def __init__(self, function: RewardFunction | str, weight: float, columns: Set[str]) -> None:
        self.function = import_function(function) if isinstance(function, str) else _check_callable(function)
        self.name = function_name(self.function)
        self.weight = weight
        self.is_async = inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(
            getattr(self.function, "__call__", None)  # noqa: B004
        )
        self._accepted = _accepted_arguments(self.function, self.name, columns | ALWAYS_PASSED)

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Return the raw result; it is awaitable for an async function."""
        if self._accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in self._accepted}
        return self.function(**arguments)

    def read(self, result: Any, count: int) -> list[Score]:
        """Read the raw result for ``count`` completions.

        Raises:
            TypeError: It is not a list with one reward, None or (reward, feedback) pair for each completion.
        """
        try:
            items = list(result)
        except TypeError:
            items = None
        if items is None or len(items) != count:
            got = type(result).__name__ if items is None else f"{len(items)} items"
            raise TypeError(
                f"The reward function {self.name} must return a list of one item per completion, {count} here, got "
                f"{got}."
            )
        return [self._score(item) for item in items]

    def _score(self, item: Any) -> Score:
        reward: Any = item
        feedback: Any = None
        if isinstance(item, tuple | list) and len(item) == 2:
            reward, feedback = item
        if feedback is not None and not isinstance(feedback, str):
            raise TypeError(f"The reward function {self.name} must give its feedback as text, got {feedback!r}.")
        try:
            return Score(None if reward is None else float(reward), feedback)
        except (TypeError, ValueError):
            raise TypeError(
                f"The reward function {self.name} must give a number, None or a (reward, feedback) pair for each "
                f"completion, got {item!r}."
            ) from None


async def ready(result: Any) -> Any:
    """Return the result, and await it where it is awaitable."""
    return await result if isinstance(result, Awaitable) else result


def import_function(name: str) -> RewardFunction:
    """Import the object that ``package.module:function`` names."""
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ConfigError(
            f"data.reward_funcs takes functions as package.module:function, got {name!r}. "
            f"(A reward model has to be wrapped in a function.)"
        )
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"The module of the reward function {name} could not be imported: {error}. "
            f"A file of your own must be in the working directory or on PYTHONPATH."
        ) from error
    for part in path.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"The module {module_name} has no {path} (data.reward_funcs: {name}).")
        value = getattr(value, part)
    return _check_callable(value)


def function_name(function: RewardFunction) -> str:
    """Return a name for logs: that of the function, of the wrapped function, or of the class."""
    if isinstance(function, functools.partial):
        return function_name(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _check_callable(value: Any) -> RewardFunction:
    # A reward model is a torch module and so callable too, but it takes token ids, not these arguments.
    if not callable(value) or hasattr(value, "forward"):
        raise ConfigError(
            f"A reward function must be a function of (prompts, completions, **columns), got {type(value).__name__}; "
            f"a reward model has to be wrapped in one."
        )
    return value


def _accepted_arguments(function: RewardFunction, name: str, passed: Set[str]) -> frozenset[str] | None:
    """Return the names of the arguments that the function takes, or None where it takes all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return None
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = sorted(p.name for p in named.values() if p.default is p.empty and p.name not in passed)
    if missing:
        raise ConfigError(
            f"The reward function {name} needs {', '.join(missing)}, which neither the data has as a column nor the "
            f"judge passes (there are: {', '.join(sorted(passed))})."
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(named)
