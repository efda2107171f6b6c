"""What a training step will cost: tokens, operations, memory and time, before it is run.

Counts follow what the trainer does: distinct prefixes once, completions without padding, the M-step's teacher in a pass
without gradient, an E-step every F batches. Matrix products decide the time of training passes, reading the weights
that of decoding; both are divided by what the hardware gives, times the share of it that such work reaches. On the
machine at hand all of these are measured (:mod:`vpd.planning.calibration`); those of GPUs are the makers' and a guess,
and nothing here has been run on one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vpd.config import ConfigError, VPDConfig

_ACTIVATION_BYTES = 34
"""Of one layer and hidden unit for each token, in 2-byte precision (arXiv 2205.05198, eq. 1, without the attention's
scores, which are never held)."""


@dataclass(frozen=True)
class Hardware:
    """What a step is divided by.

    Attributes:
        flops: matrix products a second, in the precision of training.
        bandwidth: bytes a second from memory.
        memory: bytes.
        train_share, score_share: of the products, what passes with and without gradient reach.
        decode_share: of the bandwidth, what decoding reaches.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    train_share: float = 0.6
    score_share: float = 0.6
    decode_share: float = 0.6


GPUS = {
    "a100": Hardware("A100 80 GB", 312e12, 2.0e12, 80e9),
    "h100": Hardware("H100 SXM", 989e12, 3.35e12, 80e9),
    "h200": Hardware("H200", 989e12, 4.8e12, 141e9),
    "l40s": Hardware("L40S", 362e12, 0.86e12, 48e9),
    "rtx4090": Hardware("RTX 4090", 165e12, 1.0e12, 24e9),
}
"""Dense bfloat16 products and bandwidth, from the makers' data sheets."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a network.

    Attributes:
        parameters: all of them.
        layers, hidden, vocabulary: L, H and V.
        attention_width: query heads times their size.
        cache_width: of keys and values of one token and layer.
    """

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    attention_width: int
    cache_width: int
    is_tied: bool

    @property
    def blocks(self) -> int:
        """Parameters that every token passes through, the head left aside."""
        return self.parameters - self.vocabulary * self.hidden * (1 if self.is_tied else 2)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a rollout's parts: the question, the completion, and what the teacher's prompt has behind the question
    (of its own, where each rollout has its own text)."""

    prompt: int
    completion: int
    feedback: int


@dataclass(frozen=True)
class Step:
    """The parts of one step; of tokens, operations, bytes or seconds."""

    rollout: float
    student: float
    teacher: float
    e_step: float
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Plan:
    """The prediction for one step; the E-step's share is that of an average one, every F batches.

    Attributes:
        tokens: computed by each part; those of ``rollout`` are sampled or read.
        tokens_unshared: what the training passes would compute with every sequence by itself.
        flops: of matrix products.
        seconds: of each part.
        memory: bytes at the peak.
    """

    tokens: Step
    tokens_unshared: float
    flops: Step
    seconds: Step
    memory: float


def shape_of_config(config: Any) -> Shape:
    """The sizes of a model of this config; its weights are never made."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        attention_width=text.num_attention_heads * head,
        cache_width=2 * head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        is_tied=bool(text.tie_word_embeddings),
    )


