"""The suite's tasks. Their texts say what a helpful programmer would write of an answer, and no more."""

from __future__ import annotations

import ast
import itertools
import json
import operator
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.own_tasks.base import Number, OwnTask

WORDS = re.findall(
    r"\w+",
    """river mountain apple window garden music train letter winter summer dog cat horse bird ocean forest bread coffee
    sugar paper pencil school teacher doctor farmer engine bridge castle island desert storm cloud rain snow fire stone
    metal glass wood cotton silk ship boat road street city village market kitchen table chair lamp clock mirror carpet
    blanket pillow shirt shoe hat coat button needle thread rope knife spoon plate bottle basket bucket ladder hammer
    wheel wagon saddle feather shell pearl diamond""",
)
NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ivy",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
]
CITIES = ["Paris", "London", "Rome", "Oslo", "Madrid", "Vienna", "Cairo", "Tokyo", "Lima", "Delhi"]


def sample(items: Sequence[Any], count: int) -> list[Any]:
    """Draw some of the items, always the same ones."""
    return random.Random(1).sample(items, min(count, len(items)))


class ShortSentence(OwnTask):
    """One very short sentence with a given word: at most eight words. The text names what is missing."""

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        return [(f"Write one very short sentence with the word {word}.", {"word": word}) for word in WORDS]

    def right(self, data: dict[str, Any]) -> str:
        return f"The {data['word']} is here."

    def wrong(self, data: dict[str, Any]) -> str:
        return "It is a very nice day outside and we all like it."

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        count, faults = len(answer.split()), []
        if not re.search(rf"\b{data['word']}\b", answer.lower()):
            faults.append(f"it does not contain the word {data['word']}")
        if count > 8:
            faults.append(f"it has {count} words, and at most 8 are allowed")
        if len(re.findall(r"[.!?]", answer)) != 1 or answer[-1:] not in ".!?":
            faults.append("it is not one sentence that ends with a full stop")
        if faults:
            return 0.0, f"Your sentence is not right: {'; '.join(faults)}."
        return 1.0, f"Your sentence is right: it has {count} words and contains {data['word']}."


class JsonObject(OwnTask):
    """A JSON object with three given keys. The text is the parser's message, or the first value that is wrong."""

    demonstrations_used = 16

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        people = sample(list(itertools.product(NAMES, CITIES, range(20, 60, 3))), 1500)
        return [
            (
                f"{name} is {age} and lives in {city}. Write this as JSON with the keys person, years and town.",
                {"person": name, "years": age, "town": city},
            )
            for name, city, age in people
        ]

    def right(self, data: dict[str, Any]) -> str:
        return json.dumps(data)

    def wrong(self, data: dict[str, Any]) -> str:
        return json.dumps({"name": data["person"], "age": data["years"], "city": data["town"]})

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError) as error:
            return 0.0, f"Your answer is not valid JSON: {error}. Write the object and nothing else."
        if not isinstance(found, dict) or set(found) != set(data):
            keys = ", ".join(map(str, found)) if isinstance(found, dict) else "missing"
            return 0.0, f"Your keys are {keys}; they should be person, years and town."
        for key, value in data.items():
            if found[key] != value:
                return 0.0, f"The value of {key} is {found[key]!r}; it should be {value!r}."
        return 1.0, "Your object has the right keys and values."


class UnitConversion(Number):
    """Whole units into smaller ones. The text gives the factor and the right number."""

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        units = [
            ("meters", "centimeters", 100),
            ("kilograms", "grams", 1000),
            ("hours", "minutes", 60),
            ("days", "hours", 24),
            ("feet", "inches", 12),
            ("weeks", "days", 7),
            ("dozens", "pieces", 12),
        ]
        return [
            (
                f"Convert {count} {unit} to {small}. Answer with the number only.",
                {"answer": count * factor, "unit": unit, "small": small, "factor": factor, "count": count},
            )
            for unit, small, factor in units
            for count in range(2, 100)
        ]

    def explain(self, data: dict[str, Any], given: str) -> str:
        return (
            f"One of {data['unit']} is {data['factor']} {data['small']}, so that {data['count']} {data['unit']} are "
            f"{data['answer']} {data['small']}."
        )


