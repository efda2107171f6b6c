"""A LoRA adapter of the teacher's own: the E-step trains it, the M-step reads it, and the student never sees it.

With shared weights an E-step moves the student too. Here the teacher is the network with the adapter, the student the
same network without; what the E-step learns reaches the student through distillation alone. The paper (VPD, arXiv
2605.15113) names this as future work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from vpd.config import ConfigError, LoraSettings

TEACHER = "teacher"
"""Name of the adapter."""


def add_teacher_adapter(network: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap a network so that it has the adapter, off at first; what was trained before stays trained.

    Raises:
        ConfigError: the network has adapters already, or none of its layers can have one.
    """
    if isinstance(network, PeftModel):
        raise ConfigError(
            'algorithm.teacher = "lora" gives the teacher an adapter of its own, which is not offered where the '
            "student trains adapters too: leave model.lora out"
        )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **settings.model_dump())
        wrapped = get_peft_model(network, config, adapter_name=TEACHER)
    except ValueError as error:
        raise ConfigError(f"The teacher's adapter cannot be made: {error}") from error
    for parameter in trained:
        parameter.requires_grad_(True)
    switch_teacher_adapter(wrapped, on=False)
    return wrapped  # pyright: ignore[reportReturnType]


def has_teacher_adapter(network: nn.Module) -> bool:
    return TEACHER in getattr(network, "peft_config", {})


def switch_teacher_adapter(network: nn.Module, on: bool) -> None:
    """Whether the passes from now on are the teacher's; a checkpointed layer's second pass must find it as it was.

    PEFT's own switch also changes which parameters are trained.
    """
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = not on


@contextmanager
def training_the_teacher_only(network: nn.Module) -> Iterator[None]:
    """Within it, no gradient goes to the weights that the student has too."""
    shared = [p for name, p in network.named_parameters() if p.requires_grad and f".{TEACHER}." not in name]
    for parameter in shared:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in shared:
            parameter.requires_grad_(True)


def without_teacher_adapter(network: PeftModel) -> tuple[PreTrainedModel, dict[str, object]]:
    """The student alone, for saving: its transformers model, and its weights by that model's own names."""
    base = network.get_base_model()
    return base, {plain_name(name): value for name, value in base.state_dict().items() if f".{TEACHER}." not in name}  # pyright: ignore


def plain_name(name: str) -> str:
    """A weight's name in the transformers model, from its name inside the adapter's wrapping."""
    return name.replace(".base_layer.", ".")
