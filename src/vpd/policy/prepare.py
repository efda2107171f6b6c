"""Makes what trains from the settings: the policy with adapters, checkpointing and packing, and the accelerator."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vpd.config import ConfigError, LoraSettings, ModelSettings, VPDConfig
from vpd.device import PackedKernel, autocasts, optimises_layers, packed_kernel, training_device
from vpd.packing import check_packed_equals_separate, enable_packed_attention, packable
from vpd.policy.adapter import add_teacher_adapter
from vpd.policy.architecture import backbone_of, causal_lm_of, verify_head
from vpd.policy.cpu import optimise
from vpd.policy.load import LoadedModel, check_chat_template, load_policy
from vpd.policy.module import PolicyModule
from vpd.policy.trainable import check_adapters, make_trainable

logger = logging.getLogger(__name__)

# Packed and separate runs may differ by rounding alone, relative to the largest hidden value. A token that sees what
# it must not, or a position that is off by one, makes a difference of 0.1 or more.
_PACKING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def prepare_policy(
    model: str | PreTrainedModel | PeftModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: ModelSettings,
    peft_config: Any = None,
    teacher_lora: LoraSettings | None = None,
) -> tuple[PolicyModule, PreTrainedTokenizerBase]:
    """Load what is not given, wrap it for training, and check it.

    Args:
        model: A name, a loaded model, or None for ``settings.name``.
        tokenizer: The tokenizer; None for the model's own.
        settings: The settings of the model.
        peft_config: A PEFT config; ``settings.lora`` by default.
        teacher_lora: The settings of the teacher's adapter; None where it has none.

    Raises:
        ConfigError: The model cannot be loaded or is of a kind that cannot be trained here.
    """
    # A kernel that this machine does not have is refused before anything is loaded.
    packed_kernel(settings, training_device())
    if model is None or isinstance(model, str):
        loaded = load_policy(model or settings.name, dtype=getattr(torch, settings.dtype))
        network, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    else:
        network = model
        if tokenizer is None:
            raise ConfigError("Give processing_class, the tokenizer, together with a loaded model.")
        check_chat_template(LoadedModel(causal_lm_of(network), tokenizer))
    if peft_config is None and settings.lora is not None:
        peft_config = LoraConfig(task_type="CAUSAL_LM", **settings.lora.model_dump())
    check_adapters(network, peft_config)
    if peft_config is not None:
        try:
            network = get_peft_model(network, peft_config)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            raise ConfigError(f"The adapters cannot be made: {error}") from error
    make_trainable(network, settings)
    if teacher_lora is not None:
        network = add_teacher_adapter(network, teacher_lora)  # pyright: ignore[reportArgumentType]
    module = make_module(network, settings)
    if settings.gradient_checkpointing:
        # Only now: it hooks the embedding, and layers that others have hooked are computed as they are.
        causal_lm_of(network).activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
        if isinstance(network, PeftModel):
            network.enable_input_require_grads()
    return module, tokenizer


def make_module(network: torch.nn.Module, settings: ModelSettings) -> PolicyModule:
    """Check a network's head, let it compute its layers as the settings say, and wrap it.

    Raises:
        ConfigError: The network's logits are made in a way that is not known here.
    """
    verify_head(network)
    optimise(network, settings)
    kernel = packed_kernel(settings, training_device())
    if settings.packed_attention == "auto" and getattr(causal_lm_of(network).config, "attention_dropout", 0):
        # The one kernel that can drop attention weights.
        kernel = "blocks"
    return PolicyModule(
        network,
        share_prefixes=may_share_prefixes(network, kernel),
        kernel=kernel,
        recomputes=optimises_layers(settings),
        chunk_size=settings.logits_chunk_tokens,
    )


def may_share_prefixes(network: torch.nn.Module, kernel: PackedKernel = "blocks") -> bool:
    """Whether batches of this network may be packed; if not, the log says why and sequences run one by one."""
    causal_lm = causal_lm_of(network)
    possible, reason = packable(causal_lm)
    if possible:
        try:
            enable_packed_attention(causal_lm, kernel)
            difference = check_packed_equals_separate(backbone_of(network), *_small_group(causal_lm)).relative
            tolerance = _PACKING_TOLERANCE[next(causal_lm.parameters()).dtype]
            possible, reason = difference <= tolerance, f"packed and separate runs differ by {difference:.1e}."
        except Exception as error:  # Whatever an architecture raises, it runs without packing.
            possible, reason = False, f"the trial of packing ended with {type(error).__name__}: {error}"
    if not possible:
        logger.warning("Sequences are run one by one, without sharing prefixes: %s", reason)
    return possible


def _small_group(causal_lm: PreTrainedModel) -> tuple[list[list[int]], list[int]]:
    """Make four sequences of one prompt, longer than a sliding window where that is short enough to try."""
    config = causal_lm.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = 24 + (window if window <= 1024 else 0)
    draw = random.Random(0)
    prompt = [draw.randrange(config.vocab_size) for _ in range(length)]
    completions = [[draw.randrange(config.vocab_size) for _ in range(size)] for size in (3, 8, 12)]
    completions.append([*completions[2][:6], *completions[1]])
    return [prompt + completion for completion in completions], [length] * len(completions)


def check_layers(policy: PolicyModule, layers: Sequence[int]) -> None:
    """Raise ConfigError where the loss matches hidden states of layers that the model does not have."""
    count = causal_lm_of(policy.model).config.num_hidden_layers
    for layer in layers:
        if not 1 <= layer <= count:
            raise ConfigError(
                f"algorithm.representation_layers names {layer}, but the model has {count} layers, counted from 1."
            )


def make_accelerator(args: VPDConfig, has_teacher_adapter: bool = False) -> Accelerator:
    """Make the accelerator with the settings' mixed precision and trackers.

    Args:
        args: The run's settings.
        has_teacher_adapter: Whether the two steps train different parameters.

    Raises:
        ConfigError: A tracker is not installed. (accelerate would leave it out without a word.)
    """
    installed = {str(name) for name in get_available_trackers()}
    for name in args.run.report_to:
        if name not in installed:
            raise ConfigError(f"run.report_to names {name}, which is not installed: pip install {name}.")
    return Accelerator(
        mixed_precision="bf16" if autocasts(args.model, training_device()) else "no",
        log_with=list(args.run.report_to) or None,
        project_dir=args.run.output_dir,
        # Buffers (rotary frequencies) never change, and broadcasting them would tie scoring passes together.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                broadcast_buffers=False,
                # Each of the two steps leaves the other's parameters out.
                find_unused_parameters=has_teacher_adapter,
            ),
            # Where the backward pass casts weights again, autocast must not keep their casts.
            AutocastKwargs(cache_enabled=not optimises_layers(args.model)),
        ],
    )
