"""Measure how fast the sandbox judges, how much time it adds to a test, and whether its memory stays flat.

python benchmarks/judging.py --programs 10000
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vpd.sandbox import Sandbox

PROGRAM = "numbers = [int(x) for x in input().split()]\nprint(sum(n * n for n in numbers))"
INPUT = " ".join(map(str, range(100)))
OUTPUT = f"{sum(n * n for n in range(100))}\n"


def memory_mb() -> float:
    """Return the resident memory of this process and its children, in MB."""
    pages = 0
    own = os.getpid()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if own in (parent, int(folder.name)):
                    pages += int((folder / "statm").read_text().split()[1])
            except OSError:
                continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--level", default="auto")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    with Sandbox(options.level, options.workers) as sandbox:

        def judge(_: int) -> float:
            start = time.perf_counter()
            ended = sandbox.run(PROGRAM, INPUT)
            assert ended.output == OUTPUT, ended
            return time.perf_counter() - start

        alone = statistics.median(judge(i) for i in range(200))
        begun = time.perf_counter()
        exec(PROGRAM, {"input": lambda: INPUT, "print": lambda *_: None})
        bare = time.perf_counter() - begun
        print(f"level {sandbox.level}, {options.workers} workers")
        print(f"one at a time: median {1000 * alone:.1f} ms a program, of which its own work is {1000 * bare:.2f} ms")
        with ThreadPoolExecutor(options.workers) as threads:
            start = time.perf_counter()
            for tenth in range(10):
                list(threads.map(judge, range(options.programs // 10)))
                seconds = time.perf_counter() - start
                done = (tenth + 1) * (options.programs // 10)
                print(
                    f"{done} programs, {done / seconds:.0f} a second, {memory_mb():.0f} MB in all processes", flush=True
                )


if __name__ == "__main__":
    main()
