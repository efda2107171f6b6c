"""The passes that one training step makes, and how many distinct tokens each of them computes."""

from __future__ import annotations

from dataclasses import dataclass

from vpd.config import VPDConfig
from vpd.device import PackedKernel
from vpd.packing import reuses_keys


@dataclass(frozen=True)
class Lengths:
    """The lengths of a rollout's parts, in tokens.

    Attributes:
        prompt: The length of the student's prompt.
        completion: The length of the completion.
        feedback: The length of what the teacher's prompt has after the question; where each rollout has its own text,
            the length of this text.
    """

    prompt: int
    completion: int
    feedback: int


@dataclass(frozen=True)
class StepPasses:
    """The passes of one step.

    Attributes:
        rollouts: How many rollouts the step has.
        student: The distinct tokens of a pass over the student's sequences.
        teacher: The distinct tokens of a pass over the teacher's sequences that reuses no keys and values.
        m_teacher: The distinct tokens of the M-step's teacher pass.
        m_teacher_reused: How many tokens' keys and values of each prompt the M-step's teacher pass reuses from the
            student's pass.
        teachers: How many networks make the M-step's teacher pass.
        teacher_model: The name of the network that makes it; None for the policy's own.
        reads: How many passes over the student's sequences without a gradient there are, on average over steps.
        prior: The distinct tokens of the E-step's prior pass.
        prior_reused: How many tokens' keys and values of each prompt the prior's pass reuses from the teacher's pass.
        e_share: The share of the steps that have an E-step.
        e_epochs: How often an E-step goes over the batch.
        separate_shift: Whether the E-step computes delta in a pass of its own.
    """

    rollouts: int
    student: int
    teacher: int
    m_teacher: int
    m_teacher_reused: int
    teachers: int
    teacher_model: str | None
    reads: float
    prior: int
    prior_reused: int
    e_share: float
    e_epochs: int
    separate_shift: bool


def step_passes(settings: VPDConfig, lengths: Lengths, default_kernel: PackedKernel) -> StepPasses:
    """Count the passes that the algorithm makes, and their tokens.

    Args:
        settings: The run's settings.
        lengths: The lengths of a typical rollout.
        default_kernel: The attention kernel that ``model.packed_attention = "auto"`` means.
    """
    algorithm = settings.make_algorithm()
    prompts, group = settings.rollout.prompts_per_step, settings.rollout.num_generations
    passes = algorithm.passes(prompts)
    student = prompts * (lengths.prompt + group * lengths.completion)
    # A sibling's solution is the same text for the whole group but its own author.
    own_texts = 2 if settings.feedback.sources[0] == "sibling" else group
    teacher = prompts * (lengths.prompt + own_texts * lengths.feedback + group * lengths.completion)
    teacher *= algorithm.reads_feedback
    is_one_pass = passes.e_is_whole and teacher <= settings.optim.micro_batch_tokens
    has_dropout = settings.model.lora is not None and settings.model.lora.lora_dropout > 0
    chosen = settings.model.packed_attention
    reuses = reuses_keys(default_kernel if chosen == "auto" else chosen) and not has_dropout
    m_teacher_reused = lengths.prompt if reuses and passes.teacher_reuses_keys else 0
    # The E-step's prior reuses those of the teacher's pass, where the E-step is a single pass.
    prior_reused = lengths.prompt if reuses and is_one_pass and passes.prior_reuses_keys else 0
    return StepPasses(
        rollouts=prompts * group,
        student=student,
        teacher=teacher,
        m_teacher=(teacher if passes.teacher_reads_feedback else student) - prompts * m_teacher_reused,
        m_teacher_reused=m_teacher_reused,
        teachers=passes.teacher_reads,
        teacher_model=passes.teacher_model,
        reads=passes.student_reads,
        prior=student - prompts * prior_reused,
        prior_reused=prior_reused,
        e_share=passes.e_steps,
        e_epochs=passes.e_epochs,
        separate_shift=not is_one_pass,
    )
