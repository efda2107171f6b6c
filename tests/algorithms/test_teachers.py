"""The M-step distils the teacher that the settings name, and the E-step holds it to its prior."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from test_em import examples_of
from toy import toy_model, toy_trainer

from vpd.algorithms import SDPOSettings, VPDSettings
from vpd.algorithms.e_step import betas, refine_teacher
from vpd.algorithms.example import make_examples, student_view, teacher_view, with_teacher
from vpd.algorithms.m_step import distil, distilling, pack_both
from vpd.algorithms.minibatches import Counts, split_by_prompts
from vpd.algorithms.teacher import make_teacher
from vpd.config import ConfigError
from vpd.losses import Head, divergence
from vpd.policy.copies import AVERAGE, INITIAL
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import ReadStates
from vpd.runs.folder import read_metrics


def make(tmp_path, **algorithm):
    default = {} if "type" in algorithm else {"type": "vpd", "e_step_every": 2}
    return toy_trainer(tmp_path / "run", algorithm=default | algorithm)


def prefixes(view, examples):
    """The distinct prefixes of the sequences of a view, each without its last token."""
    turns = [sequence for example in examples for sequence, _ in view(example)]
    return {tuple(sequence[:count]) for sequence in turns for count in range(1, len(sequence))}


def stir(trainer, seed=0):
    """Move the weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def logits_of(trainer, examples, settings):
    states = make_teacher(settings).read(trainer.learner, examples)
    head = states.head or Head(trainer.model.get_output_embeddings().weight)
    return (states.hidden @ head.weight.T.float())[states.rows].detach()


@pytest.mark.parametrize(
    ("algorithm", "sections"),
    [
        ({"type": "sdpo", "teacher": "live", "divergence": "js"}, {}),
        ({"type": "sdpo", "teacher": "live"}, {"model": {"autocast": "bfloat16", "gradient_checkpointing": True}}),
        ({"type": "sdpo", "teacher": "live"}, {"model": {"lora": {"r": 4}}}),
        ({"type": "joint", "teacher": "live"}, {}),
        ({"type": "joint", "teacher": "live"}, {"feedback": {"sources": ["sibling"]}}),
        ({"teacher": "live", "representation_weight": 0.5, "m_minibatch_prompts": 1}, {}),
        ({"teacher": "live", "e_epochs": 2}, {"model": {"lora": {"r": 4}}}),
        ({"teacher": "live"}, {"model": {"autocast": "bfloat16", "gradient_checkpointing": True}}),
    ],
)
def test_a_live_teacher_reads_the_questions_from_the_students_pass(tmp_path, monkeypatch, algorithm, sections):
    updates, computed = [], []
    halves = sections.get("model", {}).get("autocast") == "bfloat16"
    for reuses in (True, False):
        if not reuses:
            monkeypatch.setattr(PolicyModule, "can_reuse_keys", False)
        trainer = toy_trainer(tmp_path / str(reuses), algorithm=algorithm, **sections)
        trainer.sampler.engine.sync()
        batch = trainer.with_feedback(trainer.sample(1))
        before = trainer.learner.counts
        metrics, result = trainer.update(batch, 1)
        updates.append((metrics, result.tokens, list(trainer.model.parameters())))
        computed.append((trainer.learner.counts - before).computed)
        assert trainer.learner.module.training
        assert not torch.is_autocast_enabled("cpu")
    (reused, reused_tokens, reused_weights), (alone, alone_tokens, alone_weights) = updates
    examples = with_teacher(make_examples(batch.rollouts, batch.is_success, batch.views))
    known = 0
    for part in split_by_prompts(examples, algorithm.get("m_minibatch_prompts"), 2):
        asked, taught = (prefixes(view, part) for view in (student_view, teacher_view))
        known += len(asked & taught)
    if "type" not in algorithm:
        # The E-step's prior is conditioned on the teacher's pass over the whole batch.
        asked, taught = (prefixes(view, examples) for view in (student_view, teacher_view))
        known += len(asked & taught)
    assert known > 15
    assert computed[1] - computed[0] == known
    for name in ("m_loss", "grad_norm"):
        assert reused[name] == pytest.approx(alone[name], rel=0.1 if halves else 1e-4), name
    assert alone_tokens
    for rollout, numbers in alone_tokens.items():
        expected = pytest.approx(numbers.teacher_log_probs, rel=1e-2 if halves else 1e-4)
        assert reused_tokens[rollout].teacher_log_probs == expected
    if not halves:
        for left, right in zip(reused_weights, alone_weights, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=2e-5)


