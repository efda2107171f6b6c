import pytest

pytest.importorskip("verifiers.v1", reason="verifiers is not installed: make setup")

from vpd.config import ConfigError, VerifiersData
from vpd.environments import SPLITS, judge_all, make_environment
from vpd.types import Verdict

SIZES = {"tasks": 12, "selection_size": 2, "final_size": 3}


def words(**changes):
    return make_environment(VerifiersData(**{"id": "word-taskset", **SIZES, **changes}))


def judged(environment, completion) -> Verdict:
    (verdict,) = judge_all(environment, [(environment.tasks("train")[0], completion)])
    assert isinstance(verdict, Verdict), verdict
    return verdict


def test_tasks_are_read_up_to_the_limit_and_split():
    environment = words(arguments={"letters": "xyz"})
    assert [len(environment.tasks(split)) for split in SPLITS] == [7, 2, 3]
    prompts = [task.prompt for split in SPLITS for task in environment.tasks(split)]
    assert sorted(prompt[-1]["content"] for prompt in prompts)[0] == "Reverse xyz0."
    assert prompts[0][0] == {"role": "system", "content": "Give the word alone."}
    assert len({task.id for split in SPLITS for task in environment.tasks(split)}) == 12


def test_rewards_are_the_weighted_sum_of_the_taskset():
    environment = words()
    right = environment.tasks("train")[0].data["task"].data.answer
    verdict = judged(environment, right)
    assert verdict.reward == 1.5
    assert verdict.feedback == f"Your answer was scored: reversed_right 1, short 1, length {len(right)}."
    wrong = judged(environment, "no" * 20)
    assert wrong.reward == 0.0
    assert wrong.details["rewards"] == {"reversed_right": 0.0, "short": 0.0}


def test_a_text_that_the_taskset_left_is_the_feedback():
    assert judged(words(), "why?").feedback == "Nobody asked why."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "no-such-taskset"}, "no-such-taskset cannot be loaded"),
        ({"arguments": {"container": True}}, "run in a container"),
        ({"arguments": {"runtime": True}}, "are scored inside a runtime"),
        ({"arguments": {"colour": "red"}}, "cannot be loaded"),
    ],
)
def test_what_one_completion_cannot_answer_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        words(**changes)
