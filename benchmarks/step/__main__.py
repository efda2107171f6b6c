"""Time a full training step of ours against TRL's, with the same model, prompts, completion lengths and dtype.

    python -m benchmarks.step --against trl --workload a --sweep --output step-a.json

Each side runs in a process of its own; they take turns, one step each, in an order that is reversed every round.
With --sweep, TRL's settings (checkpointing x micro-batch x precision x cache) are first timed one after another, and
ours is compared with the fastest of them in our precision. Time and memory are always those of one configuration.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.step.results import comparison, phase_lines
from benchmarks.step.specs import WORKLOADS, Algorithm, Side, Workload
from benchmarks.step.turns import console, take_turns
from benchmarks.step.workers import WorkerError


def peers(options: argparse.Namespace, workload: Workload) -> Iterator[Side]:
    """Return TRL's configurations: the product of the given settings."""
    axes = (options.precision, options.checkpointing, options.micro_batch or _micro_batches(workload), options.cache)
    for precision, checkpointing, micro_batch, cache in itertools.product(*axes):
        yield Side(
            "trl",
            "grpo" if options.against == "trl-grpo" else "sdpo",
            options.model,
            precision,
            checkpointing == "on",
            micro_batch,
            None if cache == "dynamic" else cache,
            threads=options.threads,
        )


def _micro_batches(workload: Workload) -> list[int]:
    """Return the sizes of micro-batches to try: all rollouts at once, a half and a quarter of them."""
    return [workload.rollouts // parts for parts in (1, 2, 4)]


def sweep(options: argparse.Namespace, workload: Workload) -> tuple[Side, list[dict[str, Any]]]:
    """Return TRL's fastest configuration in our precision, and the time and memory of all configurations."""
    found, failed = [], []
    for side in peers(options, workload):
        try:
            found += take_turns([side], workload, warm_up=1, steps=options.sweep_steps)
        except WorkerError as error:
            console.print(f"{error}", style="red", markup=False)
            failed.append({"label": side.label, "side": asdict(side), "error": str(error)})
    comparable = [result for result in found if result.side.precision == options.our_precision]
    if not comparable:
        raise SystemExit(f"None of TRL's configurations in our precision, {options.our_precision}, has run.")
    found.sort(key=lambda result: result.seconds)
    console.print(comparison("TRL's configurations", found))
    best = min(comparable, key=lambda result: result.seconds)
    return best.side, [result.as_json() for result in found] + failed


def compare(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """Sweep where asked, then let the sides take turns; ours comes first, and the ratios are relative to it."""
    swept: list[dict[str, Any]] = []
    peer = None
    if options.against != "none":
        peer = next(peers(options, workload))
        if options.sweep:
            peer, swept = sweep(options, workload)
    algorithms: list[Algorithm] = ["grpo"] if options.against == "trl-grpo" else options.algorithms
    sides = [
        Side(
            "ours",
            algorithm,
            options.model,
            options.our_precision,
            overrides=tuple(options.set),
            threads=options.threads,
        )
        for algorithm in algorithms
    ]
    results = take_turns([*sides, *([peer] if peer else [])], workload, options.warm_up, options.steps)
    console.print(comparison(f"{workload}", results))
    for line in phase_lines(results):
        console.print(line, markup=False)
    return {"workload": asdict(workload), "sweep": swept, "sides": [result.as_json() for result in results]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["trl", "trl-grpo", "none"], default="trl")
    parser.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), default=["a", "b", "c"])
    parser.add_argument("--steps", type=int, default=5, help="the counted steps of each side")
    parser.add_argument(
        "--warm-up", type=int, default=1, help="the steps before the counted ones; the first has an E-step"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="a JSON file for everything that was measured")
    ours = parser.add_argument_group("ours")
    ours.add_argument("--algorithms", nargs="+", choices=["sdpo", "vpd"], default=["sdpo", "vpd"])
    ours.add_argument("--our-precision", choices=["autocast", "float32", "bfloat16"], default="autocast")
    ours.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of ours")
    trl = parser.add_argument_group("TRL's; several of each are for --sweep, the first of each is taken otherwise")
    trl.add_argument("--sweep", action="store_true", help="try all of these first, and compare with the fastest")
    trl.add_argument("--sweep-steps", type=int, default=1, help="the counted steps of each configuration")
    trl.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["off", "on"])
    trl.add_argument("--micro-batch", nargs="+", type=int, help="rollouts per pass; by default all, a half, a quarter")
    trl.add_argument("--precision", nargs="+", choices=["autocast", "float32", "bfloat16"], default=["autocast"])
    trl.add_argument("--cache", nargs="+", choices=["dynamic", "static"], default=["dynamic"])
    return parser.parse_args()


def main() -> None:
    options = arguments()
    measured: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "workloads": {},
    }
    for name in options.workload:
        console.print(f"Workload {name}: {WORKLOADS[name]}")
        measured["workloads"][name] = compare(options, WORKLOADS[name])
        if options.output:
            options.output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
