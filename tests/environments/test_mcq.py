import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpd.config import ConfigError, McqData
from vpd.environments import SPLITS, MultipleChoice, make_environment
from vpd.environments.mcq import DEFAULT_SYSTEM, read_options
from vpd.environments.splits import question_key
from vpd.types import Verdict

SYSTEM = "Respond with <reasoning>...</reasoning> and <answer>...</answer>."


def question(index: int, **changes) -> dict:
    row = {"prompt": f"Question {index}?\n\nA: one\nB: two\nC: three\nD: four", "answer": "B", "system": SYSTEM}
    return {**row, **changes}


@pytest.fixture
def environment(write_jsonl):
    path = write_jsonl("data.jsonl", [question(i) for i in range(10)])
    return MultipleChoice(path, selection_size=2, final_size=2)


def judged(environment, completion) -> Verdict:
    verdict = environment.judge(environment.tasks("train")[0], completion)
    assert isinstance(verdict, Verdict)
    return verdict


@pytest.mark.parametrize("domain", ["chemistry", "material"])
def test_sciknoweval_splits_never_overlap(sciknoweval, domain):
    sizes = {"chemistry": (1790, 100, 210), "material": (740, 100, 94)}[domain]
    first, other = (MultipleChoice(sciknoweval / domain, seed=seed) for seed in (0, 1))
    for environment in (first, other):
        keys = {s: {question_key(task.prompt[-1]["content"]) for task in environment.tasks(s)} for s in SPLITS}
        assert tuple(len(keys[split]) for split in SPLITS) == sizes
        assert len(set.union(*keys.values())) == sum(sizes)
    assert first.tasks("final") == other.tasks("final")
    assert first.tasks("selection") != other.tasks("selection")
    assert first.tasks("train") == MultipleChoice(sciknoweval / domain, seed=0).tasks("train")


def test_sciknoweval_is_shown_as_it_is_and_judged(sciknoweval):
    environment = make_environment(McqData(path=str(sciknoweval / "chemistry"), feedback="reference"))
    task = environment.tasks("final")[0]
    assert [message["role"] for message in task.prompt] == ["system", "user"]
    assert task.prompt[0]["content"].startswith("\nGiven a question and four options")
    for split in SPLITS:
        assert all(task.data["options"] == ["A", "B", "C", "D"] for task in environment.tasks(split))
    for demonstration in environment.demonstrations(100):
        right = environment.judge(demonstration.task, demonstration.completion)
        wrong = environment.judge(demonstration.task, demonstration.attempt or "")
        assert isinstance(right, Verdict)
        assert isinstance(wrong, Verdict)
        assert (right.reward, wrong.reward) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("completion", "reward", "message"),
    [
        ("<answer>B</answer>", 1.0, "Of the options A, B, C, D it is the right one."),
        ("<reasoning>\nx\n</reasoning>\n<Answer>\n b \n</ANSWER>", 1.0, "the right one"),
        ("<answer>A</answer> no, <answer>B</answer>", 1.0, "the right one"),
        ("The tag <answer> is for the end. <answer>B</answer>", 1.0, "the right one"),
        ("<answer>C</answer>", 0.0, "Your answer, C, was read from the answer tags. Of the options A, B, C, D it is a"),
        ("B", 0.0, "it has no letter between <answer> and </answer>"),
        ("<answer>B", 0.0, "the tag <answer> is not closed by </answer>"),
        ("<answer> </answer>", 0.0, "nothing stands between"),
        ("<answer>A, B</answer>", 0.0, "names more than one option; give one letter"),
        ("<answer>E</answer>", 0.0, '"E" is not an option; the options are A, B, C, D.'),
        ("<answer>B: two</answer>", 0.0, "give nothing but the letter of an option"),
        ("", 0.0, "it has no letter"),
    ],
)
def test_the_letter_is_read_and_each_error_has_its_text(environment, completion, reward, message):
    verdict = judged(environment, completion)
    assert verdict.reward == reward
    assert message in (verdict.feedback or "")
    # At the level "outcome" the text does not give the right letter away.
    if reward == 0.0 and "B" not in completion:
        assert "right option is" not in (verdict.feedback or "")


def test_reference_level_tells_the_letter_on_success_and_failure(environment):
    environment.feedback = "reference"
    for completion in ("<answer>B</answer>", "<answer>C</answer>", "B?"):
        assert (judged(environment, completion).feedback or "").endswith(" The right option is B.")


def test_success_texts_are_as_rich_as_failure_texts(environment):
    right, wrong = (judged(environment, f"<answer>{letter}</answer>").feedback or "" for letter in "BC")
    assert abs(len(right) - len(wrong)) < 5


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=st.text(alphabet="ABCDEabcde <>/answer:.()\n", max_size=30))
def test_only_the_right_letter_is_rewarded(environment, answer):
    verdict = judged(environment, f"<answer>{answer}</answer>")
    if verdict.reward == 1.0:
        assert answer.rpartition("<answer>")[2].partition("</answer>")[0].strip().upper() == "B"
    assert verdict.feedback


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("Q?\nA: x\nB: y", "AB"),
        ("Q?\n(A) x\n(B) y\n(C) z", "ABC"),
        ("Q?\nA. x\n\n B. y\n C) z\nReason.", "ABC"),
        ("Given:\nT: 300 K\nP: 1 bar\nA: x\nB: y\nC: z\nD: v\nE: w\nE: again", "ABCDE"),
        ("A. Statement one\nB. Statement two\nWhich?\n(A) both\n(B) none\n(C) one", "ABC"),
        ("No options here. A: x", ""),
        ("Q?\na) x\nb) y\nc) z", "ABC"),
        ("Q?\n1. x\n2. y\n3. z", "123"),
        ("Q?\n- A. x\n- B. y", "AB"),
        ("Q?\n* (a) x\n* (b) y", "AB"),
        ("Q?\n**A.** x\n**B)** y", "AB"),
        ("1. One\n2. Two\n3. Three\nWhich?\nA) 1 and 2\nB) 3", "AB"),
        ("At 1:30\nor 2:30?", ""),
    ],
)
def test_options_are_the_last_run_of_letters(prompt, options):
    assert "".join(read_options(prompt)) == options