def test_keys_and_values_are_forgotten_once_the_teacher_has_read_them(tmp_path):
    trainer = make(tmp_path)
    learner, examples = trainer.learner, examples_of(trainer, 1)
    batch, conditioned = pack_both(learner, examples, examples, make_teacher(trainer.args.algorithm))
    assert conditioned is not None
    learner.policy.train()
    objective = distilling(learner, examples, trainer.args.algorithm, Counts(10, 8), None)
    learner.policy(batch, objective, conditioned)
    assert learner.module.training
    again = learner.pack(examples, teacher_view, conditioned_on=batch)
    with pytest.raises(ValueError, match="told to forget"):
        learner.score(again, ReadStates())


@pytest.mark.parametrize("teacher", ["frozen", "ema", "lora", "trust_region"])
def test_other_teachers_read_them_anew(tmp_path, teacher):
    trainer = make(tmp_path, teacher=teacher)
    assert not make_teacher(trainer.args.algorithm).reuses_keys(trainer.learner)


def test_networks_that_a_training_pass_runs_otherwise_have_no_kv_reuse():
    assert PolicyModule(toy_model()).can_reuse_keys
    assert not PolicyModule(toy_model(), share_prefixes=False).can_reuse_keys
    assert not PolicyModule(toy_model(), kernel="flex").can_reuse_keys
    for name in ("attention_dropout", "resid_pdrop", "router_jitter_noise"):
        dropping = toy_model()
        setattr(dropping.config, name, 0.1)
        assert not PolicyModule(dropping).can_reuse_keys, name
    nested = toy_model()
    nested.config.ffn_config = {"moe_jitter_eps": 1}
    assert not PolicyModule(nested).can_reuse_keys
    elsewhere = toy_model()
    elsewhere.config.classifier_dropout = 0.1
    assert PolicyModule(elsewhere).can_reuse_keys
    for stretches in ({"rope_type": "dynamic"}, {"full_attention": {"rope_type": "longrope"}}):
        stretched = toy_model()
        stretched.config.rope_parameters = stretches
        assert not PolicyModule(stretched).can_reuse_keys


def test_the_average_follows_each_rollout_batch_and_not_each_minibatch(tmp_path):
    trainer = make(tmp_path, type="sdpo", teacher="ema", ema_rate=0.25, m_minibatch_prompts=1)
    average = trainer.learner.copies[AVERAGE].module.model
    trainer.sampler.engine.sync()
    for step in (1, 2):
        before = {name: value.clone() for name, value in average.state_dict().items()}
        trainer.update(trainer.with_feedback(trainer.sample(step)), step)
        assert not all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
        for name, value in average.state_dict().items():
            torch.testing.assert_close(value, before[name].lerp(trainer.model.state_dict()[name], 0.25))


def test_each_teacher_predicts_what_it_should(tmp_path):
    trainer = make(tmp_path, teacher="trust_region", trust_region_share=0.3)
    examples = examples_of(trainer, 1)
    initial = logits_of(trainer, examples, VPDSettings())
    stir(trainer)
    live = logits_of(trainer, examples, VPDSettings())
    assert (initial - live).abs().max() > 0.1
    mixed = logits_of(trainer, examples, trainer.args.algorithm)
    torch.testing.assert_close(mixed, 0.7 * initial + 0.3 * live, rtol=1e-4, atol=1e-4)


def test_a_frozen_teacher_does_not_move_between_minibatches_and_a_live_one_does(tmp_path):
    divergences = {}
    for teacher in ("live", "frozen"):
        trainer = make(tmp_path / teacher, type="sdpo", teacher=teacher, m_minibatch_prompts=1)
        examples = examples_of(trainer, 1)
        before = trainer.learner.token_log_probs(examples, teacher_view)
        result = distil(trainer.learner, examples, trainer.args.algorithm, 2, torch.full((len(examples),), 0.1))
        second = [index for index, example in enumerate(examples) if example.group == 1]
        divergences[teacher] = max(
            float((torch.tensor(result.tokens[examples[i].rollout].teacher_log_probs) - before[i]).abs().max())
            for i in second
        )
    assert divergences["frozen"] < 1e-4 < 1e-3 < divergences["live"]


