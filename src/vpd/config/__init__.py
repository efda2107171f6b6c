"""Every setting of a run: one schema for TOML files, for ``--set section.key=value`` and for Python.

Names are those of ``transformers.TrainingArguments`` and of TRL where the meaning is the same. Unknown keys are errors.
"""

from vpd.config.algorithm import (
    GRPO,
    OPSA,
    SDPO,
    VPD,
    AlgorithmSettings,
    Joint,
    MStepSettings,
    PolicyGradientSettings,
    Reshape,
    Reweight,
    UpdateSettings,
)
from vpd.config.data import (
    CodeData,
    DataSettings,
    EndpointSettings,
    MathData,
    McqData,
    PromptData,
    ReasoningGymData,
    ReasoningGymPart,
    RubricData,
    ToolUseData,
    VerifiersData,
)
from vpd.config.feedback import (
    CritiqueSettings,
    FeedbackSettings,
    RolloutSettings,
    Templates,
)
from vpd.config.lora import LoraSettings
from vpd.config.run import (
    EvalSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    VPDConfig,
    WarmStartSettings,
)
from vpd.config.section import (
    ConfigError,
    Section,
    sentences_of,
)

__all__ = [
    "GRPO",
    "OPSA",
    "SDPO",
    "VPD",
    "AlgorithmSettings",
    "CodeData",
    "ConfigError",
    "CritiqueSettings",
    "DataSettings",
    "EndpointSettings",
    "EvalSettings",
    "FeedbackSettings",
    "Joint",
    "LoraSettings",
    "MStepSettings",
    "MathData",
    "McqData",
    "ModelSettings",
    "OptimSettings",
    "PolicyGradientSettings",
    "PromptData",
    "ReasoningGymData",
    "ReasoningGymPart",
    "Reshape",
    "Reweight",
    "RolloutSettings",
    "RubricData",
    "RunSettings",
    "Section",
    "Templates",
    "ToolUseData",
    "UpdateSettings",
    "VPDConfig",
    "VerifiersData",
    "WarmStartSettings",
    "sentences_of",
]
