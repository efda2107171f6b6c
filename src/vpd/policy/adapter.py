"""The teacher's LoRA adapter: the E-step trains it, the M-step reads it, and the student never sees it.

With shared weights an E-step moves the student too. Here the teacher is the network with the adapter, and the student
is the same network without it. What the E-step learns reaches the student through distillation alone. The paper (VPD,
arXiv 2605.15113) names this as future work.
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
"""The name of the adapter."""


def add_teacher_adapter(network: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap a network so that it has the adapter, which is off at first. Parameters that were trained stay trained.

    Raises:
        ConfigError: The network has adapters already, or none of its layers can have one.
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
    """Whether the network has the teacher's adapter."""
    return TEACHER in getattr(network, "peft_config", {})


def switch_teacher_adapter(network: nn.Module, on: bool) -> None:
    """Switch the adapter on for the teacher's passes, or off for the student's.

    Where layers are checkpointed, their recomputation must find the adapter as the forward pass found it. PEFT's own
    switch is not used, because it also changes which parameters are trained.
    """
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = not on


@contextmanager
def training_the_teacher_only(network: nn.Module) -> Iterator[None]:
    """Keep gradients from the weights that the student shares, as long as the context is open."""
    shared = [p for name, p in network.named_parameters() if p.requires_grad and f".{TEACHER}." not in name]
    for parameter in shared:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in shared:
            parameter.requires_grad_(True)


def without_teacher_adapter(network: PeftModel) -> tuple[PreTrainedModel, dict[str, object]]:
    """Return the student alone, for saving: its transformers model, and its weights by that model's own names."""
    base = network.get_base_model()
    return base, {plain_name(name): value for name, value in base.state_dict().items() if f".{TEACHER}." not in name}  # pyright: ignore


def plain_name(name: str) -> str:
    """Turn a weight's name inside the adapter's wrapping into its name in the transformers model."""
    return name.replace(".base_layer.", ".")
