"""Calls are compared as JSON, and the text says which call or argument is wrong without giving the right one."""

from __future__ import annotations

import json

import pytest

from vpd import ConfigError
from vpd.config import ToolUseData
from vpd.environments import ToolUse, make_environment
from vpd.environments.tool_use import same_json
from vpd.types import Verdict

TOOLS = [{"name": "weather", "parameters": {"city": {"type": "string"}, "days": {"type": "integer"}}}]
BERN = {"name": "weather", "arguments": {"city": "Bern", "days": 3}}
ROME = {"name": "weather", "arguments": {"city": "Rome", "days": 5}}
ROWS = [
    {"prompt": "one", "tools": TOOLS, "calls": [BERN]},
    {"prompt": "two", "tools": TOOLS, "calls": [BERN, ROME]},
    {"prompt": "in order", "tools": TOOLS, "calls": [BERN, ROME], "ordered": True},
    {"prompt": "none", "tools": json.dumps(TOOLS), "calls": "[]"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "nested"}],
     "calls": [{"name": "find", "arguments": {"where": {"price": 2.0, "tags": ["a", "b"]}, "all": True}}]},
    {"prompt": "spare", "calls": [BERN]},
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(path)


def judged(path, prompt, completion, **options) -> Verdict:
    environment = ToolUse(path, selection_size=1, final_size=1, **options)
    tasks = [task for split in ("train", "selection", "final") for task in environment.tasks(split)]
    (chosen,) = [task for task in tasks if task.prompt[-1]["content"] == prompt]
    return environment.judge(chosen, completion)


def tagged(*calls):
    return "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n" for call in calls)


FIND = {"arguments": {"all": True, "where": {"tags": ["a", "b"], "price": 2}}, "name": "find"}


@pytest.mark.parametrize(
    ("prompt", "completion", "reward", "text"),
    [
        ("one", tagged(BERN), 1.0, "Your answer has 1 function call and was compared: it is right."),
        ("one", f"<think>\n{tagged(ROME)}</think>\nI look it up.\n{tagged(BERN)}", 1.0, "it is right."),
        ("one", f"```json\n{json.dumps([BERN])}\n```", 1.0, "it is right."),
        ("one", json.dumps(BERN), 1.0, "it is right."),
        ("one", tagged({"name": "weather", "arguments": json.dumps(BERN["arguments"])}), 1.0, "it is right."),
        ("two", tagged(ROME, BERN), 1.0, "Your answer has 2 function calls and was compared: it is right."),
        ("in order", tagged(BERN, ROME), 1.0, "it is right."),
        ("in order", tagged(ROME, BERN), 0.0, "The calls are right, but not in the right order."),
        ("nested", tagged(FIND), 1.0, "it is right."),
        ("nested", tagged({**FIND, "arguments": {**FIND["arguments"], "all": 1}}), 0.0,
         'Call 1, of "find": the value of the argument "all" is wrong, which should be true or false and is a number.'),
        ("none", "There is nothing to call.", 1.0, "Your answer has 0 function calls and was compared: it is right."),
        ("none", tagged(BERN), 0.0, 'Call 1, of "weather", is wrong: this function should not be called.'),
        ("one", "It will rain.", 0.0, "it is wrong. A call is missing."),
        ("one", tagged(BERN, BERN), 0.0, 'Call 2, of "weather", is one too many.'),
        ("one", tagged({"name": "weather", "arguments": {"city": "Basel", "days": 3}}), 0.0,
         'Call 1, of "weather": the value of the argument "city" is wrong.'),
        ("one", tagged({"name": "weather", "arguments": {"city": "Bern", "days": "3"}}), 0.0,
         "is wrong, which should be a number and is a text."),
        ("one", tagged({"name": "weather", "arguments": {"city": "Bern"}}), 0.0, 'an argument is missing: "days".'),
        ("one", tagged({"name": "weather", "arguments": {**BERN["arguments"], "unit": "C"}}), 0.0,
         'the argument "unit" should not be given.'),
        ("two", tagged(BERN, {"name": "weather", "arguments": {"city": "Roma", "days": 5}}), 0.0,
         'Call 2, of "weather": the value of the argument "city" is wrong.'),
        ("one", "<tool_call>\n{", 0.0, "could not be read: the tag <tool_call> is not closed"),
        ("one", "<tool_call>{name}</tool_call>", 0.0, 'could not be read: "{name}" is not valid JSON'),
        ("one", tagged({"function": "weather"}), 0.0, 'is not an object with a "name" and "arguments"'),
        ("one", tagged({"name": "weather", "arguments": [1]}), 0.0, 'the arguments of "weather" are not an object'),
        ("one", "<tool_call>" + "[" * 10**5 + "</tool_call>", 0.0, "could not be read"),
    ],
)  # fmt: skip
def test_the_text_says_which_call_or_argument_is_wrong(path, prompt, completion, reward, text):
    verdict = judged(path, prompt, completion)
    assert verdict.reward == reward
    assert text in (verdict.feedback or "")