class Spelling(OwnTask):
    """A word, letter by letter. The text shows the first letter that is wrong."""

    demonstrations_used = 16

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        pairs = sample(list(itertools.permutations(WORDS, 2)), 1200)
        return [(f"Spell the word {a + b} with a dash between letters.", {"word": a + b}) for a, b in pairs]

    def right(self, data: dict[str, Any]) -> str:
        return "-".join(data["word"])

    def wrong(self, data: dict[str, Any]) -> str:
        word = data["word"]
        return "-".join(word[:3] + word[4:])

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        wanted, given = list(data["word"]), answer.split("-")
        if given == wanted:
            return 1.0, "Your spelling is right."
        for place, (letter, own) in enumerate(zip(wanted, given, strict=False), start=1):
            if letter != own:
                return 0.0, f"Letter {place} of {data['word']} is {letter}, and you wrote {own[:20]}."
        return 0.0, f"{data['word']} has {len(wanted)} letters, and you wrote {len(given)}."


class Sorting(OwnTask):
    """Four numbers in rising order. The text names the first place that is out of order or missing."""

    demonstrations_used = 32

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        draw, found = random.Random(2), {}
        while len(found) < 1500:
            numbers = tuple(draw.sample(range(10, 100), 4))
            found[numbers] = (
                f"Sort these numbers, smallest first: {' '.join(map(str, numbers))}",
                {"numbers": numbers},
            )
        return list(found.values())

    def right(self, data: dict[str, Any]) -> str:
        return " ".join(map(str, sorted(data["numbers"])))

    def wrong(self, data: dict[str, Any]) -> str:
        return " ".join(map(str, sorted(data["numbers"], reverse=True)))

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        wanted, given = [str(number) for number in sorted(data["numbers"])], answer.replace(",", " ").split()
        if given == wanted:
            return 1.0, "Your order is right."
        if sorted(given) != sorted(wanted):
            return 0.0, f"Your answer must hold the numbers {', '.join(map(str, data['numbers']))} and nothing else."
        place = next(i for i, (own, right) in enumerate(zip(given, wanted, strict=True)) if own != right)
        return 0.0, f"Number {place + 1} of your answer is {given[place]}, and there it should be {wanted[place]}."


class CountingLetters(Number):
    """How often a letter occurs. The text spells the word and counts."""

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        pairs = sample(
            [(a + b, letter) for a, b in itertools.permutations(WORDS, 2) for letter in sorted(set(a))], 1200
        )
        return [
            (
                f"How often does the letter {letter} occur in {word}? Answer with the number only.",
                {"answer": word.count(letter), "word": word, "letter": letter},
            )
            for word, letter in pairs
        ]

    def explain(self, data: dict[str, Any], given: str) -> str:
        return f"In {'-'.join(data['word'])} the letter {data['letter']} occurs {data['answer']} times."


class TwoNumbers(Number):
    """The sum of two numbers of two digits. The text gives the right sum."""

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        pairs = sample([(a, b) for a in range(11, 99) for b in range(a, 99)], 1500)
        return [(f"What is {a} + {b}? Answer with the number only.", {"answer": a + b}) for a, b in pairs]

    def explain(self, data: dict[str, Any], given: str) -> str:
        return f"The expected answer is {data['answer']}."


class ThreeNumbers(Number):
    """The sum of three numbers. The text says which digit is wrong, and not the sum."""

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        triples = sample([(a, b, c) for a in range(5, 40) for b in range(a, 40) for c in range(b, 40)], 1500)
        return [
            (f"What is {a} + {b} + {c}? Answer with the number only.", {"answer": a + b + c}) for a, b, c in triples
        ]

    def explain(self, data: dict[str, Any], given: str) -> str:
        right = str(data["answer"])
        if not given.isdigit() or len(given) != len(right):
            return f"The right answer has {len(right)} digits."
        ones = "right" if given[-1:] == right[-1] else "wrong"
        return f"Its last digit is {ones}, and the answer should be {'larger' if given < right else 'smaller'}."


class Products(Number):
    """A number of two digits times one of one digit. The text works the product out."""

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        return [
            (f"What is {a} times {b}? Answer with the number only.", {"answer": a * b, "a": a, "b": b})
            for a in range(11, 100)
            for b in range(2, 10)
        ]

    def explain(self, data: dict[str, Any], given: str) -> str:
        tens, ones = data["a"] // 10 * 10, data["a"] % 10
        return (
            f"{tens} times {data['b']} is {tens * data['b']}, {ones} times {data['b']} is {ones * data['b']}, together "
            f"{data['answer']}."
        )


