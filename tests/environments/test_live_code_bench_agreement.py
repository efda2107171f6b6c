"""Verdicts are those of LiveCodeBench's checker, but for differences that are listed by name."""

# ruff: noqa: E501 (a program on one line is easier to read than one in pieces)

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_code_bench_reference import MODULES

from vpd.environments.code_rows import load_problems
from vpd.environments.code_tests import run_tests
from vpd.sandbox import Limits, Sandbox

# Ways of reading numbers: each program prints the sum of a line of numbers behind their count.
READING = {
    "input": "input()\nprint(sum(map(int, input().split())))",
    "read": "import sys\nprint(sum(map(int, sys.stdin.read().split()[1:])))",
    "readline": "import sys\nsys.stdin.readline()\nprint(sum(map(int, sys.stdin.readline().split())))",
    "readlines": "import sys\nprint(sum(map(int, sys.stdin.readlines()[1].split())))",
    "from_sys": "from sys import stdin\nstdin.readline()\nprint(sum(int(x) for x in stdin.readline().split()))",
    "lines": "import sys\nlines = [line for line in sys.stdin]\nprint(sum(map(int, lines[1].split())))",
    "open_zero": "print(sum(map(int, open(0).read().split()[1:])))",
    "dev_stdin": "print(sum(map(int, open('/dev/stdin').read().split()[1:])))",
    "alias": "import sys\ninput = sys.stdin.readline\nn = int(input())\nprint(sum(map(int, input().split())))",
    "main": "def main():\n    input()\n    print(sum(map(int, input().split())))\nmain()",
    "guarded_main": "def main():\n    input()\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "recursive": "input()\ndef f(v):\n    return v[0] + f(v[1:]) if v else 0\nprint(f(list(map(int, input().split()))))",
    "class": "class A:\n    def go(self):\n        input()\n        return sum(map(int, input().split()))\nprint(A().go())",
    "print_parts": "input()\nprint(*[sum(map(int, input().split()))], sep='', end='')",
    "write": "import sys\ninput()\nsys.stdout.write(str(sum(map(int, input().split()))) + '\\n')",
    "reduce": "from functools import reduce\ninput()\nprint(reduce(lambda a, b: a + b, map(int, input().split())))",
    "generator": "input()\ndef g():\n    yield from map(int, input().split())\nprint(sum(g()))",
    "deep": "input()\nv = list(map(int, input().split()))\ndef f(n):\n    return n and 1 + f(n - 1)\nprint(sum(v) + f(15000) - 15000)",
    "exit": "input()\nprint(sum(map(int, input().split())))\nexit()",
    "exit_one": "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit(1)",
    "exit_text": "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit('done')",
    "not_last_guard": "if __name__ == '__main__':\n    input()\n    print(sum(map(int, input().split())))\nx = 1",
    "too_much": "input()\nprint(sum(map(int, input().split())) + 1)",
    "prints_more": "input()\nprint(sum(map(int, input().split())))\nprint()\nprint(1)",
    "prints_nothing": "input()",
    "forgets_the_count": "print(sum(map(int, input().split())))",
    "reads_too_much": "input()\nprint(sum(map(int, input().split())))\ninput()\ninput()\ninput()",
    "raises": "input()\nprint(sum(map(int, input().split())))\nraise ValueError('late')",
    "divides_by_zero": "print(1 // 0)",
    "does_not_parse": "print(sum(",
    "unknown_name": "print(nobody_defines_this)",
    "asserts": "assert False",
    "one_test_only": "print(6)",
    "prompts": "input('How many? ')\nprint(sum(map(int, input().split())))",
    "exits_early": "import sys\nsys.exit(0)",
    "endless": "while True:\n    pass",
}
READING_TESTS = [["3\n1 2 3\n", "6\n"], ["2\n-5 10\n", "5"]]

