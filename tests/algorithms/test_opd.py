"""On-policy distillation reads another network, moves the student's weights alone, and refuses other tokenizers."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import VOCABULARY, llama, tokenizer
from toy import ToyEnvironment, toy_config, toy_model, toy_trainer

from vpd import ConfigError, VPDTrainer
from vpd.algorithms import ExampleBatch
from vpd.algorithms.example import make_examples
from vpd.policy.load import save_policy
from vpd.runs.folder import read_metrics

TOKENS = len(VOCABULARY)


def teacher_folder(path, vocabulary_size=TOKENS, hidden=48, tokens=None):
    """A network of another width than the student's, with a vocabulary that may be padded."""
    torch.manual_seed(7)
    network = llama(vocabulary_size)
    config = type(network.config)(**{**network.config.to_dict(), "hidden_size": hidden, "tie_word_embeddings": False})
    save_policy(type(network)(config), tokens or tokenizer(), path)
    return str(path)


def opd(path, **settings):
    model = {"name": teacher_folder(path / "teacher", **settings.pop("teacher", {})), "dtype": "float32"}
    return {"type": "opd", "teacher_model": {**model, **settings.pop("teacher_model", {})}, **settings}


def examples_of(trainer):
    batch = trainer.with_feedback(trainer.sampler.sample(trainer.curriculum.tasks_of_step(1), 4, seed=1))
    return make_examples(batch.rollouts, batch.is_success, batch.views)


def dense_log_probs(network, prompt, completion, count):
    logits = network(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :count]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("vocabulary", [TOKENS, TOKENS + 9])
@pytest.mark.parametrize("prompt", ["task", "feedback"])
def test_the_loss_is_the_divergence_from_the_other_network(tmp_path, vocabulary, prompt):
    algorithm = opd(tmp_path, teacher={"vocabulary_size": vocabulary}, teacher_model={"prompt": prompt})
    trainer = toy_trainer(tmp_path / "run", algorithm=algorithm)
    examples, network = examples_of(trainer), trainer.algorithm._teacher._network.model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected, tokens = torch.zeros(()), 0
    for example in examples:
        (turn,) = example.turns
        read = turn.student_prompt if prompt == "task" else turn.teacher_prompt
        student = dense_log_probs(trainer.model, turn.student_prompt, turn.completion, TOKENS)
        teacher = dense_log_probs(network, read, turn.completion, TOKENS).detach()
        expected = expected + (student.exp() * (student - teacher)).sum()
        tokens += len(turn.completion)
    (expected / tokens).backward()
    gradient = trainer.model.model.layers[0].mlp.up_proj.weight.grad.clone()
    trainer.model.zero_grad()
    found, step = {}, trainer.learner.optimizer.step

    def keep(*args, **kwargs):
        found["gradient"] = trainer.model.model.layers[0].mlp.up_proj.weight.grad.clone()

    trainer.learner.optimizer.step = keep
    trainer.args.optim.max_grad_norm = trainer.learner.settings.max_grad_norm = 1e9
    result = trainer.algorithm.update(trainer.learner, ExampleBatch(examples, 1, 2))
    trainer.learner.optimizer.step = step
    assert result.metrics["m_loss"] == pytest.approx(float(expected.detach()) / tokens, rel=1e-4)
    torch.testing.assert_close(found["gradient"], gradient, rtol=1e-3, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "forward_kl"},
        {"divergence": "js", "top_k": 5},
        {"divergence": "reverse_kl", "top_k": 5, "correction": "stopgrad"},
        {"divergence": "sampled", "m_minibatch_prompts": 1},
        {"teacher_share": 0.5},
    ],
)
def test_every_objective_trains(tmp_path, settings):
    trainer = toy_trainer(tmp_path / "run", algorithm=opd(tmp_path, **settings), run={"max_steps": 1})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_the_student_comes_nearer_to_its_teacher(tmp_path):
    algorithm = opd(tmp_path, divergence="forward_kl")
    settings = {"optim": {"learning_rate": 3e-3}, "run": {"max_steps": 12}}
    toy_trainer(tmp_path / "run", algorithm=algorithm, **settings).train()
    lines = [line for line in read_metrics(tmp_path / "run") if line["event"] == "train"]
    assert sum(line["divergence"] for line in lines[-3:]) < 0.8 * sum(line["divergence"] for line in lines[:3])


def test_a_students_vocabulary_may_be_the_larger_one(tmp_path):
    model = llama(TOKENS + 5)
    model.config.max_position_embeddings = 2048
    args = toy_config(tmp_path / "run", algorithm=opd(tmp_path), run={"max_steps": 1})
    trainer = VPDTrainer(model=model, args=args, environment=ToyEnvironment(), processing_class=tokenizer())
    trainer.train()
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["event"] == "train"]
    assert line["divergence"] > 0
    assert 0 < line["rollouts_of_other_tokens"] < 8


def test_a_teacher_of_another_tokenizer_is_refused_by_its_first_token_that_differs(tmp_path):
    other = tokenizer()
    data = json.loads(other.backend_tokenizer.to_str())
    first, second = "!", '"'
    vocabulary = data["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(data))
    algorithm = opd(tmp_path, teacher={"tokens": other})
    with pytest.raises(ConfigError, match="has another tokenizer than the student: id 3 is "):
        toy_trainer(tmp_path / "run", algorithm=algorithm)


def test_hidden_states_of_two_networks_are_not_matched(tmp_path):
    with pytest.raises(ConfigError, match="opd has two: leave it out"):
        toy_trainer(tmp_path / "run", algorithm=opd(tmp_path, representation_weight=1.0))


def test_a_dataset_needs_no_reward_functions(tmp_path):
    rows = [{"prompt": f"Number {i}."} for i in range(40)]

    def trainer(algorithm, name="opd", **sections):
        args = toy_config(tmp_path / name, algorithm=algorithm, run={"max_steps": 1}, **sections)
        return VPDTrainer(toy_model(), args, train_dataset=rows, processing_class=tokenizer())

    result = trainer(opd(tmp_path)).train()
    assert result.global_step == 1
    assert result.metrics["rows"] == []
    (line,) = [line for line in read_metrics(tmp_path / "opd") if line["event"] == "train"]
    assert line["reward"] is None
    with pytest.raises(ConfigError, match='"vpd" learns from verdicts, but these tasks have no judge'):
        trainer({"type": "vpd"})
    # Evaluations are left out, also where the settings ask for them.
    trainer(opd(tmp_path / "again"), "evaluated", eval={"eval_steps": 1}).train()
    assert not [line for line in read_metrics(tmp_path / "evaluated") if line["event"] == "eval"]


def test_the_task_alone_needs_no_feedback_and_no_verdict(tmp_path, monkeypatch):
    def broken(self, task, completion):
        raise OSError("there is no judge")

    monkeypatch.setattr(ToyEnvironment, "judge", broken)
    trainer = toy_trainer(tmp_path / "run", algorithm=opd(tmp_path), run={"max_steps": 1}, eval={"final_tasks": 0})
    assert not trainer.algorithm.reads_feedback
    trainer.train()
    (line,) = [line for line in read_metrics(tmp_path / "run") if line["event"] == "train"]
    assert line["divergence"] > 0
    assert line["ungraded"] == 8
