"""The tasks of the suite whose answer is a text in a given form."""

from __future__ import annotations

import json
import random
from typing import Any

from benchmarks.held_out_tasks.arithmetic import ExpressionError, evaluate
from benchmarks.held_out_tasks.base import OwnTask, Question, right, sentence_ends, words_of, wrong
from benchmarks.held_out_tasks.vocabulary import CITIES, NAMES, WORDS
from vpd import Task, Verdict


class ShortSentence(OwnTask):
    """One very short sentence with a given word."""

    def draw(self, rng: random.Random) -> Question:
        word, most = rng.choice(WORDS), rng.randint(4, 12)
        text = f'Write one sentence of at most {most} words that contains the word "{word}".'
        answer = rng.choice(
            [f"I like the {word}.", f"We saw the {word}.", f"The {word} is new.", f"Where is the {word}?"]
        )
        long = f"Yesterday we talked for a long time about the {word} that my old friend had once told us about."
        return Question(text, answer, long, {"word": word, "most": most})

    def judge(self, task: Task, completion: str) -> Verdict:
        word, most = task.data["word"], task.data["most"]
        words, sentences = words_of(completion), sentence_ends(completion)
        faults = []
        if sentences > 1 or "\n" in completion.strip():
            faults.append("you wrote more than one sentence")
        elif not completion.strip().endswith((".", "!", "?", '"')):
            faults.append("the sentence has no full stop at its end")
        if len(words) > most:
            faults.append(f"it has {len(words)} words, and {most} are allowed")
        if word not in [w.lower() for w in words]:
            faults.append(f'the word "{word}" does not occur')
        if len(words) < 2:
            faults.append("it is no sentence")
        if faults:
            return wrong(f"This does not fit: {'; '.join(faults)}.")
        return right(f'It is one sentence of {len(words)} words ({most} are allowed), and "{word}" is in it.')


class WordBudget(OwnTask):
    """A sentence of a given length; the reward falls off with each word too many or too few.

    A sentence is a success when it is one word off at most: from a reward of 0.8.
    """

    fall_off = 0.2

    def draw(self, rng: random.Random) -> Question:
        word, wanted = rng.choice(WORDS), rng.randint(5, 12)
        text = f"Write one sentence of exactly {wanted} words about this: {word}."
        filling = rng.choice(["on a very long warm quiet day last summer", "near our old house in the north of town"])
        start = f"We all saw the {word}".split()
        sentence = [*start, *filling.split()][:wanted]
        longer = f"We all saw the {word} because it was there and nobody else had wanted to look at it before."
        return Question(text, " ".join(sentence) + ".", longer, {"wanted": wanted})

    def judge(self, task: Task, completion: str) -> Verdict:
        wanted, count = task.data["wanted"], len(words_of(completion))
        if sentence_ends(completion) > 1:
            return wrong("You wrote more than one sentence.")
        reward = max(0.0, round(1 - self.fall_off * abs(count - wanted), 6))
        if count == wanted:
            return Verdict(reward, f"It is one sentence, and it has {count} words as asked.")
        side = "more" if count > wanted else "fewer"
        return Verdict(reward, f"It has {count} words: {abs(count - wanted)} {side} than the {wanted} asked for.")


FIELDS: dict[str, Any] = {
    "name": NAMES,
    "city": CITIES,
    "age": list(range(18, 80)),
    "colour": ["red", "blue", "green", "black"],
    "pet": ["dog", "cat", "parrot", "rabbit"],
    "job": ["nurse", "baker", "pilot", "farmer"],
    "size": ["small", "medium", "large"],
    "price": list(range(2, 60)),
}