# What is printed, what is expected.
PRINTED = {
    "same": ("1 2", "1 2"), "spaces_at_the_end": ("1 2  ", "1 2"), "spaces_at_the_start": ("  1 2", "1 2"),
    "two_spaces_between_numbers": ("1  2", "1 2"), "two_spaces_between_words": ("a  b", "a b"),
    "tab_between_numbers": ("1\t2", "1 2"), "empty_lines_at_the_end": ("1\n\n\n", "1"),
    "empty_line_between": ("1\n\n2", "1\n2"), "carriage_returns": ("1\r\n2\r\n", "1\n2"), "line_for_space": ("1\n2", "1 2"),
    "decimals": ("1.50", "1.5"), "whole_decimals": ("2.0", "2"), "exponent": ("1e3", "1000"), "plus": ("+7", "7"),
    "zeros": ("007", "7"), "minus_zero": ("-0", "0"), "point_first": (".5", "0.5"), "point_last": ("5.", "5"),
    "close_decimals": ("0.30000000000000004", "0.3"), "precise": ("50000000000000001", "50000000000000000"),
    "upper": ("YES", "yes"), "word": ("Yes", "Yes"), "quotes": ("'a'", "a"), "list": ("[1, 2]", "[1, 2]"),
    "list_without_spaces": ("[1,2]", "[1, 2]"), "boolean": ("True", "true"), "one_for_true": ("1", "True"),
    "fraction": ("1/2", "0.5"), "nothing": ("", ""), "something_for_nothing": ("0", ""), "nothing_for_something": ("", "0"),
    "nan": ("nan", "nan"), "nan_spelled_otherwise": ("NaN", "nan"), "mixed_line": ("a 1.0", "a 1"),
    "more_numbers": ("1 2 3", "1 2"), "fewer_numbers": ("1", "1 1"), "comma": ("1,5", "1.5"), "hexadecimal": ("0x10", "16"),
    "unicode": ("naïve ☃", "naïve ☃"), "form_feed": ("a\x0cb", "a\nb"), "line_separator": ("a\u2028b", "a\u2028b"),
    "long": ("x" * 30_000, "x" * 30_000), "large": ("9" * 400, "9" * 400), "percent": ("5%", "5"),
    "space_in_word": ("y es", "yes"), "accents": ("é", "e\u0301"), "underscore": ("1_000", "1000"), "other_digits": ("\u0661", "1"), "repeated": ("1\n1", "1"),
}  # fmt: skip

# The name is used without an import.
NAMES = {
    "math_sqrt": "int(sqrt(16)) + x", "math_module": "math.gcd(4, 8) + x", "gcd": "gcd(4, 6) + x", "inf": "x if inf > 0 else 0",
    "Counter": "Counter([x])[x]", "defaultdict": "defaultdict(int)[x]", "deque": "deque([x]).pop()",
    "heappop": "heappop([x])", "heapq": "heapq.nsmallest(1, [x])[0]", "bisect_left": "bisect_left([1, 2, 3], x)",
    "bisect_module": "bisect.bisect([1, 2, 3], x)", "accumulate": "list(accumulate([x, 1]))[-1]",
    "itertools": "len(list(itertools.permutations([1, 2, x])))", "lru_cache": "lru_cache(None)(lambda: x)()",
    "reduce": "reduce(lambda a, b: a + b, [x, 1])", "json": "json.loads('[1]')[0] + x", "dumps": "len(dumps([x]))",
    "sys": "min(sys.maxsize, x)", "maxsize": "min(maxsize, x)", "datetime": "datetime.date(2000, 1, x).day",
    "timedelta": "timedelta(days=x).days", "mean": "mean([x, x])", "statistics": "statistics.median([x])",
    "itemgetter": "itemgetter(0)([x])", "operator": "operator.add(x, 1)", "StringIO": "len(StringIO('ab').read()) + x",
    "io": "len(io.StringIO('ab').read()) + x", "ascii_lowercase": "len(ascii_lowercase) + x", "re": "len(re.findall('a', 'aba')) + x",
    "deepcopy": "deepcopy([x])[0]", "copy": "copy.copy(x)", "List": "x if List[int] else 0", "Optional": "x if Optional[int] else 0",
    "pow": "pow(2, 3, 5) + x", "cache": "cache(lambda: x)()", "string": "len(string.digits) + x", "random": "random.randint(x, x)",
    "collections": "collections.OrderedDict(a=x)['a']",
    "Fraction": "Fraction(x).numerator", "np": "np.int64(x)", "dataclass": "len(str(dataclass)) * 0 + x", "SortedList": "SortedList([x])[0]",
    "os": "len(os.sep) * 0 + x", "Decimal": "int(Decimal(x))", "time": "int(time.time() * 0) + x", "array": "array('i', [x])[0]",
}  # fmt: skip

