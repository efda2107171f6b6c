"""Blocks are paired line by line whatever their language, and the program is the last Python block."""

from __future__ import annotations

import pytest

from vpd.environments.code_answer import read_code
from vpd.environments.fences import read_blocks

PROGRAM = "print(1)\n"
BLOCK = "```python\nprint(1)\n```\n"


@pytest.mark.parametrize("language", ["text", "bash", "json", "cpp", "input", "latex", "output", "diff", "python-repl"])
@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_blocks_of_other_languages_are_passed_over(language, order):
    other = f"It prints:\n```{language}\n1 2\n```\n"
    completion = {"before": other + BLOCK, "after": BLOCK + other, "both": other + BLOCK + other}[order]
    assert read_code(completion)[0] == PROGRAM


@pytest.mark.parametrize(
    "info",
    [
        "python", "Python", "py", "python3", "py3", "python3.11", "python-3.11", "Python 3", "pypy3", "ipython",
        'python title="solution.py"', "python solution.py", "python:solution.py", "python, editable", "{python}",
        "{.python .numberLines}", "solution.py", " python ", "python{1,3}", "",
    ],
)  # fmt: skip
def test_python_has_many_names_and_titles_may_follow(info):
    assert read_code(f"Here:\n```{info}\nprint(1)\n```\n")[0] == PROGRAM


@pytest.mark.parametrize(
    "completion",
    [
        "```python\r\nprint(1)\r\n```\r\nIt prints 1.\r\n",
        "~~~python\nprint(1)\n~~~",
        "~~~~ python\nprint(1)\n~~~~~~",
        "````python\nprint(1)\n````",
        "1. So:\n   ```python\n   print(1)\n   ```\n",
        "1. So:\n   ```python\nprint(1)\n   ```\n",
        "- ```python\n  print(1)\n  ```\n",
        "\t```python\n\tprint(1)\n\t```\n",
        "````markdown\n# Answer\n```python\nprint(1)\n```\n````\n",
        "```markdown\n# Answer\n```python\nprint(1)\n```\n```\n",
        "Answer: ```python\nprint(1)\n```",
        "```python\nprint(1)```",
        "```python\nprint(1)```\nIt prints:\n```\n1\n```\n",
        "```python\nprint(1)\n``` It prints 1.\n",
        "```\n1 2 3\n```\n```\nprint(1)\n```\n```\nand 1 is printed\n```\n",
        "```\nforgotten\n```python\nprint(1)\n```\n",
        "```python\nprint(2)\n```python\nprint(1)\n```\n",
        "```python\nprint(1)\n```output\n1\n```\n",
        "```python\nprint(1)\n```\n```python\n```\n",
        "```python\nprint(1)\n```\n```python\nprint(",
        "<think>```python\nprint(2)\n```</think>\n```\nprint(1)\n```",
        "<think>```python\nprint(2)\n</think>\n```python\nprint(1)\n```",
        "<think>```python\nprint(1)\n```\n</think>\nAs said.",
    ],
)
def test_the_program_is_found(completion):
    assert read_code(completion)[0] == PROGRAM


def test_a_shorter_fence_and_tildes_do_not_end_a_block():
    program = 'text = """\n```\n~~~~\n"""\n'
    assert read_code(f"````python\n{program}````")[0] == program
    assert read_code("```python\nx = '```'\ny = 1 # ~~~\n```")[0] == "x = '```'\ny = 1 # ~~~\n"


def test_indentation_inside_the_program_stays():
    body = "def f():\n    if 1:\n        return 1\n\nf()\n"
    indented = "".join(f"    {line}\n" if line else "\n" for line in body.splitlines())
    assert read_code(f"2. So\n    ```python\n{indented}    ```")[0] == body


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("```\nexample\n```\n```python\nprint(1)", "code block is not closed"),
        ("```cpp\nint x;\n```", "holds no Python block, only cpp"),
        ("Use ```python print(1)``` here.", "holds no code block"),
        ("```\n \n```", "code block is empty"),
        ("```\nprint(1)", "code block is not closed"),
    ],
)
def test_an_answer_without_a_program_is_told_why(completion, text):
    code, error = read_code(completion)
    assert code is None
    assert text in error


def test_where_no_block_compiles_the_last_one_is_the_program():
    assert read_code("```\n1 2\n```\n```\nprint(1\n```")[0] == "print(1\n"
    assert read_code("```\n\0\n```")[0] == "\0\n"


def test_blocks_are_listed_with_their_languages():
    blocks = read_blocks("```json\n1\n```\n~~~ Text x\n```\n~~~\n```\nopen")
    assert [(b.language, b.text, b.closed) for b in blocks] == [
        ("json", "1\n", True),
        ("text", "```\n", True),
        ("", "open\n", False),
    ]
