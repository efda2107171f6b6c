"""The plan predicts what a training step will cost before it is run: tokens, operations, memory and time.

The counts follow what the trainer does: distinct prefixes are computed once, completions have no padding, the M-step's
teacher is a pass without gradient, and an E-step comes every F batches. Matrix products decide the time of training
passes, and reading the weights decides that of decoding. Both are divided by what the hardware gives, times the share
of it that such work reaches. On this machine all of these are measured (:mod:`vpd.planning.calibration`). For the
listed GPUs the figures are the makers' and the shares are guesses; nothing here has been run on one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vpd.config import ConfigError, VPDConfig
from vpd.device import PackedKernel
from vpd.planning.step_passes import Lengths, StepPasses, step_passes

_ACTIVATION_BYTES = 34
"""The bytes of activations for each token, layer and hidden unit, in 2-byte precision (arXiv 2205.05198, eq. 1, without
the attention's scores, which are never held)."""


@dataclass(frozen=True)
class Hardware:
    """A device's speed and memory.

    Attributes:
        name: The device's name, for people.
        flops: The operations of matrix products per second, in the precision of training.
        bandwidth: The bytes per second that are read from memory.
        memory: The size of the memory, in bytes.
        train_share: The share of ``flops`` that passes with a gradient reach.
        score_share: The share of ``flops`` that passes without a gradient reach.
        decode_share: The share of ``bandwidth`` that decoding reaches.
        kernel: The attention kernel that a run takes there by default.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    train_share: float = 0.6
    score_share: float = 0.6
    decode_share: float = 0.6
    kernel: PackedKernel = "flex"


GPUS = {
    "a100": Hardware("A100 80 GB", 312e12, 2.0e12, 80e9),
    "h100": Hardware("H100 SXM", 989e12, 3.35e12, 80e9),
    "h200": Hardware("H200", 989e12, 4.8e12, 141e9),
    "l40s": Hardware("L40S", 362e12, 0.86e12, 48e9),
    "rtx4090": Hardware("RTX 4090", 165e12, 1.0e12, 24e9),
}
"""GPUs with the dense bfloat16 products and the bandwidth of the makers' data sheets."""


@dataclass(frozen=True)
class NetworkSize:
    """The sizes of a network.

    Attributes:
        parameters: How many parameters it has in all.
        layers: How many layers it has.
        hidden: The hidden width, H.
        vocabulary: The size of the vocabulary, V.
        attention_width: The number of query heads times the size of a head.
        cache_width: How many numbers the keys and values of one token have in one layer.
        is_tied: Whether the head's weight is the embedding's.
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
        """The number of parameters that every token passes through, without the head."""
        return self.parameters - self.vocabulary * self.hidden * (1 if self.is_tied else 2)


@dataclass(frozen=True)
class Step:
    """An amount (tokens, operations or seconds) for each part of one step."""

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
    """The prediction for one step; with an E-step every F batches, each step has 1 / F of an E-step.

    Attributes:
        tokens: The tokens that each part computes; those of ``rollout`` are sampled or read.
        tokens_unshared: The tokens that the training passes would compute without prefix sharing.
        flops: The operations of each part's matrix products.
        seconds: The time of each part.
        memory: The peak of memory, in bytes.
    """

    tokens: Step
    tokens_unshared: float
    flops: Step
    seconds: Step
    memory: float


def network_size_of(config: Any) -> NetworkSize:
    """Return the sizes of a model with this transformers config; its weights are never made."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return NetworkSize(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        attention_width=text.num_attention_heads * head,
        cache_width=2 * head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        is_tied=bool(text.tie_word_embeddings),
    )