class JsonObject(OwnTask):
    """A JSON object with given keys and values."""

    def draw(self, rng: random.Random) -> Question:
        keys = rng.sample(list(FIELDS), 3)
        values = {key: rng.choice(FIELDS[key]) for key in keys}
        listed = ", ".join(f"{key} {value}" for key, value in values.items())
        text = f"Write this as a JSON object with the keys {', '.join(keys)}: {listed}. Reply with the JSON only."
        short = {key: values[key] for key in keys[:2]}
        slips = [json.dumps(short), str(values), f"```json\n{json.dumps(values)}\n```"]
        return Question(text, json.dumps(values), rng.choice(slips), {"values": values})

    def judge(self, task: Task, completion: str) -> Verdict:
        wanted: dict[str, Any] = task.data["values"]
        try:
            found = json.loads(completion)
        except json.JSONDecodeError as error:
            return wrong(f"This is not JSON: {error.msg} at character {error.pos + 1}. It begins {completion[:20]!r}.")
        except (ValueError, RecursionError):
            return wrong("This is not JSON that can be read: a number is too long or the nesting is too deep.")
        if not isinstance(found, dict):
            return wrong(f"This is JSON, but a {type(found).__name__} and not an object.")
        if missing := wanted.keys() - found.keys():
            return wrong(f"The JSON is well-formed, but keys are missing: {', '.join(sorted(missing))}.")
        if added := found.keys() - wanted.keys():
            return wrong(f"The JSON is well-formed, but keys were not asked for: {', '.join(sorted(added))}.")
        for key, value in wanted.items():
            # An age in quotation marks is still the age.
            if str(found[key]) != str(value):
                return wrong(f'The value of "{key}" is {found[key]!r}, which is not what the question says.')
        return right(
            f"The JSON is well-formed, has the keys {', '.join(wanted)} and no others, and the values are right."
        )


class Spelling(OwnTask):
    """A word letter by letter, with hyphens between."""

    def draw(self, rng: random.Random) -> Question:
        word = "".join(rng.choice("bdfgklmnprstv") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        word = rng.choice([word, word + rng.choice("nrstl"), rng.choice(WORDS)])
        text = f'Spell the word "{word}" letter by letter, with hyphens between the letters.'
        letters = list(word)
        del letters[rng.randrange(len(letters))]
        return Question(text, "-".join(word), "-".join(letters), {"word": word})

    def judge(self, task: Task, completion: str) -> Verdict:
        word, written = task.data["word"], completion.strip().lower().removesuffix(".")
        letters = written.split("-")
        if written == "-".join(word):
            return right(f"All {len(word)} letters are there, in their order, with a hyphen between each two.")
        if longer := [part for part in letters if len(part) != 1]:
            return wrong(f'Between hyphens there should be one letter each, but there is "{longer[0][:40]}".')
        for place, letter in enumerate(letters, start=1):
            if place > len(word):
                return wrong(f"The word is spelt right, but then {len(letters) - len(word)} more letters follow.")
            if letter != word[place - 1]:
                return wrong(
                    f'Letter {place} is wrong: you wrote "{letter}". The {place - 1} letters before it are right.'
                )
        return wrong(f"You stop too early: {len(word) - len(letters)} letters are missing at the end.")


class Expression(OwnTask):
    """A Python expression for a rule in words, tried on some values of x."""

    values = (2, 5, 11)

    def draw(self, rng: random.Random) -> Question:
        a, b = rng.randint(2, 40), rng.randint(2, 40)
        rule, answer, slip = rng.choice(
            [
                (f"adds {a} to x and then multiplies by {b}", f"(x + {a}) * {b}", f"x + {a} * {b}"),
                (f"multiplies x by {a} and then adds {b}", f"x * {a} + {b}", f"x * ({a} + {b})"),
                (f"subtracts {a} from x and then multiplies by {b}", f"(x - {a}) * {b}", f"x - {a} * {b}"),
                (f"subtracts x from {a} and then adds {b}", f"{a} - x + {b}", f"x - {a} + {b}"),
                (f"squares x and then adds {a}", f"x * x + {a}", f"x + {a}"),
            ]
        )
        text = f"Write a Python expression that {rule}. Reply with the expression only."
        return Question(text, answer, slip, {"expression": answer})

    def judge(self, task: Task, completion: str) -> Verdict:
        written = completion.strip()
        for x in self.values:
            wanted = evaluate(task.data["expression"], {"x": x})
            try:
                found = evaluate(written, {"x": x})
            except ExpressionError as error:
                return wrong(f"This cannot be evaluated: {error}")
            if found != wanted:
                return wrong(f"For x = {x} the expression gives {found:g}, but {wanted:g} is expected.")
        return right(f"The expression gives the expected values for x = {', '.join(map(str, self.values))}.")
