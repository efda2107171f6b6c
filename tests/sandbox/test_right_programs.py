"""What Python runs the sandbox runs too, at every level that this machine offers."""

# ruff: noqa: E501 (a program on one line is easier to read than one in pieces)

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vpd.sandbox import SAFE_LEVELS, Limits, Sandbox, SandboxError, check_packages, why_not

SCRIPTS = {
    "exit": ("print(1)\nexit()", "", "1\n"),
    "quit": ("print(1)\nquit()", "", "1\n"),
    "stdin_mode": ("import sys\nprint(sys.stdin.mode, sys.stdout.mode, sys.stdin.name)", "", "r w <stdin>\n"),
    "dev_stdin": ("print(open('/dev/stdin').read())", "text", "text\n"),
    "dev_stdout": ("with open('/dev/stdout', 'w') as out:\n    out.write('text')", "", "text"),
    "size_of_stdin": ("import os\nprint(os.read(0, os.fstat(0).st_size))", "text", "b'text'\n"),
    "stdin_twice": ("import sys\nfirst = input()\nsys.stdin.seek(0)\nprint(first + input())", "ab\n", "abab\n"),
    "many_lines": ("for i in range(200_000):\n    print(i)", "", "".join(f"{i}\n" for i in range(200_000))),
    "deep_recursion": ("def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20_000))", "", "20000\n"),
    "deep_recursion_through_c": (
        "from functools import cache\n@cache\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20_000))",
        "",
        "20000\n",
    ),
    "larger_stack": (
        "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (2**28, resource.RLIM_INFINITY))\nprint(1)",
        "",
        "1\n",
    ),
    "large_stacks_of_threads": (
        "import threading\nthreading.stack_size(2**30)\nt = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()",
        "",
        "1\n",
    ),
    "numpy": ("import numpy as np\nprint(np.arange(5).sum(), np.linalg.det(np.eye(2)))", "", "10 1.0\n"),
    "sortedcontainers": ("from sortedcontainers import SortedList\nprint(SortedList([2, 1])[0])", "", "1\n"),
    "locks": (
        "import fcntl, sqlite3\nfcntl.flock(0, fcntl.LOCK_EX)\nbase = sqlite3.connect('a.db')\n"
        "base.execute('create table t(x)')\nbase.execute('insert into t values (7)')\nbase.commit()\n"
        "print(base.execute('select x from t').fetchone()[0])",
        "",
        "7\n",
    ),
}
FUNCTIONS = {
    "list_of_55000": ("def f():\n    return list(range(55_000))", list(range(55_000))),
    "grid": ("def f():\n    return [[10**9] * 300 for _ in range(300)]", [[10**9] * 300] * 300),
    "many_keys": ("def f():\n    return {str(i): i for i in range(30_000)}", {str(i): i for i in range(30_000)}),
    "large_set": ("def f():\n    return set(range(100_000))", set(range(100_000))),
    "deep_recursion": ("def g(n):\n    return 0 if n == 0 else 1 + g(n - 1)\ndef f():\n    return g(5_000)", 5_000),
    "dataclass": (
        "from dataclasses import dataclass, fields\n@dataclass(order=True)\nclass A:\n    x: int\n"
        "def f():\n    return [max(A(1), A(2)).x, fields(A)[0].type is int]",
        [2, True],
    ),
    "pickle": (
        "import pickle\nclass A:\n    pass\ndef f():\n    return type(pickle.loads(pickle.dumps(A()))).__name__",
        "A",
    ),
    "annotations_are_values": ("def g(x: int): pass\ndef f():\n    return g.__annotations__['x'] is int", True),
    "numpy_number": (
        "import numpy as np\ndef f():\n    return [np.int64(3), np.bool_(True), np.float64(0.5)]",
        [3, True, 0.5],
    ),
}


@pytest.fixture(scope="module", params=SAFE_LEVELS)
def sandbox(request) -> Iterator[Sandbox]:
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(f"this machine does not offer level {request.param}: {reason}")
    with Sandbox(request.param, workers=1) as made:
        yield made


def skip_without_packages(source):
    for package in ("numpy", "sortedcontainers"):
        if package in source and package not in Limits().packages:
            pytest.skip(f"{package} is not installed, or below /tmp, which programs do not see")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name, sandbox):
    source, stdin, output = SCRIPTS[name]
    skip_without_packages(source)
    ended = sandbox.run(source, stdin)
    assert (ended.errors, ended.exit_code, ended.stopped) == ("", 0, None)
    assert ended.output == output


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, sandbox):
    source, value = FUNCTIONS[name]
    skip_without_packages(source)
    with sandbox.functions(source) as program:
        answer = program.call("f")
    assert answer.error is None
    assert answer.value == value


def test_one_instance_serves_all_calls_and_a_bare_function_serves_for_a_method(sandbox):
    source = "class Solution:\n    n = 0\n    def count(self):\n        self.n += 1\n        return self.n"
    with sandbox.functions(source) as program:
        assert [program.call("Solution.count").value for _ in range(2)] == [1, 2]
    with sandbox.functions("def count():\n    return 5") as program:
        assert program.call("Solution.count").value == 5


def test_other_packages_cannot_be_imported_and_missing_ones_are_refused(sandbox):
    assert sandbox.run("import pydantic").errors.endswith("ModuleNotFoundError: No module named 'pydantic'\n")
    with pytest.raises(SandboxError, match="not installed"):
        check_packages(("no_such_package",))


def test_workers_hash_alike(sandbox):
    outputs = set()
    for _ in range(2):
        with Sandbox(sandbox.level, workers=1) as other:
            outputs.add(other.run("print(list({'a', 'b', 'c', 'd', 'e'}))").output)
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("source", "limits", "stopped"),
    [
        ("print('x' * 5000)", Limits(output_kb=2), "output"),
        ("open('a', 'wb').write(bytes(3 * 2**20))", Limits(disk_mb=2), "disk"),
        ("bytes(300 * 2**20)", Limits(memory_mb=256), "memory"),
    ],
)
def test_limits_are_settings(source, limits, stopped, sandbox):
    assert sandbox.run(source, limits=limits).stopped == stopped
    assert sandbox.run(source).stopped is None


def test_the_number_of_threads_and_the_size_of_their_stacks_are_settings(sandbox):
    assert (
        sandbox.run("import threading\nthreading.stack_size(2**30)\nprint(threading.stack_size())").output
        == f"{2**26}\n"
    )
    limits = Limits(stack_mb=16)
    ended = sandbox.run("import threading\nthreading.stack_size(2**30)\nprint(threading.stack_size())", limits=limits)
    assert ended.output == f"{2**24}\n"


def test_packages_below_the_programs_own_folder_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("vpd.sandbox.worker.is_hidden", lambda path: True)
    with pytest.raises(SandboxError, match='"numpy", which is installed below /tmp'):
        check_packages(("numpy",))
    monkeypatch.setattr("vpd.sandbox.limits.is_hidden", lambda path: True)
    assert Limits().packages == ()
