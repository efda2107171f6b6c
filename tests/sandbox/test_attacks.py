"""Every attack fails at every level that this machine offers, and the next judgement is right."""

from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import BOMBS, KERNEL, NETWORK, PROCESSES, READING, TAMPERING, WRITING

from vpd.sandbox import Limits, Sandbox, why_not, worker
from vpd.sandbox.zygote import remove_tree

LEVELS = ("full", "bubblewrap", "landlock")
LIMITS = Limits(seconds=3, memory_mb=256, disk_mb=4, output_kb=64)
# Bombs end by their limits, and a short time limit keeps the test suite fast.
BOMB_LIMITS = Limits(seconds=1, memory_mb=256, disk_mb=4, output_kb=64)
HARMLESS = {
    f"{group}/{name}": source
    for group, attacks in {
        "reading": READING,
        "writing": WRITING,
        "network": NETWORK,
        "processes": PROCESSES,
    }.items()
    for name, source in attacks.items()
}


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request) -> Iterator[Sandbox]:
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(f"this machine does not offer level {request.param}: {reason}")
    with Sandbox(request.param, workers=1, limits=LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def unsafe() -> Iterator[Sandbox]:
    with Sandbox("unsafe", workers=1, limits=LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def listeners(tmp_path_factory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("listeners")
    name = f"vpd-test-{os.getpid()}"
    sockets = {
        "tcp": socket.create_server(("127.0.0.1", 0)),
        "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "unix": socket.socket(socket.AF_UNIX),
        "abstract": socket.socket(socket.AF_UNIX),
        "datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    }
    sockets["udp"].bind(("127.0.0.1", 0))
    sockets["unix"].bind(str(folder / "unix"))
    sockets["abstract"].bind(f"\0{name}")
    sockets["datagram"].bind(str(folder / "datagram"))
    for kind in ("unix", "abstract"):
        sockets[kind].listen()

    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "tcp": str(sockets["tcp"].getsockname()[1]),
        "udp": str(sockets["udp"].getsockname()[1]),
        "unix": str(folder / "unix"),
        "abstract": name,
        "datagram": str(folder / "datagram"),
        "http": str(server.server_port),
    }
    server.shutdown()
    server.server_close()
    for each in sockets.values():
        each.close()


def filled(source: str, listeners: dict[str, str], tmp_path, level: str) -> str:
    """Fill in the attack's places, with a secret that this test makes."""
    folder = tmp_path / "outside"
    folder.mkdir()
    secret = folder / "secret.txt"
    secret.write_text("secret")
    values = {"secret": str(secret), "folder": str(folder), "judge": str(os.getpid()), "level": level, **listeners}
    for name, value in values.items():
        source = source.replace(f"@{name}@", value)
    return source


def contents(folder) -> dict[str, tuple[bytes, int, float]]:
    return {p.name: (p.read_bytes(), p.stat().st_mode, p.stat().st_mtime) for p in folder.iterdir()}


def still_judges_right(sandbox: Sandbox) -> bool:
    with sandbox.functions("def add(a, b):\n    return a + b") as program:
        adds = program.call("add", 1, 2).value == 3
    return adds and sandbox.run("print(input()[::-1])", "abc").output == "cba\n"


@pytest.mark.parametrize("name", HARMLESS)
def test_the_attack_works_without_a_sandbox(name, unsafe, listeners, tmp_path):
    ended = unsafe.run(filled(HARMLESS[name], listeners, tmp_path, "unsafe"))
    assert "SUCCEEDED" in ended.output, ended


@pytest.mark.parametrize("name", HARMLESS)
def test_the_attack_fails_in_the_sandbox(name, sandbox, listeners, tmp_path):
    source = filled(HARMLESS[name], listeners, tmp_path, sandbox.level)
    before = contents(tmp_path / "outside")
    ended = sandbox.run(source)
    assert "SUCCEEDED" not in ended.output
    # A refused call is an error that the program could have caught. A killed program would prove nothing.
    assert "Error" in ended.errors or ended.exit_code == 0, ended
    assert contents(tmp_path / "outside") == before
    assert still_judges_right(sandbox)


@pytest.mark.parametrize("name", KERNEL)
def test_what_only_the_kernel_can_refuse_is_refused(name, sandbox, listeners, tmp_path):
    ended = sandbox.run(filled(KERNEL[name], listeners, tmp_path, sandbox.level))
    assert "SUCCEEDED" not in ended.output
    assert still_judges_right(sandbox)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_by_their_limits(name, sandbox):
    source, stopped = BOMBS[name]
    # On a busy machine the time limit must not come before the limit that the test expects.
    limits = BOMB_LIMITS if stopped in (None, "time") else LIMITS
    start = time.monotonic()
    ended = sandbox.run(source, limits=limits)
    assert ended.exit_code != 0
    if stopped is not None:
        assert ended.stopped == stopped, ended
    assert time.monotonic() - start < 5 * limits.seconds
    assert len(ended.output) <= limits.output_kb * 1024
    assert "STARTED ALL" not in ended.output
    assert still_judges_right(sandbox)


@pytest.mark.parametrize("name", TAMPERING)
def test_a_program_cannot_pass_by_tampering_with_its_judge(name, sandbox):
    with sandbox.functions(TAMPERING[name], BOMB_LIMITS) as program:
        expected = 3
        answer = program.call("add", 1, 2)
    assert answer.error is not None or answer.value != expected
    # The error can be encoded as text.
    (answer.error or "").encode()
    assert type(answer.value) in (bool, int, float, list, type(None))
    assert still_judges_right(sandbox)


def test_nothing_is_left_behind(sandbox):
    """Folders of programs are removed, however deep and whatever their modes."""
    for name in ("deep_folders", "unreadable_folder", "many_small_files"):
        sandbox.run(BOMBS[name][0], limits=BOMB_LIMITS)
    (worker,) = sandbox._all
    assert worker._folder is None or list(Path(worker._folder).iterdir()) == []


def test_a_folder_is_removed_once_and_its_absence_leaves_nothing(tmp_path):
    folder = tmp_path / "program"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").write_text("x")
    (folder / "link").symlink_to(tmp_path)
    for _ in range(2):
        remove_tree(str(folder))
        assert list(tmp_path.iterdir()) == []


def test_a_worker_that_died_is_replaced(sandbox):
    # The worker starts with the first program.
    assert still_judges_right(sandbox)
    (worker,) = sandbox._all
    worker._process.kill()
    worker._process.wait()
    assert still_judges_right(sandbox)


def test_correct_programs_with_unusual_endings_print_what_they_should(sandbox):
    for source, output in {
        "open(1, 'w', closefd=False).write('left open')": "left open",
        "import io, sys\nold = sys.stdout\nsys.stdout = io.StringIO()\nold.write('to the old')": "to the old",
        "import sys\nprint('before')\nsys.stdout = None": "before\n",
        "import atexit\natexit.register(print, 'at exit')": "at exit\n",
        "import threading\nthreading.Timer(0.05, print, ['later']).start()": "later\n",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    print('async')\nasyncio.run(f())": "async\n",
    }.items():
        ended = sandbox.run(source)
        assert (ended.output, ended.exit_code) == (output, 0), source


def test_common_modules_can_be_used(sandbox):
    modules = (
        "abc array asyncio base64 bisect calendar cmath collections concurrent.futures copy csv dataclasses "
        "datetime decimal difflib enum fractions functools hashlib heapq html io itertools json math numbers "
        "operator os pathlib pickle pprint queue random re secrets shutil sqlite3 statistics string struct tempfile "
        "textwrap threading time timeit traceback types typing unicodedata urllib.parse uuid xml.etree.ElementTree "
        "zlib zoneinfo"
    )
    lines = [f"import {name}" for name in modules.split()]
    lines += [
        "with tempfile.TemporaryDirectory() as folder:",
        "    pathlib.Path(folder, 'a').write_text('x')",
        "    shutil.copyfile(f'{folder}/a', 'b')",
        "print(sqlite3.connect(':memory:').execute('select 6 * 7').fetchone()[0], open('b').read())",
        "with concurrent.futures.ThreadPoolExecutor(4) as pool:",
        "    print(sum(pool.map(lambda x: x * x, range(10))))",
    ]
    ended = sandbox.run("\n".join(lines))
    assert (ended.output, ended.errors) == ("42 x\n285\n", "")


def test_the_suite_has_what_it_should():
    assert len(HARMLESS) + len(KERNEL) + len(BOMBS) + len(TAMPERING) >= 40


def test_what_an_interpreter_of_the_systems_needs_is_shown_once(monkeypatch):
    """The system's interpreter has its library in /usr/lib, and a link that is shown twice stops bubblewrap."""
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    shown = worker._paths()["readable"]
    assert any(path.startswith("/usr/lib/") for path in shown)
    assert len(set(shown)) == len(shown)
