"""Which loss on which rollouts when: one small file an algorithm, with its settings."""

from vpd.algorithms.base import Algorithm, ExampleBatch, Passes, TokenNumbers, UpdateResult
from vpd.algorithms.example import (
    Example,
    ExampleTurn,
    make_examples,
    student_view,
    teacher_view,
    with_teacher,
)
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.joint import Joint, JointSettings
from vpd.algorithms.opd import OPD, OPDSettings, TeacherModelSettings
from vpd.algorithms.opsa import OPSA, OPSASettings
from vpd.algorithms.reshape import Reshape, ReshapeSettings
from vpd.algorithms.reweight import Reweight, ReweightSettings
from vpd.algorithms.sdpo import SDPO, SDPOSettings
from vpd.algorithms.verified import Verified, VerifiedSettings
from vpd.algorithms.vpd import VPD, VPDSettings

__all__ = [
    "GRPO",
    "OPD",
    "OPSA",
    "SDPO",
    "VPD",
    "Algorithm",
    "Example",
    "ExampleBatch",
    "ExampleTurn",
    "GRPOSettings",
    "Joint",
    "JointSettings",
    "OPDSettings",
    "OPSASettings",
    "Passes",
    "Reshape",
    "ReshapeSettings",
    "Reweight",
    "ReweightSettings",
    "SDPOSettings",
    "TeacherModelSettings",
    "TokenNumbers",
    "UpdateResult",
    "VPDSettings",
    "Verified",
    "VerifiedSettings",
    "make_examples",
    "student_view",
    "teacher_view",
    "with_teacher",
]
