"""Multiple-choice questions with a letter as the answer, such as those of SciKnowEval."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vpd.config import ConfigError
from vpd.environments.answers import quoted
from vpd.environments.base import Environment, Split
from vpd.environments.rows import Row, load_rows
from vpd.environments.splits import check_split, cut_splits, question_key
from vpd.types import Demonstration, Messages, Task, Verdict


def _options_pattern(label: str, ends: str) -> re.Pattern[str]:
    # An option begins a line, perhaps behind a list mark or in bold; "A.5" numbers a section.
    begin = r"^[ \t]*(?:[-*+\u2022][ \t]+)?(?:\*\*)?"
    return re.compile(rf"{begin}(?:\(({label})\)|({label})[{ends}]|({label})\.(?=[\s*]))", re.MULTILINE)


# In this order: numbered statements often stand before lettered options. A colon behind a digit is mostly a time.
OPTIONS = tuple(_options_pattern(*parts) for parts in (("[A-Z]", ":)"), ("[a-z]", ":)"), (r"\d{1,2}", ")")))
# No other opening tag may stand inside, so that a sentence about the tag does not become part of the answer.
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
LETTERS = string.ascii_uppercase
LONE_LETTER = re.compile(r"\b[A-Z]\b")
DEFAULT_SYSTEM = (
    "Answer the multiple-choice question. End with the letter of the right option between answer tags, "
    "such as <answer>A</answer>."
)


SCIKNOWEVAL = "hicai-zju/SciKnowEval"
SCIKNOWEVAL_DOMAINS: Mapping[str, str] = {
    f"sciknoweval-{domain.lower()}": domain for domain in ("Biology", "Chemistry", "Material", "Physics")
}


class MultipleChoice(Environment):
    """Questions from rows with ``prompt`` (question and options), ``answer`` (a letter) and optionally ``system``.

    Rows with ``question``, ``choices`` (``{"text": [...], "label": [...]}``) and ``answerKey``, as SciKnowEval and ARC
    have them on the hub, are put into that form.

    The student reads the system text and the prompt as they are; where neither speaks of the ``<answer>`` tag, a system
    text that does is put in front. The letter between the last pair of answer tags is judged, whatever its case; the
    reward is 1 or 0. The options are read from each prompt, because their number varies between questions.

    ``final`` holds the test file's questions and stays whole: a training question that also stands in it is dropped
    from training. ``selection`` is taken from the training questions by the seed.

    Args:
        path: A folder with ``train.jsonl`` and ``test.jsonl``, one JSONL file, a Hugging Face dataset id, or a name of
            :data:`SCIKNOWEVAL_DOMAINS`, which stands for that domain's level-3 questions from the hub (it publishes
            one split).
        feedback: How much the text says: ``outcome`` tells right from wrong and names errors of form; ``reference``
            also gives the right letter.
        scorer: ``tags`` reads the letter between the last pair of answer tags, whatever its case. ``sdpo`` is for
            comparisons with SDPO: it takes what follows the last ``<answer>`` up to ``</answer>``, or the whole
            completion without these tags, and it must equal the right letter, case included.
        selection_size: How many training questions become the selection split.
        final_size: How many test questions the final split has at most (all by default); without a test file it takes
            this many training questions.
        seed: Decides the split.

    Raises:
        ConfigError: The data is missing or malformed (the message names file and line), or holds too few questions.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        feedback: Literal["outcome", "reference"] = "outcome",
        scorer: Literal["tags", "sdpo"] = "tags",
        selection_size: int = 100,
        final_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.feedback = feedback
        self.scorer = scorer
        self.seed = seed
        rows = _load(str(path))
        self._tasks = cut_splits(
            [_task(row) for row in rows["train"]],
            [_task(row) for row in rows["test"]] if "test" in rows else None,
            key=lambda task: question_key(task.prompt[-1]["content"]),
            selection_size=selection_size,
            final_size=final_size,
            seed=seed,
            origin=str(path),
        )

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    def judge(self, task: Task, completion: str) -> Verdict:
        options: list[str] = task.data["options"]
        listed = ", ".join(options)
        read = _read_letter if self.scorer == "tags" else _read_as_sdpo
        letter, error = read(completion, options)
        if error:
            text = f"Your answer could not be read: {error}"
        else:
            outcome = "the right one" if letter == task.reference else "a wrong one"
            where = " from the answer tags" if self.scorer == "tags" else ""
            text = f"Your answer, {letter}, was read{where}. Of the options {listed} it is {outcome}."
        if self.feedback == "reference":
            text = f"{text} The right option is {task.reference}."
        return Verdict(float(letter == task.reference), text, {"answer": letter})

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Return answers in the right form but without any reasoning of substance, because the data has none."""
        rng = random.Random(self.seed)
        demonstrations = []
        for task in self._tasks["train"][:count]:
            wrong = rng.choice([letter for letter in task.data["options"] if letter != task.reference])
            demonstrations.append(Demonstration(task, _answer(task, str(task.reference)), _answer(task, wrong)))
        return demonstrations


def _load(path: str) -> dict[str, list[Row]]:
    domain = SCIKNOWEVAL_DOMAINS.get(path)
    if domain is None:
        return {split: [_with_prompt(row) for row in rows] for split, rows in load_rows(path).items()}
    rows = [row for part in load_rows(SCIKNOWEVAL).values() for row in part]
    chosen = [row for row in rows if _is_level_3(row.values, domain)]
    if not chosen:
        raise ConfigError(f"{SCIKNOWEVAL} holds no level-3 multiple-choice questions of the domain {domain}.")
    return {"train": [_with_prompt(row) for row in chosen]}


def _is_level_3(values: Mapping[str, Any], domain: str) -> bool:
    return (
        values.get("domain") == domain
        and (values.get("details") or {}).get("level") == "L3"
        and str(values.get("type", "")).startswith("mcq")
    )


def _with_prompt(row: Row) -> Row:
    """Turn a row of question, choices and key into one of prompt and answer, whose options are lettered from A on."""
    if isinstance(row.values.get("prompt"), str) or "choices" not in row.values:
        return row
    try:
        texts, labels = list(row.values["choices"]["text"]), list(row.values["choices"]["label"])
        answer = LETTERS[labels.index(row.values["answerKey"])]
        question = str(row.values["question"]).strip()
    except (KeyError, TypeError, ValueError, IndexError):
        raise ConfigError(
            f"{row.origin}: expected a question, choices (texts and their labels), and an answerKey among the labels."
        ) from None
    options = "\n".join(f"{letter}: {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return Row(
        row.id, row.origin, {"prompt": f"{question}\n\n{options}\nPlease reason step by step.", "answer": answer}
    )


def _task(row: Row) -> Task:
    prompt, answer = (_text(row, column) for column in ("prompt", "answer"))
    options = read_options(prompt)
    letter = answer.strip().upper()
    if len(options) < 2:
        raise ConfigError(f'{row.origin}: the prompt has no options, such as lines "A: ..." and "B: ...".')
    if letter not in options:
        raise ConfigError(f"{row.origin}: the answer {quoted(answer)} is not one of the options {', '.join(options)}.")
    system = row.values.get("system") or ""
    if "<answer>" not in f"{system}{prompt}":
        system = f"{DEFAULT_SYSTEM}\n\n{system}".strip()
    messages: Messages = [{"role": "system", "content": system}] if system else []
    return Task(row.id, [*messages, {"role": "user", "content": prompt}], {"options": options}, letter)


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{row.origin}: the column {column!r} must be a text that is not empty, got {value!r}.")
    return value


def read_options(prompt: str) -> list[str]:
    """Return the labels of the last run A, B, C, ... at line starts; a line such as ``T: 300 K`` does not count.

    Where there are no two capital letters, small letters are taken (returned as capitals), and else numbers from 1 on.
    """
    for pattern in OPTIONS:
        run: list[str] = []
        for match in pattern.finditer(prompt):
            label = next(group for group in match.groups() if group).upper()
            if label in ("A", "1"):
                run = [label]
            elif run and label == _next(run[-1]):
                run.append(label)
        if len(run) > 1:
            return run
    return []


def _next(label: str) -> str:
    return str(int(label) + 1) if label.isdigit() else chr(ord(label) + 1)


def _read_letter(completion: str, options: list[str]) -> tuple[str | None, str | None]:
    """Return the letter, or a text on what is wrong with the form."""
    answers = ANSWER.findall(completion)
    listed = ", ".join(options)
    if not answers:
        if "<answer>" in completion.lower():
            return None, "the tag <answer> is not closed by </answer>."
        return None, "it has no letter between <answer> and </answer>."
    answer = answers[-1].strip()
    if answer.upper() in options:
        return answer.upper(), None
    if not answer:
        return None, "nothing stands between <answer> and </answer>."
    if len(set(LONE_LETTER.findall(answer)) & set(options)) > 1:
        return None, f"{quoted(answer)} names more than one option; give one letter."
    if len(answer) == 1:
        return None, f"{quoted(answer)} is not an option; the options are {listed}."
    return (
        None,
        f"{quoted(answer)} stands between the answer tags; give nothing but the letter of an option ({listed}).",
    )


def _read_as_sdpo(completion: str, options: list[str]) -> tuple[str | None, str | None]:
    answer = completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if answer in options:
        return answer, None
    return None, _read_letter(completion, options)[1] or f"{quoted(answer)} is not written as the options are."


def _answer(task: Task, letter: str) -> str:
    """Write a minimal answer in the form that the prompt asks for."""
    answer = f"<answer>\n{letter}\n</answer>"
    if any("<reasoning>" in message["content"] for message in task.prompt):
        return f"<reasoning>\nI compared the options with the question.\n</reasoning>\n{answer}"
    return answer
