"""``python -m benchmarks.own_tasks --out DIR``: the whole suite, several runs at a time; finished runs are kept."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.own_tasks.run_one import METHODS
from benchmarks.own_tasks.tasks import TASKS


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=640)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    jobs = [(task, "start", 0) for task in given.tasks]
    jobs += [(t, method, seed) for seed in given.seeds for t in given.tasks for method in given.methods]

    def start(job: tuple[str, str, int]) -> None:
        path = given.out / f"{job[0]}.{job[1]}.{job[2]}.json"
        if path.exists():
            return
        command = [sys.executable, "-m", "benchmarks.own_tasks.run_one", *map(str, job), str(path)]
        log = path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "--rollouts", str(given.rollouts)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
        print(*job, "done" if done.returncode == 0 else f"failed, see {log}", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(start, jobs))


if __name__ == "__main__":
    main()
