"""The whole loop runs on a random two-layer Llama."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from peft import LoraConfig
from tiny import tokenizer
from toy import ToyEnvironment, toy_config, toy_model, toy_trainer
from transformers import TrainerCallback

from vpd import ConfigError, Verdict, VPDTrainer
from vpd.algorithms.warm_start import WarmStartResult
from vpd.runs.files import RunError
from vpd.runs.folder import read_metrics

TIMINGS = ("seconds", "tokens_per_second", "peak_memory")


def losses(folder):
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMINGS)}
        for line in read_metrics(folder)
        if line["event"] == "train"
    ]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_same_seed_gives_the_same_losses_and_weights_and_another_does_not(tmp_path):
    runs = {}
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        trainer = toy_trainer(tmp_path / name, run={"seed": seed})
        trainer.train()
        runs[name] = (losses(tmp_path / name), weights(trainer))
    assert runs["first"][0] == runs["second"][0]
    assert_same_weights(runs["first"][1], runs["second"][1])
    assert runs["first"][0] != runs["other"][0]


def test_a_run_killed_in_its_second_e_iteration_and_resumed_equals_the_uninterrupted_one(tmp_path, monkeypatch):
    settings = {"run": {"max_steps": 4, "save_steps": 1}, "optim": {"lr_scheduler_type": "linear", "warmup_steps": 2}}
    whole = toy_trainer(tmp_path / "whole", **settings)
    whole.train()

    # F = 2: the second E-iteration is step 3. It dies after its E-step, before its M-step.
    from vpd.algorithms import vpd as algorithm

    distil, calls = algorithm.distil, []

    def dying(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return distil(*args)

    monkeypatch.setattr(algorithm, "distil", dying)
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path / "cut", **settings).train()
    monkeypatch.setattr(algorithm, "distil", distil)
    resumed = toy_trainer(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    random_state = torch.get_rng_state()

    assert_same_weights(weights(whole), weights(resumed))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert "reward_shift" in losses(tmp_path / "cut")[2]
    again = toy_trainer(tmp_path / "again", **settings)
    again.train()
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path):
    toy_trainer(tmp_path / "run").train()
    with pytest.raises(ConfigError, match="--resume"):
        toy_trainer(tmp_path / "run").train()


def test_sigterm_saves_before_leaving(tmp_path):
    class Terminate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    result = toy_trainer(tmp_path / "run", [Terminate()], run={"max_steps": 5}).train()
    assert result.metrics["interrupted"] == signal.SIGTERM
    assert result.global_step == 1
    resumed = toy_trainer(tmp_path / "run", run={"max_steps": 2})
    resumed.train(resume_from_checkpoint=True)
    assert [line["step"] for line in losses(tmp_path / "run")] == [1, 2]


def test_the_folder_holds_everything(tmp_path):
    toy_trainer(tmp_path / "run", eval={"eval_steps": 1}, run={"save_steps": 2}).train()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["base model", "after VPD"]
    for name in ("config.json", "report.html", "model/model.safetensors", "rollouts/step-000002.parquet"):
        assert (tmp_path / "run" / name).exists(), name
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()
    events = [(line["event"], line.get("split")) for line in read_metrics(tmp_path / "run")]
    assert events.count(("eval", "selection")) == 3
    assert ("gap", None) in events


def test_metrics_of_an_e_iteration_name_its_effects(tmp_path):
    toy_trainer(tmp_path / "run", eval={"margin_tasks": 2}).train()
    first, second = losses(tmp_path / "run")
    assert first["e_step"] == 1
    assert second["e_step"] is None
    for name in (
        "margin_before",
        "margin_after",
        "margin_fresh_before",
        "margin_fresh_after",
        "reward_shift",
        "e_loss",
    ):
        assert isinstance(first[name], float), name
    for name in (
        "reward",
        "active_share",
        "margin",
        "divergence",
        "entropy",
        "grad_norm",
        "length_mean",
        "truncated_share",
    ):
        assert isinstance(second[name], float), name
    assert first["margin_after"] > first["margin_before"]


def test_the_gap_is_measured_before_and_after(tmp_path):
    toy_trainer(tmp_path / "run").train()
    gaps = [line for line in read_metrics(tmp_path / "run") if line["event"] == "gap"]
    assert [gap["step"] for gap in gaps] == [0, 2]
    assert all(0 <= gap["teacher_accuracy"] <= 1 for gap in gaps)


def test_a_resume_with_other_settings_says_which(tmp_path):
    toy_trainer(tmp_path / "run", run={"save_steps": 1, "max_steps": 1}).train()
    changed = toy_trainer(tmp_path / "run", optim={"learning_rate": 1e-4}, run={"save_steps": 1, "max_steps": 1})
    changed.train(resume_from_checkpoint=True)
    (warning,) = [line for line in read_metrics(tmp_path / "run") if line.get("name") == "changed_settings"]
    assert warning["text"] == "The run began with other settings: optim.learning_rate was 0.001 and is 0.0001."


def test_a_judge_that_fails_too_often_stops_the_run_with_its_reason(tmp_path, monkeypatch):
    judge, calls = ToyEnvironment.judge, []

    def failing(self, task, completion):
        calls.append(task)
        if task.id.startswith("train") and len(calls) % 3:
            raise OSError("the grader's server is gone")
        return judge(self, task, completion)

    monkeypatch.setattr(ToyEnvironment, "judge", failing)
    with pytest.raises(RunError, match=r"failed on .* of step 1, more than .* 0.5.*OSError: the grader's server"):
        toy_trainer(tmp_path / "strict").train()
    trainer = toy_trainer(tmp_path / "patient", rollout={"max_ungraded_share": 1.0})
    assert trainer.train().global_step == 2
    assert losses(tmp_path / "patient")[0]["ungraded"] > 0


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vpd.policy.prepare.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match="names wandb, which is not installed: pip install wandb"):
        toy_trainer(tmp_path / "run", run={"report_to": ["wandb"]})


def test_tokens_computed_are_fewer_than_padding_needs(tmp_path):
    toy_trainer(tmp_path / "run").train()
    for line in losses(tmp_path / "run"):
        assert 0 < line["tokens_computed"] < line["tokens_padded"]


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    trained = {}
    for tokens in (150, 10_000):
        trainer = toy_trainer(tmp_path / str(tokens), run={"max_steps": 1}, optim={"micro_batch_tokens": tokens})
        trainer.train()
        trained[tokens] = (losses(tmp_path / str(tokens)), weights(trainer))
    for name, value in trained[150][1].items():
        torch.testing.assert_close(value, trained[10_000][1][name], rtol=1e-3, atol=2e-5)
    for name in ("e_loss", "m_loss", "divergence", "margin_after"):
        assert trained[150][0][0][name] == pytest.approx(trained[10_000][0][0][name], rel=1e-3), name


def test_every_minibatch_is_an_optimizer_step(tmp_path):
    trainer = toy_trainer(
        tmp_path / "run", algorithm={"m_minibatch_prompts": 1, "e_minibatch_prompts": 1}, run={"max_steps": 1}
    )
    steps = []
    optimizer = trainer.learner.optimizer.optimizer
    optimizer.register_step_post_hook(lambda *_: steps.append(None))
    trainer.train()
    assert len(steps) == 4


def test_sdpo_never_takes_an_e_step(tmp_path):
    trainer = toy_trainer(tmp_path / "run", algorithm={"type": "sdpo"})
    trainer.train()
    assert all("e_step" not in line for line in losses(tmp_path / "run"))
    assert all(isinstance(line["margin"], float) for line in losses(tmp_path / "run"))


def test_lora_trains_adapters_only(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    trainer = toy_trainer(tmp_path / "run", peft_config=config)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()


def test_gradient_checkpointing_gives_the_same_update(tmp_path):
    trained = []
    for checkpointing in (False, True):
        settings = {"model": {"autocast": "none", "gradient_checkpointing": checkpointing}, "run": {"max_steps": 1}}
        trainer = toy_trainer(tmp_path / str(checkpointing), **settings)
        trainer.train()
        trained.append(weights(trainer))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-4, atol=1e-6)


def test_callbacks_are_called_at_their_places(tmp_path):
    calls = []

    class Record(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda *args, **kwargs: calls.append(name)
            return super().__getattribute__(name)

    toy_trainer(tmp_path / "run", [Record()], eval={"eval_steps": 2}, run={"save_steps": 2}).train()
    step = ["on_step_begin", "on_log", "on_step_end"]
    evaluation = ["on_log", "on_evaluate"]
    assert calls == ["on_init_end", *evaluation, "on_train_begin", *step, *step, *evaluation, "on_save", "on_train_end"]


def test_a_callback_can_stop_the_run(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    assert toy_trainer(tmp_path / "run", [Stop()], run={"max_steps": 5}).train().global_step == 1


def test_prompt_datasets_with_reward_functions(tmp_path):
    def ends_even(completions, **kwargs):
        return [(float(ord(c[0]["content"][-1]) % 2 == 0), "Look at the end.") for c in completions]

    rows = [{"prompt": [{"role": "user", "content": f"Number {i}."}]} for i in range(40)]
    config = toy_config(tmp_path / "run")
    settings = {"train_dataset": rows[:20], "reward_funcs": [ends_even], "eval_dataset": rows[20:]}
    trainer = VPDTrainer(toy_model(), config, processing_class=tokenizer(), **settings)
    assert trainer.train().global_step == 2


def test_arguments_that_contradict_are_refused(tmp_path):
    config = toy_config(tmp_path / "run")
    with pytest.raises(ConfigError, match="not both"):
        VPDTrainer(toy_model(), config, ToyEnvironment(), reward_funcs=[len], processing_class=tokenizer())
    with pytest.raises(ConfigError, match="go together"):
        VPDTrainer(toy_model(), config, reward_funcs=[len], processing_class=tokenizer())
    with pytest.raises(ConfigError, match="processing_class"):
        VPDTrainer(toy_model(), config, ToyEnvironment())


def test_warm_start_is_cached_and_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("VPD_CACHE", str(tmp_path / "cache"))
    trained = []
    for seed in (0, 1):
        settings = {"warm_start": {"demonstrations": 4, "epochs": 2}, "run": {"max_steps": 0, "seed": seed}}
        trainer = toy_trainer(tmp_path / str(seed), **settings)
        before = weights(trainer)
        result = trainer.train()
        trained.append(weights(trainer))
        assert [row["name"] for row in result.metrics["rows"]] == ["base model", "after warm start"]
    assert not torch.equal(before["model.norm.weight"], trained[0]["model.norm.weight"])
    assert_same_weights(*trained)
    steps = [
        line["steps"] for seed in (0, 1) for line in read_metrics(tmp_path / str(seed)) if line["event"] == "warm_start"
    ]
    assert steps[0] > 0
    assert steps[1] == 0


def test_a_warm_start_without_feedback_learns_plain_answers_alone(tmp_path, monkeypatch):
    learned = {}
    for feedback in (True, False):
        settings = {"warm_start": {"demonstrations": 4, "feedback": feedback, "cache": False}, "run": {"max_steps": 0}}
        trainer = toy_trainer(tmp_path / str(feedback), **settings)

        def record(learner, sequences, *rest, feedback=feedback):
            learned[feedback] = sequences
            return WarmStartResult(len(sequences), 0, 0.0, 0.0, None)

        monkeypatch.setattr("vpd.phases.warm_start", record)
        trainer.train()
    plain = [trainer.prompts.student(task.prompt) for task in trainer.environment.tasks("train")[:4]]
    assert [sequence.prompt for sequence in learned[False]] == plain
    assert [sequence for sequence in learned[True] if sequence.prompt in plain] == learned[False]
    assert len(learned[True]) == 8


def test_the_permuted_control_starts_from_the_same_warm_start(tmp_path, monkeypatch):
    monkeypatch.setenv("VPD_CACHE", str(tmp_path / "cache"))
    trained = []
    for permute in (False, True):
        trainer = toy_trainer(
            tmp_path / str(permute),
            warm_start={"demonstrations": 4, "cache": False},
            feedback={"permute": permute},
            eval={"final_tasks": 0},
            run={"max_steps": 0},
        )
        trainer.train()
        trained.append(weights(trainer))
    assert_same_weights(*trained)


def test_truncated_rollouts_are_judged_or_fail_and_have_a_view_unless_masked(tmp_path):
    settings = {"stop_strings": [], "max_completion_length": 2}
    for truncated in ("judge", "mask", "failure"):
        trainer = toy_trainer(tmp_path / truncated, rollout=settings, algorithm={"truncated": truncated})
        batch = trainer.with_feedback(trainer.sample(1))
        cut = [view for rollout, view in zip(batch.rollouts, batch.views, strict=True) if rollout.truncated]
        assert cut
        assert all((view is None) == (truncated == "mask") for view in cut)
        succeeded = [s for r, s in zip(batch.rollouts, batch.is_success, strict=True) if r.truncated]
        assert any(succeeded) == (truncated == "judge")
        assert all("cut off at the length limit" in view.first.text for view in cut if view is not None)


class Staged(ToyEnvironment):
    """Three stages; what ends right in the first two is everything."""

    def stages(self):
        tasks = self.tasks("train")
        return [tasks[:3], tasks[3:6], tasks[6:]]

    def judge(self, task, completion):
        if int(task.id.removeprefix("train-") if task.id.startswith("train") else 9) < 6:
            return Verdict(1.0, "Right.")
        return super().judge(task, completion)


def staged_trainer(folder, **run):
    # The teacher learns nothing from one class only, and the stages are what this is about.
    return VPDTrainer(
        model=toy_model(),
        args=toy_config(folder, run={"max_steps": 6, **run}, eval={"preflight_tasks": 0, "final_tasks": 0}),
        environment=Staged(),
        processing_class=tokenizer(),
    )


def questions_of_steps(trainer, steps):
    return [[task.id for task in trainer.curriculum.tasks_of_step(step)] for step in steps]


def test_a_curriculum_goes_on_when_enough_succeeds_and_stays_when_not(tmp_path):
    trainer = staged_trainer(tmp_path / "run")
    assert {int(task[6:]) for tasks in questions_of_steps(trainer, [1, 2, 3]) for task in tasks} == {0, 1, 2}
    trainer.train()
    events = [(line["step"], line["stage"]) for line in read_metrics(tmp_path / "run") if line["event"] == "stage"]
    # Each easy stage takes one batch; the last is never left, though it is not always solved.
    assert events == [(1, 1), (2, 2)]
    assert (trainer.curriculum.stage, trainer.curriculum.stage_start) == (2, 2)
    seen = [task for tasks in questions_of_steps(trainer, range(3, 20)) for task in tasks]
    assert len(set(seen)) == 34 == len(set(seen[:34]))


def test_a_stage_that_is_not_mastered_is_not_left(tmp_path):
    trainer = staged_trainer(tmp_path / "run", max_steps=2)
    trainer.environment.judge = lambda task, completion: Verdict(0.0, "Wrong.")
    trainer.train()
    assert trainer.curriculum.stage == 0


def test_a_resumed_run_goes_on_in_its_stage(tmp_path):
    staged_trainer(tmp_path / "run", max_steps=2, save_steps=1).train()
    resumed = staged_trainer(tmp_path / "run", max_steps=3, save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert (resumed.curriculum.stage, resumed.curriculum.stage_start) == (2, 2)
