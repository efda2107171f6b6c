import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd.config import ConfigError, ReasoningGymData
from vpd.environments import SPLITS, ReasoningGym, make_environment
from vpd.environments.splits import question_key
from vpd.types import Task, Verdict

SIZES = {"train_size": 40, "selection_size": 20, "final_size": 20}
# There are only 200 expressions, so that a stream of 80 repeats some.
FEW_QUESTIONS = {"max_terms": 2, "max_digits": 1}


def questions(environment, split) -> list[str]:
    return [question_key(task.prompt[-1]["content"]) for task in environment.tasks(split)]


def judged(environment: ReasoningGym, task: Task, completion: str) -> Verdict:
    verdict = environment.judge(task, completion)
    assert isinstance(verdict, Verdict)
    return verdict


def text(environment: ReasoningGym, task: Task, completion: str) -> str:
    return judged(environment, task, completion).feedback or ""


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), worked=st.booleans())
def test_splits_share_no_question(seed, worked):
    environment = ReasoningGym("chain_sum", parameters=FEW_QUESTIONS, worked=worked, seed=seed, **SIZES)
    everything = [question for split in SPLITS for question in questions(environment, split)]
    assert len(everything) == len(set(everything)) == 80
    ids = [task.id for split in SPLITS for task in environment.tasks(split)]
    assert len(set(ids)) == 80


def test_splits_depend_on_the_seed_alone():
    first, again = (ReasoningGym("chain_sum", seed=3, **SIZES) for _ in range(2))
    for split in SPLITS:
        assert first.tasks(split) == again.tasks(split)


def test_neighbouring_seeds_give_other_questions():
    first, second = (ReasoningGym("chain_sum", seed=seed, **SIZES) for seed in (0, 1))
    assert not set(questions(first, "train")) & set(questions(second, "train"))


def test_final_questions_do_not_depend_on_the_training_size():
    small = ReasoningGym("chain_sum", parameters=FEW_QUESTIONS, **SIZES)
    large = ReasoningGym("chain_sum", parameters=FEW_QUESTIONS, **{**SIZES, "train_size": 80})
    assert questions(small, "final") == questions(large, "final")
    assert questions(small, "selection") == questions(large, "selection")


def test_too_few_distinct_questions_is_an_error():
    with pytest.raises(ConfigError, match=r"about 200 distinct questions.*need 2400.*lower data\.train_size"):
        ReasoningGym("chain_sum", parameters=FEW_QUESTIONS)


# The datasets' scorers read numbers, texts, lists and grids, and one accepts many right answers.
@pytest.mark.parametrize("dataset", ["chain_sum", "caesar_cipher", "number_sorting", "mini_sudoku", "countdown"])
@pytest.mark.parametrize("feedback", ["outcome", "location", "reference"])
def test_the_reward_is_the_package_score(dataset, feedback):
    environment = ReasoningGym(dataset, feedback=feedback, train_size=5, selection_size=1, final_size=1)
    demonstrations = environment.demonstrations(5)
    assert len(demonstrations) == 5
    for demonstration in demonstrations:
        task = demonstration.task
        verdict = judged(environment, task, demonstration.completion)
        assert verdict.reward == 1.0
        assert "is right" in (verdict.feedback or "")
        assert judged(environment, task, f"Let me see.\n**Answer:** {task.reference}\n").reward == 1.0
        for wrong in ("17 apples", "nothing"):
            score = environment._scorer(task).score_answer(wrong, task.data["entry"])
            assert judged(environment, task, f"Answer: {wrong}").reward == score


def test_demonstrations_of_numbers_come_with_a_wrong_attempt():
    environment = ReasoningGym("chain_sum", **SIZES)
    for demonstration in environment.demonstrations(40):
        assert demonstration.attempt is not None
        assert judged(environment, demonstration.task, demonstration.attempt).reward < 1.0


def test_no_answer_and_empty_answer_have_their_own_texts(monkeypatch):
    monkeypatch.setattr("vpd.environments.reasoning_gym.ACCEPT_ANYTHING", ())
    environment = ReasoningGym("game_of_life_halting", train_size=1, selection_size=1, final_size=1)
    task = environment.tasks("train")[0]
    # This dataset's scorer takes any text that does not say True as False: an answer without a value must not reach it.
    assert judged(environment, task, "No idea") == Verdict(
        0.0, 'Your answer could not be read: it has no line that begins with "Answer:".', {"answer": None}
    )
    assert "nothing follows" in text(environment, task, "So.\nAnswer:  \n")
    assert judged(environment, task, "Answer:").reward == 0.0