def test_a_share_of_the_teacher_is_mixed_as_probabilities_with_the_student():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 4, generator=generator, requires_grad=True)
    teacher, weight = torch.randn(5, 4, generator=generator), torch.randn(9, 4, generator=generator)
    loss = divergence(student, teacher, Head(weight), kind="forward_kl", teacher_share=0.2)
    pi, q = (student @ weight.T).softmax(-1), (teacher @ weight.T).softmax(-1)
    target = 0.2 * q + 0.8 * pi.detach()
    expected = (target * (target / pi).log()).sum(-1)
    torch.testing.assert_close(loss.per_token, expected.detach())
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, student)[0], torch.autograd.grad(expected.sum(), student)[0]
    )
    with pytest.raises(ValueError, match="teacher_share must be above 0"):
        divergence(student, teacher, Head(weight), teacher_share=0.0)


def test_with_adapters_only_these_are_copied(tmp_path):
    settings = {"type": "sdpo", "teacher": "ema"}
    adapters = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    trainer = toy_trainer(tmp_path / "run", peft_config=adapters, algorithm=settings)
    average = trainer.learner.copies[AVERAGE]
    own, theirs = (dict(module.named_parameters()) for module in (average.module, trainer.learner.module))
    for name, parameter in theirs.items():
        assert (own[name] is parameter) == (not parameter.requires_grad), name
    assert set(average.state_dict()) == {name for name, parameter in theirs.items() if parameter.requires_grad}


@pytest.mark.parametrize("settings", [{"type": "sdpo", "teacher": "ema"}, {"prior": "fixed", "shift_momentum": 0.5}])
def test_a_resumed_run_has_its_copies_and_its_shift_back(tmp_path, settings):
    algorithm = {"type": "vpd", "e_step_every": 1, **settings} if "type" not in settings else settings
    run = {"max_steps": 3, "save_steps": 1}
    toy_trainer(tmp_path / "whole", algorithm=algorithm, run=run).train()
    toy_trainer(tmp_path / "cut", algorithm=algorithm, run={**run, "max_steps": 2}).train()
    resumed = toy_trainer(tmp_path / "cut", algorithm=algorithm, run=run)
    resumed.train(resume_from_checkpoint=True)

    def last_loss(folder):
        line = [line for line in read_metrics(tmp_path / folder) if line["event"] == "train"][-1]
        return line["step"], line["m_loss"], line.get("e_loss"), line.get("reward_shift")

    assert last_loss("cut") == last_loss("whole")


def test_the_fixed_prior_is_the_initial_model(tmp_path):
    trainer = make(tmp_path, prior="fixed")
    examples = examples_of(trainer, 1)
    before = trainer.learner.sequence_log_probs(examples, student_view)
    stir(trainer)
    assert (trainer.learner.sequence_log_probs(examples, student_view) - before).abs().max() > 0.1
    copies = trainer.learner.copies
    torch.testing.assert_close(
        trainer.learner.sequence_log_probs(examples, student_view, copies[INITIAL].module), before
    )
    trainer.args.optim.learning_rate = 0.0
    metrics = refine_teacher(trainer.learner, examples, trainer.args.algorithm, 2).metrics
    is_success = torch.tensor([example.is_success for example in examples])
    trainer.learner.optimizer.zero_grad()
    assert metrics["reward_shift"] is not None
    dynamic = refine_teacher(trainer.learner, examples, VPDSettings(), 2).metrics
    assert abs(metrics["reward_shift"] - dynamic["reward_shift"]) > 0.01
    assert is_success.any()


