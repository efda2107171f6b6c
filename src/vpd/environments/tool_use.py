"""The environment whose answers are function calls, which are compared with the right ones by name and arguments."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpd.config import ConfigError
from vpd.environments.answers import THINKING_END, parse_integer, quoted
from vpd.environments.base import Environment, Split
from vpd.environments.fences import read_blocks
from vpd.environments.rows import Row, chat_prompt, load_rows
from vpd.environments.splits import check_split, cut_splits, question_key
from vpd.environments.worked import change_digit
from vpd.types import Demonstration, Task, Verdict

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"
MOST_SENTENCES = 20
"""How many faults a text names at most: a completion may repeat a wrong call without end."""

INSTRUCTION = """You may call these functions, one JSON schema a line:
{tools}

Write each call between <tool_call> and </tool_call> as JSON with the function's name and arguments:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Call:
    """A function call; ``arguments`` holds JSON values by name."""

    name: str
    arguments: Mapping[str, Any]


class UnreadableError(ValueError):
    """A completion's calls do not have the required form; the error's text is a clause without a full stop."""


class ToolUse(Environment):
    """Requests that are answered by function calls.

    Rows have ``prompt`` (text or chat messages), ``calls`` (a list of ``{"name", "arguments"}``, empty where no
    function should be called), ``tools`` (JSON schemas, shown in a system text; rows whose prompt shows them itself
    leave the column out), and ``ordered`` where the order of the calls matters. Calls are read from ``<tool_call>``
    tags, or from JSON blocks.

    The reward is 1 where every call is right and none is missing or too many, and 0 otherwise. Arguments are compared
    as JSON: 1 and 1.0 are equal, true and 1 are not, and the order of keys does not matter.

    Args:
        path: A JSONL file, a folder with ``train.jsonl`` and perhaps ``test.jsonl``, or a Hugging Face dataset id.
        feedback: How much the text says: ``outcome`` tells right from wrong; ``location`` also names the call or the
            argument that is wrong; ``reference`` also gives the right calls.
        selection_size: How many training requests become the selection split.
        final_size: How many test requests the final split has at most (all by default); without a test file it takes
            this many training requests.
        seed: Decides the split.

    Raises:
        ConfigError: The data is missing or malformed (the message names file and line), or holds too few requests.
    """

    def __init__(
        self,
        path: str,
        *,
        feedback: Literal["outcome", "location", "reference"] = "location",
        selection_size: int = 100,
        final_size: int | None = None,
        seed: int = 0,
    ) -> None:
        rows = load_rows(path)
        self.feedback = feedback
        self.seed = seed
        self._tasks = cut_splits(
            [_task(row) for row in rows["train"]],
            [_task(row) for row in rows["test"]] if "test" in rows else None,
            key=lambda task: question_key(json.dumps(task.prompt)),
            selection_size=selection_size,
            final_size=final_size,
            seed=seed,
            origin=path,
        )

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    def judge(self, task: Task, completion: str) -> Verdict:
        wanted: list[Call] = task.data["calls"]
        try:
            calls = read_calls(completion)
        except UnreadableError as error:
            return self._verdict(task, 0.0, f"Your calls could not be read: {error}.")
        errors = compare(calls, wanted, task.data["ordered"])
        count = f"{len(calls)} function call{'' if len(calls) == 1 else 's'}"
        text = f"Your answer has {count} and was compared: it is {'wrong' if errors else 'right'}."
        if self.feedback != "outcome":
            more = [f"There are {len(errors) - MOST_SENTENCES} more faults."] if len(errors) > MOST_SENTENCES else []
            text = " ".join([text, *errors[:MOST_SENTENCES], *more])
        return self._verdict(task, float(not errors), text)

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Return the right calls, with attempts in which one argument is changed or a call is left out."""
        rng = random.Random(self.seed)
        demonstrations = []
        for task in self._tasks["train"]:
            calls: list[Call] = task.data["calls"]
            if calls and len(demonstrations) < count:
                attempt = write_calls(_changed(calls, rng)) or "I cannot help with that."
                demonstrations.append(Demonstration(task, write_calls(calls), attempt))
        return demonstrations

    def _verdict(self, task: Task, reward: float, text: str) -> Verdict:
        if self.feedback == "reference":
            text = f"{text} The right answer is:\n{task.reference or 'no call'}"
        return Verdict(reward, text)


def read_calls(completion: str) -> list[Call]:
    """Read the calls of a completion; there are none where it has neither tags nor a JSON block.

    Raises:
        UnreadableError: A tag or a block holds something that is not a call.
    """
    answer = completion.rpartition(THINKING_END)[2]
    texts = _tagged(answer)
    if not texts:
        if CALL_BEGIN in answer:
            raise UnreadableError("the tag <tool_call> is not closed by </tool_call>")
        texts = _fenced(answer) or ([answer] if answer.lstrip().startswith(("{", "[")) else [])
    calls = []
    for text in texts:
        value = _json(text, quoted(text))
        calls += [_call(item) for item in (value if isinstance(value, list) else [value])]
    return calls


def _tagged(answer: str) -> list[str]:
    texts, end = [], 0
    while (start := answer.find(CALL_BEGIN, end)) >= 0:
        start += len(CALL_BEGIN)
        end = answer.find(CALL_END, start)
        if end < 0:
            break
        texts.append(answer[start:end])
    return texts


def _fenced(answer: str) -> list[str]:
    """Return the JSON blocks, or else the blocks without a language that begin as JSON does."""
    blocks = [block for block in read_blocks(answer) if block.closed]
    named = [block.text for block in blocks if block.language == "json"]
    unnamed = [block.text for block in blocks if not block.language]
    return named or [text for text in unnamed if text.lstrip().startswith(("{", "["))]


def _json(text: str, name: str) -> Any:
    try:
        value = json.loads(text)
        # Whatever is nested too deeply to be written again would end a later comparison too.
        json.dumps(value)
    except RecursionError:
        raise UnreadableError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise UnreadableError(f"{name} is not valid JSON ({error})") from None
    return value


def _call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UnreadableError(f'{quoted(json.dumps(value))} is not an object with a "name" and "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        # Some models write the arguments as OpenAI's interface gives them: JSON inside JSON.
        arguments = _json(arguments, f"the text of the arguments of {quoted(value['name'])}")
    if not isinstance(arguments, dict):
        raise UnreadableError(f"the arguments of {quoted(value['name'])} are not an object")
    return Call(value["name"], arguments)


def compare(calls: Sequence[Call], wanted: Sequence[Call], ordered: bool) -> list[str]:
    """Say what is wrong with the calls, one sentence for each fault; no sentence gives a right value away."""
    missing = list(wanted)
    wrong: list[tuple[int, Call]] = []
    for number, call in enumerate(calls, start=1):
        found = next((other for other in missing if _same_call(call, other)), None)
        if found is None:
            wrong.append((number, call))
        else:
            missing.remove(found)
    sentences = []
    for number, call in wrong:
        # Of the calls that are still missing, the one with the most equal arguments is taken as the intended one.
        named = [other for other in missing if other.name == call.name]
        if named:
            nearest = max(named, key=lambda other: _equal_arguments(call, other))
            missing.remove(nearest)
            sentences += _argument_errors(number, call, nearest)
        elif any(other.name == call.name for other in wanted):
            sentences.append(f"Call {number}, of {quoted(call.name)}, is one too many.")
        else:
            sentences.append(f"Call {number}, of {quoted(call.name)}, is wrong: this function should not be called.")
    if missing:
        count = "A call is" if len(missing) == 1 else f"{len(missing)} calls are"
        sentences.append(f"{count} missing.")
    if ordered and not sentences and not all(map(_same_call, calls, wanted)):
        sentences.append("The calls are right, but not in the right order.")
    return sentences


def _argument_errors(number: int, call: Call, wanted: Call) -> list[str]:
    where = f"Call {number}, of {quoted(call.name)}:"
    sentences = []
    for name, value in call.arguments.items():
        if name not in wanted.arguments:
            sentences.append(f"{where} the argument {quoted(name)} should not be given.")
        elif not same_json(value, wanted.arguments[name]):
            kinds = _kind(value), _kind(wanted.arguments[name])
            detail = f", which should be {kinds[1]} and is {kinds[0]}" if kinds[0] != kinds[1] else ""
            sentences.append(f"{where} the value of the argument {quoted(name)} is wrong{detail}.")
    absent = [name for name in wanted.arguments if name not in call.arguments]
    if absent:
        named = ", ".join(quoted(name) for name in absent)
        sentences.append(f"{where} {'an argument is' if len(absent) == 1 else 'arguments are'} missing: {named}.")
    return sentences


def _kind(value: Any) -> str:
    for kinds, name in (
        (bool, "true or false"), (int | float, "a number"), (str, "a text"), (list, "a list"), (dict, "an object"),
    ):  # fmt: skip
        if isinstance(value, kinds):
            return name
    return "null"


def _same_call(call: Call, other: Call) -> bool:
    return call.name == other.name and same_json(call.arguments, other.arguments)


def _equal_arguments(call: Call, other: Call) -> int:
    return sum(name in other.arguments and same_json(v, other.arguments[name]) for name, v in call.arguments.items())


def same_json(first: Any, second: Any) -> bool:
    """Compare two JSON values; numbers are compared by value, but true and false are not numbers."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_json(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_json, first, second))
    return (type(first) is type(second) and first == second) or (
        isinstance(first, int | float) and isinstance(second, int | float) and first == second
    )


