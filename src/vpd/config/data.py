"""Settings of the environments: one section an environment, told apart by ``environment``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from vpd.config.section import Section


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
    final: Literal["held_out", "training"] = "held_out"
    """Problems of the final split: ``held_out`` ones, or the ``training`` problems themselves, judged by the tests that
    evaluate, as the paper does on LiveCodeBench."""
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
