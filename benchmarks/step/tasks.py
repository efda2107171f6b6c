"""The tasks, verdicts and feedback of the benchmark: the same for every side, made of words with one token each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from benchmarks.step.specs import Workload
from vpd.environments import Environment, Split
from vpd.packing.trie import PrefixCounter
from vpd.types import Task, Verdict

STEPS_OF_TASKS = 8
"""The number of steps with distinct tasks; after that the tasks repeat."""

FEEDBACK_WORDS = (28, 56)
"""The range of the number of words in a feedback text; each is a token, and punctuation adds a few more."""


class ImposedVerdicts(Environment):
    """An environment in which every other rollout succeeds, whatever it says, and each gets a feedback text of its own.

    Verdicts are given in the order of the calls, which is the order of the rollouts on both sides.

    Args:
        tokenizer: The tokenizer that gives the words and measures the prompts.
        workload: The workload, which says how many tasks there are and how long.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, workload: Workload) -> None:
        self._words = _words(tokenizer)
        self._tasks = [
            Task(f"task-{index}", _prompt(tokenizer, self._words, workload, index))
            for index in range(workload.prompts * STEPS_OF_TASKS)
        ]
        self._numbers = itertools.count()

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks if split == "train" else []

    def judge(self, task: Task, completion: str) -> Verdict:
        number = next(self._numbers)
        draw = random.Random(f"feedback-{number}")
        words = draw.choices(self._words, k=draw.randint(*FEEDBACK_WORDS))
        return Verdict(float(number % 2 == 0), f"{' '.join(words).capitalize()}.")


def needed_tokens(students: Sequence[list[int]], teachers: Sequence[list[int]]) -> tuple[int, int]:
    """Count the distinct prefix tokens of the students' plus those of the teachers' sequences, and of both in one trie.

    The last token of a sequence predicts nothing, so that it need not be computed.
    """
    apart, jointly = 0, PrefixCounter()
    for sequences in (students, teachers):
        counter = PrefixCounter()
        for sequence in sequences:
            counter.add(sequence[:-1])
            jointly.add(sequence[:-1])
        apart += counter.count
    return apart, jointly.count


def _words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the words that are one token together with the space before them, in alphabetical order."""
    texts = (str(tokenizer.decode([token])) for token in range(len(tokenizer)))
    return sorted({text[1:] for text in texts if text[:1] == " " and text[1:].isascii() and _is_word(text[1:])})


def _is_word(text: str) -> bool:
    return text.isalpha() and text.islower() and 3 <= len(text) <= 8


def _prompt(
    tokenizer: PreTrainedTokenizerBase, words: list[str], workload: Workload, seed: int
) -> list[dict[str, str]]:
    """Make a chat of the workload's length, with template and system message; it has one word at least."""
    length = workload.prompt_tokens
    draw = random.Random(f"prompt-{seed}")
    drawn = [draw.choice(words) for _ in range(length)]
    said = random.Random("system").choices(words, k=workload.system_words)
    system = [{"role": "system", "content": f"{' '.join(said).capitalize()}."}] if said else []

    def chat(count: int) -> list[dict[str, str]]:
        return [*system, {"role": "user", "content": f"Question: {' '.join(drawn[:count])}?"}]

    def tokens(count: int) -> int:
        text = str(tokenizer.apply_chat_template(chat(count), tokenize=False, add_generation_prompt=True))
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]

    count = max(1, length - tokens(1) + 1)
    return chat(max(1, count - (tokens(count) - length)))
