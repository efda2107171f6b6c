"""VPDTrainer has what users of transformers' Trainer and of TRL look for."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tokenizer
from toy import toy_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback, TrainerState

from vpd import ConfigError, RunError, TrainOutput, Verdict
from vpd.runs.folder import read_metrics

SAVES = {"save_steps": 1, "save_total_limit": 9}


class Record(TrainerCallback):
    """Keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.calls.append(("log", logs))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.calls.append(("evaluate", metrics))


def events(folder, name):
    return [line for line in read_metrics(folder) if line["event"] == name]


def without_timings(lines):
    timings = ("seconds", "train_seconds", "tokens_per_second", "peak_memory")
    return [{name: value for name, value in line.items() if not name.startswith(timings)} for line in lines]


def checkpoint(folder, step):
    return folder / "checkpoints" / f"checkpoint-{step}"


def test_train_returns_what_a_trainer_returns(tmp_path):
    trainer = toy_trainer(tmp_path, run={"max_steps": 3, **SAVES})
    output = trainer.train()
    assert isinstance(output, TrainOutput)
    global_step, training_loss, metrics = output
    assert global_step == 3
    losses = [line["m_loss"] for line in events(tmp_path, "train")]
    assert training_loss == pytest.approx(sum(losses) / 3)
    assert [row["name"] for row in metrics["rows"]] == ["base model", "after VPD"]
    assert (metrics["stopped_by"], metrics["interrupted"]) == (None, None)
    assert metrics["train_runtime"] > metrics["train_seconds"] > 0
    assert metrics["train_steps_per_second"] == pytest.approx(3 / metrics["train_seconds"])
    assert metrics["report"] == str(tmp_path / "report.html")
    # The loss of a resumed run is that of all its batches.
    resumed = toy_trainer(tmp_path, run={"max_steps": 3, **SAVES})
    assert resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path, 2))).training_loss == training_loss


def test_a_run_without_steps_has_no_training_loss(tmp_path):
    output = toy_trainer(tmp_path, run={"max_steps": 0}).train()
    assert output.global_step == 0
    assert math.isnan(output.training_loss)


def test_the_state_is_a_trainer_state(tmp_path):
    evaluation = {"eval_steps": 1, "load_best_model_at_end": True}
    trainer = toy_trainer(tmp_path, eval=evaluation, run={"max_steps": 2, **SAVES})
    state = trainer.state
    assert isinstance(state, TrainerState)
    assert (state.max_steps, state.global_step, state.eval_steps, state.save_steps) == (2, 0, 1, 1)
    trainer.train()
    assert trainer.state is state
    assert state.global_step == trainer.run_state.step == 2
    assert [entry["step"] for entry in state.log_history if "m_loss" in entry] == [1, 2]
    accuracies = [entry["eval_accuracy"] for entry in state.log_history if "eval_accuracy" in entry]
    # Before the first step, and after each. Of equal ones the latest is the best, but for those before the first step.
    assert len(accuracies) == 3
    best = max(accuracies)
    step = 0 if accuracies[0] == best else 2 - accuracies[::-1].index(best)
    assert (state.best_metric, state.best_global_step) == (best, step)
    assert state.best_model_checkpoint == str(tmp_path / f"best-{state.best_global_step}")
    resumed = toy_trainer(tmp_path, eval=evaluation, run={"max_steps": 2, **SAVES})
    resumed.train(resume_from_checkpoint=True)
    for name in ("global_step", "log_history", "best_metric", "best_global_step", "best_model_checkpoint"):
        assert getattr(resumed.state, name) == getattr(state, name), name


def test_names_that_a_trainer_has(tmp_path):
    mine = tokenizer()
    trainer = toy_trainer(tmp_path)
    assert type(trainer.processing_class) is type(mine)
    assert trainer.model is trainer.learner.module.model
    assert trainer.optimizer is trainer.learner.optimizer
    before = trainer.lr_scheduler.last_epoch
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == before + 2


