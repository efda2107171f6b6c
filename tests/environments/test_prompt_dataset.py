import asyncio
import functools
import gc
import inspect
import json
import sys
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerState
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from vpd.config import ConfigError, PromptData
from vpd.environments import SPLITS, PromptDataset, judge_all, make_environment
from vpd.environments.base import Attempt
from vpd.environments.judging import described
from vpd.types import Verdict, plain_text

SIZES: dict[str, Any] = {"selection_size": 2, "final_size": 3}


def rows(count: int = 20, chat: bool = False) -> list[dict]:
    return [
        {"prompt": [{"role": "user", "content": f"Say {i}"}] if chat else f"Say {i}", "solution": str(i)}
        for i in range(count)
    ]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def says_solution(prompts, completions, solution, **kwargs):
    return [float(text_of(c) == s) for c, s in zip(completions, solution, strict=True)]


def says_why(completions, solution, **kwargs):
    return [(float(text_of(c) == s), f"You said {text_of(c)}.") for c, s in zip(completions, solution, strict=True)]


async def says_solution_later(prompts, completions, solution, **kwargs):
    await asyncio.sleep(0)
    return says_solution(prompts, completions, solution)


def nothing_to_say(completions, **kwargs):
    return [None] * len(completions)


def judged(environment: PromptDataset, completion: str, task=None):
    return judge_all(environment, [(task or environment.tasks("train")[0], completion)])[0]


@given(seed=st.integers(0, 2**32), repeats=st.lists(st.integers(0, 19), max_size=10))
def test_splits_share_no_prompt_and_depend_on_the_seed_alone(seed, repeats):
    data = rows() + [{"prompt": f" Say  {i}", "solution": "other"} for i in repeats]
    environment, again = (PromptDataset(data, says_solution, seed=seed, **SIZES) for _ in range(2))
    prompts = [" ".join(task.data["prompt"].split()) for split in SPLITS for task in environment.tasks(split)]
    assert len(prompts) == len(set(prompts)) == 20
    for split in SPLITS:
        assert environment.tasks(split) == again.tasks(split)


def test_an_eval_dataset_is_what_is_evaluated_during_training_and_leaves_training():
    environment = PromptDataset(rows(), says_solution, eval_dataset=rows(5), final_size=2)
    assert [task.data["prompt"] for task in environment.tasks("selection")] == [f"Say {i}" for i in range(5)]
    assert len(environment.tasks("final")) == 2
    seen = {task.data["prompt"] for split in ("train", "final") for task in environment.tasks(split)}
    assert seen == {f"Say {i}" for i in range(5, 20)}
    assert len({task.id for split in SPLITS for task in environment.tasks(split)}) == 20


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_functions_see_what_trl_passes(chat, kind):
    seen = {}

    def function(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        kwargs["log_extra"]("length", [3])
        kwargs["log_metric"]("words", 1.0)
        return [1.0]

    data = [{**row, "completion": "hidden", "completion_ids": [1]} for row in rows(chat=chat)]
    environment = PromptDataset(kind(data), function, **SIZES)
    task = environment.tasks("train")[0]
    said = f"Say {task.data['columns']['solution']}"
    assert task.prompt == ([{"role": "user", "content": said}] if chat else plain_text(said))
    verdict = judged(environment, "abc")
    assert seen["prompts"] == [task.data["prompt"]]
    assert seen["completions"] == ([[{"role": "assistant", "content": "abc"}]] if chat else ["abc"])
    assert seen["solution"] == [task.data["columns"]["solution"]]
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "solution", "trainer_state", "log_extra", "log_metric",
    }  # fmt: skip
    assert verdict == Verdict(1.0, None, {"length": 3, "metrics": {"words": 1.0}, "rewards": {"function": 1.0}})


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_is_called_once_with_the_whole_batch(is_async):
    """A reward may compare completions: this one is the rank of the length among all of the batch."""
    calls = []

    def rank(prompts, completions, completion_ids, solution, trainer_state, log_extra, log_metric, level=None):
        calls.append((prompts, completion_ids, solution, trainer_state.global_step, level))
        log_extra("length", [len(text) for text in completions])
        log_metric("longest", max(map(len, completions)))
        by_length = sorted(completions, key=len)
        return [(float(by_length.index(text)), text.upper()) for text in completions]

    async def later(**kwargs):
        return rank(**kwargs)

    data = [row | {"level": i} if i % 2 else row for i, row in enumerate(rows())]
    function = later if is_async else rank
    environment = PromptDataset(data, [function, says_solution], **SIZES)
    environment.trainer_state = TrainerState(global_step=7)
    one, other = environment.tasks("train")[:2]
    attempts = [Attempt(one, "aaa", [1, 1, 1]), Attempt(other, "b", [2]), Attempt(one, "cc", [3, 3])]
    verdicts = judge_all(environment, attempts, seconds=5)
    assert [v.reward for v in verdicts] == [2.0, 0.0, 1.0]
    assert [v.feedback for v in verdicts] == ["AAA", "B", "CC"]
    assert [v.details["length"] for v in verdicts] == [3, 1, 2]
    assert all(v.details["metrics"] == {"longest": 3.0} for v in verdicts)
    assert verdicts[1].details["rewards"] == {function.__name__: 0.0, "says_solution": 0.0}
    tasks = [one, other, one]
    levels = [task.data["columns"].get("level") for task in tasks]
    assert calls == [
        (
            [task.data["prompt"] for task in tasks],
            [[1, 1, 1], [2], [3, 3]],
            [task.data["columns"]["solution"] for task in tasks],
            7,
            levels,
        )
    ]