def predict(settings: VPDConfig, shape: Shape, lengths: Lengths, hardware: Hardware) -> Plan:
    """The cost of one step.

    Args:
        settings: of the run; prompts and generations of a step, the algorithm, precision and checkpointing.
        shape: of the network.
        lengths: of a typical rollout.
        hardware: one device that does all of it.
    """
    prompts, group = settings.rollout.prompts_per_step, settings.rollout.num_generations
    rollouts = prompts * group
    algorithm = settings.make_algorithm()
    has_teacher, passes = algorithm.has_teacher, algorithm.passes(prompts)
    student = prompts * (lengths.prompt + group * lengths.completion)
    # A sibling's answer is the same text for all of a group but its own author.
    own_texts = 2 if settings.feedback.sources[0] == "sibling" else group
    teacher = prompts * (lengths.prompt + own_texts * lengths.feedback + group * lengths.completion) * has_teacher
    e_share, epochs, reads, teachers = passes.e_steps, passes.e_epochs, passes.student_reads, passes.teacher_reads
    fits = passes.e_is_whole and teacher <= settings.optim.micro_batch_tokens
    # The M-step's teacher may take the questions' keys and values from the student's pass.
    has_dropout = settings.model.lora is not None and settings.model.lora.lora_dropout > 0
    reuses_keys = settings.model.packed_attention == "blocks" and not has_dropout
    is_conditioned = reuses_keys and passes.teacher_reuses_keys
    m_teacher = teacher - is_conditioned * prompts * lengths.prompt
    # The E-step's prior may take them from the teacher's, where that is one pass.
    known_to_prior = lengths.prompt if reuses_keys and fits and passes.prior_reuses_keys else 0
    prior = student - prompts * known_to_prior
    scored = rollouts * lengths.completion

    backward = 2 + settings.model.gradient_checkpointing
    student_pass, head = pass_flops(shape, replace(lengths, feedback=0), rollouts, student)
    teacher_pass, _ = pass_flops(shape, lengths, rollouts, teacher)
    m_teacher_pass, _ = pass_flops(shape, lengths, rollouts, m_teacher, is_conditioned * lengths.prompt)
    prior_pass, _ = pass_flops(shape, replace(lengths, feedback=0), rollouts, prior, known_to_prior)
    prefill, _ = pass_flops(shape, Lengths(lengths.prompt, 0, 0), prompts, prompts * lengths.prompt)
    flops = Step(
        rollout=student_pass + head,
        student=(1 + backward + reads) * student_pass + (3 + reads) * head,
        teacher=teachers * (m_teacher_pass + head),
        # The prior; the training pass, whose head is computed once more in its backward pass; delta's pass.
        e_step=e_share
        * (
            prior_pass
            + head
            + epochs * ((1 + backward) * teacher_pass + 4 * head)
            + (0 if fits else teacher_pass + head)
        ),
    )
    tokens = Step(
        rollout=prompts * lengths.prompt + scored,
        student=(1 + reads) * student,
        teacher=teachers * m_teacher,
        e_step=e_share * (prior + (epochs + (not fits)) * teacher),
    )
    unshared = rollouts * (lengths.prompt + lengths.completion)
    unshared += has_teacher * rollouts * (lengths.prompt + lengths.feedback + lengths.completion)

    width = 2 if settings.model.dtype == "bfloat16" else 4
    # Adapters have gradients and moments of their own alone, which are next to nothing.
    trained = 0 if settings.model.lora is not None else width
    copies = len(algorithm.weight_copies()) + settings.optim.extrapolation
    train, score = hardware.flops * hardware.train_share, hardware.flops * hardware.score_share
    batches = -(-rollouts // settings.rollout.batch_size)
    rows = min(rollouts, settings.rollout.batch_size)
    # A step of decoding reads the weights, in two bytes, and the keys and values so far.
    read = 2 * shape.parameters + rows * cache_bytes(shape) * (lengths.prompt + lengths.completion / 2)
    read *= lengths.completion * batches
    # The E-step's prior and a separate pass for delta have no gradient.
    without = e_share * (prior_pass + head + (0 if fits else teacher_pass + head))
    reading = reads * (student_pass + head)
    # Weights, gradient and two moments, read and written, and the copy that samples.
    optimizer = shape.parameters * (7 * trained * (1 + e_share) + width + 2) / hardware.bandwidth
    seconds = Step(
        rollout=prefill / score
        + max((flops.rollout - prefill) / score, read / (hardware.bandwidth * hardware.decode_share)),
        student=(flops.student - reading) / train + reading / score,
        teacher=flops.teacher / score,
        e_step=(flops.e_step - without) / train + without / score,
        optimizer=optimizer,
    )
    held = min(settings.optim.micro_batch_tokens, max(student, teacher * (e_share > 0)))
    kept_layers = 2 if settings.model.gradient_checkpointing else _ACTIVATION_BYTES
    activations = held * shape.layers * shape.hidden * kept_layers
    if settings.model.gradient_checkpointing:
        # Keys and values that are lent; without checkpointing they are held for the backward pass anyway.
        lent = max(student * is_conditioned, teacher * (known_to_prior > 0) * (e_share > 0))
        activations += cache_bytes(shape) * min(settings.optim.micro_batch_tokens, lent)
    # The copy that samples and its cache are freed before the update.
    sampling = 2 * shape.parameters + rows * cache_bytes(shape) * (lengths.prompt + lengths.completion)
    memory = shape.parameters * (width + (3 + copies) * trained) + max(activations, sampling)
    return Plan(tokens, unshared, flops, seconds, memory)


def pass_flops(shape: Shape, lengths: Lengths, rollouts: int, tokens: float, known: int = 0) -> tuple[float, float]:
    """Operations of a pass without gradient over ``tokens`` distinct ones, which stand behind ``known`` ones of another
    pass: of the blocks, and of the head, which scores the completions alone."""
    context = (known + lengths.prompt + lengths.feedback + lengths.completion) / 2
    blocks = tokens * (2 * shape.blocks + 4 * shape.layers * shape.attention_width * context)
    return blocks, 2 * rollouts * lengths.completion * shape.vocabulary * shape.hidden


def cache_bytes(shape: Shape) -> int:
    """Of one token's keys and values in all layers, in two bytes a number."""
    return 2 * shape.layers * shape.cache_width


def hardware_named(name: str) -> Hardware:
    """A preset.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in GPUS:
        raise ConfigError(f"There is no hardware {name!r}; there are {', '.join(sorted(GPUS))}, and this.")
    return GPUS[name]