def test_evaluate_logs_and_tells_the_callbacks(tmp_path):
    record = Record()
    trainer = toy_trainer(tmp_path, [record], run={"max_steps": 1})
    trainer.train()
    record.calls.clear()
    metrics = trainer.evaluate()
    names = ("accuracy", "low", "high", "reward", "n", "ungraded", "seconds")
    assert set(metrics) == {f"eval_{name}" for name in names}
    assert metrics["eval_n"] == 12
    # Wilson's interval misses its own mean by rounding.
    assert 0 <= metrics["eval_low"] <= metrics["eval_accuracy"] + 1e-9
    assert metrics["eval_accuracy"] - 1e-9 <= metrics["eval_high"] <= 1
    assert record.calls == [("log", metrics), ("evaluate", metrics)]
    assert trainer.state.log_history[-1] == {**metrics, "step": 1}
    line = events(tmp_path, "eval")[-1]
    assert (line["split"], line["step"], line["accuracy"]) == ("selection", 1, metrics["eval_accuracy"])


def test_evaluate_takes_a_split_a_limit_and_a_prefix(tmp_path):
    trainer = toy_trainer(tmp_path)
    assert trainer.evaluate("final")["eval_n"] == 8
    assert trainer.evaluate("train", limit=3, metric_key_prefix="train")["train_n"] == 3
    with pytest.raises(ConfigError, match="no split 'test': give one of train, selection, final"):
        trainer.evaluate("test")


