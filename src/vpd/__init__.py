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
        ReshapeSettings,
        ReweightSettings,
        SDPOSettings,
        UpdateResult,
        VPDSettings,
        student_view,
        teacher_view,
    )
    from vpd.config import (
        AlgorithmSettings,
        ConfigError,
        EvalSettings,
        FeedbackSettings,
        LoraSettings,
        ModelSettings,
        MStepSettings,
        OptimSettings,
        PolicyGradientSettings,
        RolloutSettings,
        RunSettings,
        VPDConfig,
        WarmStartSettings,
        register_algorithm,
    )
    from vpd.environments import Environment
    from vpd.feedback import FeedbackSource, FeedbackTexts
    from vpd.policy.learner import Learner, TrainingPass
    from vpd.rollout import LocalEngine, RolloutEngine, Sample, SamplingParameters
    from vpd.runs import RunError, TrainOutput
    from vpd.trainer import VPDTrainer
    from vpd.types import Demonstration, Rollout, Task, Verdict

__all__ = [
    "Algorithm",
    "AlgorithmSettings",
    "ConfigError",
    "Demonstration",
    "Environment",
    "EvalSettings",
    "Example",
    "ExampleBatch",
    "FeedbackSettings",
    "FeedbackSource",
    "FeedbackTexts",
    "GRPOSettings",
    "JointSettings",
    "Learner",
    "LocalEngine",
    "LoraSettings",
    "MStepSettings",
    "ModelSettings",
    "OPDSettings",
    "OPSASettings",
    "OptimSettings",
    "PolicyGradientSettings",
    "ReshapeSettings",
    "ReweightSettings",
    "Rollout",
    "RolloutEngine",
    "RolloutSettings",
    "RunError",
    "RunSettings",
    "SDPOSettings",
    "Sample",
    "SamplingParameters",
    "Task",
    "TrainOutput",
    "TrainingPass",
    "UpdateResult",
    "VPDConfig",
    "VPDSettings",
    "VPDTrainer",
    "Verdict",
    "WarmStartSettings",
    "register_algorithm",
    "student_view",
    "teacher_view",
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
        "ReshapeSettings",
        "ReweightSettings",
        "SDPOSettings",
        "UpdateResult",
        "VPDSettings",
        "student_view",
        "teacher_view",
    ],
    "vpd.config": [
        "AlgorithmSettings",
        "ConfigError",
        "EvalSettings",
        "FeedbackSettings",
        "LoraSettings",
        "MStepSettings",
        "ModelSettings",
        "OptimSettings",
        "PolicyGradientSettings",
        "RolloutSettings",
        "RunSettings",
        "VPDConfig",
        "WarmStartSettings",
        "register_algorithm",
    ],
    "vpd.environments": ["Environment"],
    "vpd.feedback": ["FeedbackSource", "FeedbackTexts"],
    "vpd.policy.learner": ["Learner", "TrainingPass"],
    "vpd.rollout": ["LocalEngine", "RolloutEngine", "Sample", "SamplingParameters"],
    "vpd.runs": ["RunError", "TrainOutput"],
    "vpd.trainer": ["VPDTrainer"],
    "vpd.types": ["Demonstration", "Rollout", "Task", "Verdict"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # A name is imported on first use: torch takes seconds to load, which `vpd --help` need not pay.
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'vpd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
