"""The environment for tasksets of PrimeIntellect's verifiers whose tasks ask for a single answer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpd.config import ConfigError
from vpd.environments.base import Environment, Split
from vpd.environments.splits import check_split, cut_splits, question_key
from vpd.types import Messages, Task, Verdict


class Verifiers(Environment):
    """The tasks of an installed taskset, scored by its own rewards and judges.

    The reward is the taskset's weighted sum; ``algorithm.success_threshold`` sets the reward at which an answer is a
    success. The feedback is ``trace.info["feedback"]`` where the taskset's scoring writes a text there; otherwise it
    lists the names and scores of the taskset's rewards and metrics.

    Args:
        id: The taskset's name as verifiers imports it: a module, or ``owner/name`` of an installed hub environment.
        arguments: The taskset's own settings.
        tasks: How many tasks are read at most.
        selection_size: How many tasks become the selection split.
        final_size: How many tasks become the final split; training has the rest.
        seed: Decides the split.

    Raises:
        ConfigError: verifiers is not installed or has no such taskset; or the tasks need tools, a container, or scoring
            inside a runtime, or do not begin with a user's text, so that one completion is not enough.
    """

    def __init__(
        self,
        id: str,
        *,
        arguments: Mapping[str, Any] | None = None,
        tasks: int = 2000,
        selection_size: int = 100,
        final_size: int = 300,
        seed: int = 0,
    ) -> None:
        found = list(_load(id, arguments or {}, tasks))
        self._tasks = cut_splits(
            [_task(index, task, id) for index, task in enumerate(found)],
            None,
            key=lambda task: question_key(str(task.prompt)),
            selection_size=selection_size,
            final_size=final_size,
            seed=seed,
            origin=id,
        )

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    async def judge(self, task: Task, completion: str) -> Verdict:
        original = task.data["task"]
        trace = _trace(original, task.prompt, completion)
        await original.score(trace)
        scores = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        if not scores:
            raise ValueError("the taskset's scoring gave no reward")
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        text = trace.info.get("feedback")
        if not isinstance(text, str) or not text.strip():
            listed = ", ".join(f"{name} {value:g}" for name, value in {**scores, **metrics}.items())
            text = f"Your answer was scored: {listed}."
        return Verdict(float(trace.reward), text, {"rewards": scores, "metrics": metrics})


def _load(id: str, arguments: Mapping[str, Any], limit: int) -> Iterator[Any]:
    try:
        import verifiers.v1 as vf
    except ImportError:
        raise ConfigError(
            'The environment verifiers needs the package verifiers, 0.4 or newer: pip install "vpd-rl[verifiers]".'
        ) from None
    try:
        config = vf.taskset_config_type(id)(id=id, **arguments)
        taskset = vf.load_taskset(config)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"The taskset {id} cannot be loaded: {error}") from error
    if type(taskset).toolsets(config):
        raise ConfigError(_refusal(id, "bring tools"))
    yield from taskset.take(limit)


def _task(index: int, original: Any, id: str) -> Task:
    data = original.data
    if original.NEEDS_CONTAINER or data.image is not None:
        raise ConfigError(_refusal(id, "run in a container"))
    if type(original).toolsets(original.config):
        raise ConfigError(_refusal(id, "bring tools"))
    signals = [*original.hooks("reward"), *(judge.score for judge in original.plugged_judges())]
    if any(_requires_runtime(signal) for signal in signals):
        raise ConfigError(_refusal(id, "are scored inside a runtime"))
    messages: Messages = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        messages.append({"role": "user", "content": data.prompt})
    else:
        messages += [message.model_dump(include={"role", "content"}) for message in data.prompt or []]
    texts = all(isinstance(message["content"], str) for message in messages)
    if not messages or not texts or messages[-1]["role"] != "user":
        raise ConfigError(_refusal(id, "do not begin with a user's text"))
    return Task(f"{id}/{index}", messages, {"task": original})


def _requires_runtime(signal: Any) -> bool:
    parameter = inspect.signature(signal).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _refusal(id: str, why: str) -> str:
    return f"The tasks of {id} {why}: only tasksets that one text answers can be trained on."


def _trace(original: Any, prompt: Messages, completion: str) -> Any:
    """Make the trace that verifiers would have recorded of a chat that ends with the completion."""
    import verifiers.v1 as vf
    from verifiers.v1.state import state_cls

    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
    messages = [kinds[message["role"]](content=message["content"]) for message in prompt]
    messages.append(vf.AssistantMessage(content=completion))
    nodes = [
        vf.MessageNode(parent=index - 1 if index else None, message=message, sampled=index == len(prompt))
        for index, message in enumerate(messages)
    ]
    task = vf.TraceTask(type=type(original).__name__, data=original.data, key=original.key, hash=original.hash)
    return vf.Trace(
        task=task,
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        state=state_cls(type(original))(),
        is_completed=True,
        ok=True,
    )
