"""The settings of the environments: each has a section of its own, chosen by ``data.environment``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from vpd.config.section import Section


class EndpointSettings(Section):
    """An OpenAI-compatible endpoint where a chat model answers."""

    model: str
    """The name of the model at the endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """The address of the OpenAI-compatible interface."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself stays out of configs and runs."""
    timeout: float = Field(default=60.0, gt=0)
    """How long to wait for one answer, in seconds."""
    max_retries: int = Field(default=4, ge=0)
    """How often to ask again after an error of the server or of the connection; the wait grows each time."""
    concurrency: int = Field(default=16, ge=1)
    """How many questions are on their way at the same time."""
    temperature: float | None = Field(default=0.0, ge=0)
    """The sampling temperature; None leaves it to the endpoint."""
    max_tokens: int | None = Field(default=1024, ge=1)
    """The length limit of an answer, in tokens; None leaves it to the endpoint."""


class ReasoningGymPart(Section):
    """One dataset of a composite of reasoning-gym's datasets."""

    dataset: str
    """The name of the dataset in reasoning-gym."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """The dataset's own parameters, without ``seed`` and ``size``."""
    weight: float = Field(default=1.0, gt=0)
    """How often the dataset is drawn, in proportion to the other parts."""


class ReasoningGymData(Section):
    """Generated questions of reasoning-gym, judged by its own scorers."""

    environment: Literal["reasoning_gym"] = "reasoning_gym"
    """The environment's name."""
    dataset: str | None = None
    """The name of the dataset in reasoning-gym, such as ``chain_sum``."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """The dataset's own parameters, without ``seed`` and ``size``."""
    datasets: list[ReasoningGymPart] = Field(default_factory=list)
    """A composite of several datasets, mixed by weight, in place of ``dataset`` and ``parameters``."""
    curriculum: list[int | dict[str, Any]] = Field(default_factory=list)
    """The stages of the training split, from easy to hard. Each is a level of the package's own curricula, or
    parameters that replace the given ones of the same names. The other splits have questions of the last stage;
    ``rollout.next_stage_at`` says when the next stage begins."""
    worked: bool = False
    """Ask for the steps, one per line, and judge them too. The datasets ``chain_sum``, ``basic_arithmetic`` (with +
    and - alone) and ``products`` have steps."""
    feedback: Literal["outcome", "location", "reference"] = "location"
    """How much the text says: ``outcome`` tells right from wrong; ``location`` also says where the first error is;
    ``reference`` also gives the right answer."""
    train_size: int = Field(default=2000, ge=1)
    """The number of questions in the train split."""
    selection_size: int = Field(default=100, ge=1)
    """The number of questions in the selection split."""
    final_size: int = Field(default=300, ge=1)
    """The number of questions in the final split."""
    seed: int = 0
    """The seed of the questions; the run's own seed does not change them."""


class McqData(Section):
    """Multiple-choice questions with a letter as the answer."""

    environment: Literal["mcq"] = "mcq"
    """The environment's name."""
    path: str
    """A folder with ``train.jsonl`` and ``test.jsonl``, one JSONL file, a Hugging Face dataset id, or
    ``sciknoweval-biology``, ``-chemistry``, ``-material``, ``-physics`` (the level-3 questions from the hub)."""
    feedback: Literal["outcome", "reference"] = "outcome"
    """How much the text says: ``outcome`` tells right from wrong and names errors of form; ``reference`` also gives the
    right letter."""
    scorer: Literal["tags", "sdpo"] = "tags"
    """How the letter is read: ``tags`` takes it from the last pair of answer tags, whatever its case; ``sdpo`` is for
    comparisons with SDPO and also takes a letter behind an unclosed ``<answer>`` or without tags, but no small one."""
    selection_size: int = Field(default=100, ge=1)
    """The number of training questions that become the selection split."""
    final_size: int | None = None
    """The largest number of test questions in the final split, by default all of them. Without a test file, the number
    of training questions that become the final split."""
    seed: int = 0
    """The seed that decides the split."""


class PromptData(Section):
    """Prompts of a dataset, judged by reward functions with TRL's signature."""

    environment: Literal["prompts"] = "prompts"
    """The environment's name."""
    path: str | None = None
    """A JSONL file or a Hugging Face dataset id with a ``prompt`` column (text or chat messages); None where
    ``VPDTrainer(train_dataset=...)`` brings the prompts."""
    reward_funcs: list[str] | None = Field(default=None, min_length=1)
    """The reward functions with TRL's signature, each as ``package.module:function``. Without any, completions are not
    judged, which only ``algorithm.type = "opd"`` can do with."""
    reward_weights: list[float] | None = None
    """One weight for each reward function; by default all weights are 1."""
    selection_size: int | None = Field(default=None, ge=1)
    """The number of training prompts that become the selection split, by default a tenth, at most 100; an
    ``eval_dataset`` takes their place."""
    final_size: int | None = Field(default=None, ge=1)
    """The number of training prompts that become the final split where the data has no test split, by default a tenth,
    at most 300."""
    seed: int = 0
    """The seed that decides the split."""