def test_demonstrations_follow_the_asked_form(environment, write_jsonl):
    demonstration = environment.demonstrations(1)[0]
    assert demonstration.completion.startswith("<reasoning>\n")
    assert demonstration.completion.endswith("</reasoning>\n<answer>\nB\n</answer>")
    assert demonstration.attempt != demonstration.completion
    plain = MultipleChoice(
        write_jsonl("plain.jsonl", [question(i, system=None) for i in range(5)]), selection_size=1, final_size=1
    )
    assert plain.demonstrations(1)[0].completion == "<answer>\nB\n</answer>"
    assert plain.tasks("train")[0].prompt[0] == {"role": "system", "content": DEFAULT_SYSTEM}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "E"}, r"data\.jsonl, line 4: the answer \"E\" is not one of the options A, B, C, D"),
        ({"answer": 2}, "line 4: the column 'answer' must be a text"),
        ({"prompt": " "}, "line 4: the column 'prompt' must be a text"),
        ({"prompt": "What?"}, "line 4: the prompt has no options"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(write_jsonl, changes, message):
    path = write_jsonl("data.jsonl", [*map(question, range(3)), question(3, **changes)])
    with pytest.raises(ConfigError, match=message):
        MultipleChoice(path, selection_size=1, final_size=1)


def test_without_a_test_file_the_final_size_is_needed(write_jsonl):
    path = write_jsonl("data.jsonl", map(question, range(10)))
    with pytest.raises(ConfigError, match=r"no test split: set data\.final_size"):
        MultipleChoice(path, selection_size=1)


def hub_row(index: int, **changes) -> dict:
    row = {
        "question": f"Which one, {index}?",
        "choices": {"text": ["iron", "gold", "lead"], "label": ["1", "2", "3"]},
        "answerKey": "2",
        "prompt": {"default": "Not shown."},
        "answer": "",
        "type": "mcq-4-choices",
        "domain": "Physics",
        "details": {"level": "L3"},
    }
    return {**row, **changes}


def test_rows_of_question_choices_and_key_are_lettered(write_jsonl):
    path = write_jsonl("data.jsonl", [hub_row(i) for i in range(3)])
    environment = MultipleChoice(path, selection_size=1, final_size=1)
    task = environment.tasks("train")[0]
    assert task.prompt[-1]["content"].endswith("?\n\nA: iron\nB: gold\nC: lead\nPlease reason step by step.")
    assert (task.reference, task.data["options"]) == ("B", ["A", "B", "C"])


def test_a_key_that_is_no_label_is_named_by_its_line(write_jsonl):
    path = write_jsonl("data.jsonl", [hub_row(0), hub_row(1, answerKey="D")])
    with pytest.raises(ConfigError, match="line 2: expected a question, choices"):
        MultipleChoice(path, selection_size=1, final_size=1)


def test_sciknoweval_by_name_takes_one_domain_and_level_from_the_hub(monkeypatch):
    others = [hub_row(90, domain="Biology"), hub_row(91, details={"level": "L1"}), hub_row(92, type="open-ended-qa")]
    dataset = {"test": [*others, *(hub_row(i) for i in range(5))]}
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda path, config: asked.append((path, config)) or dataset)
    environment = MultipleChoice("sciknoweval-physics", selection_size=1, final_size=2)
    assert asked == [("hicai-zju/SciKnowEval", None)]
    assert [len(environment.tasks(split)) for split in SPLITS] == [2, 1, 2]
    assert all("9" not in task.prompt[-1]["content"] for split in SPLITS for task in environment.tasks(split))
    with pytest.raises(ConfigError, match="no level-3 multiple-choice questions of the domain Material"):
        MultipleChoice("sciknoweval-material", selection_size=1, final_size=2)


@pytest.mark.parametrize(
    ("completion", "tags", "sdpo"),
    [
        ("<answer>B</answer>", 1.0, 1.0),
        ("<answer>b</answer>", 1.0, 0.0),
        ("B", 0.0, 1.0),
        ("So it is <answer>\nB", 0.0, 1.0),
        ("<answer>A</answer> no, <answer>B</answer>", 1.0, 1.0),
        ("<ANSWER>B</ANSWER>", 1.0, 0.0),
        ("The answer is B", 0.0, 0.0),
        ("<answer>C</answer>", 0.0, 0.0),
    ],
)
def test_sdpos_scorer_may_be_asked_for(environment, monkeypatch, completion, tags, sdpo):
    assert judged(environment, completion).reward == tags
    monkeypatch.setattr(environment, "scorer", "sdpo")
    verdict = judged(environment, completion)
    assert verdict.reward == sdpo
    assert verdict.feedback


def test_the_scorer_is_a_setting(write_jsonl):
    path = write_jsonl("data.jsonl", map(question, range(4)))
    made = make_environment(McqData(path=str(path), selection_size=1, final_size=1, scorer="sdpo"))
    assert isinstance(made, MultipleChoice)
    assert made.scorer == "sdpo"