def test_evaluate_measures_the_weights_as_they_are(tmp_path):
    # Sampled by a copy of the weights.
    trainer = toy_trainer(tmp_path, rollout={"dtype": "bfloat16"})
    trainer.environment.judge = lambda task, completion: Verdict(float(completion == ""), "Say nothing.")
    assert trainer.evaluate()["eval_accuracy"] == 0.0
    # All logits are equal then, and the first token of all ends the sequence.
    torch.nn.init.zeros_(trainer.model.model.norm.weight)
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_what_is_logged_reaches_everyone(tmp_path):
    record = Record()

    class Own(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.log({"mine": 0.5})

    trainer = toy_trainer(tmp_path, [Own(), record], run={"max_steps": 2, **SAVES})
    tracked = []
    trainer.accelerator.log = lambda values, step: tracked.append((step, values))
    trainer.train()
    assert [(line["step"], line["mine"]) for line in events(tmp_path, "log")] == [(1, 0.5), (2, 0.5)]
    assert {"mine": 0.5, "step": 1} in trainer.state.log_history
    assert record.calls.count(("log", {"mine": 0.5})) == 2
    assert tracked[1::2] == [(1, {"mine": 0.5}), (2, {"mine": 0.5})]


def test_trackers_are_finished_once_and_not_asked_again(tmp_path):
    class Tracker:
        name = "tensorboard"

        def __init__(self):
            self.calls = []

        def log(self, values, step):
            self.calls.append("log")

        def finish(self):
            self.calls.append("finish")

    trainer, tracker = toy_trainer(tmp_path), Tracker()
    trainer.accelerator.trackers.append(tracker)
    trainer.train()
    trainer.evaluate()
    assert tracker.calls == ["log", "log", "finish"]


def test_callbacks_come_and_go(tmp_path):
    kept, popped, removed = Record(), Record(), EarlyStoppingCallback()
    trainer = toy_trainer(tmp_path, [popped, removed], run={"max_steps": 1})
    assert trainer.pop_callback(Record) is popped
    assert trainer.pop_callback(Record) is None
    trainer.remove_callback(removed)
    trainer.add_callback(kept)
    trainer.train()
    assert [name for name, _ in kept.calls] == ["log"]
    assert popped.calls == []


def test_a_checkpoint_holds_the_state_of_callbacks_that_were_added(tmp_path):
    class Counter(EarlyStoppingCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            pass

        def on_step_end(self, args, state, control, **kwargs):
            self.early_stopping_patience_counter += 1

    trainer = toy_trainer(tmp_path, run={"max_steps": 2, **SAVES})
    trainer.add_callback(Counter())
    trainer.train()
    saved = [TrainerState.load_from_json(checkpoint(tmp_path, step) / "trainer_state.json") for step in (1, 2)]
    counters = [state.stateful_callbacks["Counter"]["attributes"]["early_stopping_patience_counter"] for state in saved]
    assert counters == [1, 2]


def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_forgotten(tmp_path):
    settings = {
        "run": {"max_steps": 4, **SAVES},
        "optim": {"lr_scheduler_type": "linear", "warmup_steps": 2},
    }
    whole = toy_trainer(tmp_path, **settings)
    whole.train()
    metrics, history = events(tmp_path, "train"), whole.state.log_history
    rows = without_timings(whole.run_state.rows)
    again = toy_trainer(tmp_path, **settings)
    again.checkpoints.open(checkpoint(tmp_path, 2))
    again.checkpoints.rewind()
    again.checkpoints.close()
    assert (again.run_state.step, again.state.global_step) == (2, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    resumed = toy_trainer(tmp_path, **settings)
    output = resumed.train(resume_from_checkpoint=checkpoint(tmp_path, 1))
    assert output.global_step == 4
    assert without_timings(events(tmp_path, "train")) == without_timings(metrics)
    assert len(resumed.state.log_history) == len(history)
    assert without_timings(resumed.run_state.rows) == rows
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_path_that_is_no_checkpoint_of_the_run_is_refused(tmp_path):
    toy_trainer(tmp_path / "other", run={"max_steps": 1, **SAVES}).train()
    toy_trainer(tmp_path / "run", run={"max_steps": 1, **SAVES}).train()
    for path in (checkpoint(tmp_path / "other", 1), checkpoint(tmp_path / "run", 7), tmp_path / "run" / "model"):
        trainer = toy_trainer(tmp_path / "run", run={"max_steps": 2, **SAVES})
        with pytest.raises(
            ConfigError, match=r"is no checkpoint of the run in .*run, which has these: .*checkpoint-1\."
        ):
            trainer.train(resume_from_checkpoint=str(path))
    assert checkpoint(tmp_path / "run", 1).is_dir()
    with pytest.raises(ConfigError, match="which has these: none yet"):
        toy_trainer(tmp_path / "new").train(resume_from_checkpoint="nowhere")


def test_the_best_weights_of_every_kept_checkpoint_are_kept(tmp_path):
    settings = {"eval": {"eval_steps": 1, "load_best_model_at_end": True}, "run": {"save_total_limit": 2}}
    trainer = toy_trainer(tmp_path, **settings)
    trainer.checkpoints.open(resume=False)

    def best_folders(step, accuracy):
        state = trainer.run_state
        state.step = step
        if state.note_evaluation(accuracy, accuracy):
            trainer.state.best_global_step = step
            trainer.checkpoints.keep_best()
        trainer.checkpoints.save()
        return sorted(path.name for path in tmp_path.glob("best-*"))

    assert best_folders(1, 0.1) == ["best-1"]
    assert best_folders(2, 0.5) == ["best-1", "best-2"]
    assert best_folders(3, 0.4) == ["best-2"]
    trainer.checkpoints.close()


def test_a_saved_model_loads_with_transformers(tmp_path):
    trainer = toy_trainer(tmp_path / "run", run={"max_steps": 1})
    trainer.train()
    trainer.save_model(tmp_path / "mine")
    for folder in (tmp_path / "mine", tmp_path / "run" / "model"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
        assert AutoTokenizer.from_pretrained(folder)("Number 7.") == trainer.processing_class("Number 7.")
        assert "after VPD" in (folder / "README.md").read_text()
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today.txt").write_text("dear diary")
    with pytest.raises(RunError, match="does not hold a model"):
        trainer.save_model(tmp_path / "diary")
