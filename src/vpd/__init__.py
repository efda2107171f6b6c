"""Variational Policy Distillation: train language models from textual feedback."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpd.algorithms import (
        Algorithm,
        Example,
        ExampleBatch,
        GRPOSettings,
        JointSettings,
        OPDSettings,
        OPSASettings,
        Passes,
        ReshapeSettings,
        ReweightSettings,
        SDPOSettings,
        TeacherModelSettings,
        UpdateResult,
        VPDSettings,
        student_view,
        teacher_view,
        with_teacher,
    )
    from vpd.config import (
        AlgorithmSettings,
        CodeData,
        ConfigError,
        CritiqueSettings,
        EndpointSettings,
        EvalSettings,
        FeedbackSettings,
        LoraSettings,
        MathData,
        McqData,
        ModelSettings,
        MStepSettings,
        OptimSettings,
        PolicyGradientSettings,
        PromptData,
        ReasoningGymData,
        RolloutSettings,
        RubricData,
        RunSettings,
        Templates,
        ToolUseData,
        VerifiersData,
        VPDConfig,
        WarmStartSettings,
        register_algorithm,
    )
    from vpd.environments import Environment
    from vpd.feedback import FeedbackSource, FeedbackTexts
    from vpd.policy.learner import Learner, TrainingPass
    from vpd.policy.objectives import Forward, Imitate, Objective, Outputs
    from vpd.rollout import LocalEngine, RolloutEngine, Sample, SamplingParameters
    from vpd.runs import RunError, TrainOutput
    from vpd.trainer import VPDTrainer
    from vpd.types import Demonstration, Rollout, Task, Turn, Verdict

__all__ = [
    "Algorithm",
    "AlgorithmSettings",
    "CodeData",
    "ConfigError",
    "CritiqueSettings",
    "Demonstration",
    "EndpointSettings",
    "Environment",
    "EvalSettings",
    "Example",
    "ExampleBatch",
    "FeedbackSettings",
    "FeedbackSource",
    "FeedbackTexts",
    "Forward",
    "GRPOSettings",
    "Imitate",
    "JointSettings",
    "Learner",
    "LocalEngine",
    "LoraSettings",
    "MStepSettings",
    "MathData",
    "McqData",
    "ModelSettings",
    "OPDSettings",
    "OPSASettings",
    "Objective",
    "OptimSettings",
    "Outputs",
    "Passes",
    "PolicyGradientSettings",
    "PromptData",
    "ReasoningGymData",
    "ReshapeSettings",
    "ReweightSettings",
    "Rollout",
    "RolloutEngine",
    "RolloutSettings",
    "RubricData",
    "RunError",
    "RunSettings",
    "SDPOSettings",
    "Sample",
    "SamplingParameters",
    "Task",
    "TeacherModelSettings",
    "Templates",
    "ToolUseData",
    "TrainOutput",
    "TrainingPass",
    "Turn",
    "UpdateResult",
    "VPDConfig",
    "VPDSettings",
    "VPDTrainer",
    "Verdict",
    "VerifiersData",
    "WarmStartSettings",
    "register_algorithm",
    "student_view",
    "teacher_view",
    "with_teacher",
]

# The module that each public name comes from: a new name has its place here, above in __all__, and in the imports.
_HOMES = {
    "vpd.algorithms": [
        "Algorithm",
        "Example",
        "ExampleBatch",
        "GRPOSettings",
        "JointSettings",
        "OPDSettings",
        "OPSASettings",
        "Passes",
        "ReshapeSettings",
        "ReweightSettings",
        "SDPOSettings",
        "TeacherModelSettings",
        "UpdateResult",
        "VPDSettings",
        "student_view",
        "teacher_view",
        "with_teacher",
    ],
    "vpd.config": [
        "AlgorithmSettings",
        "CodeData",
        "ConfigError",
        "CritiqueSettings",
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
        "RolloutSettings",
        "RubricData",
        "RunSettings",
        "Templates",
        "ToolUseData",
        "VPDConfig",
        "VerifiersData",
        "WarmStartSettings",
        "register_algorithm",
    ],
    "vpd.environments": ["Environment"],
    "vpd.feedback": ["FeedbackSource", "FeedbackTexts"],
    "vpd.policy.learner": ["Learner", "TrainingPass"],
    "vpd.policy.objectives": ["Forward", "Imitate", "Objective", "Outputs"],
    "vpd.rollout": ["LocalEngine", "RolloutEngine", "Sample", "SamplingParameters"],
    "vpd.runs": ["RunError", "TrainOutput"],
    "vpd.trainer": ["VPDTrainer"],
    "vpd.types": ["Demonstration", "Rollout", "Task", "Turn", "Verdict"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # A name is imported on first use: torch takes seconds to load, which `vpd --help` need not pay.
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'vpd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
