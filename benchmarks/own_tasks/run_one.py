"""Trains one task with one method and one seed, and writes what came out as JSON."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.own_tasks.base import OwnTask
from benchmarks.own_tasks.tasks import TASKS
from vpd import VPDConfig, VPDTrainer

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "grpo": {"type": "grpo"},
    "sdpo": {"type": "sdpo"},
    "vpd": {"type": "vpd"},
}
"""The algorithm's section of each method; all else are the trainer's defaults but for the sizes below."""

PROMPTS, GENERATIONS, LONGEST = 8, 4, 40


class Budget(TrainerCallback):
    """Stops a run when it has sampled so many rollouts, second attempts included.

    Args:
        rollouts: How many.
    """

    def __init__(self, rollouts: int) -> None:
        self.left = rollouts

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Count the rollouts of a batch."""
        if logs and "success_rate" in logs:
            self.left -= PROMPTS * GENERATIONS + int(logs.get("second_attempts") or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop where nothing is left."""
        control.should_training_stop |= self.left <= 0


def run(task: str, method: str, seed: int, rollouts: int, steps_between: int) -> dict[str, Any]:
    """Train, and return the final accuracy with each question's outcome, and the accuracy along the way.

    Args:
        task: The task's name.
        method: The method's name; ``start`` does not train.
        seed: The run's seed.
        rollouts: How many rollouts may be sampled.
        steps_between: How many steps there are between evaluations on the selection split.
    """
    torch.set_num_threads(1)
    environment: OwnTask = TASKS[task]()
    algorithm = {} if method == "start" else METHODS[method]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = VPDConfig.parse(
            {
                "rollout": {
                    "prompts_per_step": PROMPTS,
                    "num_generations": GENERATIONS,
                    "max_completion_length": LONGEST,
                },
                "algorithm": {**algorithm, "success_threshold": environment.success},
                "warm_start": {"demonstrations": environment.demonstrations_used},
                "eval": {"eval_on_start": False, "eval_steps": steps_between, "preflight_tasks": 16},
                "run": {
                    "output_dir": folder,
                    "seed": seed,
                    "max_steps": 0 if method == "start" else rollouts,
                    "logged_samples": 0,
                },
            }
        )
        trainer = VPDTrainer(args=config, environment=environment, callbacks=[Budget(rollouts)])
        trainer.train()
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
    evaluations = [event for event in events if "outcomes" in event]
    final = [event for event in evaluations if event["split"] == "final"][-1]
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "rollouts": rollouts,
        "steps": trainer.run_state.step,
        "stopped_by": trainer.run_state.stopped_by,
        "best_step": trainer.run_state.best_step,
        "accuracy": final["accuracy"],
        "outcomes": final["outcomes"],
        "selection": [[e["step"], e["accuracy"]] for e in evaluations if e["split"] == "selection"],
        "gaps": [event["gap"] for event in events if "gap" in event],
        "attempts": [e.get("second_attempts") for e in events if "second_attempts" in e],
        "attempts_right": [e.get("second_attempt_success_rate") for e in events if "second_attempts" in e],
        "success_rate": [event["success_rate"] for event in events if "success_rate" in event],
        "warnings": [event["name"] for event in events if event.get("event") == "warning" and "name" in event],
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    """Read the job from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("method", choices=["start", *METHODS])
    parser.add_argument("seed", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rollouts", type=int, default=640)
    parser.add_argument("--eval-steps", type=int, default=5)
    given = parser.parse_args()
    result = run(given.task, given.method, given.seed, given.rollouts, given.eval_steps)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
