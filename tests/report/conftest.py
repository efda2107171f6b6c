"""A synthetic run folder, so that the page can be tested, and looked at, without a training run.

``python tests/report/conftest.py FOLDER [STEPS]`` makes a folder and writes its page.
"""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vpd.config import VPDConfig
from vpd.runs import RolloutRecord, RunFolder, TurnRecord

EVIL = "<script>alert('x')</script>"


def fill_run(path: Path, steps: int = 30, finished: bool = True) -> RunFolder:
    """Write a run of ``steps`` steps that goes well; every text in it holds markup."""
    chance = random.Random(0)
    folder = RunFolder(path)
    config = VPDConfig.parse(
        {
            "model": {"name": f"smollm2 {EVIL}"},
            "data": {"environment": "reasoning_gym", "dataset": "chain_sum"},
            "run": {"max_steps": 30},
        }
    )
    folder.write_config(config)
    folder.log(0, "gap", {"student_accuracy": 0.31, "teacher_accuracy": 0.42, "gap": 0.11, "low": 0.02, "high": 0.2})
    folder.log(0, "warning", {"name": f"short-prompts {EVIL}", "text": f"Prompts are short. {EVIL}"})
    for step in range(steps + 1):
        if step:
            folder.log(step, "train", _train(step, steps, chance))
        if step % 3 == 1:
            folder.write_rollouts(step, [_record(step, index, chance) for index in range(16)])
        if step % 5 == 0:
            accuracy = 0.3 + 0.4 * step / max(steps, 1)
            folder.log(
                step,
                "eval",
                {
                    "accuracy": accuracy,
                    "low": accuracy - 0.09,
                    "high": accuracy + 0.09,
                    "n": 100,
                    "seconds": 9.0,
                    "split": "selection",
                },
            )
        if step % 4 == 2:
            folder.log(step, "warning", {"name": "gradient-clipped", "text": "Lower optim.learning_rate."})
    if finished:
        rows = [
            {"name": "base model", "accuracy": 0.31, "low": 0.26, "high": 0.365, "n": 300, "seconds": 31.0},
            {
                "name": f"after warm start {EVIL}",
                "accuracy": 0.44,
                "low": 0.385,
                "high": 0.497,
                "n": 300,
                "seconds": 92,
            },
            {"name": "after VPD", "accuracy": 0.683, "low": 0.628, "high": 0.733, "n": 300, "seconds": 1830.4},
        ]
        folder.write_result(
            {"rows": rows, "environment": "reasoning_gym chain_sum", "model": f"smollm2 {EVIL}", "algorithm": "vpd",
             "seconds_total": 2110.0}
        )  # fmt: skip
    return folder


def _train(step: int, steps: int, chance: random.Random) -> dict[str, object]:
    progress = step / steps
    reward = min(1.0, 0.3 + 0.4 * progress + chance.gauss(0, 0.05))
    metrics: dict[str, object] = {
        "reward": reward, "success_rate": reward - 0.04, "active_share": 0.9 - 0.2 * progress,
        "all_success_groups": 0.3 * progress, "all_failure_groups": 0.35 - 0.3 * progress, "ungraded": 0,
        "without_feedback": 3, "e_step": step % 5 == 1, "m_loss": 0.2, "margin_before": 1 + progress,
        "divergence": 0.2 * math.exp(-2 * progress) + chance.random() * 0.02, "entropy": 1.1 - 0.5 * progress,
        "grad_norm": 10 ** chance.uniform(-1, 0.3), "clipped_share": 0.1, "length_mean": 60 + 30 * progress,
        "length_max": 140 + chance.randint(0, 40), "truncated_share": 0.08 * (1 - progress), "repetition": 0.03,
        "learning_rate": 1e-5, "tokens_rollout": 9000, "seconds_rollout": 20.0 + chance.random() * 3,
        "seconds_judge": 0.8, "seconds_m_step": 14.0, "seconds_sync": 0.5, "seconds": 40.0,
        "tokens_per_second_rollout": 420 + chance.random() * 30, "tokens_per_second_train": 1300.0,
        "peak_memory_gb": 3.21,
    }  # fmt: skip
    if metrics["e_step"]:
        metrics |= {
            "e_loss": 0.69, "margin_after": 2.2 + progress, "margin_fresh_before": 0.8 + progress,
            "margin_fresh_after": 1.6 + progress, "margin_after_sibling": 1.2, "margin_after_environment": 0.7,
            "e_grad_norm": 2.0, "seconds_e_step": 11.0,
        }  # fmt: skip
    return metrics


def _record(step: int, index: int, chance: random.Random) -> RolloutRecord:
    success = (step + index) % 3 == 0
    tokens = chance.randint(6, 160)
    student = [-chance.expovariate(1.5) for _ in range(tokens)]
    teacher = [value + chance.gauss(0.1 if success else -0.4, 0.4) for value in student]
    return RolloutRecord(
        step=step,
        group=index // 4,
        task_id=f"chain_sum-{step}-{index // 4}",
        prompt=f"State the final answer: 4 + 3 - 12 = ? {EVIL}",
        turns=[
            TurnRecord(
                prompt_ids=[1, 2],
                completion=f"4 + 3 = 7\n7 - 12 = {-5 if success else 5}\nThe answer is {-5 if success else 5}. {EVIL}",
                completion_ids=list(range(tokens)),
                log_probs=student,
                truncated=index == 3,
                teacher_prompt=f"State: 4 + 3 - 12 = ?\n\nLine 2: 7 - 12 is not 5. {EVIL}\n\nCorrectly solve.",
                student_log_probs=student if index % 4 else None,
                teacher_log_probs=teacher if index % 4 else None,
                divergence=[abs(t - s) / 2 for s, t in zip(student, teacher, strict=True)] if index % 4 else None,
            )
        ],
        reward=None if index == 7 else float(success),
        feedback=f"Line 2: 7 - 12 is not 5. {EVIL}" if not success else "All 2 lines are right.",
        source="environment" if index % 2 else "sibling",
    )


@pytest.fixture(scope="session")
def make_run() -> Callable[..., RunFolder]:
    return fill_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_run(tmp_path_factory.mktemp("finished") / "my run").path


@pytest.fixture
def interrupted_run(tmp_path: Path) -> Path:
    return fill_run(tmp_path / "interrupted", steps=3, finished=False).path


if __name__ == "__main__":
    from vpd.report import write_report

    made = fill_run(Path(sys.argv[1]), steps=int(sys.argv[2]) if len(sys.argv) > 2 else 30)
    print(write_report(made.path))