def test_trl_reward_functions_work_as_they_are():
    environment = PromptDataset(rows(chat=True), think_format_reward, **SIZES)
    assert judged(environment, "<think>So.</think>3").reward == 1.0
    assert judged(environment, "3").reward == 0.0
    assert PromptDataset(rows(chat=True), accuracy_reward, **SIZES)
    overlong = PromptDataset(rows(chat=True), get_soft_overlong_punishment(10, 5), **SIZES)
    task = overlong.tasks("train")[0]
    outcomes = judge_all(overlong, [Attempt(task, "x", [0] * count) for count in (3, 8, 11)])
    assert [outcome.reward for outcome in outcomes] == pytest.approx([0.0, -0.6, -1.0])


def test_rewards_are_weighted_and_none_is_left_out():
    environment = PromptDataset(
        rows(), [says_solution, nothing_to_say, says_why], reward_weights=[0.25, 9.0, 0.5], **SIZES
    )
    task = environment.tasks("train")[0]
    solution = task.data["columns"]["solution"]
    assert judged(environment, solution) == Verdict(
        0.75,
        f"You said {solution}.",
        {"rewards": {"says_solution": 1.0, "nothing_to_say": None, "says_why": 1.0}},
    )


def test_feedback_texts_are_joined_in_order():
    def also(completions):
        return [(None, "Also.")]

    environment = PromptDataset(rows(), [says_why, also, says_solution, says_why], **SIZES)
    verdict = judged(environment, "x")
    assert verdict.feedback == "You said x.\nAlso.\nYou said x."
    assert list(verdict.details["rewards"]) == ["says_why_0", "also", "says_solution", "says_why_3"]


@pytest.mark.parametrize("function", [says_solution_later, functools.partial(says_solution_later)])
def test_async_functions_give_the_same_verdicts(function):
    plain = PromptDataset(rows(), [says_solution, says_why], **SIZES)
    mixed = PromptDataset(rows(), [function, says_why], **SIZES)
    task = plain.tasks("train")[0]
    assert inspect.isawaitable(waiting := mixed.judge(task, "x"))
    assert isinstance(asyncio.run(waiting), Verdict)
    for completion in ("x", task.data["columns"]["solution"]):
        one, other = judged(plain, completion), judged(mixed, completion)
        assert (one.reward, one.feedback) == (other.reward, other.feedback)


@pytest.mark.parametrize("others", [[], [says_solution_later]])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "must return a list of one item per completion, 1 here, got 2 items"),
        (1.0, TypeError, "got float"),
        ([(1.0, 5)], TypeError, "feedback as text, got 5"),
        ([(1.0, "a", "b")], TypeError, r"a (reward, feedback) pair for each completion, got (1.0, 'a', 'b')"),
        (["good"], TypeError, "The reward function wrong must give a number, None or a"),
    ],
)
def test_a_function_that_returns_something_else_is_broken(others, result, error, message):
    def wrong(completions, **kwargs):
        return result

    outcome = judged(PromptDataset(rows(), [wrong, *others], **SIZES), "x")
    assert isinstance(outcome, error)
    assert message in str(outcome)


def test_a_plain_function_that_raises_leaves_no_async_one_unawaited():
    def broken(completions):
        raise OSError("disk full")

    outcome = judged(PromptDataset(rows(), [says_solution_later, broken], **SIZES), "x")
    assert isinstance(outcome, OSError)
    # An abandoned coroutine warns when it is collected, and warnings fail the run.
    del outcome
    gc.collect()


def test_where_a_function_failed_is_told():
    def divides(completions, **kwargs):
        return [1 / len(text) for text in completions]

    outcome = judged(PromptDataset(rows(), divides, **SIZES), "")
    line = inspect.getsourcelines(divides)[1] + 1
    assert described(outcome) == (
        f"ZeroDivisionError: division by zero ({__file__}, line {line}: return [1 / len(text) for text in completions])"
    )