def test_the_last_answer_counts():
    environment = ReasoningGym("chain_sum", **SIZES)
    task = environment.tasks("train")[0]
    assert judged(environment, task, f"Answer: 0.5\nNo, wait.\nAnswer: {task.reference}").reward == 1.0
    assert judged(environment, task, f"Answer: {task.reference}\nNo, wait.\nAnswer: 0.5").reward < 1.0


def test_an_answer_that_the_scorer_cannot_read_has_failed():
    environment = ReasoningGym("prime_factorization", train_size=1, selection_size=1, final_size=1)
    task = environment.tasks("train")[0]
    verdict = judged(environment, task, "Answer: foo bar")
    assert verdict.reward == 0.0
    assert "does not have the form" in (verdict.feedback or "")


def test_a_scorer_that_fails_on_the_right_answer_is_broken(monkeypatch):
    environment = ReasoningGym("gcd", train_size=1, selection_size=1, final_size=1)

    def broken(answer, entry):
        raise OSError("disk full")

    monkeypatch.setattr(environment._scorer(environment.tasks("train")[0]), "score_answer", broken)
    with pytest.raises(OSError, match="disk full"):
        environment.judge(environment.tasks("train")[0], "Answer: 3")


def test_location_names_the_place_and_reference_the_answer():
    environment = ReasoningGym("chain_sum", parameters={"min_digits": 4}, **SIZES)
    task = Task("t", [], {"stage": 0, "entry": {"answer": "1234"}}, "1234")
    assert "but the tens digit is wrong" in text(environment, task, "Answer: 1294")
    assert "the ones and thousands digits are wrong" in text(environment, task, "Answer: 5230")
    assert "the sign is wrong" in text(environment, task, "Answer: -1234")
    assert "too few digits" in text(environment, task, "Answer: 123")
    assert "not a whole number" in text(environment, task, "Answer: 12.5")
    assert "1234" not in text(environment, task, "Answer: 1294")
    environment.feedback = "reference"
    assert text(environment, task, "Answer: 1294").endswith("The right answer is: 1234")
    environment.feedback = "outcome"
    assert text(environment, task, "Answer: 1294") == 'Your answer, "1294", was checked and is wrong.'


def test_location_in_texts_only_where_one_answer_is_right():
    exact = ReasoningGym("word_sequence_reversal", train_size=1, selection_size=1, final_size=1)
    task = Task("t", [], {"stage": 0, "entry": {"answer": "one, two, three"}}, "one, two, three")
    assert "word 2 is the first that is wrong" in text(exact, task, "Answer: one, four, three")
    many = ReasoningGym("countdown", train_size=1, selection_size=1, final_size=1)
    assert text(many, many.tasks("train")[0], "Answer: 1 + 1").endswith("is wrong.")


def test_success_texts_are_as_rich_as_failure_texts():
    environment = ReasoningGym("chain_sum", parameters={"min_digits": 4}, **SIZES)
    for demonstration in environment.demonstrations(10):
        right = text(environment, demonstration.task, demonstration.completion)
        wrong = text(environment, demonstration.task, demonstration.attempt or "")
        assert len(right) >= 0.75 * len(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "chain_sun"}, "no dataset 'chain_sun'; did you mean chain_sum"),
        ({"parameters": {"terms": 3}}, "does not take the data.parameters"),
        ({"parameters": {"min_terms": 0}}, "min_terms must be positive"),
        ({"parameters": {"seed": 3}}, "must not hold seed"),
        (
            {"dataset": "countdown", "worked": True},
            r"basic_arithmetic, chain_sum, products.*leave it out for countdown",
        ),
        ({"dataset": "products", "worked": True, "parameters": {"max_terms": 3}}, "needs two factors"),
        ({"dataset": "basic_arithmetic", "worked": True}, r"a chain sum is two numbers or more with \+ or - between"),
        ({"train_size": -1}, "must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_told_in_a_sentence(changes, message):
    with pytest.raises(ConfigError, match=message):
        ReasoningGym(**{"dataset": "chain_sum", **SIZES, **changes})


def test_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r'pip install "vpd-rl\[reasoning-gym\]"'):
        ReasoningGym("chain_sum")


