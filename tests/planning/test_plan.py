"""The plan counts what the trainer computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy import ToyEnvironment, toy_model, toy_trainer
from transformers import LlamaConfig

from vpd import ConfigError, Verdict, VPDConfig
from vpd.planning import calibration
from vpd.planning.calibration import this_machine
from vpd.planning.plan import GPUS, hardware_named, network_size_of, predict
from vpd.planning.step_passes import Lengths
from vpd.policy import load
from vpd.rollout.sampler import RolloutSampler
from vpd.types import Task

SIZE = network_size_of(
    LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )
)  # fmt: skip


BLOCKS = {"packed_attention": "blocks"}


def config(**sections):
    """Four prompts of eight rollouts, with the environment's text and a kernel that reuses keys on any hardware."""
    rollout = {"prompts_per_step": 4, "num_generations": 8}
    sections["model"] = BLOCKS | sections.get("model", {})
    sections["algorithm"] = {"type": "vpd"} | sections.get("algorithm", {})
    return VPDConfig.parse({"rollout": rollout, "feedback": {"sources": ["environment"]}, **sections})


def test_sizes_are_those_of_smollm2():
    assert SIZE.parameters == 134_515_008
    assert SIZE.blocks == 134_515_008 - 49152 * 576


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "sdpo", "teacher": "live"},
        {"type": "sdpo", "teacher": "trust_region"},
        {"type": "grpo", "beta": 0.1},
        {"type": "reshape"},
        {"type": "sdpo", "teacher": "ema"},
        {"type": "joint", "teacher": "live"},
        {"type": "vpd", "e_step_every": 1},
        {"type": "vpd", "e_step_every": 1, "e_minibatch_prompts": 1, "e_epochs": 2},
        {"type": "vpd", "e_step_every": 1, "divergence": "sampled"},
        {"type": "sdpo", "teacher": "live", "divergence": "sampled"},
        {"type": "sdpo", "teacher": "live", "m_minibatch_prompts": 1},
    ],
)
def test_tokens_are_those_that_the_trainer_computes(tmp_path, monkeypatch, algorithm):
    texts = iter(range(10, 99))

    class OfOneLength(ToyEnvironment):
        def tasks(self, split):
            return [Task(t.id, [{"role": "user", "content": f"{t.id[-1:]} Number."}]) for t in super().tasks(split)]

        def judge(self, task, completion):
            number = next(texts)
            return Verdict(float(number % 2), f"{number} says the judge.")

    monkeypatch.setattr("toy.ToyEnvironment", OfOneLength)
    # The templates add no text of their own, so that the feedback that the plan counts is each rollout's own.
    templates = {"feedback_on_failure": "{text}", "feedback_on_success": "{text}"}
    feedback = {"templates": templates}
    trainer = toy_trainer(tmp_path, algorithm=algorithm, rollout={"stop_strings": []}, feedback=feedback, model=BLOCKS)
    trainer.sampler.eos_token_ids = ()
    made = RolloutSampler._rollout

    def whole(*args):
        rollout = made(*args)
        return replace(rollout, turns=[replace(turn, truncated=False) for turn in rollout.turns])

    monkeypatch.setattr(RolloutSampler, "_rollout", whole)
    batch = trainer.with_feedback(trainer.sample(1))
    before = trainer.learner.counts
    trainer.update(batch, 1)
    views = [view for view in batch.views if view is not None]
    prompt = len(batch.rollouts[0].turns[0].prompt_ids)
    lengths = Lengths(prompt, len(batch.rollouts[0].completion_ids), len(views[0].first.prompt_ids) - prompt)
    plan = predict(trainer.args, SIZE, lengths, GPUS["h100"])
    # Short texts and prompts share some beginnings that the plan does not know of, and no sequence's last token is
    # computed.
    parts = plan.tokens.student + plan.tokens.teacher + plan.tokens.e_step
    assert parts == pytest.approx((trainer.learner.counts - before).computed, rel=0.15)


