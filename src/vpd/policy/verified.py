"""Saves a policy, loads what was saved, and compares the two: a file that comes back otherwise is no result."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vpd.config import ConfigError
from vpd.policy.adapter import has_teacher_adapter
from vpd.policy.architecture import causal_lm_of
from vpd.policy.load import load_policy, save_policy
from vpd.policy.out_of_memory import is_out_of_memory
from vpd.policy.saved_adapter import largest_difference

_TOKENS = 16
# Merging an adapter rounds once more than computing it apart, relative to the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class UnverifiedError(OSError):
    """What was saved is not what was trained."""


def save_verified(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, keep_base: bool = False
) -> None:
    """Save a policy as :func:`vpd.policy.load.save_policy` does, load it again, and compare logits and tokenizer.

    An adapter whose base cannot be found again, or is not the network that was trained (resized or changed in Python),
    is saved with its base.

    Args:
        model: A transformers model or a PEFT model.
        tokenizer: The tokenizer that is saved beside it.
        folder: The folder to write.
        keep_base: Whether an adapter gets its base beside it where plain PEFT could not load it by name.

    Raises:
        OSError: The folder cannot be written.
        UnverifiedError: What was loaded is not what was saved. It is kept under another name, for a look.
    """
    save_policy(model, tokenizer, folder, keep_base=keep_base)  # pyright: ignore[reportArgumentType]
    problem = _problem(model, tokenizer, folder)
    if problem and isinstance(model, PeftModel) and not has_teacher_adapter(model):
        save_policy(model, tokenizer, folder, keep_base="always")  # pyright: ignore[reportArgumentType]
        problem = _problem(model, tokenizer, folder)
    if problem:
        unproven = Path(folder).with_name(f"{Path(folder).name}-unverified")
        shutil.rmtree(unproven, ignore_errors=True)
        Path(folder).rename(unproven)
        raise UnverifiedError(
            f"The model that was saved is not the one that was trained: {problem} It stands in {unproven}. Set "
            "run.verify_saved = false to save it without this comparison."
        )


def _problem(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> str:
    """Say in what the saved policy differs from the one in memory; nothing where it is the same."""
    network = causal_lm_of(model)
    try:
        loaded = load_policy(str(folder), dtype=next(network.parameters()).dtype, chats=False)
    except (ConfigError, OSError, RuntimeError, ValueError) as error:
        return f"it cannot be loaded ({error})."
    if loaded.tokenizer.chat_template != tokenizer.chat_template:
        return "its chat template comes back as another one."
    if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
        return "its tokenizer comes back with other tokens."
    expected, found = _logits(network), _logits_where_there_is_room(loaded.model, next(network.parameters()).device)
    expected, found = expected.cpu(), found.cpu()
    if expected.shape != found.shape:
        return f"it has {found.shape[-1]} logits, and the trained one {expected.shape[-1]}."
    difference = largest_difference(expected, found)
    tolerance = _TOLERANCE.get(next(network.parameters()).dtype, 1e-3)
    return "" if difference <= tolerance else f"their logits differ by {difference:.1e} of the largest one."


def _logits_where_there_is_room(model: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """Return the logits of a model beside the one that trains; on the CPU where the device has no room for both."""
    try:
        return _logits(model.to(device))  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _logits(model.to("cpu"))  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of tokens from all over the vocabulary, the last ones too: added tokens are the last."""
    was_training = model.training
    model.eval()
    try:
        count = model.config.get_text_config().vocab_size
        spread = torch.linspace(0, count - 1, _TOKENS, dtype=torch.float64).round().long()
        return model(input_ids=spread[None].to(model.device), use_cache=False).logits[0].float()  # pyright: ignore
    finally:
        model.train(was_training)