def test_made_from_settings():
    environment = make_environment(ReasoningGymData(dataset="chain_sum", worked=True, **SIZES))
    assert isinstance(environment, ReasoningGym)
    assert [len(environment.tasks(split)) for split in SPLITS] == [40, 20, 20]
    with pytest.raises(ValueError, match="no split 'test'"):
        environment.tasks("test")  # pyright: ignore[reportArgumentType]


PARTS = [{"dataset": "chain_sum", "weight": 3}, {"dataset": "number_sorting"}]


def sources(environment, split) -> list[str]:
    return [task.data["entry"]["metadata"]["source_dataset"] for task in environment.tasks(split)]


def test_a_composite_mixes_by_weight_and_judges_each_by_its_own_scorer():
    environment = ReasoningGym(datasets=PARTS, train_size=200, selection_size=10, final_size=10)
    counts = {name: sources(environment, "train").count(name) for name in ("chain_sum", "number_sorting")}
    assert sum(counts.values()) == 200
    assert 0.65 < counts["chain_sum"] / 200 < 0.85
    for task in environment.tasks("train")[:40]:
        assert judged(environment, task, f"Answer: {task.reference}").reward == 1.0
        assert judged(environment, task, "Answer: 123456").reward < 1.0
    everything = [question for split in SPLITS for question in questions(environment, split)]
    assert len(set(everything)) == 220


def test_a_composite_comes_from_a_config_file_and_its_mistakes_are_named():
    data = {"environment": "reasoning_gym", "datasets": PARTS, **SIZES}
    assert len(make_environment(ReasoningGymData(**data)).tasks("train")) == 40
    for changes, message in {
        "either": ({"dataset": "chain_sum"}, "Set either data.dataset or data.datasets"),
        "neither": ({"datasets": []}, "Set either data.dataset or data.datasets"),
        "parameters": ({"parameters": {"max_terms": 3}}, "leave data.parameters out"),
        "worked": ({"worked": True}, "leave it out for a composite"),
        "name": ({"datasets": [{"dataset": "chain_sun"}]}, "did you mean chain_sum"),
        "twice": ({"datasets": [PARTS[0], PARTS[0]]}, "Duplicate dataset names"),
        "stages": ({"curriculum": [{"max_terms": 2}]}, "stages of a composite are levels"),
    }.values():
        with pytest.raises(ConfigError, match=message):
            make_environment(ReasoningGymData(**{**data, **changes}))


def test_a_curriculum_has_stages_of_its_own_parameters_and_holds_out_the_last():
    stages = [{"max_terms": 2, "min_terms": 2}, {"min_terms": 4, "max_terms": 4}]
    environment = ReasoningGym("chain_sum", curriculum=stages, **{**SIZES, "train_size": 41})

    def terms(task) -> int:
        return len(task.data["entry"]["metadata"]["expression"].split()) // 2 + 1

    assert [{terms(task) for task in stage} for stage in environment.stages()] == [{2}, {4}]
    assert [len(stage) for stage in environment.stages()] == [20, 21]
    assert [task for stage in environment.stages() for task in stage] == environment.tasks("train")
    for split in ("selection", "final"):
        assert {terms(task) for task in environment.tasks(split)} == {4}
    assert {terms(demonstration.task) for demonstration in environment.demonstrations(4)} == {2, 4}
    everything = [question for split in SPLITS for question in questions(environment, split)]
    assert len(everything) == len(set(everything)) == 81
    assert all(judged(environment, t, f"Answer: {t.reference}").reward == 1.0 for t in environment.tasks("train"))


def test_levels_of_the_package_curriculum_are_stages():
    environment = ReasoningGym("chain_sum", curriculum=[0, 2], **SIZES)
    easy, hard = (max(len(task.prompt[-1]["content"]) for task in stage) for stage in environment.stages())
    assert easy < hard
    with pytest.raises(ConfigError, match="levels of reasoning-gym's curriculum for chain_sum are 0 to 10, not 11"):
        ReasoningGym("chain_sum", curriculum=[11], **SIZES)
    assert ReasoningGym(datasets=PARTS, curriculum=[0, 1], **SIZES).stages()


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "game_of_life_halting"},
        {"datasets": [{"dataset": n} for n in ("chain_sum", "game_of_life_halting")]},
    ],
)
def test_datasets_whose_scorer_accepts_anything_are_refused(options):
    with pytest.raises(ConfigError, match="game_of_life_halting takes any answer for right"):
        ReasoningGym(**options, **SIZES)
