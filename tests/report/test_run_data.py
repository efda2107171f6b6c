from dataclasses import replace
from pathlib import Path

from vpd.report.run_data import load_run, sample_rollouts, series, threshold_of
from vpd.runs import RolloutRecord, RunFolder, TurnRecord

RECORD = RolloutRecord(1, 0, "t", "p", [TurnRecord([2], "c", [1], [-1.0], False)], 1.0, None, None)


def files(folder: Path, rewards_by_step: dict[int, list[float | None]]) -> dict[int, Path]:
    run = RunFolder(folder)
    return {
        step: run.write_rollouts(
            step, [replace(RECORD, step=step, group=i // 2, reward=reward) for i, reward in enumerate(rewards)]
        )
        for step, rewards in rewards_by_step.items()
    }


def test_samples_spread_over_the_run_and_over_successes_and_failures(tmp_path):
    paths = files(tmp_path, {step: [1.0] * 6 + [0.0, None] for step in range(1, 101)})
    samples = sample_rollouts(paths, 20, 1.0)
    assert sorted({record.step for record in samples}) == [1, 12, 23, 34, 45, 56, 67, 78, 89, 100]
    assert [record.reward for record in samples] == [1.0, 0.0] * 10


def test_the_threshold_tells_successes_and_groups_are_spread(tmp_path):
    paths = files(tmp_path, {1: [0.5, 0.6, 0.7, 0.1]})
    samples = sample_rollouts(paths, 3, 0.5)
    assert [(record.reward, record.group) for record in samples] == [(0.5, 0), (0.1, 1), (0.7, 1)]


def test_few_rollouts_are_all_shown(tmp_path):
    paths = files(tmp_path, {1: [0.0], 2: [], 7: [0.0, 0.0]})
    assert [record.step for record in sample_rollouts(paths, 20, 1.0)] == [1, 7, 7]
    assert sample_rollouts({}, 20, 1.0) == []


def test_the_threshold_comes_from_the_settings(tmp_path):
    RunFolder(tmp_path).write_config({"algorithm": {"success_threshold": 0.0}})
    assert threshold_of(load_run(tmp_path, 1).config) == 0.0


def test_a_series_has_the_finite_numbers_only():
    entries = [
        {"step": 1, "reward": 0.5}, {"step": 2, "reward": None}, {"step": 3}, {"reward": 1.0},
        {"step": 4, "reward": "x"}, {"step": 5, "reward": float("nan")}, {"step": 6, "reward": 0},
    ]  # fmt: skip
    assert series(entries, "reward") == ([1.0, 6.0], [0.5, 0.0])
