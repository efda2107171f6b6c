"""What a run leaves is a model at every moment: in checkpoints, after a signal, and merged."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from toy import toy_trainer
from transformers import TrainerCallback
from typer.testing import CliRunner

from vpd.cli import app
from vpd.policy.load import load_policy, save_policy
from vpd.runs.files import RunError

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None]).logits


@pytest.mark.parametrize("config", [None, LORA])
def test_a_checkpoint_and_an_interrupted_run_hold_the_model(tmp_path, config):
    trainer = toy_trainer(tmp_path / "run", [Interrupt()], peft_config=config)
    trainer.train()
    for folder in (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "model", tmp_path / "run" / "model"):
        assert (folder / "adapter_config.json").is_file() is (config is not None)
        torch.testing.assert_close(logits(load_policy(str(folder)).model), logits(trainer.model), atol=1e-5, rtol=0)


def test_a_lora_run_is_merged_by_the_command_and_loads_with_plain_peft(tmp_path):
    trainer = toy_trainer(tmp_path / "run", peft_config=LORA, run={"max_steps": 1})
    trainer.train()
    expected = logits(trainer.model)
    plain = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "run" / "model"))
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    merged = load_policy(str(tmp_path / "run" / "merged")).model
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


def test_a_run_whose_model_comes_back_otherwise_is_not_done(tmp_path, monkeypatch):
    def spoilt(model, tokenizer, folder, **options):
        weight = next(model.parameters())
        with torch.no_grad():
            weight.mul_(1.1)
            save_policy(model, tokenizer, folder, **options)
            weight.div_(1.1)

    monkeypatch.setattr("vpd.policy.verified.save_policy", spoilt)
    trainer = toy_trainer(tmp_path / "run", run={"max_steps": 1})
    with pytest.raises(RunError, match="not the one that was trained"):
        trainer.train()
    assert not (tmp_path / "run" / "model").exists()
    trusting = toy_trainer(tmp_path / "trusting", run={"max_steps": 1, "verify_saved": False})
    trusting.train()
    assert (tmp_path / "trusting" / "model").exists()
