"""Functions that find the final answer in a completion, and say where it goes wrong without giving the right one."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

# Chat models like to write the word in bold.
ANSWER_LINE = re.compile(r"^[ \t]*(\*\*)?answer(\*\*)?[ \t]*:(\*\*)?[ \t]*", re.IGNORECASE | re.MULTILINE)
THINKING_END = "</think>"
PLACES = ("ones", "tens", "hundreds", "thousands", "ten-thousands")
QUOTE_LIMIT = 80


def split_at_answer(completion: str) -> tuple[str, str | None]:
    """Return the text before the last ``Answer:`` line, and the text after its colon (None without such a line).

    A thinking block is dropped from the text before the line.
    """
    matches = list(ANSWER_LINE.finditer(completion))
    start, end = matches[-1].span() if matches else (len(completion), None)
    before = completion[:start].rpartition(THINKING_END)[2]
    return before, None if end is None else completion[end:].strip("\n").rstrip()


def first_line(text: str) -> str:
    """Return the first line, without the blanks and bold marks around it."""
    return text.partition("\n")[0].strip().removeprefix("**").removesuffix("**").strip()


def quoted(text: str) -> str:
    """Put the text in quotation marks, and shorten it so that a runaway line cannot fill the teacher's prompt."""
    text = text.strip()
    return f'"{text}"' if len(text) <= QUOTE_LIMIT else f'"{text[:QUOTE_LIMIT]}..."'


def parse_integer(text: str) -> int | None:
    """Read the text as an integer; it may have thousands commas and a trailing ``.0``. Anything else gives None."""
    try:
        number = Decimal(text.strip().replace(",", ""))
        # The bound keeps an answer such as 1e999999 from becoming a million digits.
        if number.is_finite() and number.adjusted() < 100 and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    return None


def wrong_digits(number: int, reference: int) -> str:
    """Say which part of a wrong integer is wrong: its sign, its length, or the digits by their place."""
    digits, right = str(abs(number)), str(abs(reference))
    if (number < 0) != (reference < 0):
        return "the sign is wrong"
    if len(digits) != len(right):
        return f"it has too {'many' if len(digits) > len(right) else 'few'} digits"
    places = [place_name(i) for i in range(len(right)) if digits[-1 - i] != right[-1 - i]]
    return f"the {' and '.join(places)} {'digit is' if len(places) == 1 else 'digits are'} wrong"


def place_name(index: int) -> str:
    """Return the name of a decimal place; place 0 is the ones."""
    return PLACES[index] if index < len(PLACES) else f"10^{index}"


def wrong_part(answer: str, reference: str, exact: bool) -> str | None:
    """Say where a wrong answer goes wrong; return None where that cannot be told.

    Args:
        answer: The answer that the completion gave.
        reference: The right answer; the text repeats no part of it.
        exact: Whether the judge compares texts, so that words at the same position can be compared too. Where many
            answers are right, a position at which one differs from the reference means nothing.
    """
    number, right = parse_integer(answer), parse_integer(reference)
    if right is not None:
        return "it is not a whole number" if number is None else wrong_digits(number, right)
    if not exact:
        return None
    given, wanted = answer.split(), reference.split()
    if len(given) != len(wanted):
        return f"it has too {'many' if len(given) > len(wanted) else 'few'} words"
    for position, (word, right_word) in enumerate(zip(given, wanted, strict=True), start=1):
        if word != right_word:
            if len(given) > 1:
                return f"word {position} is the first that is wrong"
            return _wrong_character(word, right_word)
    return "the white space is wrong"


def _wrong_character(word: str, right: str) -> str:
    if len(word) != len(right):
        return f"it is too {'long' if len(word) > len(right) else 'short'}"
    position = next(i for i, (a, b) in enumerate(zip(word, right, strict=True), start=1) if a != b)
    return f"character {position} is the first that is wrong"
