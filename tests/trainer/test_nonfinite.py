"""Numbers that are not finite change no weight, are kept for inspection, and end a run by name where they go on."""

from __future__ import annotations

import math

import pytest
import torch
from toy import toy_trainer
from transformers import TrainerCallback

from vpd.runs import RunError, read_metrics, read_rollouts


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def spoil(trainer, steps, value):
    """Let the gradient of these optimizer steps, counted from 1, hold ``value`` in one place."""
    clip, calls = trainer.accelerator.clip_grad_norm_, []

    def spoiled(parameters, limit):
        parameters = list(parameters)
        calls.append(None)
        if len(calls) in steps:
            parameters[-1].grad[0] = value
        return clip(parameters, limit)

    trainer.accelerator.clip_grad_norm_ = spoiled


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped_and_its_batch_is_kept(tmp_path, value):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights(trainer))

    settings = {"run": {"max_steps": 3, "logged_samples": 1}, "algorithm": {"type": "sdpo"}}
    trainer = toy_trainer(tmp_path, [Watch()], **settings)
    spoil(trainer, {2}, value)
    result = trainer.train()
    assert (result.global_step, result.metrics["stopped_by"]) == (3, None)
    assert all(torch.equal(tensor, seen[0][name]) for name, tensor in seen[1].items())
    assert not all(torch.equal(tensor, seen[1][name]) for name, tensor in seen[2].items())
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    moments = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    assert all(tensor.isfinite().all() for tensor in moments)
    lines = [line for line in read_metrics(tmp_path) if line["event"] == "train"]
    assert [line.get("skipped_updates") for line in lines] == [None, 1, None]
    assert [path.name for path in (tmp_path / "skipped").iterdir()] == ["step-000002.parquet"]
    assert len(read_rollouts(tmp_path / "skipped" / "step-000002.parquet")) == 8
    (warning,) = [line for line in read_metrics(tmp_path) if line.get("name") == "nonfinite"]
    assert "1 update of step 2 was not finite, and skipped" in warning["text"]


def test_a_loss_that_is_not_finite_is_skipped_too(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, run={"max_steps": 2}, algorithm={"type": "sdpo"})
    monkeypatch.setattr(trainer.learner, "total", lambda *values: [*map(float, values[:-1]), math.nan])
    before = weights(trainer)
    trainer.learner.optimizer.zero_grad()
    step = trainer.learner.optimise([], lambda part: part)
    assert math.isnan(step.loss)
    assert trainer.learner.skipped.in_a_row == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_too_many_in_a_row_end_the_run_by_name_with_a_checkpoint(tmp_path):
    settings = {"algorithm": {"type": "sdpo"}, "optim": {"max_skipped_updates": 2}}
    trainer = toy_trainer(tmp_path, run={"max_steps": 9}, **settings)
    # One alone is no row.
    spoil(trainer, {2, 4, 5}, math.nan)
    result = trainer.train()
    assert (result.global_step, result.metrics["stopped_by"]) == (5, "nonfinite")
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    trainer.model.model.norm.weight[0] = math.inf

    trainer = toy_trainer(tmp_path, [Break()], run={"save_steps": 1})
    with pytest.raises(RunError, match=r"checkpoint-2 is not saved.*not finite \(.*norm\.weight\).*--resume"):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]
    trainer.run_state.best_step = 2
    for save in (trainer.checkpoints.keep_best, trainer.save_model):
        with pytest.raises(RunError, match="not finite"):
            save()
    assert not list(tmp_path.glob("best-*")) + list(tmp_path.glob("model"))


def test_logits_that_are_not_finite_end_the_run_with_a_sentence(tmp_path):
    trainer = toy_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.nan
    with pytest.raises(RunError, match=r"logits are not finite.*--resume"):
        trainer.train()
