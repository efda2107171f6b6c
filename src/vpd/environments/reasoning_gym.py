"""The environment for any dataset of reasoning-gym: generated questions, judged by the dataset's own scorer."""

from __future__ import annotations

import difflib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from vpd.config import ConfigError
from vpd.environments.answers import first_line, parse_integer, quoted, split_at_answer, wrong_part
from vpd.environments.base import Environment, Split
from vpd.environments.splits import check_sizes, check_split, question_key
from vpd.environments.worked import WORKED_FORMS, change_digit, read, write, write_wrong
from vpd.types import Demonstration, Task, Verdict

PLAIN_INSTRUCTION = 'End with a line that says "Answer: " and then your final answer.'
NO_ANSWER = 'Your answer could not be read: it has no line that begins with "Answer:".'
EMPTY_ANSWER = 'Your answer could not be read: nothing follows "Answer:".'

ACCEPT_ANYTHING = ("game_of_life_halting",)
"""The datasets whose scorer takes any answer for right."""


@dataclass(frozen=True)
class Part:
    """One dataset of a composite.

    Attributes:
        dataset: The dataset's name in reasoning-gym.
        parameters: The dataset's own parameters, without ``seed`` and ``size``.
        weight: How often it is drawn, in proportion to the other parts.
    """

    dataset: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


