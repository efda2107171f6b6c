"""Where memory is missing for a micro-batch, it is halved once, with the same update, or a sentence says what to do."""

from __future__ import annotations

import pytest
import torch
from toy import toy_trainer

from vpd import ConfigError
from vpd.runs import read_metrics

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}
ALGORITHMS = [{"type": "sdpo"}, {"type": "vpd", "e_minibatch_prompts": 1}, {"type": "grpo"}]


def limit_rollouts(trainer, most, error):
    """Let the backward pass of more rollouts than this fail, after it has begun to add gradients up."""
    backward, sizes = trainer.accelerator.backward, []
    pack = trainer.learner.pack

    def packed(items, *args, **kwargs):
        sizes.append(len(items))
        return pack(items, *args, **kwargs)

    def limited(loss):
        backward(loss)
        if sizes[-1] > most:
            raise error

    trainer.learner.pack = packed
    trainer.accelerator.backward = limited
    return sizes


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda settings: settings["type"])
def test_a_step_that_lacks_memory_is_made_in_halves_with_the_same_result(tmp_path, algorithm, kind):
    trained = {}
    for name in ("plenty", "scarce"):
        trainer = toy_trainer(tmp_path / name, algorithm=algorithm, run={"max_steps": 2})
        if name == "scarce":
            # A step has two prompts with four rollouts each, and an E-step's minibatch one of them.
            limit_rollouts(trainer, 4 if algorithm["type"] != "vpd" else 5, ERRORS[kind])
        trainer.train()
        lines = [line for line in read_metrics(tmp_path / name) if line["event"] == "train"]
        trained[name] = (trainer.model.state_dict(), lines, trainer.learner.budget_divisor)
    # The toy's batches are far below the budget, so that the second step may have to halve it again.
    assert trained["plenty"][2] == 1 < trained["scarce"][2] <= 4
    for name, value in trained["plenty"][0].items():
        torch.testing.assert_close(trained["scarce"][0][name], value, rtol=1e-3, atol=2e-5)
    for key in ("m_loss", "grad_norm", "divergence", "e_loss"):
        for first, second in zip(trained["plenty"][1], trained["scarce"][1], strict=True):
            assert second.get(key) == (None if first.get(key) is None else pytest.approx(first[key], rel=1e-3)), key


def test_memory_that_half_a_micro_batch_lacks_too_ends_the_run_with_a_sentence(tmp_path):
    trainer = toy_trainer(tmp_path, algorithm={"type": "sdpo"})
    limit_rollouts(trainer, 1, ERRORS["cuda"])
    with pytest.raises(ConfigError, match=r"Memory is missing.*lower optim\.micro_batch_tokens.*--resume"):
        trainer.train()


def test_a_pass_that_must_not_be_divided_is_not(tmp_path):
    # The first E-step computes its shift from all rollouts of its one pass.
    trainer = toy_trainer(tmp_path, algorithm={"type": "vpd"})
    limit_rollouts(trainer, 1, ERRORS["cuda"])
    with pytest.raises(ConfigError, match="Memory is missing"):
        trainer.train()
    assert trainer.learner.budget_divisor == 1


def test_other_errors_are_left_alone(tmp_path):
    trainer = toy_trainer(tmp_path, algorithm={"type": "sdpo"})
    limit_rollouts(trainer, 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()