_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def value_of(node: ast.AST) -> int:
    """Compute an expression of whole numbers with +, - and *.

    Raises:
        ValueError: It holds anything else.
    """
    if isinstance(node, ast.Expression):
        return value_of(node.body)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    raise ValueError("only whole numbers with +, - and * are allowed")


class Expression(OwnTask):
    """A one-line Python expression for a sentence. The text is the error, or the two values."""

    demonstrations_used = 16

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        found = []
        for a, b, c in itertools.product(range(2, 12), repeat=3):
            found += [
                (f"Write as a Python expression: {a} times the sum of {b} and {c}.", {"wanted": f"{a} * ({b} + {c})"}),
                (f"Write as a Python expression: {a} less than {b} times {c}.", {"wanted": f"{b} * {c} - {a}"}),
            ]
        return sample(found, 1500)

    def right(self, data: dict[str, Any]) -> str:
        return data["wanted"]

    def wrong(self, data: dict[str, Any]) -> str:
        return data["wanted"].replace("(", "").replace(")", "").replace(" - ", " + ")

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        try:
            value = value_of(ast.parse(answer[:200], mode="eval"))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return 0.0, f"This is no Python expression: {str(error)[:80]}."
        wanted = value_of(ast.parse(data["wanted"], mode="eval"))
        if value != wanted:
            return 0.0, f"Your expression gives {value}, and it should give {wanted}, as {data['wanted']} does."
        return 1.0, f"Your expression gives {wanted}, which is right."


class LargestOption(OwnTask):
    """A multiple-choice question: which option is the largest number. The text compares the chosen one."""

    demonstrations_used = 16

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        draw, found = random.Random(3), {}
        while len(found) < 1500:
            options = tuple(draw.sample(range(10, 100), 4))
            listed = " ".join(f"{letter}) {value}" for letter, value in zip("ABCD", options, strict=True))
            found[options] = (f"Which number is the largest? {listed} Answer with the letter.", {"options": options})
        return list(found.values())

    def right(self, data: dict[str, Any]) -> str:
        return "ABCD"[data["options"].index(max(data["options"]))]

    def wrong(self, data: dict[str, Any]) -> str:
        return "ABCD"[data["options"].index(min(data["options"]))]

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        letter = answer.removesuffix(".").removesuffix(")")
        if letter not in set("ABCD"):
            return 0.0, "Answer with one letter, A, B, C or D, and nothing else."
        chosen, largest = data["options"]["ABCD".index(letter)], max(data["options"])
        if chosen != largest:
            return 0.0, f"{letter} is {chosen}, and {largest} is larger."
        return 1.0, f"{letter} is right: {chosen} is the largest number."


class WordCount(OwnTask):
    """About so many words on a thing: the reward falls off with the distance. The text counts the words."""

    success = 0.99

    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        return [
            (f"Describe a {word} in exactly {count} words.", {"count": count}) for word in WORDS for count in (5, 7, 9)
        ]

    def right(self, data: dict[str, Any]) -> str:
        words = ["It", "is", "one", "of", "the", "things", "that", "we", "use"]
        return " ".join(words[: data["count"]]) + "."

    def wrong(self, data: dict[str, Any]) -> str:
        return "It is a thing that many of us have seen and used very often."

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        count, wanted = len(answer.split()), data["count"]
        reward = max(0.0, 1.0 - abs(count - wanted) / wanted)
        if count == wanted:
            return reward, f"Your answer has exactly {wanted} words."
        return (
            reward,
            f"Your answer has {count} words, {abs(count - wanted)} too {'many' if count > wanted else 'few'}.",
        )


TASKS: dict[str, type[OwnTask]] = {
    "short-sentence": ShortSentence,
    "json-object": JsonObject,
    "unit-conversion": UnitConversion,
    "spelling": Spelling,
    "sorting": Sorting,
    "counting-letters": CountingLetters,
    "two-numbers": TwoNumbers,
    "three-numbers": ThreeNumbers,
    "products": Products,
    "expression": Expression,
    "largest-option": LargestOption,
    "word-count": WordCount,
}