# What a method returns, what is expected.
RETURNED = {
    "integer": ("3", "3"), "other_integer": ("4", "3"), "float_for_integer": ("3.0", "3"), "integer_for_float": ("3", "3.0"),
    "inexact": ("0.1 + 0.2", "0.3"), "exact": ("0.1", "0.1"), "true": ("True", "true"), "one_for_true": ("1", "true"),
    "zero_for_false": ("0", "false"), "none": ("None", "null"), "nothing_for_zero": ("None", "0"), "text": ("'a'", '"a"'),
    "other_text": ("'a '", '"a"'), "text_for_number": ("'1'", "1"), "list": ("[1, 2]", "[1, 2]"), "order": ("[2, 1]", "[1, 2]"),
    "tuple": ("(1, 2)", "[1, 2]"), "nested_tuples": ("[(1, 2)]", "[[1, 2]]"), "set": ("{1, 2}", "[1, 2]"), "range": ("range(2)", "[0, 1]"), "generator": ("(i for i in [1])", "[1]"),
    "nested": ("[[1], []]", "[[1], []]"), "longer": ("[1, 2, 3]", "[1, 2]"), "empty": ("[]", "[]"), "empty_for_none": ("[]", "null"),
    "dict": ("{'a': 1}", '{"a": 1}'), "dict_of_integers": ("{1: 1}", '{"1": 1}'), "Counter": ("Counter('a')", '{"a": 1}'),
    "defaultdict": ("defaultdict(int, a=1)", '{"a": 1}'), "deque": ("deque([1])", "[1]"), "map": ("map(int, [1])", "[1]"),
    "large": ("10**400", "1" + "0" * 400), "list_of_booleans": ("[True, False]", "[1, 0]"), "lambda": ("(lambda: 1)", "1"),
    "raises": ("1 // 0", "0"), "index": ("[][0]", "0"), "exit": ("sys.exit()", "null"), "bytes": ("b'a'", '"a"'),
    "nan": ("nan", "NaN"), "infinity": ("inf", "Infinity"), "many": ("list(range(60000))", json.dumps(list(range(60000)))),
    "many_keys": ("{str(i): i for i in range(12000)}", json.dumps({str(i): i for i in range(12000)})),
    "class": ("Solution", "1"), "unicode": ("'☃'", '"☃"'), "minus_zero": ("-0.0", "0"), "frozenset": ("frozenset([1])", "[1]"),
}  # fmt: skip

FUNCTIONS = {
    "instance_is_kept": ("class Solution:\n    n = 0\n    def f(self, x):\n        self.n += 1\n        return self.n", ["1", "2"]),
    "new_instance_is_expected": ("class Solution:\n    n = 0\n    def f(self, x):\n        self.n += 1\n        return self.n", ["1", "1"]),
    "constructor": ("class Solution:\n    def __init__(self):\n        self.memo = {}\n    def f(self, x):\n        return x", ["1", "2"]),
    "bare_function": ("def f(x):\n    return x", ["1", "2"]),
    "bare_function_wrong": ("def f(x):\n    return x + 1", ["1", "2"]),
    "annotated": ("class Solution:\n    def f(self, x: Optional[int]) -> List[int]:\n        return x", ["1", "2"]),
    "unknown_annotation": ("class Solution:\n    def f(self, x: ListNode) -> int:\n        return x", ["1", "2"]),
    "helper": ("def g(x):\n    return x\nclass Solution:\n    def f(self, x):\n        return g(x)", ["1", "2"]),
    "other_method": ("class Solution:\n    def g(self, x):\n        return x", ["1", "2"]),
    "other_class": ("class Answer:\n    def f(self, x):\n        return x", ["1", "2"]),
    "too_few_parameters": ("class Solution:\n    def f(self):\n        return 1", ["1", "2"]),
    "static": ("class Solution:\n    @staticmethod\n    def f(x):\n        return x", ["1", "2"]),
    "cached": ("class Solution:\n    @lru_cache(None)\n    def f(self, x):\n        return x", ["1", "2"]),
    "prints_too": ("class Solution:\n    def f(self, x):\n        print('hello')\n        return x", ["1", "2"]),
    "prints_instead": ("class Solution:\n    def f(self, x):\n        print(x)", ["1", "2"]),
    "deep": ("class Solution:\n    def f(self, x):\n        def g(n):\n            return n and 1 + g(n - 1)\n        return x + g(9000) - 9000", ["1", "2"]),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nclass Solution:\n    def f(self, x):\n        return A(x).x", ["1", "2"]),
    "guarded": ("class Solution:\n    def f(self, x):\n        return x\nif __name__ == '__main__':\n    print(nothing)", ["1", "2"]),
    "raises_at_load": ("class Solution:\n    def f(self, x):\n        return x\nraise ValueError", ["1", "2"]),
    "does_not_parse": ("class Solution:\n    def f(self, x)\n        return x", ["1", "2"]),
    "changes_globals": ("n = 0\nclass Solution:\n    def f(self, x):\n        global n\n        n += 1\n        return n", ["1", "2"]),
    "endless": ("class Solution:\n    def f(self, x):\n        while True:\n            pass", ["1", "2"]),
    "numpy": ("import numpy as np\nclass Solution:\n    def f(self, x):\n        return np.int64(x)", ["1", "2"]),
    "future": ("class Solution:\n    def f(self, x: int):\n        return x if Solution.f.__annotations__['x'] is int else 0", ["1", "2"]),
}  # fmt: skip