def test_where_a_library_failed_is_told_by_the_line_that_called_it():
    def reads(completions, **kwargs):
        return [json.loads(text)["reward"] for text in completions]

    outcome = judged(PromptDataset(rows(), reads, **SIZES), "{")
    line = inspect.getsourcelines(reads)[1] + 1
    assert f"({__file__}, line {line}: return [json.loads(text)" in described(outcome)


def test_extra_values_are_one_per_completion():
    def logs(completions, log_extra, **kwargs):
        log_extra("odd", [1, 2])
        return [1.0] * len(completions)

    outcome = judged(PromptDataset(rows(), logs, **SIZES), "x")
    assert "takes a value per completion, 1 here, got 2" in str(outcome)


def test_no_reward_at_all_and_no_finite_reward_leave_it_ungraded():
    outcome = judged(PromptDataset(rows(), [nothing_to_say, nothing_to_say], **SIZES), "x")
    assert isinstance(outcome, ValueError)
    assert "All reward functions (nothing_to_say_0, nothing_to_say_1) returned None" in str(outcome)
    nan = PromptDataset(rows(), lambda completions: [float("nan")], **SIZES)
    assert isinstance(judged(nan, "x"), ValueError)


def test_scalars_of_torch_and_bool_count_as_numbers():
    environment = PromptDataset(rows(), [lambda completions: torch.ones(1), lambda completions: [True]], **SIZES)
    assert judged(environment, "x").reward == 2.0


REWARDS = """
async def later(completions, **kwargs): return [1.0]
class Judge:
    def score(completions, **kwargs): return [(0.5, "half")]
number = 3
"""


def test_functions_are_imported_by_name(write_jsonl, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    path = str(write_jsonl("data.jsonl", rows()))
    settings = PromptData(
        path=path, reward_funcs=["my_rewards:later", "my_rewards:Judge.score"], reward_weights=[1.0, 2.0], **SIZES
    )
    environment = make_environment(settings)
    assert isinstance(environment, PromptDataset)
    assert judged(environment, "x") == Verdict(2.0, "half", {"rewards": {"later": 1.0, "score": 0.5}})
    for name, message in {
        "my_rewards.later": r"as package\.module:function",
        "no_such_module:f": "no_such_module.* could not be imported.*PYTHONPATH",
        "my_rewards:missing": "my_rewards has no missing",
        "my_rewards:number": "must be a function",
    }.items():
        with pytest.raises(ConfigError, match=message):
            PromptDataset(path, name, **SIZES)


def one_more_argument(completions, difficulty):
    return [1.0]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (rows(), {"reward_funcs": one_more_argument}, "needs difficulty, which neither the data has as a column"),
        (rows(), {"reward_funcs": torch.nn.Linear(1, 1)}, "a reward model has to be wrapped"),
        (rows(), {"reward_funcs": []}, "at least one function"),
        (rows(), {"reward_weights": [1.0, 2.0]}, "2 numbers for 1 reward functions"),
        (rows(5), {}, "5 distinct training questions"),
        ([], {}, "training data has no rows"),
        (
            rows(),
            {"eval_dataset": rows(), "selection_size": None},
            "All prompts of train_dataset stand in eval_dataset",
        ),
        (rows(), {"eval_dataset": rows(3)}, "selection_size does nothing beside an eval_dataset"),
        (rows(), {"eval_dataset": []}, "evaluation data has no rows"),
        ([{"question": "?"}], {}, "train, row 0: the column 'prompt' must be a text or chat messages"),
        ([{"prompt": [{"role": "assistant", "content": "."}]}], {}, "last message must be the user's"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], {}, "must be a text or chat messages"),
    ],
)
def test_data_and_settings_that_cannot_work_are_told(data, options, message):
    with pytest.raises(ConfigError, match=message):
        PromptDataset(data, **{"reward_funcs": says_solution, **SIZES, **options})


def test_a_column_holds_demonstrations():
    data = [row | {"demonstration": row["solution"] if i % 2 else None} for i, row in enumerate(rows())]
    data[1]["demonstration"] = [{"role": "assistant", "content": "1"}]
    environment = PromptDataset(data, says_solution, **SIZES)
    told = environment.demonstrations(100)
    assert 5 <= len(told) <= 10
    assert all(judged(environment, each.completion, each.task).reward == 1.0 for each in told)
    assert environment.demonstrations(3) == told[:3]
    odd = PromptDataset([row | {"demonstration": 3} for row in rows()], says_solution, **SIZES)
    with pytest.raises(
        ConfigError, match=r"'demonstration' of train/.* must be a text or one assistant's message, got 3"
    ):
        odd.demonstrations(2)