def test_a_reference_length_takes_the_length_out_of_the_temperature(tmp_path):
    trainer = make(tmp_path)
    examples = examples_of(trainer, 1)
    lengths = torch.tensor([float(len(example.completion)) for example in examples])
    assert len(set(lengths.tolist())) > 1
    torch.testing.assert_close(betas(examples, VPDSettings(bco_beta=0.2)), torch.full_like(lengths, 0.2))
    torch.testing.assert_close(
        betas(examples, VPDSettings(bco_beta=0.2, length_reference=10.0)) * lengths, 2.0 + 0 * lengths
    )
    metrics = refine_teacher(trainer.learner, examples, VPDSettings(length_reference=1e-6), 2).metrics
    assert abs(metrics["margin_before"]) < 1e-5


def test_the_shift_keeps_its_momentum(tmp_path):
    trainer = make(tmp_path)
    examples, memory = examples_of(trainer, 1), {"reward_shift": 5.0}
    plain = refine_teacher(trainer.learner, examples, VPDSettings(e_learning_rate_factor=0.0), 2).metrics
    settings = VPDSettings(e_learning_rate_factor=0.0, shift_momentum=0.9)
    held = refine_teacher(trainer.learner, examples, settings, 2, memory=memory).metrics
    assert held["reward_shift"] == pytest.approx(4.5 + 0.1 * plain["reward_shift"], abs=1e-3)
    assert memory["reward_shift"] == held["reward_shift"]
    # A shift far above all rewards: successes count in full, failures hardly.
    assert held["e_weight_success"] > 0.95 > 0.05 > held["e_weight_failure"]
    assert plain["e_weight_success"] == pytest.approx(0.5, abs=0.2)


def test_epochs_of_an_e_step_are_as_many_optimizer_steps(tmp_path):
    trainer = make(tmp_path)
    examples, steps = examples_of(trainer, 1), []
    actual = trainer.learner.optimizer.step
    trainer.learner.optimizer.step = lambda *args, **kwargs: (steps.append(None), actual(*args, **kwargs))
    refine_teacher(trainer.learner, examples, VPDSettings(e_epochs=3, e_minibatch_prompts=1), 2)
    assert len(steps) == 6


def test_an_averaged_teacher_under_vpd_is_warned_of(tmp_path):
    trainer = make(tmp_path, teacher="ema")
    trainer.train()
    warnings = [line["name"] for line in read_metrics(tmp_path / "run") if line["event"] == "warning"]
    assert "averaged_teacher" in warnings
    assert SDPOSettings().teacher == "ema"


def test_a_capped_head_cannot_be_mixed():
    from vpd.algorithms.teacher import mixed_head

    head = Head(torch.eye(3), softcap=2.0)
    with pytest.raises(ConfigError, match="cap their logits"):
        mixed_head(head, head, 0.5)


def test_passes_without_gradient_have_four_budgets(tmp_path):
    trainer = make(tmp_path)
    learner, examples = trainer.learner, examples_of(trainer, 1)
    student, teacher = (learner.pack(examples, view).token_count for view in (student_view, teacher_view))
    quarter = -(-teacher // 4)
    assert student < quarter

    def parts(budget, *views):
        learner.settings = learner.settings.model_copy(update={"micro_batch_tokens": budget})
        return len(learner.micro_batches(examples, *views))

    assert parts(quarter, student_view, teacher_view) == parts(quarter, None, teacher_view) == 1
    assert parts(quarter - 1, student_view, teacher_view) == parts(quarter - 1, None, teacher_view) == 2
    assert parts(quarter, teacher_view) >= 4
    assert len(learner.micro_batches(examples, student_view, teacher_view, wants_layers=True)) >= 4
    trainer.model.activation_checkpointing_enable()
    assert parts(quarter, student_view, teacher_view) >= 4


@pytest.mark.parametrize(
    "algorithm", [{"teacher": "live"}, {"teacher": "frozen"}, {"type": "joint", "teacher": "live"}]
)
def test_micro_batches_are_planned_for_where_the_teacher_stands(tmp_path, algorithm):
    trainer = make(tmp_path, **algorithm)
    learner, asked = trainer.learner, []
    plan = learner.micro_batches
    learner.micro_batches = lambda *args, **options: (
        asked.append((len(args), options.get("conditioned", False))) or plan(*args, **options)
    )
    trainer.update(trainer.with_feedback(trainer.sample(1)), 1)
    assert asked[-1] == (3, algorithm["teacher"] == "live"), "the M-step's, the last of the batch"