DIFFERENCES: dict[str, tuple[bool, str]] = {
    "reading/from_sys": (True, "LiveCodeBench replaces sys.stdin after the program's imports have bound the real one"),
    "reading/open_zero": (True, "LiveCodeBench replaces sys.stdin, but not the descriptor"),
    "reading/dev_stdin": (True, "LiveCodeBench replaces sys.stdin, but not the device"),
    "reading/not_last_guard": (True, "LiveCodeBench runs a guarded main only where it comes last"),
    "printed/underscore": (False, "1_000 is a number in Python's source, and not in the output of a contest's program"),
    "printed/other_digits": (False, "digits of other scripts are not those that the problem asks for"),
    "returned/nested_tuples": (True, "tuples and lists with equal items count as equal at every depth"),
}
"""The verdict here where it is not LiveCodeBench's, and the reason."""


def cases() -> dict[str, tuple[str, str | None, list[list[str]]]]:
    found: dict[str, tuple[str, str | None, list[list[str]]]] = {}
    for name, code in READING.items():
        found[f"reading/{name}"] = (code, None, READING_TESTS)
    for name, (printed, expected) in PRINTED.items():
        found[f"printed/{name}"] = (f"print({printed!r})", None, [["", expected]])
    for name, expression in NAMES.items():
        # A wrong value is expected where the name is none of the prelude's, so that only an error can be told apart.
        code = f"class Solution:\n    def f(self, x):\n        return repr(int({expression}))"
        right = repr_of(expression)
        found[f"names/function/{name}"] = (code, "f", [["2", json.dumps(right)]])
        found[f"names/script/{name}"] = (f"x = 2\nprint(int({expression}))", None, [["", right]])
    for name, (expression, expected) in RETURNED.items():
        found[f"returned/{name}"] = (
            f"class Solution:\n    def f(self):\n        return {expression}",
            "f",
            [["", expected]],
        )
    for name, (code, outputs) in FUNCTIONS.items():
        found[f"functions/{name}"] = (code, "f", [[str(i + 1), output] for i, output in enumerate(outputs)])
    return found


def repr_of(expression: str) -> str:
    """Compute the value with all names at hand."""
    imports = [f"from {name} import *" for name in (*MODULES, "builtins", "typing")]
    imports += [
        f"import {', '.join(MODULES)}, os, time",
        "import numpy as np",
        "from sortedcontainers import SortedList",
    ]
    imports += [
        "from fractions import Fraction\nfrom decimal import Decimal\nfrom array import array\nfrom dataclasses import dataclass"
    ]
    namespace: dict = {"x": 2}
    exec("\n".join(imports), namespace)
    return repr(int(eval(expression, namespace)))


def row(name: str, code: str, function: str | None, tests: list[list[str]]) -> str:
    kind = "stdin" if function is None else "functional"
    rows = [{"input": given, "output": expected, "testtype": kind} for given, expected in tests]
    starter = "" if function is None else f"class Solution:\n    def {function}(self) -> int:\n        "
    values = {
        "question_id": name,
        "question_content": name,
        "starter_code": starter,
        "public_test_cases": json.dumps(rows),
    }
    return json.dumps({**values, "metadata": json.dumps({} if function is None else {"func_name": function})})


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, tuple[bool, bool]]:
    """Return LiveCodeBench's verdict and ours by case."""
    if "numpy" not in Limits().packages:
        pytest.skip("numpy is not installed, or below /tmp, which programs do not see")
    all_cases = cases()
    # The reference reads a test without arguments as one without lines.
    asked = [{"code": c, "function": f, "tests": t} for c, f, t in all_cases.values()]
    reference = Path(__file__).parents[1] / "live_code_bench_reference.py"
    ended = subprocess.run(
        [sys.executable, reference], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("\n".join(row(name, *case) for name, case in all_cases.items()))
    limits = Limits(seconds=3)
    ours = {}
    with Sandbox(workers=1, limits=limits) as sandbox:
        for problem in load_problems(str(path))["train"]:
            failures = run_tests(sandbox, all_cases[problem.id][0], problem.public, limits)
            ours[problem.id] = failures == [None] * len(failures)
    return {name: (theirs, ours[name]) for name, theirs in zip(all_cases, json.loads(ended.stdout), strict=True)}


def test_verdicts_agree_but_for_the_listed_differences(verdicts):
    assert len(verdicts) >= 150
    found = {name: ours for name, (theirs, ours) in verdicts.items() if theirs != ours}
    assert found == {name: verdict for name, (verdict, _) in DIFFERENCES.items()}


def test_both_verdicts_are_frequent(verdicts):
    passed = sum(theirs for theirs, _ in verdicts.values())
    assert min(passed, len(verdicts) - passed) >= 50