class CodeLimits(Section):
    """The limits of one program in the sandbox."""

    seconds: float = Field(default=5.0, gt=0)
    """The time limit of one test, in seconds, wall-clock and CPU."""
    memory_mb: int = Field(default=1024, ge=128)
    """The address space of a program in MB, the interpreter's own memory included."""
    output_kb: int = Field(default=16384, ge=1)
    """How much a program may write to standard output, to standard error and as returned values, each in kB; where a
    test expects more than half of it, twice what the test expects."""
    disk_mb: int = Field(default=16, ge=1)
    """How much all files of a program may hold together, in MB."""
    descriptors: int = Field(default=64, ge=16)
    """How many files a program may have open."""
    threads: int = Field(default=64, ge=1)
    """How many threads a program may have; other processes it may not start."""
    stack_mb: int = Field(default=64, ge=8)
    """How large a program's stack is, and how large that of a thread may be, in MB."""
    packages: list[str] | None = None
    """The installed packages that programs may import besides the standard library; by default those of numpy and
    sortedcontainers that are installed."""


class CodeData(Section):
    """Programming problems, whose programs run in the sandbox."""

    environment: Literal["code"] = "code"
    """The environment's name."""
    path: str
    """``humaneval``, or a JSONL file, folder or Hugging Face dataset id with rows in LiveCodeBench's or the plain
    format."""
    tests: Literal["public", "half"] = "public"
    """The tests that give the reward in training. With ``public`` the public tests do, and the private ones evaluate;
    with ``half`` a seeded random half of all tests does, and all of them evaluate."""
    final: Literal["held_out", "training"] = "held_out"
    """The problems of the final split: ``held_out`` ones, or the ``training`` problems themselves, judged by the tests
    that evaluate, as the paper does on LiveCodeBench."""
    sandbox: Literal["auto", "full", "bubblewrap", "landlock", "unsafe"] = "auto"
    """The isolation of programs: ``auto`` takes the strongest that the machine offers; ``unsafe`` has none."""
    limits: CodeLimits = Field(default_factory=lambda: CodeLimits())
    """The limits of each program."""
    selection_size: int = Field(default=100, ge=1)
    """The number of training problems that become the selection split."""
    final_size: int | None = None
    """The largest number of test problems in the final split, by default all of them. Without a test file, the number
    of training problems that become the final split."""
    seed: int = 0
    """The seed that decides the splits and the halves."""


class MathData(Section):
    """Mathematical problems with a boxed answer, compared by math-verify."""

    environment: Literal["math"] = "math"
    """The environment's name."""
    path: str
    """``dapo-math``, ``math-500``, ``aime24``, ``aime25`` or ``amc23``, or a JSONL file, folder or Hugging Face dataset
    id with columns ``problem`` and ``answer``."""
    final_path: str | None = None
    """The same, for the final split, which takes all of its problems."""
    feedback: Literal["outcome", "reference"] = "outcome"
    """How much the text says: ``outcome`` tells right from wrong and names errors of form; ``reference`` also gives the
    right answer."""
    seconds: float = Field(default=5.0, gt=0)
    """The time limit of one comparison, in seconds."""
    selection_size: int = Field(default=100, ge=1)
    """The number of training problems that become the selection split."""
    final_size: int | None = None
    """The largest number of test problems in the final split, by default all of them. Without test problems, the number
    of training problems that become the final split."""
    seed: int = 0
    """The seed that decides the split."""


class ToolUseData(Section):
    """Requests that are answered by function calls."""

    environment: Literal["tool_use"] = "tool_use"
    """The environment's name."""
    path: str
    """A JSONL file, folder or Hugging Face dataset id with columns ``prompt``, ``calls`` and ``tools``."""
    feedback: Literal["outcome", "location", "reference"] = "location"
    """How much the text says: ``outcome`` tells right from wrong; ``location`` also names the call or the argument that
    is wrong; ``reference`` also gives the right calls."""
    selection_size: int = Field(default=100, ge=1)
    """The number of training requests that become the selection split."""
    final_size: int | None = None
    """The largest number of test requests in the final split, by default all of them. Without a test file, the number
    of training requests that become the final split."""
    seed: int = 0
    """The seed that decides the split."""


class RubricData(Section):
    """Questions whose answers a chat model at an endpoint grades by a rubric."""

    environment: Literal["rubric"] = "rubric"
    """The environment's name."""
    path: str
    """A JSONL file, folder or Hugging Face dataset id with ``prompt``, and optionally ``answer`` and ``rubric``."""
    rubric: str
    """A text that tells the judge what a good answer is."""
    endpoint: EndpointSettings
    """The endpoint of the judge."""
    selection_size: int = Field(default=100, ge=1)
    """The number of training questions that become the selection split."""
    final_size: int | None = None
    """The largest number of test questions in the final split, by default all of them. Without a test file, the number
    of training questions that become the final split."""
    seed: int = 0
    """The seed that decides the split."""


class VerifiersData(Section):
    """The tasks of a taskset of PrimeIntellect's verifiers, scored by the taskset itself."""

    environment: Literal["verifiers"] = "verifiers"
    """The environment's name."""
    id: str
    """The name of an installed taskset, such as ``owner/name``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """The taskset's own settings."""
    tasks: int = Field(default=2000, ge=3)
    """The largest number of tasks that are read; some tasksets never end."""
    selection_size: int = Field(default=100, ge=1)
    """The number of tasks in the selection split."""
    final_size: int = Field(default=300, ge=1)
    """The number of tasks in the final split."""
    seed: int = 0
    """The seed that decides the split."""


DataSettings: TypeAlias = Annotated[
    ReasoningGymData | McqData | CodeData | MathData | ToolUseData | RubricData | VerifiersData | PromptData,
    Field(discriminator="environment"),
]