def write_calls(calls: Sequence[Call]) -> str:
    """Write the calls in the form that the instruction asks for."""
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': call.name, 'arguments': call.arguments}, ensure_ascii=False)}\n</tool_call>"
        for call in calls
    )


def _changed(calls: Sequence[Call], rng: random.Random) -> list[Call]:
    index = rng.randrange(len(calls))
    call = calls[index]
    if not call.arguments:
        return [other for i, other in enumerate(calls) if i != index]
    name = rng.choice(sorted(call.arguments))
    arguments = {**call.arguments, name: _other_value(call.arguments[name], rng)}
    return [Call(call.name, arguments) if i == index else other for i, other in enumerate(calls)]


def _other_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return change_digit(value, rng)
    number = parse_integer(value) if isinstance(value, str) else None
    if number is not None:
        return str(change_digit(number, rng))
    return "unknown" if value != "unknown" else "none"


def _task(row: Row) -> Task:
    calls, tools = (row.values.get(name) for name in ("calls", "tools"))
    # Datasets often keep such columns as JSON text.
    try:
        calls, tools = (json.loads(v) if isinstance(v, str) and v.strip() else v for v in (calls, tools))
    except ValueError as error:
        raise ConfigError(f"{row.origin}: the column 'calls' or 'tools' is not valid JSON: {error}.") from None
    if not isinstance(calls, list):
        raise ConfigError(f"{row.origin}: the column 'calls' must be a list of calls, got {calls!r}.")
    try:
        wanted = [_call(call) for call in calls]
    except UnreadableError as error:
        raise ConfigError(f"{row.origin}: in the column 'calls', {error}.") from None
    messages = chat_prompt(row)
    if tools:
        system = INSTRUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if messages[0]["role"] == "system":
            messages = [{"role": "system", "content": f"{messages[0]['content']}\n\n{system}"}, *messages[1:]]
        else:
            messages = [{"role": "system", "content": system}, *messages]
    data = {"calls": wanted, "ordered": bool(row.values.get("ordered"))}
    return Task(row.id, messages, data, write_calls(wanted) or None)
