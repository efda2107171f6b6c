"""The suite of small tasks: each judge and generator, and the runner with a network made anew."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny import tokenizer
from toy import toy_model

from benchmarks.held_out_tasks import __main__ as runner
from benchmarks.held_out_tasks import suite
from benchmarks.held_out_tasks.__main__ import main
from benchmarks.held_out_tasks.arithmetic import ExpressionError, evaluate
from benchmarks.held_out_tasks.base import OwnTask, Question, right
from benchmarks.held_out_tasks.jobs import Job, run, start_of
from benchmarks.held_out_tasks.table import comparison
from vpd import Task
from vpd.environments import SPLITS
from vpd.policy.load import save_policy

TASKS = {name: entry.environment(train=60, selection=20, final=40) for name, entry in suite.SUITE.items()}


STEPS = [("7 + 8", 15), ("15 + 1", 16)]


def judged(name: str, completion: str, **data):
    return TASKS[name].judge(Task("one", [{"role": "user", "content": "?"}], data), completion)


@pytest.mark.parametrize("name", TASKS)
def test_demonstrated_answers_succeed_and_wrong_ones_fail_with_a_text_of_their_own(name):
    environment, threshold = TASKS[name], suite.SUITE[name].success_threshold
    shown = environment.demonstrations(40)
    assert len(shown) == 40
    for demonstration in shown:
        good = environment.judge(demonstration.task, demonstration.completion)
        bad = environment.judge(demonstration.task, demonstration.attempt)
        assert good.reward == 1
        assert bad.reward < threshold
        assert good.feedback
        assert bad.feedback
        assert good.feedback != bad.feedback


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("completion", ["", " \n", "é" * 5000, "[" * 5000, "9" * 6000, "-" * 50, "a b. c d. e", "\x00"])
def test_odd_completions_fail_and_do_not_break_the_judge(name, completion):
    verdict = TASKS[name].judge(TASKS[name].tasks("train")[0], completion)
    assert verdict.reward < suite.SUITE[name].success_threshold
    assert 0 < len(verdict.feedback) < 400


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_question_and_are_the_same_each_time(name):
    environment = suite.SUITE[name].environment
    whole, again = environment(), environment()
    texts = {split: [task.prompt[0]["content"] for task in whole.tasks(split)] for split in SPLITS}
    flat = [text for of_split in texts.values() for text in of_split]
    ids = [task.id for split in SPLITS for task in whole.tasks(split)]
    assert len(set(flat)) == len(flat) == len(set(ids))
    assert (len(texts["train"]) >= 400, len(texts["selection"]), len(texts["final"])) == (True, 100, 1000)
    assert all(list(whole.tasks(split)) == list(again.tasks(split)) for split in SPLITS)
    assert max(len(text.split()) for text in flat) <= 30
    assert environment(seed=1).tasks("train") != whole.tasks("train")


def test_a_generator_with_few_questions_takes_them_from_training_and_then_from_final():
    class Few(OwnTask):
        def draw(self, rng):
            return Question(f"Number {rng.randrange(900)}.", "yes", "no")

        def judge(self, task, completion):
            return right("It is.")

    few = Few(train=1000, selection=100, final=1000)
    sizes = [len(few.tasks(split)) for split in SPLITS]
    assert sizes[:2] == [400, 100]
    assert 380 < sizes[2] <= 400


@pytest.mark.parametrize(
    ("name", "completion", "data", "reward", "said"),
    [
        ("units", "55.", {"answer": 55, "asked": "34 + 21"}, 1, "is right"),
        ("units", "45", {"answer": 55, "asked": "34 + 21"}, 0, "too small, though its last digit is right"),
        ("units", "57", {"answer": 55, "asked": "34 + 21"}, 0, "57 is not 34 + 21. It is too large."),
        ("sum-of-three", "7 + 8 = 15, 15 + 1 = 16", {"steps": STEPS}, 1, "7 + 8 = 15 and 15 + 1 = 16: the left"),
        ("sum-of-three", "7 + 8 = 14, 14 + 1 = 15", {"steps": STEPS}, 0, '"7 + 8 = 14" is wrong: 14 is too small'),
        ("sum-of-three", "7 + 8 = 15, 14 + 1 = 15", {"steps": STEPS}, 0, '"14 + 1" is not made of the result before'),
        ("sum-of-three", "7 + 8 = 15", {"steps": STEPS}, 0, "right so far, but you wrote 1 of 2"),
        ("sum-of-three", "7 + 8 = 15, 15 + 1 = 16, 1 + 1 = 2", {"steps": STEPS}, 0, "you wrote 3 of 2"),
        ("sum-of-two", "34 + 21 = 56", {"steps": [("34 + 21", 55)]}, 0, "56 is too large"),
        ("product", "5 x 11 = 55", {"steps": [("5 * 11", 55)]}, 1, "the result is right"),
        ("product", "5 * 12 = 60", {"steps": [("5 * 11", 55)]}, 0, '"5 * 12" is not made of the question'),
        ("product", "55", {"steps": [("5 * 11", 55)]}, 0, '"55" is not an equation such as "1 * 1 = 1"'),
        ("units", "It is 700 cm", {"answer": 700, "asked": "7 m in cm"}, 0, 'you wrote "It is 700 cm"'),
        ("letter-count", "2", {"answer": 2, "asked": "the count"}, 1, "is right"),
        ("sorting", "3, 5, 9", {"numbers": [9, 5, 3]}, 1, "All 3 numbers"),
        ("sorting", "3, 9, 5", {"numbers": [9, 5, 3]}, 0, "9 before 5"),
        ("sorting", "3, 9", {"numbers": [9, 5, 3]}, 0, "5 from the question is missing"),
        ("sorting", "3, 5, 9, 9", {"numbers": [9, 5, 3]}, 0, "repeat"),
        ("sorting", "3, 4, 5, 9", {"numbers": [9, 5, 3]}, 0, "4 was not among"),
        ("sorting", "3, five, 9", {"numbers": [9, 5, 3]}, 0, '"five" is not a number'),
        ("largest", "9.", {"options": ["7", "9", "8"], "answer": "9"}, 1, "9 is larger"),
        ("largest", "7", {"options": ["7", "9", "8"], "answer": "9"}, 0, "2 of the other numbers are larger"),
        ("largest", "It is 9", {"options": ["7", "9", "8"], "answer": "9"}, 0, 'alone, but you wrote "It is 9"'),
        ("odd-one-out", "Dog", {"options": ["dog", "pear", "fig"], "answer": "dog", "same": "fruit"}, 1, "fruit"),
        ("odd-one-out", "fig", {"options": ["dog", "pear", "fig"], "answer": "dog", "same": "fruit"}, 0, "in common"),
        ("short-sentence", "The dog ran.", {"word": "dog", "most": 3}, 1, "3 words"),
        ("short-sentence", "The dog ran home.", {"word": "dog", "most": 3}, 0, "it has 4 words, and 3 are allowed"),
        ("short-sentence", "A cat. A dog.", {"word": "dog", "most": 9}, 0, "more than one sentence"),
        ("short-sentence", "The hotdog ran.", {"word": "dog", "most": 9}, 0, '"dog" does not occur'),
        ("short-sentence", "The dog ran", {"word": "dog", "most": 9}, 0, "no full stop"),
        ("word-budget", "We saw a dog.", {"wanted": 4}, 1, "4 words as asked"),
        ("word-budget", "We saw a dog.", {"wanted": 5}, 0.8, "1 fewer than the 5"),
        ("word-budget", "We saw a dog.", {"wanted": 6}, 0.6, "2 fewer than the 6"),
        ("word-budget", "We saw a dog.", {"wanted": 40}, 0, "36 fewer"),
        ("json", '{"age": "3", "name": "A"}', {"values": {"name": "A", "age": 3}}, 1, "the values are right"),
        ("json", '{"age": 4, "name": "A"}', {"values": {"name": "A", "age": 3}}, 0, 'value of "age" is 4'),
        ("json", '{"name": "A"}', {"values": {"name": "A", "age": 3}}, 0, "keys are missing: age"),
        ("json", '{"name": "A", "b": 1}', {"values": {"name": "A"}}, 0, "not asked for: b"),
        ("json", "[1]", {"values": {"name": "A"}}, 0, "a list and not an object"),
        ("json", "{'name': 1}", {"values": {"name": "A"}}, 0, "not JSON: Expecting property name"),
        ("spelling", "c-a-t", {"word": "cat"}, 1, "All 3 letters"),
        ("spelling", "c-u-t", {"word": "cat"}, 0, 'Letter 2 is wrong: you wrote "u"'),
        ("spelling", "c-a", {"word": "cat"}, 0, "too early: 1 letters"),
        ("spelling", "c-a-t-s", {"word": "cat"}, 0, "1 more letters follow"),
        ("spelling", "cat", {"word": "cat"}, 0, 'there is "cat"'),
        ("expression", "2 * (3 + x)", {"expression": "(x + 3) * 2"}, 1, "x = 2, 5, 11"),
        ("expression", "2 * 3 + x", {"expression": "(x + 3) * 2"}, 0, "For x = 2 the expression gives 8, but 10"),
        ("expression", "y + 1", {"expression": "x + 1"}, 0, "the name y is unknown"),
    ],
)
def test_verdicts_say_what_is_wrong_with_this_attempt(name, completion, data, reward, said):
    verdict = judged(name, completion, **data)
    assert verdict.reward == reward
    assert said in verdict.feedback


@pytest.mark.parametrize(
    "text", ["x.real", "abs(x)", "x ** 9", "9 ** 9 ** 9", "[x]", "x if x else 1", "True", "1 / 0", "x = 1", "'a' * 9"]
)
def test_only_arithmetic_is_evaluated(text):
    with pytest.raises(ExpressionError):
        evaluate(text, {"x": 2})


def test_arithmetic_has_pythons_precedence():
    assert evaluate("-x ** 2 + 6 / (1 + 2) * 2 - 1", {"x": 3}) == -6


def small(tmp_path) -> list[str]:
    """Save a small network, and return the command line of two small jobs."""
    save_policy(toy_model(), tokenizer(), tmp_path / "model")
    sizes = ["--rollouts", "64", "--eval-steps", "1", "--selection", "3", "--final", "6"]
    chosen = ["--tasks", "word-budget", "--methods", "grpo", "default", "--seeds", "0"]
    return [*chosen, *sizes, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]


def test_the_runner_goes_from_one_start_to_a_table_and_skips_what_is_done(tmp_path, capsys, monkeypatch):
    few = replace(suite.SUITE["word-budget"], demonstrations=2, epochs=1)
    monkeypatch.setitem(suite.SUITE, "word-budget", few)
    # Jobs run here, one after another; a process of its own would take longer to begin than to run.
    monkeypatch.setattr(runner, "_run_in_a_process", lambda job, out, start: run(job, out) and "")
    line = small(tmp_path)
    assert main(line) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    files = {path.stem: json.loads(path.read_text()) for path in (out / "word-budget").glob("*.json")}
    assert files.keys() == {"start", "grpo-0", "default-0"}
    assert (out / "word-budget/start/model").is_dir()
    for name in ("grpo-0", "default-0"):
        result = files[name]
        # The default's second attempts count as rollouts, so that it may make one batch less.
        assert 64 <= result["rollouts"] <= 64 + 32
        assert result["rollouts"] == 64 if name == "grpo-0" else result["rollouts"] > 32 * result["steps"]
        assert result["final"]["n"] == 6
        assert result["settings"]["model"]["name"] == str(out / "word-budget/start/model")
        assert result["settings"]["algorithm"]["success_threshold"] == 0.8
        assert [step for step, _ in result["selection"]] == list(range(result["steps"] + 1))
        assert result["final"]["outcomes"].keys() == files["start"]["final"]["outcomes"].keys()
        assert not (out / "word-budget" / name / "model").exists()
    assert files["grpo-0"]["settings"]["algorithm"]["type"] == "grpo"
    table = comparison(out)
    assert all(f"| word-budget | {name} |" in table for name in ("start", "grpo", "default"))

    written = {path: path.stat().st_mtime_ns for path in (out / "word-budget").glob("*.json")}
    assert main(line) == 0
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert main([*line, "--rollouts", "96"]) == 2
    assert "made with other settings (rollouts)" in capsys.readouterr().err


def test_a_job_that_fails_is_told_with_its_log_and_what_needs_it_is_left_out(tmp_path, capsys):
    line = small(tmp_path)
    (tmp_path / "model" / "tokenizer.json").write_text("nothing")
    assert main(line) == 1
    error = capsys.readouterr().err
    assert f"word-budget, start ended with exit code 1; its log is {tmp_path}/out/word-budget/start.log" in error
    assert error.count("was left out, because its start failed") == 2
    assert "Traceback" in (tmp_path / "out/word-budget/start.log").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "sums"], "There is no task 'sums'"),
        (["--methods", "ppo"], "There is no method 'ppo'"),
        (["--define", "odd"], "--define takes"),
        (["--define", 'odd={algorithm={type="vpd", nothing=1}}'], "Unknown setting"),
    ],
)
def test_names_that_there_are_not_are_refused_before_anything_runs(more, said, tmp_path, capsys):
    assert main([*small(tmp_path), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_start_is_the_same_whatever_the_methods_jobs_are():
    jobs = [Job("json", "grpo", 0, 960, 10, 100, 1000, "m", {}), Job("json", "default", 2, 96, 5, 100, 1000, "m", {})]
    assert start_of(jobs[0]) == start_of(jobs[1])


def result_of(method: str, seed: int, outcomes: dict[str, float], stopped_by: str | None = None) -> str:
    job = {"task": "json", "method": method, "seed": seed}
    final = {"outcomes": outcomes, "rewards": outcomes}
    return json.dumps({"job": job, "final": final, "selection": [[10, 0.5]], "warnings": [], "stopped_by": stopped_by})


def test_the_tables_differences_are_paired_by_question_and_seed(tmp_path):
    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "start.json").write_text(result_of("start", 0, {"a": 0, "b": 0, "c": 1, "d": 0}))
    (folder / "grpo-0.json").write_text(result_of("grpo", 0, {"a": 1, "b": 0, "c": 1, "d": 0}))
    (folder / "grpo-1.json").write_text(result_of("grpo", 1, {"a": 1, "b": 1, "c": 1, "d": 1}))
    (folder / "default-0.json").write_text(result_of("default", 0, {"a": 1, "b": 1, "c": 1, "d": 0}, "plateau"))
    (row,) = [line for line in comparison(tmp_path).splitlines() if line.startswith("| json | default |")]
    cells = [cell.strip() for cell in row.split("|")]
    # Seed 1 of the baseline has no counterpart and does not count.
    assert (cells[3], cells[4], cells[5][:5], cells[6][:5]) == ("0", "75.0%", "+50.0", "+25.0")
    assert cells[8] == "stopped by plateau 1"