def test_prompts_are_shared_and_siblings_texts_too():
    lengths = Lengths(250, 16, 60)
    plan = predict(config(), SIZE, lengths, GPUS["h100"])
    assert plan.tokens.student == 4 * (250 + 8 * 16)
    assert plan.tokens.teacher == 4 * 8 * (60 + 16)
    averaged = predict(config(algorithm={"type": "sdpo", "teacher": "ema"}), SIZE, lengths, GPUS["h100"])
    assert averaged.tokens.teacher == 4 * (250 + 8 * (60 + 16))
    assert plan.tokens_unshared == 32 * (250 + 16) + 32 * (250 + 60 + 16)
    siblings = predict(config(feedback={"sources": ["sibling"]}), SIZE, lengths, GPUS["h100"])
    assert siblings.tokens.teacher == 4 * (2 * 60 + 8 * 16)
    rewards_alone = predict(config(algorithm={"type": "grpo"}), SIZE, lengths, GPUS["h100"])
    assert (rewards_alone.tokens.teacher, rewards_alone.flops.teacher, rewards_alone.flops.e_step) == (0, 0, 0)


def test_the_operations_of_a_student_pass_are_six_for_each_parameter_and_token():
    plan = predict(config(algorithm={"type": "sdpo"}), SIZE, Lengths(2, 1, 0), GPUS["h100"])
    tokens = 4 * (2 + 8)
    expected = 6 * SIZE.blocks * tokens + 6 * 32 * 49152 * 576
    assert plan.flops.student == pytest.approx(expected, rel=1e-3)
    again = predict(
        config(algorithm={"type": "sdpo"}, model={"gradient_checkpointing": True}),
        SIZE,
        Lengths(2, 1, 0),
        GPUS["h100"],
    )
    assert again.flops.student - plan.flops.student == pytest.approx(2 * SIZE.blocks * tokens, rel=1e-3)
    kept, recomputed = (
        predict(config(model={"gradient_checkpointing": on}), SIZE, Lengths(250, 16, 60), GPUS["h100"]).memory
        for on in (False, True)
    )
    assert recomputed < kept


def test_keys_are_reused_where_the_kernel_of_the_hardware_does():
    lengths = Lengths(250, 16, 60)
    chosen = {name: config(model={"packed_attention": name}) for name in ("auto", "blocks", "flex")}
    hardware = {"gpu": GPUS["h100"], "cpu": replace(GPUS["h100"], kernel="blocks")}
    teacher = {
        (name, where): predict(settings, SIZE, lengths, hardware[where]).tokens.teacher
        for name, settings in chosen.items()
        for where in hardware
    }
    reused, whole = 4 * 8 * (60 + 16), 4 * (250 + 8 * (60 + 16))
    assert {where for where, tokens in teacher.items() if tokens == reused} == {
        ("auto", "cpu"), ("blocks", "cpu"), ("blocks", "gpu")
    }  # fmt: skip
    assert set(teacher.values()) == {reused, whole}


def test_rarer_e_steps_cost_less_and_one_pass_less_than_two():
    costs = [
        predict(config(algorithm={"type": "vpd", "e_step_every": f}), SIZE, Lengths(250, 16, 60), GPUS["h100"]).flops
        for f in (1, 5)
    ]
    assert costs[0].e_step == pytest.approx(5 * costs[1].e_step)
    small = predict(config(optim={"micro_batch_tokens": 1000}), SIZE, Lengths(250, 16, 60), GPUS["h100"]).flops
    large = predict(config(optim={"micro_batch_tokens": 8000}), SIZE, Lengths(250, 16, 60), GPUS["h100"]).flops
    assert small.e_step > large.e_step


def test_the_sizes_of_a_local_model_are_found_without_the_network(tmp_path, monkeypatch):
    asked, from_pretrained = [], load.AutoConfig.from_pretrained

    def watched(location, **options):
        asked.append(options["local_files_only"])
        return from_pretrained(location, **options)

    monkeypatch.setattr(load.AutoConfig, "from_pretrained", watched)
    toy_model().save_pretrained(tmp_path)
    found = network_size_of(load.config_of(str(tmp_path)))
    assert found.parameters == sum(p.numel() for p in toy_model().parameters())
    assert asked == [True]
    with pytest.raises(ConfigError, match="There is no file or folder"):
        load.config_of(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="There is no hardware 'abacus'"):
        hardware_named("abacus")