class ReasoningGym(Environment):
    """Questions of one reasoning-gym dataset, or of several mixed by weight.

    The reward is the dataset's own score of the text after the last ``Answer:``, so that partial scores stay what the
    package gives; a completion without an answer gets 0. With ``worked`` the prompt asks for the steps, and the reward
    is 1 where every step and the final answer are right, and 0 otherwise.

    The splits are cut from one seeded stream of distinct questions, ``final`` first: its questions are the same
    whatever the size of the training split.

    With a curriculum the training questions come in stages of equal size (:meth:`stages`); ``selection`` and ``final``
    hold questions of the last stage.

    Args:
        dataset: The dataset's name in reasoning-gym, such as ``chain_sum``; None for a composite.
        parameters: The dataset's own parameters, without ``seed`` and ``size``.
        datasets: The parts of a composite, in place of ``dataset`` and ``parameters``.
        curriculum: One entry for each stage, from easy to hard: a level of the package's own curricula, or parameters
            that replace the given ones of the same names.
        worked: Whether to ask for the steps and judge them (only for the datasets in
            :data:`vpd.environments.worked.WORKED_FORMS`).
        feedback: How much the text says: ``outcome`` tells right from wrong; ``location`` also says where the first
            error is; ``reference`` also gives the right answer.
        train_size: How many questions the train split has.
        selection_size: How many questions the selection split has.
        final_size: How many questions the final split has.
        seed: Decides the questions.

    Raises:
        ConfigError: reasoning-gym is not installed, does not know the dataset or its parameters, or cannot make that
            many distinct questions; or the dataset has no worked form.
    """

    def __init__(
        self,
        dataset: str | None = None,
        *,
        parameters: Mapping[str, Any] | None = None,
        datasets: Sequence[Part | Mapping[str, Any]] = (),
        curriculum: Sequence[int | Mapping[str, Any]] = (),
        worked: bool = False,
        feedback: Literal["outcome", "location", "reference"] = "location",
        train_size: int = 2000,
        selection_size: int = 100,
        final_size: int = 300,
        seed: int = 0,
    ) -> None:
        if (dataset is None) == (not datasets):
            raise ConfigError("Set either data.dataset or data.datasets.")
        if datasets and parameters:
            raise ConfigError("The parts of a composite have parameters of their own: leave data.parameters out.")
        if worked and dataset not in WORKED_FORMS:
            raise ConfigError(
                f"data.worked is for datasets whose steps can be read ({', '.join(sorted(WORKED_FORMS))}); "
                f"leave it out for {dataset or 'a composite'}."
            )
        check_sizes(train_size=train_size, selection_size=selection_size, final_size=final_size)
        self.feedback = feedback
        self.seed = seed
        self._form = WORKED_FORMS[dataset] if worked and dataset else None
        parts = [part if isinstance(part, Part) else Part(**part) for part in datasets]
        parts = parts or [Part(str(dataset), parameters or {})]
        stages = [[_at_stage(part, stage, bool(datasets)) for part in parts] for stage in curriculum or [{}]]
        last = len(stages) - 1
        sizes = [train_size * (i + 1) // len(stages) - train_size * i // len(stages) for i in range(len(stages))]
        # The last stage is drawn first, and its first questions are held out: so these stay the same whatever the
        # training sizes.
        seen: set[str] = set()
        self._scorers: dict[int, Any] = {}
        self._stages: list[list[Task]] = []
        held_out: list[dict[str, Any]] = []
        for index in reversed(range(len(stages))):
            extra = final_size + selection_size if index == last else 0
            entries, self._scorers[index] = _distinct_entries(stages[index], extra + sizes[index], seed, seen)
            held_out += entries[:extra]
            self._stages.insert(0, [self._task(index, entry) for entry in entries[extra:]])
        splits: dict[Split, list[Task]] = {
            "train": [task for stage in self._stages for task in stage],
            "selection": [self._task(last, entry) for entry in held_out[final_size:]],
            "final": [self._task(last, entry) for entry in held_out[:final_size]],
        }
        name = dataset or "composite"
        self._tasks: dict[Split, list[Task]] = {
            split: [replace(task, id=f"{name}/{split}/{index}") for index, task in enumerate(tasks)]
            for split, tasks in splits.items()
        }

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    def stages(self) -> Sequence[Sequence[Task]]:
        ends = list(itertools.accumulate(map(len, self._stages)))
        return [self._tasks["train"][start:end] for start, end in itertools.pairwise([0, *ends])]

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
        """Return worked answers with one wrong digit in the attempt, or plain answers with a changed number in it.

        Questions without a stored right answer are passed over.
        """
        rng = random.Random(self.seed)
        # The stages take turns, so that all of them are shown equally often.
        interleaved = (task for tasks in itertools.zip_longest(*self.stages()) for task in tasks if task is not None)
        with_reference = [task for task in interleaved if task.reference is not None]
        return [self._demonstration(task, rng) for task in with_reference[:count]]

    def _task(self, stage: int, entry: Mapping[str, Any]) -> Task:
        answer = entry["answer"]
        data: dict[str, Any] = {"entry": entry, "stage": stage}
        text = f"{entry['question']}\n\n{PLAIN_INSTRUCTION}"
        if self._form is not None:
            expression = entry["metadata"]["expression"]
            text = self._form.prompt(expression)
            try:
                data["steps"] = self._form.steps(expression)
            except ValueError as error:
                raise ConfigError(
                    f"data.worked cannot be used with these data.parameters: {error}, and the dataset made "
                    f"{expression!r}. Change the parameters or leave data.worked out."
                ) from None
        return Task("", [{"role": "user", "content": text}], data, None if answer is None else str(answer))

    def _score(self, answer: str, task: Task) -> float | None:
        """Return the dataset's score, or None where its scorer cannot read the answer."""
        entry = task.data["entry"]
        scorer = self._scorer(task)
        try:
            return float(scorer.score_answer(answer, entry))
        except Exception:
            # Some scorers raise on malformed answers. A scorer that fails on the right answer too is itself broken.
            if task.reference is not None:
                scorer.score_answer(task.reference, entry)
            return None

    def _scorer(self, task: Task) -> Any:
        """Return the dataset of reasoning-gym that made the question."""
        scorer = self._scorers[task.data["stage"]]
        parts = getattr(scorer, "datasets", None)
        return scorer if parts is None else parts[task.data["entry"]["metadata"]["source_dataset"]]

    def _outcome(self, task: Task, answer: str, score: float) -> str:
        said = f"Your answer, {quoted(answer)}, was checked and is {'right' if score == 1.0 else 'wrong'}"
        if self.feedback == "outcome" or self._form is not None or task.reference is None:
            return f"{said}."
        if score == 1.0:
            return f"{said}: it has the form that was asked for, and every part of it is as it should be."
        part = wrong_part(answer, task.reference, _compares_texts(self._scorer(task)))
        return f"{said}: it has the form that was asked for, but {part}." if part else f"{said}."

    def _with_steps(self, task: Task, completion: str, text: str) -> str:
        """Add what the feedback's level asks for to the text: the judgement of the steps, and the right answer."""
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


def _at_stage(part: Part, stage: int | Mapping[str, Any], composite: bool) -> Part:
    """Give the part a stage's parameters: those listed, or those of a level of the package's own curriculum."""
    if not isinstance(stage, int):
        if stage and composite:
            raise ConfigError("The stages of a composite are levels: data.curriculum must hold whole numbers.")
        return replace(part, parameters={**part.parameters, **stage})
    curricula = _factory(part.dataset).CURRICULA
    if part.dataset not in curricula:
        raise ConfigError(f"reasoning-gym has no curriculum for {part.dataset}: give each stage's parameters instead.")
    curriculum = curricula[part.dataset]()
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if not 0 <= stage <= highest:
        raise ConfigError(
            f"The levels of reasoning-gym's curriculum for {part.dataset} are 0 to {highest}, not {stage}."
        )
    curriculum.set_global_level(stage)
    config = curriculum.generate_configuration(dict(part.parameters))
    parameters = {item.name: getattr(config, item.name) for item in fields(config) if item.name not in ("seed", "size")}
    return replace(part, parameters=parameters)


def _distinct_entries(parts: Sequence[Part], size: int, seed: int, seen: set[str]) -> tuple[list[dict[str, Any]], Any]:
    """Return the first ``size`` distinct questions that the seed gives, and the dataset that scores their answers.

    ``seen`` holds the keys of the questions taken so far, and the new keys are added to it.
    """
    # Entry i of a dataset depends on seed + i, so that neighbouring seeds would give nearly the same questions. The
    # random number spreads them.
    first_seed = random.Random(seed).randrange(2**30)
    scorer = _create(parts, first_seed, size)
    found: list[dict[str, Any]] = []
    misses, chunk, start = 0, scorer, 0
    while len(found) < size:
        for index in range(size):
            entry = chunk[index]
            key = question_key(entry["question"])
            if key not in seen and len(found) < size:
                found.append(entry)
                seen.add(key)
                misses = 0
            misses += 1
            # Of M questions with m still missing, a missing one turns up once in M / m draws on average.
            if misses > 1000 + 10 * len(seen):
                raise ConfigError(
                    f"reasoning-gym's {_names(parts)} gives only about {len(found)} distinct questions with these "
                    f"parameters, but the splits need {size}: lower data.train_size, data.selection_size or "
                    f"data.final_size, or widen data.parameters."
                )
        start += size
        chunk = _create(parts, first_seed + start, size)
    return found, scorer


def _names(parts: Sequence[Part]) -> str:
    return " and ".join(part.dataset for part in parts)


def _compares_texts(scorer: Any) -> bool:
    """Tell whether the dataset inherits reasoning-gym's scorer, which compares with the one right answer."""
    from reasoning_gym.factory import ProceduralDataset

    return type(scorer).score_answer is ProceduralDataset.score_answer


def _factory(dataset: str) -> Any:
    """Return reasoning-gym's factory, after checking that it has the dataset."""
    try:
        import reasoning_gym.factory as factory
    except ImportError:
        raise ConfigError(
            'The environment reasoning_gym needs the package reasoning-gym: pip install "vpd-rl[reasoning-gym]".'
        ) from None
    if dataset in ACCEPT_ANYTHING:
        raise ConfigError(
            f"reasoning-gym's scorer of {dataset} takes any answer for right, so that nothing can be learned from it: "
            "choose another dataset."
        )
    if dataset not in factory.DATASETS:
        near = difflib.get_close_matches(dataset, factory.DATASETS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f". Known: {', '.join(sorted(factory.DATASETS))}."
        raise ConfigError(f"reasoning-gym has no dataset {dataset!r}{hint}")
    return factory


def _create(parts: Sequence[Part], seed: int, size: int) -> Any:
    for part in parts:
        factory = _factory(part.dataset)
        fixed = sorted({"seed", "size"} & part.parameters.keys())
        if fixed:
            raise ConfigError(
                f"data.parameters must not hold {' and '.join(fixed)}: data.seed and the sizes of the splits set them."
            )
    try:
        if len(parts) == 1:
            return factory.create_dataset(parts[0].dataset, seed=seed, size=size, **parts[0].parameters)
        from reasoning_gym.composite import DatasetSpec

        specs = [DatasetSpec(part.dataset, part.weight, dict(part.parameters)) for part in parts]
        return factory.create_dataset("composite", seed=seed, size=size, datasets=specs)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"reasoning-gym's {_names(parts)} does not take the data.parameters "
            f"{[dict(part.parameters) for part in parts]}: {error}."
        ) from None
