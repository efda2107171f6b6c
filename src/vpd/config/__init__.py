"""The settings of a run: one schema for TOML files, for ``--set section.key=value`` and for Python.

Where a setting means the same as one of ``transformers.TrainingArguments`` or of TRL, it has the same name. Unknown
keys are errors.
"""

from vpd.config.algorithm import (
    AlgorithmSettings,
    MStepSettings,
    PolicyGradientSettings,
    algorithm_class,
    bounded_importance,
    register_algorithm,
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
    "AlgorithmSettings",
    "CodeData",
    "ConfigError",
    "CritiqueSettings",
    "DataSettings",
    "EndpointSettings",
    "EvalSettings",
    "FeedbackSettings",
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
    "RolloutSettings",
    "RubricData",
    "RunSettings",
    "Section",
    "Templates",
    "ToolUseData",
    "VPDConfig",
    "VerifiersData",
    "WarmStartSettings",
    "algorithm_class",
    "bounded_importance",
    "register_algorithm",
    "sentences_of",
]
