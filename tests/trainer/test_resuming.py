"""Work is saved by default, and a run goes on from wherever it was ended, or says that there is nothing to do."""

from __future__ import annotations

import signal

import pytest
import torch
from toy import toy_trainer
from transformers import TrainerCallback

from vpd import ConfigError
from vpd.runs import read_metrics
from vpd.runs.lock import RunLock

TIMINGS = ("seconds", "train_seconds", "tokens_per_second", "peak_memory")


def lines(folder):
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMINGS)} for line in read_metrics(folder)
    ]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoints/*"))


class Call(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function(control)


def killed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval": {"eval_steps": 1, "load_best_model_at_end": True}},
        {"run": {"max_steps": 0}, "warm_start": {"demonstrations": 2, "cache": False}},
        {"run": {"max_seconds": 1e-3}},
    ],
)
def test_a_finished_run_that_is_resumed_says_so_and_writes_nothing(tmp_path, capsys, settings):
    first = toy_trainer(tmp_path / "here", **settings)
    result = first.train()
    before = weights(first)
    (tmp_path / "here").rename(tmp_path / "there")
    files = contents(tmp_path / "there")
    again = toy_trainer(tmp_path / "there", **settings)
    found = again.train(resume_from_checkpoint=True)
    assert contents(tmp_path / "there") == files
    assert_same_weights(before, weights(again))
    assert found.global_step == result.global_step
    assert found.training_loss == pytest.approx(result.training_loss, nan_ok=True)
    assert found.metrics["rows"] == result.metrics["rows"]
    assert "nothing is done again" in capsys.readouterr().out


def test_a_finished_run_goes_on_with_more_steps_and_equals_the_longer_one(tmp_path):
    toy_trainer(tmp_path / "cut", run={"max_steps": 1}).train()
    longer = toy_trainer(tmp_path / "cut", run={"max_steps": 3})
    longer.train(resume_from_checkpoint=True)
    whole = toy_trainer(tmp_path / "whole", run={"max_steps": 3})
    whole.train()
    assert_same_weights(weights(whole), weights(longer))
    assert [line for line in lines(tmp_path / "cut") if line["event"] != "warning"] == [
        line for line in lines(tmp_path / "whole") if line["event"] != "warning"
    ]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path / "cut", [Call(1, killed)]).train()
    assert lines(tmp_path / "cut")
    assert not saved(tmp_path / "cut")
    resumed = toy_trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert "ended before its first checkpoint, so it begins again" in capsys.readouterr().out
    whole = toy_trainer(tmp_path / "whole")
    whole.train()
    assert_same_weights(weights(whole), weights(resumed))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.parametrize("place", ["phases.write_report", "base_trainer.save_verified", "phases.load_final_weights"])
def test_a_run_that_was_killed_while_it_ended_goes_on_there(tmp_path, monkeypatch, place):
    monkeypatch.setattr(f"vpd.{place}", killed)
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path / "cut").train()
    monkeypatch.undo()
    # No step is done again.
    resumed = toy_trainer(tmp_path / "cut", [Call(1, killed), Call(2, killed)])
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "cut" / "report.html").exists()
    whole = toy_trainer(tmp_path / "whole")
    whole.train()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert_same_weights(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_minutes": 1e-9}, ["checkpoint-1", "checkpoint-2", "checkpoint-3"]),
        ({"save_minutes": 0}, ["checkpoint-3"]),
        ({}, ["checkpoint-3"]),
        ({"save_minutes": 1e-9, "save_steps": 2}, ["checkpoint-2", "checkpoint-3"]),
    ],
)
def test_checkpoints_come_by_time_by_steps_and_at_the_end(tmp_path, settings, steps):
    toy_trainer(tmp_path, run={"max_steps": 3, "save_total_limit": 9, **settings}).train()
    assert saved(tmp_path) == steps


def test_ten_minutes_without_a_checkpoint_are_enough(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vpd.runs.checkpoints.time.monotonic", lambda: now[0])
    trainer = toy_trainer(tmp_path)
    for minutes, due in ((9.9, False), (10.1, True)):
        now[0] = 60 * minutes
        assert trainer.checkpoints.is_due == due


def test_a_stop_by_name_is_saved_first(tmp_path):
    settings = {"eval_steps": 1, "early_stopping_patience": 1}
    result = toy_trainer(tmp_path, run={"max_steps": 9}, eval=settings).train()
    assert result.metrics["stopped_by"] == "early_stopping"
    assert saved(tmp_path) == [f"checkpoint-{result.global_step}"]


def test_a_callback_that_stops_the_run_lets_it_go_on_when_resumed(tmp_path):
    stop = Call(1, lambda control: setattr(control, "should_training_stop", True))
    assert toy_trainer(tmp_path, [stop], run={"max_steps": 2}).train().global_step == 1
    assert toy_trainer(tmp_path, run={"max_steps": 2}).train(resume_from_checkpoint=True).global_step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_before_leaving(tmp_path, number):
    result = toy_trainer(tmp_path, [Call(1, lambda control: signal.raise_signal(number))]).train()
    assert (result.metrics["interrupted"], saved(tmp_path)) == (number, ["checkpoint-1"])


def test_two_resumes_at_once_are_refused_and_the_lock_ends_with_the_run(tmp_path):
    toy_trainer(tmp_path, run={"max_steps": 1}).train()
    assert not (tmp_path / "run.lock").exists()
    lock = RunLock(tmp_path)
    files = contents(tmp_path)
    with pytest.raises(ConfigError, match="is being run already, by process"):
        toy_trainer(tmp_path, run={"max_steps": 2}).train(resume_from_checkpoint=True)
    assert contents(tmp_path) == files
    lock.release()
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path, [Call(2, killed)], run={"max_steps": 2}).train(resume_from_checkpoint=True)
    assert not (tmp_path / "run.lock").exists()