def predict(
    settings: VPDConfig,
    size: NetworkSize,
    lengths: Lengths,
    hardware: Hardware,
    teacher_size: NetworkSize | None = None,
) -> Plan:
    """Predict the cost of one step.

    Args:
        settings: The run's settings; prompts and generations of a step, the algorithm, the precision and gradient
            checkpointing have a part in the cost.
        size: The network's sizes.
        lengths: The lengths of a typical rollout.
        hardware: The one device that does all of the work.
        teacher_size: The sizes of the teacher's network, where it is another one.

    Raises:
        ValueError: The teacher is another network, and its sizes are not given.
    """
    passes = step_passes(settings, lengths, hardware.kernel)
    if passes.teacher_model is not None and teacher_size is None:
        raise ValueError(f"The teacher is {passes.teacher_model}: give the sizes of its network as teacher_size.")
    flops = _flops_of_passes(settings, size, teacher_size or size, lengths, passes)
    prompts, rollouts = settings.rollout.prompts_per_step, passes.rollouts
    tokens = Step(
        rollout=prompts * lengths.prompt + rollouts * lengths.completion,
        student=(1 + passes.reads) * passes.student,
        teacher=passes.teachers * passes.m_teacher,
        e_step=passes.e_share * (passes.prior + (passes.e_epochs + passes.separate_shift) * passes.teacher),
    )
    unshared = rollouts * (lengths.prompt + lengths.completion)
    feedback = lengths.feedback * settings.make_algorithm().reads_feedback
    unshared += (passes.teachers > 0) * rollouts * (lengths.prompt + feedback + lengths.completion)
    return Plan(
        tokens,
        unshared,
        _step_flops(settings, passes, flops),
        _step_seconds(settings, size, lengths, hardware, passes, flops),
        _peak_memory(settings, size, lengths, passes) + _teacher_bytes(settings, teacher_size),
    )


@dataclass(frozen=True)
class _PassFlops:
    """The operations of the passes without a gradient that a step is made of.

    Attributes:
        student, teacher, m_teacher, prior: The operations of these passes' blocks (see :class:`.StepPasses`).
        prefill: The operations of the prompts' pass in sampling.
        head: The operations of the head over all completions.
        teacher_head: The same of the M-step's teacher.
    """

    student: float
    teacher: float
    m_teacher: float
    prior: float
    prefill: float
    head: float
    teacher_head: float


def _flops_of_passes(
    settings: VPDConfig, size: NetworkSize, teacher_size: NetworkSize, lengths: Lengths, passes: StepPasses
) -> _PassFlops:
    prompts, rollouts = settings.rollout.prompts_per_step, passes.rollouts
    own = replace(lengths, feedback=0)
    student, head = pass_flops(size, own, rollouts, passes.student)
    teacher, _ = pass_flops(size, lengths, rollouts, passes.teacher)
    m_teacher, teacher_head = pass_flops(teacher_size, lengths, rollouts, passes.m_teacher, passes.m_teacher_reused)
    prior, _ = pass_flops(size, own, rollouts, passes.prior, passes.prior_reused)
    prefill, _ = pass_flops(size, Lengths(lengths.prompt, 0, 0), prompts, prompts * lengths.prompt)
    return _PassFlops(student, teacher, m_teacher, prior, prefill, head, teacher_head)


def _step_flops(settings: VPDConfig, passes: StepPasses, flops: _PassFlops) -> Step:
    backward = 2 + settings.model.gradient_checkpointing
    return Step(
        rollout=flops.student + flops.head,
        student=(1 + backward + passes.reads) * flops.student + (3 + passes.reads) * flops.head,
        teacher=passes.teachers * (flops.m_teacher + flops.teacher_head),
        # The training pass computes its head once more in its backward pass.
        e_step=passes.e_share
        * (
            flops.prior
            + flops.head
            + passes.e_epochs * ((1 + backward) * flops.teacher + 4 * flops.head)
            + (flops.teacher + flops.head if passes.separate_shift else 0)
        ),
    )


