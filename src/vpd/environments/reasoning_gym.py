"""Any dataset of reasoning-gym as an environment: generated questions, judged by the dataset's own scorer."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vpd.config import ConfigError
from vpd.environments.answers import first_line, parse_integer, quoted, split_at_answer, wrong_part
from vpd.environments.base import Environment, Split
from vpd.environments.splits import check_sizes, check_split, question_key
from vpd.environments.worked import WORKED_FORMS, change_digit, read, write, write_wrong
from vpd.types import Demonstration, Task, Verdict

FeedbackLevel = Literal["outcome", "location", "reference"]

PLAIN_INSTRUCTION = 'End with a line that says "Answer: " and then your final answer.'
NO_ANSWER = 'Your answer could not be read: it has no line that begins with "Answer:".'
EMPTY_ANSWER = 'Your answer could not be read: nothing follows "Answer:".'


class ReasoningGym(Environment):
    """Questions of one reasoning-gym dataset.

    The reward is the dataset's own score of what follows the last ``Answer:``, so that partial scores stay what the
    package gives; a completion without an answer gets 0. With ``worked`` the prompt asks for the steps, and the reward
    is 1 for a right final answer and 0 otherwise.

    The splits are cut from one seeded stream of distinct questions, ``final`` first: its questions are the same
    whatever the size of the training split.

    Args:
        dataset: name in reasoning-gym, such as ``chain_sum``.
        parameters: the dataset's own, without ``seed`` and ``size``.
        worked: ask for the steps and read them (datasets in :data:`vpd.environments.worked.WORKED_FORMS`).
        feedback: what the text says: right or wrong; where the first error stands; the right answer too.
        train_size, selection_size, final_size: questions of each split.
        seed: of the questions.

    Raises:
        ConfigError: reasoning-gym is not installed, does not know the dataset or its parameters, or cannot make that
            many distinct questions; or the dataset has no worked form.
    """

    def __init__(
        self,
        dataset: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        worked: bool = False,
        feedback: FeedbackLevel = "location",
        train_size: int = 2000,
        selection_size: int = 100,
        final_size: int = 300,
        seed: int = 0,
    ) -> None:
        if worked and dataset not in WORKED_FORMS:
            raise ConfigError(
                f"data.worked is for datasets whose steps can be read ({', '.join(sorted(WORKED_FORMS))}); "
                f"leave it out for {dataset}."
            )
        check_sizes(train_size=train_size, selection_size=selection_size, final_size=final_size)
        self.dataset = dataset
        self.feedback = feedback
        self.seed = seed
        self._form = WORKED_FORMS[dataset] if worked else None
        sizes: dict[Split, int] = {"final": final_size, "selection": selection_size, "train": train_size}
        entries, self._scorer = _distinct_entries(dataset, dict(parameters or {}), sum(sizes.values()), seed)
        self._exact = _compares_texts(self._scorer)
        self._tasks: dict[Split, list[Task]] = {}
        start = 0
        for split, size in sizes.items():
            part = entries[start : start + size]
            self._tasks[split] = [self._task(f"{dataset}/{split}/{i}", entry) for i, entry in enumerate(part)]
            start += size

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    def judge(self, task: Task, completion: str) -> Verdict:
        _, answer = split_at_answer(completion)
        if not answer:
            text = NO_ANSWER if answer is None else EMPTY_ANSWER
            return Verdict(0.0, self._with_steps(task, completion, text), {"answer": None})
        if task.reference is not None and "\n" not in task.reference:
            answer = first_line(answer)
        score = self._score(answer, task)
        if score is None:
            text = f"Your answer, {quoted(answer)}, is wrong: it does not have the form that the question asks for."
            return Verdict(0.0, self._with_steps(task, completion, text), {"answer": answer})
        outcome = self._outcome(task, answer, score)
        if self._form is not None:
            score = float(score == 1.0 and read(task.data["steps"], completion).is_right)
        return Verdict(score, self._with_steps(task, completion, outcome), {"answer": answer})

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Worked answers with one wrong digit in the attempt, or plain answers with a changed number as the attempt.

        Questions without a stored right answer are passed over.
        """
        rng = random.Random(self.seed)
        with_reference = [task for task in self._tasks["train"] if task.reference is not None]
        return [self._demonstration(task, rng) for task in with_reference[:count]]

    def _task(self, id: str, entry: Mapping[str, Any]) -> Task:
        answer = entry["answer"]
        data: dict[str, Any] = {"entry": entry}
        text = f"{entry['question']}\n\n{PLAIN_INSTRUCTION}"
        if self._form is not None:
            expression = entry["metadata"]["expression"]
            text = self._form.prompt(expression)
            try:
                data["steps"] = self._form.steps(expression)
            except ValueError as error:
                raise ConfigError(
                    f"data.worked cannot be used with these data.parameters: {error}, and {self.dataset} made "
                    f"{expression!r}. Change the parameters or leave data.worked out."
                ) from None
        return Task(id, [{"role": "user", "content": text}], data, None if answer is None else str(answer))

    def _score(self, answer: str, task: Task) -> float | None:
        """The dataset's score, or None where its scorer cannot read the answer."""
        entry = task.data["entry"]
        try:
            return float(self._scorer.score_answer(answer, entry))
        except Exception:
            # Some scorers raise on malformed answers. A scorer that fails on the right answer too is broken itself.
            if task.reference is not None:
                self._scorer.score_answer(task.reference, entry)
            return None

    def _outcome(self, task: Task, answer: str, score: float) -> str:
        said = f"Your answer, {quoted(answer)}, was checked and is {'right' if score == 1.0 else 'wrong'}"
        if self.feedback == "outcome" or self._form is not None or task.reference is None:
            return f"{said}."
        if score == 1.0:
            return f"{said}: it has the form that was asked for, and every part of it is as it should be."
        part = wrong_part(answer, task.reference, self._exact)
        return f"{said}: it has the form that was asked for, but {part}." if part else f"{said}."

    def _with_steps(self, task: Task, completion: str, text: str) -> str:
        """The text, and what the level of feedback adds to it: the reading of the steps, the right answer."""
        if self._form is not None and self.feedback != "outcome":
            text = f"{text} {read(task.data['steps'], completion).text}"
        if self.feedback == "reference" and task.reference is not None:
            separator = "\n" if "\n" in task.reference else " "
            text = f"{text} The right answer is:{separator}{task.reference}"
        return text.strip()

    def _demonstration(self, task: Task, rng: random.Random) -> Demonstration:
        if self._form is not None:
            steps = task.data["steps"]
            return Demonstration(task, write(steps), write_wrong(steps, rng))
        reference = task.reference or ""
        number = parse_integer(reference)
        attempt = None if number is None else f"Answer: {change_digit(number, rng)}"
        separator = "\n" if "\n" in reference else " "
        return Demonstration(task, f"Answer:{separator}{reference}", attempt)


