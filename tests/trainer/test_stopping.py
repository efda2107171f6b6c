"""Runs end before their time where they should, with the right weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import toy_trainer
from transformers import TrainerCallback

from vpd import ConfigError
from vpd.runs.folder import read_metrics
from vpd.runs.state import TrainingState


def scripted(trainer, accuracies, monkeypatch):
    """Let the evaluations on the selection split find these accuracies, and keep the weights of each."""
    evaluate, left, weights = trainer.evaluator.accuracy, list(accuracies), []

    def accuracy(split, limit=None):
        found = evaluate(split, limit)
        if split != "selection":
            return found
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        score = left.pop(0)
        return replace(found, accuracy=score, reward=score)

    monkeypatch.setattr(trainer.evaluator, "accuracy", accuracy)
    return weights


def is_same(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items())


def test_the_best_weights_are_kept_and_patience_ends_the_run(tmp_path, monkeypatch):
    settings = {"eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 2, "final_tasks": 2}
    trainer = toy_trainer(tmp_path, run={"max_steps": 9}, eval=settings)
    weights = scripted(trainer, [0.1, 0.2, 0.5, 0.4, 0.45], monkeypatch)
    result = trainer.train()
    assert (result.global_step, result.metrics["stopped_by"]) == (4, "early_stopping")
    assert is_same(trainer.model.state_dict(), weights[2])
    assert not is_same(weights[4], weights[2])
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-2"]
    from vpd.policy.load import load_policy

    assert is_same(load_policy(str(tmp_path / "model")).model.state_dict(), weights[2])


def test_a_resumed_run_finds_the_best_weights_of_its_checkpoint(tmp_path, monkeypatch):
    settings = {"eval_steps": 1, "load_best_model_at_end": True}
    run = {"max_steps": 2, "save_steps": 1}
    first = toy_trainer(tmp_path, run=run, eval=settings)
    weights = scripted(first, [0.1, 0.6, 0.3], monkeypatch)
    first.train()
    second = toy_trainer(tmp_path, run=run | {"max_steps": 3}, eval=settings)
    scripted(second, [0.5], monkeypatch)
    result = second.train(resume_from_checkpoint=True)
    assert result.global_step == 3
    assert is_same(second.model.state_dict(), weights[1])


def test_a_warning_that_is_named_ends_the_run(tmp_path):
    stopping = toy_trainer(tmp_path / "stops", run={"max_steps": 2, "stop_on": ["no_gap"]})
    result = stopping.train()
    warned = {line["name"] for line in read_metrics(tmp_path / "stops") if line["event"] == "warning"}
    # A random model's teacher is no better than its student.
    assert "no_gap" in warned
    assert (result.global_step, result.metrics["stopped_by"]) == (0, "no_gap")
    going_on = toy_trainer(tmp_path / "goes-on", run={"max_steps": 1}).train()
    assert (going_on.global_step, going_on.metrics["stopped_by"]) == (1, None)


def test_the_preflight_compares_with_permuted_feedback_where_asked(tmp_path):
    toy_trainer(tmp_path, run={"max_steps": 1}, eval={"preflight_permuted": True, "preflight_tasks": 3}).train()
    events = [line["event"] for line in read_metrics(tmp_path)]
    assert events.count("gap_permuted") == 1


def test_patience_goes_by_evaluations_and_needs_them(tmp_path):
    with pytest.raises(ConfigError, match=r"set eval\.eval_steps"):
        toy_trainer(tmp_path, eval={"early_stopping_patience": 3})


def test_a_run_that_only_gets_worse_ends_early_with_the_weights_it_began_with(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, run={"max_steps": 9}, eval={"eval_steps": 1})
    weights = scripted(trainer, [1.0, 0.9, 0.2], monkeypatch)
    result = trainer.train()
    assert (result.global_step, result.metrics["stopped_by"]) == (2, "worse_than_start")
    assert is_same(trainer.model.state_dict(), weights[0])
    (warning,) = [line["text"] for line in read_metrics(tmp_path) if line.get("name") == "worse_than_start"]
    assert "20.0% of the selection split, against 100.0% at the start" in warning


def test_training_that_shows_no_gain_ends_with_the_weights_it_began_with(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, run={"max_steps": 2}, eval={"eval_steps": 1})
    weights = scripted(trainer, [0.5, 0.5, 0.5], monkeypatch)
    trainer.train()
    assert is_same(trainer.model.state_dict(), weights[0])
    assert not is_same(weights[2], weights[0])


def test_patience_also_ends_a_run_that_is_worse_than_its_start_and_may_go_on(tmp_path, monkeypatch):
    settings = {"eval_steps": 1, "early_stopping_patience": 2}
    trainer = toy_trainer(tmp_path, run={"max_steps": 4, "stop_on": []}, eval=settings)
    scripted(trainer, [1.0, 0.1, 0.1, 0.1, 0.1], monkeypatch)
    result = trainer.train()
    assert (result.global_step, result.metrics["stopped_by"]) == (2, "early_stopping")


def test_where_accuracies_are_equal_rewards_decide():
    state = TrainingState()
    assert state.note_evaluation(0.0, 0.2)
    state.step = 1
    assert state.note_evaluation(0.0, 0.3)
    state.step = 2
    assert not state.note_evaluation(0.0, 0.25)
    assert (state.best_step, state.best_reward, state.stale_evaluations) == (1, 0.3, 1)


def test_a_resumed_run_knows_the_evaluation_that_ended_it(tmp_path, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = True

    settings = {"eval": {"eval_steps": 5}, "run": {"max_steps": 9}}
    first = toy_trainer(tmp_path, [Stop()], **settings)
    weights = scripted(first, [0.1, 0.6], monkeypatch)
    first.train()
    second = toy_trainer(tmp_path, [Stop()], **settings)
    second.checkpoints.open(True)
    assert (second.run_state.best_step, second.run_state.evaluated_step) == (1, 1)
    second.checkpoints.close()
    assert is_same(first.model.state_dict(), weights[1])


def test_the_last_weights_take_part_in_the_choice_where_no_evaluation_was_due(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, run={"max_steps": 3}, eval={"eval_steps": 2})
    weights = scripted(trainer, [0.2, 0.5, 0.5], monkeypatch)
    trainer.train()
    assert is_same(trainer.model.state_dict(), weights[2])
    assert trainer.run_state.best_step == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"run": {"stop_on": ["no_gap"]}, "eval": {"preflight_tasks": 0}}, "run.stop_on names no_gap"),
        ({"run": {"stop_on": ["template_only"]}}, "preflight_permuted = true"),
        ({"eval": {"preflight_tasks": 0, "preflight_permuted": True}}, "measures a second time"),
    ],
)
def test_what_nothing_would_find_out_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        toy_trainer(tmp_path, **settings)


def test_an_evaluation_without_a_grade_is_not_the_best(tmp_path, monkeypatch):
    settings = {"eval_steps": 1, "load_best_model_at_end": True}
    trainer = toy_trainer(tmp_path, run={"max_steps": 3}, eval=settings)
    scripted(trainer, [0.1, 0.2, float("nan"), 0.1], monkeypatch)
    trainer.train()
    assert (trainer.run_state.best_step, trainer.run_state.best_accuracy) == (1, 0.2)


def test_a_run_without_steps_still_has_its_row(tmp_path):
    result = toy_trainer(tmp_path, run={"max_steps": 0}, eval={"eval_on_start": False}).train()
    assert len(result.metrics["rows"]) == 1
    # The gap is measured once: there is no "after training".
    assert [line["event"] for line in read_metrics(tmp_path)].count("gap") == 1


def test_a_run_without_steps_is_measured_on_the_selection_split_where_evaluations_are_wanted(tmp_path):
    toy_trainer(tmp_path, run={"max_steps": 0}, eval={"eval_steps": 5, "final_tasks": 0}).train()
    (evaluation,) = [line for line in read_metrics(tmp_path) if line["event"] == "eval"]
    assert evaluation["split"] == "selection"
    assert set(evaluation["outcomes"].values()) <= {0.0, 1.0}


def test_rewards_alone_need_no_feedback_to_learn_from(tmp_path):
    algorithm = {"type": "grpo"}
    toy_trainer(tmp_path, run={"max_steps": 1}, algorithm=algorithm, feedback={"sources": ["critique"]}).train()
    assert "nothing_to_learn" not in {line.get("name") for line in read_metrics(tmp_path)}