def test_the_right_values_are_told_only_where_configured(path):
    wrong = tagged({"name": "weather", "arguments": {"city": "Basel", "days": 4}})
    texts = {
        level: judged(path, "one", wrong, feedback=level).feedback for level in ("outcome", "location", "reference")
    }
    assert texts["outcome"] == "Your answer has 1 function call and was compared: it is wrong."
    for level in ("outcome", "location"):
        assert "Bern" not in texts[level]
        assert "3" not in texts[level]
    assert texts["reference"].endswith(tagged(BERN).strip())


def test_tools_are_shown_in_the_system_text_where_the_row_has_them(path):
    environment = ToolUse(path, selection_size=1, final_size=1)
    tasks = [task for split in ("train", "selection", "final") for task in environment.tasks(split)]
    for task in tasks:
        has_tools = task.prompt[-1]["content"] in ("one", "two", "in order", "none")
        assert any(json.dumps(TOOLS[0]) in message["content"] for message in task.prompt) == has_tools


def test_demonstrations_pass_and_attempts_fail(path):
    environment = make_environment(ToolUseData(path=path, selection_size=1, final_size=1))
    demonstrations = environment.demonstrations(10)
    assert demonstrations
    for each in demonstrations:
        assert environment.judge(each.task, each.completion).reward == 1.0
        assert environment.judge(each.task, each.attempt).reward == 0.0


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (1, 1.0, True), (True, 1, False), (True, True, True), (None, None, True), (None, False, False), ("1", 1, False),
        ([1, 2], [2, 1], False), ({"a": 1, "b": [True]}, {"b": [True], "a": 1.0}, True), ({"a": 1}, {}, False),
    ],
)  # fmt: skip
def test_values_are_equal_as_json_has_it(first, second, same):
    assert same_json(first, second) is same
    assert same_json(second, first) is same


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "line 1: the column 'calls' must be a list of calls"),
        ({"prompt": "x", "calls": "[{"}, "line 1: the column 'calls' or 'tools' is not valid JSON"),
        ({"prompt": "", "calls": []}, "line 1: the column 'prompt' must be a text or chat messages"),
        ({"prompt": "x", "calls": [{"arguments": {}}]}, "line 1: in the column 'calls', .* is not an object with"),
    ],
)
def test_rows_that_cannot_be_read_are_told_with_their_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        ToolUse(str(path), final_size=1)


@pytest.mark.parametrize(
    ("completion", "reward", "text"),
    [
        (f"```text\nI look it up.\n```\n```json\n{json.dumps(BERN)}\n```\n```text\nDone.\n```", 1.0, "it is right."),
        (f"~~~json\r\n{json.dumps(BERN)}\r\n~~~", 1.0, "it is right."),
        (f"```\nsome prose\n```\n```\n{json.dumps(BERN)}\n```", 1.0, "it is right."),
        ("[" * 50_000 + "]" * 50_000, 0.0, "nested too deeply"),
        (tagged({"name": "weather", "arguments": "[" * 40_000}), 0.0, "nested too deeply"),
        ("<tool_call>" * 9_000, 0.0, "is not closed"),
        (tagged(BERN) * 1_500, 0.0, "There are 1479 more faults."),
    ],
)
def test_odd_completions_fail_with_a_short_text(path, completion, reward, text):
    verdict = judged(path, "one", completion)
    assert verdict.reward == reward
    assert text in (verdict.feedback or "")
    assert len(verdict.feedback or "") < 3_000