def test_the_machine_at_hand_is_measured_with_the_runs_own_work():
    network, lengths = toy_model().config, Lengths(20, 6, 10)
    for model in ({}, {"gradient_checkpointing": True, "autocast": "none"}):
        hardware = this_machine(config(model=model), network, lengths)
        shares = (hardware.train_share, hardware.score_share, hardware.decode_share)
        assert all(0 < share < 1 for share in shares), "a tiny network reaches little"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_says_what_was_timed(monkeypatch, checkpointing):
    # The times are those of a matrix product, a read of memory, sampling of 6 tokens and of 1, a pass without a
    # gradient and a pass with one.
    timed = iter([1e-6, 1e-6, 0.6, 0.1, 2.0, 7.0])
    monkeypatch.setattr(calibration, "_seconds", lambda *args, **kwargs: next(timed))
    lengths = Lengths(100, 20, 30)
    network = toy_model().config
    settings = config(
        algorithm={"type": "vpd", "e_step_every": 1},
        model={"gradient_checkpointing": checkpointing},
        optim={"micro_batch_tokens": 8000},
    )
    hardware = this_machine(settings, network, lengths)
    seconds = predict(settings, network_size_of(network), lengths, hardware).seconds
    frozen = config(**settings.model_dump(include={"optim", "model"}), algorithm={"type": "vpd", "teacher": "frozen"})
    whole = predict(frozen, network_size_of(network), lengths, hardware).seconds.teacher
    assert whole == pytest.approx(2.0, rel=0.05)
    # A live teacher reuses the questions' keys and values from the student's pass: it computes a fifth fewer tokens,
    # which attend to as many.
    assert 1.6 <= seconds.teacher < whole
    prior = 2.0 * 4 * (100 + 8 * 20) / (4 * (100 + 8 * 50))
    assert seconds.e_step == pytest.approx(7.0 + prior, rel=0.1)
    # Each of 20 steps of decoding takes a tenth of a second, and the prompts' pass comes on top.
    prefill = 2.0 * 4 * 100 / (4 * (100 + 8 * 50))
    assert seconds.rollout == pytest.approx(20 * 0.1 + prefill, rel=0.1)


def test_a_pass_that_is_timed_is_no_larger_than_a_micro_batch(monkeypatch):
    packed = []
    made = calibration.pack
    monkeypatch.setattr(calibration, "pack", lambda *args, **kwargs: packed.append(made(*args, **kwargs)) or packed[-1])
    monkeypatch.setattr(calibration, "_seconds", lambda *args, **kwargs: 1.0)
    hardware = this_machine(config(optim={"micro_batch_tokens": 200}), toy_model().config, Lengths(60, 20, 30))
    assert packed[0].rollout_count == 2
    assert packed[0].token_count <= 200
    assert hardware.decode_share == 0.6, "five steps that take no time are noise"


def test_a_network_that_is_large_however_few_its_layers_is_not_run(monkeypatch):
    monkeypatch.setattr(calibration, "_LARGEST", 10.0)
    monkeypatch.setattr(calibration, "PolicyModule", None)
    hardware = this_machine(config(), toy_model().config, Lengths(20, 6, 10))
    assert "is a guess" in hardware.name
    assert (hardware.train_share, hardware.decode_share) == (0.6, 0.6)


def test_another_networks_teacher_is_counted_with_its_own_size():
    teacher = {"name": "some/model", "prompt": "task"}
    settings = config(algorithm={"type": "opd", "teacher_model": teacher})
    lengths = Lengths(250, 16, 60)
    with pytest.raises(ValueError, match="The teacher is some/model: give the sizes of its network"):
        predict(settings, SIZE, lengths, GPUS["h100"])
    large = replace(SIZE, parameters=10 * SIZE.parameters, hidden=4 * SIZE.hidden)
    plans = [predict(settings, SIZE, lengths, GPUS["h100"], size) for size in (SIZE, large)]
    assert plans[0].tokens.teacher == plans[0].tokens.student == 4 * (250 + 8 * 16)
    assert plans[1].flops.teacher > 5 * plans[0].flops.teacher
    assert plans[1].flops.student == plans[0].flops.student
    assert plans[1].memory - plans[0].memory == 2 * 9 * SIZE.parameters


def test_a_placebo_reads_the_student_once_more_than_a_policy_gradient():
    grpo, opsa = (
        predict(config(algorithm={"type": kind}), SIZE, Lengths(250, 16, 60), GPUS["h100"]) for kind in ("grpo", "opsa")
    )
    assert opsa.tokens.student == 1.5 * grpo.tokens.student