def _distinct_entries(
    dataset: str, parameters: dict[str, Any], size: int, seed: int
) -> tuple[list[dict[str, Any]], Any]:
    """The first ``size`` distinct questions that the seed gives, and the dataset that scores their answers."""
    # Entry i of a dataset depends on seed + i: neighbouring seeds give nearly the same questions, so they are spread.
    first_seed = random.Random(seed).randrange(2**30)
    scorer = _create(dataset, parameters, first_seed, size)
    found: dict[str, dict[str, Any]] = {}
    misses, chunk, start = 0, scorer, 0
    while len(found) < size:
        for index in range(size):
            entry = chunk[index]
            key = question_key(entry["question"])
            if key not in found:
                found[key] = entry
                misses = 0
            misses += 1
            # With M questions of which m are still missing, one of them turns up every M / m draws.
            if misses > 1000 + 10 * len(found):
                raise ConfigError(
                    f"reasoning-gym's {dataset} gives only about {len(found)} distinct questions with these "
                    f"parameters, but the splits need {size}: lower data.train_size, data.selection_size or "
                    f"data.final_size, or widen data.parameters."
                )
        start += size
        chunk = _create(dataset, parameters, first_seed + start, size)
    return list(found.values())[:size], scorer


def _compares_texts(scorer: Any) -> bool:
    """Whether the dataset inherits reasoning-gym's scorer, which compares with the one right answer."""
    from reasoning_gym.factory import ProceduralDataset

    return type(scorer).score_answer is ProceduralDataset.score_answer


def _create(dataset: str, parameters: dict[str, Any], seed: int, size: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise ConfigError(
            'The environment reasoning_gym needs the package reasoning-gym: pip install "vpd-rl[reasoning-gym]".'
        ) from None
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f". Known: {', '.join(sorted(DATASETS))}."
        raise ConfigError(f"reasoning-gym has no dataset {dataset!r}{hint}")
    fixed = sorted({"seed", "size"} & parameters.keys())
    if fixed:
        raise ConfigError(
            f"data.parameters must not hold {' and '.join(fixed)}: data.seed and the sizes of the splits set them."
        )
    try:
        return create_dataset(dataset, seed=seed, size=size, **parameters)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"reasoning-gym's {dataset} does not take the data.parameters {parameters}: {error}."
        ) from None
