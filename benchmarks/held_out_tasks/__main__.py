"""Run methods on the suite's tasks, and write the tables.

    python -m benchmarks.held_out_tasks --methods grpo default --seeds 0 1 2 --out runs/held-out-tasks --jobs 2

Finished jobs are skipped, so that the same line goes on where it stopped. ``--starts`` makes and measures the starts
alone; ``--table`` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.held_out_tasks.jobs import Job, check, method_settings, run, start_of
from benchmarks.held_out_tasks.suite import METHODS, SUITE, Sections
from benchmarks.held_out_tasks.table import comparison, starts
from vpd.config import ConfigError


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(SUITE), help=f"of {', '.join(SUITE)}; all by default")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"of {', '.join(METHODS)}, or of --define")
    parser.add_argument(
        "--define",
        nargs="+",
        default=[],
        metavar="NAME={...}",
        help="more methods, as settings by section: 'slow={algorithm={type=\"vpd\"}, optim={learning_rate=1e-6}}'",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=960, help="of training, the teacher's second attempts included")
    parser.add_argument("--eval-steps", type=int, default=10, help="batches between evaluations on the selection split")
    parser.add_argument("--selection", type=int, default=100, help="questions of these evaluations")
    parser.add_argument("--final", type=int, default=1000, help="questions of the final split at most")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the jobs and the tables")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at the same time, each a process of one thread")
    parser.add_argument("--starts", action="store_true", help="make and measure the starts alone")
    parser.add_argument("--table", action="store_true", help="run nothing, and write the tables anew")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Plan the methods' jobs, seed by seed, so that an early look has all methods."""
    defined: dict[str, Sections] = {}
    for definition in options.define:
        try:
            defined.update(tomllib.loads(definition))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"--define takes NAME={{...}} in TOML syntax, got {definition!r}: {error}.") from None
    methods = {name: defined.get(name) or method_settings(name) for name in (*options.methods, *defined)}
    sizes = (options.rollouts, options.eval_steps, options.selection, options.final, options.model)
    return [
        Job(task, name, seed, *sizes, settings)
        for seed in options.seeds
        for task in options.tasks
        for name, settings in methods.items()
    ]


def run_all(jobs: Sequence[Job], out: Path, workers: int) -> list[str]:
    """Run what is not finished, each job after its start; return a line for each job that failed."""
    begun = {start.task: start for job in jobs if not (start := start_of(job)).is_finished(out)}
    left = [job for job in jobs if job.method != "start" and not job.is_finished(out)]
    with ThreadPoolExecutor(workers) as pool:
        # The starts stand before the jobs that wait for them, so that the pool never waits for itself.
        made = {task: pool.submit(_run_in_a_process, start, out, None) for task, start in begun.items()}
        done = [pool.submit(_run_in_a_process, job, out, made.get(job.task)) for job in left]
    return [line for future in (*made.values(), *done) if (line := future.result())]


def _run_in_a_process(job: Job, out: Path, start: Future[str] | None) -> str:
    """Run a job once its start is made; return why it failed, or an empty text."""
    name, log = f"{job.task}, {job.name}", job.folder(out).with_suffix(".log")
    if start is not None and start.result():
        return f"{name} was left out, because its start failed."
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.held_out_tasks", "--out", str(out), "--job", json.dumps(asdict(job))]
    with open(log, "w", encoding="utf-8") as file:
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=one_thread, check=False).returncode
    print(f"{name} {'failed' if code else 'is done'}.", flush=True)
    return f"{name} ended with exit code {code}; its log is {log}." if code else ""


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    if options.job:
        run(Job(**json.loads(options.job)), options.out)
        return 0
    try:
        jobs = jobs_of(options)
        check(jobs, options.out)
        if options.starts:
            jobs = list({job.task: start_of(job) for job in jobs}.values())
        failed = [] if options.table else run_all(jobs, options.out, options.jobs)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    tables = {"starts.md": starts(options.out), "table.md": comparison(options.out)}
    tables["rewards.md"] = comparison(options.out, "rewards")
    for name, text in tables.items():
        (options.out / name).write_text(text, encoding="utf-8")
    print(tables["starts.md"] if options.starts else tables["table.md"])
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