def _step_seconds(
    settings: VPDConfig, size: NetworkSize, lengths: Lengths, hardware: Hardware, passes: StepPasses, flops: _PassFlops
) -> Step:
    step = _step_flops(settings, passes, flops)
    train, score = hardware.flops * hardware.train_share, hardware.flops * hardware.score_share
    batches = -(-passes.rollouts // settings.rollout.batch_size)
    rows = min(passes.rollouts, settings.rollout.batch_size)
    # A step of decoding reads the weights, with two bytes each, and the keys and values so far.
    read = 2 * size.parameters + rows * cache_bytes(size) * (lengths.prompt + lengths.completion / 2)
    read *= lengths.completion * batches
    # The E-step's prior and a separate pass for delta have no gradient.
    without = passes.e_share * (flops.prior + flops.head + (flops.teacher + flops.head if passes.separate_shift else 0))
    reading = passes.reads * (flops.student + flops.head)
    # The optimizer reads and writes weights, gradient and two moments; then the inference copy is written again.
    width, trained = _parameter_bytes(settings)
    optimizer = size.parameters * (7 * trained * (1 + passes.e_share) + width + 2) / hardware.bandwidth
    return Step(
        rollout=flops.prefill / score
        + max((step.rollout - flops.prefill) / score, read / (hardware.bandwidth * hardware.decode_share)),
        student=(step.student - reading) / train + reading / score,
        teacher=step.teacher / score,
        e_step=(step.e_step - without) / train + without / score,
        optimizer=optimizer,
    )


def _peak_memory(settings: VPDConfig, size: NetworkSize, lengths: Lengths, passes: StepPasses) -> float:
    budget = settings.optim.micro_batch_tokens
    width, trained = _parameter_bytes(settings)
    copies = len(settings.make_algorithm().weight_copies()) + settings.optim.extrapolation
    held = min(budget, max(passes.student, passes.teacher * (passes.e_share > 0)))
    kept_layers = 2 if settings.model.gradient_checkpointing else _ACTIVATION_BYTES
    activations = held * size.layers * size.hidden * kept_layers
    if settings.model.gradient_checkpointing:
        # Keys and values for reuse are held on top; without checkpointing the backward pass holds them anyway.
        reused = max(
            passes.student * (passes.m_teacher_reused > 0),
            passes.teacher * (passes.prior_reused > 0) * (passes.e_share > 0),
        )
        activations += cache_bytes(size) * min(budget, reused)
    # The inference copy and its cache are freed before the update.
    rows = min(passes.rollouts, settings.rollout.batch_size)
    sampling = 2 * size.parameters + rows * cache_bytes(size) * (lengths.prompt + lengths.completion)
    return size.parameters * (width + (3 + copies) * trained) + max(activations, sampling)


def _teacher_bytes(settings: VPDConfig, teacher_size: NetworkSize | None) -> int:
    """Return the bytes of another network's weights, which are held during the whole run."""
    if teacher_size is None:
        return 0
    return teacher_size.parameters * settings.make_algorithm().passes(settings.rollout.prompts_per_step).teacher_bytes


def _parameter_bytes(settings: VPDConfig) -> tuple[int, int]:
    """Return the bytes of one weight, and those of one trained weight.

    Adapters count as no trained weights: their gradients and moments take next to nothing.
    """
    width = 2 if settings.model.dtype == "bfloat16" else 4
    return width, 0 if settings.model.lora is not None else width


def pass_flops(
    size: NetworkSize, lengths: Lengths, rollouts: int, tokens: float, reused: int = 0
) -> tuple[float, float]:
    """Count the operations of a pass without a gradient.

    Args:
        size: The network's sizes.
        lengths: The lengths of a typical rollout, which give the average context.
        rollouts: How many completions the head scores.
        tokens: How many distinct tokens are computed.
        reused: How many tokens before each sequence have keys and values that are reused from another pass.

    Returns:
        The operations of the blocks, and those of the head, which scores the completions alone.
    """
    context = (reused + lengths.prompt + lengths.feedback + lengths.completion) / 2
    blocks = tokens * (2 * size.blocks + 4 * size.layers * size.attention_width * context)
    return blocks, 2 * rollouts * lengths.completion * size.vocabulary * size.hidden


def cache_bytes(size: NetworkSize) -> int:
    """Return the bytes of one token's keys and values in all layers, with two bytes for a number."""
    return 2 * size.layers * size.cache_width


def hardware_named(name: str) -> Hardware:
    """Return the preset of :data:`GPUS` with this name.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in GPUS:
        raise ConfigError(f"There is no hardware {name!r}; there are {', '.join(sorted(GPUS))}, and this.")
    return GPUS[name]
