import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd.environments import ReasoningGym
from vpd.environments.worked import chain_sum_steps, change_digit, products_steps, read, write
from vpd.types import Task, Verdict

SIZES = {"train_size": 50, "selection_size": 1, "final_size": 1}


def make(dataset: str, **options) -> ReasoningGym:
    parameters = {
        "chain_sum": {"min_terms": 3},
        "basic_arithmetic": {"operators": ["+"], "allow_parentheses": False, "min_terms": 3},
        "products": {"max_digits": 3},
    }[dataset]
    return ReasoningGym(dataset, worked=True, parameters=parameters, **{**SIZES, **options})


CHAIN_SUM = make("chain_sum")


def judged(expression: str, answer: int, completion: str, environment: ReasoningGym = CHAIN_SUM) -> Verdict:
    entry = {"answer": str(answer), "metadata": {"expression": expression}}
    assert environment._form is not None
    data = {"entry": entry, "stage": 0, "steps": environment._form.steps(expression)}
    verdict = environment.judge(Task("t", [], data, str(answer)), completion)
    assert isinstance(verdict, Verdict)
    return verdict


def test_forms_of_the_worked_answers():
    assert write(chain_sum_steps("47 + 38 - 100")) == "47 + 38 = 85\n85 - 100 = -15\nAnswer: -15"
    assert write(chain_sum_steps("-3 - -5")) == "-3 - -5 = 2\nAnswer: 2"
    assert write(products_steps("47 * 38")) == "47 * 8 = 376\n47 * 30 = 1410\n376 + 1410 = 1786\nAnswer: 1786"
    assert write(products_steps("12 * 304")) == "12 * 4 = 48\n12 * 300 = 3600\n48 + 3600 = 3648\nAnswer: 3648"
    assert write(products_steps("7 * 0")) == "7 * 0 = 0\nAnswer: 0"


def test_prompt_is_the_instruction_and_the_expression():
    prompt = CHAIN_SUM.tasks("train")[0].prompt
    assert [message["role"] for message in prompt] == ["user"]
    lines = prompt[0]["content"].splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"[0-9]+( [+-] [0-9]+){2,}", lines[1])


RIGHT = "47 + 38 = 85\n85 + 56 = 141\nAnswer: 141"


@pytest.mark.parametrize(
    ("completion", "reward", "message"),
    [
        (
            RIGHT,
            1.0,
            'Line 2, "85 + 56 = 141", is right. Every step was checked. The final answer matches the last line.',
        ),
        (f"<think>\n47 + 1 = 2\n</think>\n{RIGHT}", 1.0, "The final answer matches the last line."),
        ("38 + 47 = 85\n\n 85+56=141.\n**Answer: 141**", 1.0, "The final answer matches the last line."),
        (
            "47 + 38 = 95\n95 + 56 = 141\nAnswer: 141",
            0.0,
            'Line 1, "47 + 38 = 95", is wrong: in the result of its arithmetic, the tens digit is wrong.',
        ),
        (
            "47 + 38 = 85\n85 + 56 = 151\nAnswer: 151",
            0.0,
            'is right. Line 2, "85 + 56 = 151", is wrong: in the result',
        ),
        ("47 + 38 = 85\n85 + 56 = 151\nAnswer: 151", 0.0, "of its arithmetic, the tens digit is wrong."),
        ("47 + 38 = 85\n84 + 56 = 140\nAnswer: 140", 0.0, "does not continue from the result of the line before."),
        ("47 + 56 = 103\nAnswer: 103", 0.0, 'Line 1, "47 + 56 = 103", is wrong: a number was skipped or miscopied.'),
        ("47 - 38 = 9\n9 + 56 = 65\nAnswer: 65", 0.0, "does not have the operation that comes next"),
        ("47 + 38 = 85\n85 + 56 = 141\nAnswer: 142", 0.0, 'The final answer, "142", does not match the last line.'),
        ("47 + 38 = 85\nAnswer: 85", 0.0, "The steps stop after line 1: some are missing."),
        ("Answer: 140", 0.0, "The steps stop before the first line: all are missing."),
        ("I add them.\nAnswer: 140", 0.0, 'Line 1, "I add them.", is wrong: it does not have the form of a step.'),
        ("47 + 38 = 85\n85 + 56 = 141\n141 + 1 = 142\nAnswer: 142", 0.0, "is wrong: it is one step too many."),
        ("47 + 38 = 85\n85 + 56 = 141", 0.0, 'could not be read: it has no line that begins with "Answer:".'),
        ("47 + 38 = 85\n85 + 56 = 141\nAnswer:", 0.0, 'could not be read: nothing follows "Answer:".'),
        ("47 + 38 = 85\n85 + 56 = 141\nAnswer: 141 apples", 0.0, "does not match the last line"),
        (f"{RIGHT}\n\nSo the sum is 141.", 0.0, 'Nothing may follow the final answer, but "So the sum is 141." does.'),
        (f"{RIGHT}\n\n", 1.0, "The final answer matches the last line."),
        ("9" * 9999 + " + 1 = 2\nAnswer: " + "9" * 9999, 0.0, "it does not have the form of a step."),
        ("", 0.0, "all are missing."),
    ],
)
def test_feedback_names_the_first_wrong_line(completion, reward, message):
    verdict = judged("47 + 38 + 56", 141, completion)
    assert verdict.reward == reward
    assert message in (verdict.feedback or "")
    assert len(verdict.feedback or "") < 600


