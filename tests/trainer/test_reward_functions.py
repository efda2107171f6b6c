"""Reward functions in a run: what they are called with, what they give, and what is told where they fail."""

from __future__ import annotations

import json
from statistics import fmean, stdev

import pytest
from tiny import tokenizer
from toy import toy_config, toy_model

from vpd import RunError, VPDTrainer
from vpd.runs.folder import read_metrics
from vpd.runs.samples import read_rollouts

ROWS = [{"prompt": f"Number {i}.", "answer": str(i)} for i in range(40)]


def trainer_of(folder, functions, **sections):
    return VPDTrainer(
        model=toy_model(),
        args=toy_config(folder, **sections),
        train_dataset=ROWS,
        reward_funcs=functions,
        processing_class=tokenizer(),
    )


def ends_even(completions, **kwargs):
    return [float(bool(text) and ord(text[-1]) % 2 == 0) for text in completions]


def test_each_functions_rewards_are_logged_and_written(tmp_path):
    steps, sizes = [], []

    def shortness(completions, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
        log_extra("length", list(map(len, completion_ids)))
        steps.append(trainer_state.global_step)
        sizes.append(len(completions))
        log_metric("longest", max(map(len, completion_ids)))
        return [(-0.125 * len(ids), "Too long.") for ids in completion_ids]

    trainer_of(tmp_path, [ends_even, shortness], eval={"preflight_tasks": 0, "final_tasks": 4}).train()
    logged = [line for line in read_metrics(tmp_path) if line["event"] == "train"]
    # The whole final split, a step's whole batch twice, and the final split again.
    assert (steps, sizes) == ([0, 0, 1, 2], [4, 8, 8, 4])
    for step, line in enumerate(logged, start=1):
        rollouts = read_rollouts(tmp_path / "rollouts" / f"step-{step:06d}.parquet")
        assert len(rollouts) == 8
        for name in ("ends_even", "shortness"):
            values = [float(rollout.rewards[name] or 0.0) for rollout in rollouts]
            assert line[f"rewards/{name}/mean"] == pytest.approx(fmean(values))
            assert line[f"rewards/{name}/std"] == pytest.approx(stdev(values))
        assert all(rollout.reward == sum(filter(None, rollout.rewards.values())) for rollout in rollouts)
        assert [json.loads(r.details)["length"] for r in rollouts] == [r.token_count for r in rollouts]
        assert line["longest"] == max(rollout.token_count for rollout in rollouts)


def test_a_broken_function_ends_the_run_before_training_and_names_its_line(tmp_path):
    def broken(completions, **kwargs):
        return [text.missing for text in completions]

    with pytest.raises(RunError, match=rf"every completion of the final split.*{__file__}, line \d+: return \[text"):
        trainer_of(tmp_path, broken).train()


def test_a_wrong_count_of_rewards_ends_the_run(tmp_path):
    with pytest.raises(RunError, match="must return a list of one item per completion, 8 here, got 1 items"):
        trainer_of(tmp_path, lambda completions, **kwargs: [1.0], eval={"preflight_tasks": 0, "final_tasks": 0}).train()


def test_a_warm_start_learns_from_a_column_of_demonstrations(tmp_path):
    """A plain text is closed by the end of the sequence, not by the end of a chat's turn."""
    rows = [row | {"demonstration": "b"} for row in ROWS]
    warm = {"demonstrations": 4, "cache": False, "epochs": 40, "learning_rate": 1e-2}
    args = toy_config(tmp_path, warm_start=warm, run={"max_steps": 0}, rollout={"stop_strings": []})
    trainer = VPDTrainer(toy_model(), args, train_dataset=rows, reward_funcs=[ends_even], processing_class=tokenizer())
    trainer.train()
    sampled = trainer.sampler.sample(trainer.environment.tasks("train")[:1], 4, seed=0)
    end = trainer.processing_class.eos_token_id
    assert [rollout.completion_ids[-1] for rollout in sampled.rollouts].count(end) >= 3


def letters(completions, **kwargs):
    """A continuous reward, far from 1."""
    return [-sum(map(ord, text)) / 1000 for text in completions]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # No batch has anything to learn from.
def test_without_any_success_a_run_says_so_and_does_not_blame_the_teacher(tmp_path):
    trainer_of(tmp_path, letters, feedback={"sources": ["sibling", "environment"]}).train()
    told = {line["name"]: line["text"] for line in read_metrics(tmp_path) if line["event"] == "warning"}
    assert "no completion reached algorithm.success_threshold = 1, neither the student's nor" in told["no_gap"]
    assert "the highest reward was -0.0" in told["no_gap"]
    assert "The rewards of this batch differ, but none reaches algorithm.success_threshold = 1" in told["no_success"]
    assert "no reward reaches the threshold" in told["nothing_to_learn"]
    assert not any("teacher is not" in text for text in told.values())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("success", ["threshold", "group"])
def test_continuous_rewards_teach_where_success_goes_by_the_group(tmp_path, success):
    evaluations = {"eval_steps": 1, "load_best_model_at_end": True, "final_tasks": 2, "temperature": 1.0}
    trainer = trainer_of(
        tmp_path,
        letters,
        algorithm={"success": success, "e_step_every": 1},
        feedback={"sources": ["sibling"]},
        eval=evaluations,
    )
    trainer.train()
    by_group = success == "group"
    lines = read_metrics(tmp_path)
    steps = [line for line in lines if line["event"] == "train"]
    assert all((0 < step["success_rate"] < 1) == by_group for step in steps)
    assert all((step["e_step"] == 1) == by_group for step in steps)
    told = {line["name"] for line in lines if line["event"] == "warning"}
    assert ("no_success" in told) != by_group
    selection = [line for line in lines if line["event"] == "eval" and line["split"] == "selection"]
    assert all(line["accuracy"] == 0 and line["reward"] < 0 for line in selection)
    best = max(line["reward"] for line in selection) if by_group else 0.0
    assert trainer.run_state.best_accuracy == best
    for rollout in read_rollouts(tmp_path / "rollouts" / "step-000001.parquet"):
        assert not rollout.success or by_group
    (gap, *_) = [line for line in lines if line["event"] == "gap"] or [{"n": 0}]
    assert (gap["n"] > 0 and gap["student_accuracy"] < 0) == by_group
