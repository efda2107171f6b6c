"""Settings under TRL's names: the same batches, rates and steps, and a word on whatever has no counterpart."""

from __future__ import annotations

import warnings

import pytest
from tiny import tokenizer
from toy import toy_model

from vpd import ConfigError, OptimSettings, VPDConfig, VPDTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import GRPOConfig


def trl_config(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GRPOConfig(**{"output_dir": "runs/x", "bf16": False, **settings})


def translated(algorithm="grpo", **settings):
    """The translation; any warning fails the test."""
    return VPDConfig.from_trl(trl_config(**settings), algorithm={"type": algorithm})


def test_flat_names_are_those_of_sections():
    flat = VPDConfig(  # pyright: ignore[reportCallIssue]
        learning_rate=1e-4,
        num_generations=4,
        max_steps=7,
        num_train_epochs=2,
        save_steps=3,
        eval_steps=2,
        report_to="wandb",
        optim=OptimSettings(weight_decay=0.1),
        eval={"k": 1},
    )
    nested = VPDConfig.parse(
        {
            "optim": {"learning_rate": 1e-4, "weight_decay": 0.1},
            "rollout": {"num_generations": 4},
            "run": {"max_steps": 7, "num_train_epochs": 2, "save_steps": 3, "report_to": ["wandb"]},
            "eval": {"eval_steps": 2, "k": 1},
        }
    )
    assert flat == nested


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1e-4, "optim": {"learning_rate": 1e-5}}, "learning_rate is given twice"),
        ({"per_device_train_batch_size": 8}, "is called otherwise here: rollout.prompts_per_step"),
        ({"learning_rat": 1e-4}, "Unknown setting learning_rat"),
    ],
)
def test_flat_names_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        VPDConfig.parse(values)


def test_what_has_no_effect_is_named():
    with pytest.warns(UserWarning, match="no effect here: logging_steps = 10"):
        VPDConfig(logging_steps=10)  # pyright: ignore[reportCallIssue]
    with pytest.warns(UserWarning, match=r"num_completions_to_print = 3, report_to = \['mlflow'\], use_vllm = True"):
        VPDConfig.from_trl(trl_config(use_vllm=True, num_completions_to_print=3, report_to=["mlflow", "wandb"]))
    with pytest.warns(UserWarning, match=r"beta = 0\.04, loss_type = 'dr_grpo'"):
        VPDConfig.from_trl(trl_config(beta=0.04, loss_type="dr_grpo"), algorithm={"type": "sdpo"})


def test_the_defaults_are_trls():
    config = translated()
    assert (config.rollout.prompts_per_step, config.rollout.num_generations) == (1, 8)
    assert (config.optim.learning_rate, config.optim.lr_scheduler_type) == (1e-6, "linear")
    assert config.rollout.max_completion_length == trl_config().max_completion_length
    assert (config.run.num_train_epochs, "max_steps" in config.run.model_fields_set) == (3.0, False)
    assert (config.run.save_steps, config.eval.eval_steps, config.algorithm.truncated) == (500, 10, "judge")
    algorithm = config.algorithm.model_dump()
    assert (algorithm["epsilon"], algorithm["epsilon_high"], algorithm["scale_rewards"]) == (0.2, 0.2, True)
    assert algorithm["loss_aggregation"] == "token_mean"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 4 prompts of 4 rollouts, one update.
        ({}, (4, None, 100, 50)),
        # 8 prompts of 4 rollouts, two updates with 4 prompts each: half as many batches as updates.
        ({"steps_per_generation": 8}, (8, 4, 50, 25)),
    ],
)
def test_batches_and_steps_are_those_of_trl(settings, expected):
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 4}
    config = translated(max_steps=100, eval_strategy="steps", eval_steps=0.5, warmup_steps=0.5, **settings)
    prompts, minibatch, steps, half = expected
    assert (config.rollout.prompts_per_step, config.algorithm.m_minibatch_prompts) == (prompts, minibatch)
    assert config.run.max_steps == steps
    assert config.eval.eval_steps == config.optim.warmup_steps == half


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": 2}, "num_iterations = 2 has no counterpart"),
        ({"reward_weights": [1.0]}, r"VPDTrainer\(reward_weights"),
        ({"warmup_steps": 0.1}, "warmup_steps = 0.1 is a share of max_steps, which is not set"),
        (
            {"per_device_train_batch_size": 4, "num_generations": 8, "steps_per_generation": 2},
            "no whole numbers of prompts",
        ),
    ],
)
def test_what_would_come_out_otherwise_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        translated(**settings)


def test_sections_and_flat_names_come_before_the_grpo_config():
    config = VPDConfig.from_trl(trl_config(), learning_rate=1e-3, rollout={"max_prompt_length": 99})
    assert (config.optim.learning_rate, config.rollout.max_prompt_length) == (1e-3, 99)
    assert config.rollout.num_generations == 8
    assert VPDConfig.from_trl(trl_config(mask_truncated_completions=True)).algorithm.truncated == "mask"


def trainer_of(folder, args=None, **arguments):
    rows = [{"prompt": f"Number {i}."} for i in range(30)]
    if args is None:
        args = VPDConfig.parse(
            {"output_dir": str(folder), "num_train_epochs": 1.5, "rollout": {"prompts_per_step": 4}, **arguments}
        )
    return VPDTrainer(
        toy_model(),
        args,
        train_dataset=rows,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        processing_class=tokenizer(),
    )


def test_epochs_become_steps_and_data_sets_split_sizes(tmp_path):
    trainer = trainer_of(tmp_path, data={"environment": "prompts", "selection_size": 4, "final_size": 6})
    assert [len(trainer.environment.tasks(split)) for split in ("train", "selection", "final")] == [20, 4, 6]
    assert trainer.args.run.max_steps == trainer.state.max_steps == 8
    assert trainer_of(tmp_path, max_steps=3).args.run.max_steps == 3


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="may be of the environment"):
        trainer_of(tmp_path, data={"environment": "prompts", "path": "other.jsonl"})
    with pytest.raises(ConfigError, match="may be of the environment"):
        trainer_of(tmp_path, data={"environment": "reasoning_gym", "dataset": "chain_sum"})
    with pytest.raises(ConfigError, match=r"not GRPOConfig: VPDConfig.from_trl\(args\) translates"):
        trainer_of(tmp_path, args=trl_config())