def test_products_are_read_step_by_step():
    environment = make("products")
    lines = ["47 * 8 = 376", "47 * 30 = 1410", "376 + 1410 = 1786", "Answer: 1786"]
    assert judged("47 * 38", 1786, "\n".join(lines), environment).reward == 1.0
    lines[2:] = ["366 + 1410 = 1776", "Answer: 1776"]
    verdict = judged("47 * 38", 1786, "\n".join(lines), environment)
    assert verdict.reward == 0.0
    assert "does not continue from the result of the lines before" in (verdict.feedback or "")


def test_levels_of_feedback():
    wrong = "47 + 38 = 85\n85 + 56 = 151\nAnswer: 151"
    texts = {
        level: judged("47 + 38 + 56", 141, wrong, make("chain_sum", feedback=level)).feedback or ""
        for level in ("outcome", "location", "reference")
    }
    assert texts["outcome"] == 'Your answer, "151", was checked and is wrong.'
    assert texts["location"].startswith(texts["outcome"])
    assert texts["reference"] == f"{texts['location']} The right answer is: 141"


@pytest.mark.parametrize("dataset", ["chain_sum", "basic_arithmetic", "products"])
def test_demonstrations_are_right_and_attempts_wrong(dataset):
    environment = make(dataset)
    demonstrations = environment.demonstrations(50)
    assert len(demonstrations) == 50
    train = {task.id for task in environment.tasks("train")}
    for demonstration in demonstrations:
        assert demonstration.task.id in train
        right = environment.judge(demonstration.task, demonstration.completion)
        wrong = environment.judge(demonstration.task, demonstration.attempt or "")
        assert isinstance(right, Verdict)
        assert isinstance(wrong, Verdict)
        assert (right.reward, wrong.reward) == (1.0, 0.0)
        assert "in the result of its arithmetic" in (wrong.feedback or "")
        # A text about a success must not be recognisable by being shorter.
        assert len(right.feedback or "") >= 0.75 * len(wrong.feedback or "")
    assert demonstrations == make(dataset).demonstrations(50)


LONG_NUMBERS = st.integers(100, 99999)


@settings(max_examples=200, deadline=None)
@given(
    terms=st.lists(LONG_NUMBERS, min_size=2, max_size=6),
    operators=st.lists(st.sampled_from("+-"), min_size=5, max_size=5),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_location_does_not_state_a_number_that_the_attempt_did_not_write(terms, operators, seed, data):
    expression = str(terms[0]) + "".join(
        f" {operator} {term}" for operator, term in zip(operators, terms[1:], strict=False)
    )
    steps = chain_sum_steps(expression)
    rng = random.Random(seed)
    lines = write(steps).splitlines()
    # The attempt has a mixture of errors: changed numbers, and dropped, doubled and unreadable lines.
    for index in data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=1)):
        numbers = list(re.finditer(r"[0-9]+", lines[index]))
        match rng.choice(["digit", "drop", "double", "garble"]):
            case "digit":
                number = rng.choice(numbers)
                changed = change_digit(int(number.group()), rng)
                lines[index] = f"{lines[index][: number.start()]}{changed}{lines[index][number.end() :]}"
            case "drop":
                lines[index] = ""
            case "double":
                lines[index] += f"\n{lines[index]}"
            case "garble":
                lines[index] = lines[index].replace("=", "is")
    attempt = "\n".join(lines)
    text = judged(expression, eval(expression), attempt).feedback or ""
    written = set(re.findall(r"[0-9]+", attempt))
    # Numbers of lines are below ten, and 10^5 names a place of digits; every other number must come from the attempt.
    stated = {number for number in re.findall(r"[0-9]+", re.sub(r"10\^[0-9]+ digit", "", text)) if len(number) > 1}
    assert stated <= written


@settings(max_examples=200, deadline=None)
@given(number=st.integers(-(10**6), 10**6), seed=st.integers(0, 2**32))
def test_a_changed_digit_changes_the_number_and_keeps_its_length(number, seed):
    changed = change_digit(number, random.Random(seed))
    assert changed != number
    assert len(str(abs(changed))) == len(str(abs(number)))


@settings(max_examples=300, deadline=None)
@given(completion=st.text(alphabet="0123456789+-*= \nAnswer:<>()., ²٣", max_size=200))
def test_any_completion_can_be_read(completion):
    verdict = judged("47 + 38 + 56", 141, completion)
    assert verdict.feedback
    assert read(chain_sum_steps("1 + 2"), completion) is not None
