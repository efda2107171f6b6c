"""Reads a saved PEFT adapter: where it lies, what it adapts, and the network that both make together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vpd.config import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"
"""The folder inside a saved adapter that holds the network that it adapts, where no other place holds it."""


def adapter_folder(folder: Path) -> Path | None:
    """Return the folder of the adapter that lies in ``folder``; None where there is none.

    PEFT writes an adapter with a name of its own into a folder of that name, and one called "default" beside it.

    Raises:
        ConfigError: There are several.
    """
    if (folder / "config.json").is_file():
        return None
    found = [path.parent for path in (folder / ADAPTER_CONFIG, *sorted(folder.glob(f"*/{ADAPTER_CONFIG}")))]
    found = [path for path in found if (path / ADAPTER_CONFIG).is_file()]
    if len(found) > 1:
        names = ", ".join("its own" if path == folder else path.name for path in found)
        raise ConfigError(
            f"The folder {folder} holds several adapters ({names}), of which one alone can be the model: name the "
            "folder of one of them, or keep each adapter in a folder of its own."
        )
    return found[0] if found else None


def base_of(folder: Path) -> str:
    """Return the name of the model that an adapter adapts; a base that was saved with the adapter goes first.

    Raises:
        ConfigError: The adapter does not say.
    """
    if (folder / BASE / "config.json").is_file():
        return str(folder / BASE)
    name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG} does not say which model it adapts: set its base_model_name_or_path."
        )
    return name


def merged(base: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the network that the base and the adapter in ``folder`` make together, without adapters.

    Raises:
        ConfigError: The adapter is of a kind that cannot become a part of the weights.
    """
    config = PeftConfig.from_pretrained(str(folder))
    refuse_virtual_tokens(config)
    _fit_vocabulary(base, folder, tokenizer)
    try:
        wrapped = PeftModel.from_pretrained(base, str(folder))
        _untie(wrapped)
        network: Any = wrapped.merge_and_unload()  # pyright: ignore[reportCallIssue]
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ConfigError(f"The adapter in {folder} cannot be merged into {base.name_or_path}: {error}") from error
    return network


def refuse_virtual_tokens(config: PeftConfig) -> None:
    """Raise ConfigError for prompt, prefix and p-tuning: they put virtual tokens before the sequence.

    Packed sequences and engines have positions for real tokens alone.
    """
    if config.is_prompt_learning:
        raise ConfigError(
            f"Adapters of type {config.peft_type} put virtual tokens before every sequence, which neither packed "
            "passes nor rollouts can have: take one that changes layers, such as LoRA (model.lora)."
        )


def _fit_vocabulary(base: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Resize the base's embeddings to the saved ones, where the adapter was trained with a larger vocabulary."""
    rows = cast(Tensor, base.get_input_embeddings().weight).shape[0]
    saved = [
        value.shape[0]
        for name, value in load_peft_weights(str(folder), device="cpu").items()
        if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight"))
    ]
    wanted = max(saved, default=max(rows, len(tokenizer)))
    if wanted != rows:
        base.resize_token_embeddings(wanted, mean_resizing=False)


def _untie(wrapped: PeftModel) -> None:
    """Give the head weights of its own where an adapter changes the embedding that it shares.

    While the adapter is apart, it changes the embedding alone. Merged into shared weights it would change the head too.
    """
    model: Any = wrapped.get_base_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Where PEFT adapts both sides of a tie by the same weights, they stay tied.
    if head is None or _is_adapted(head) or not _is_adapted(embedding):
        return
    model.config.tie_word_embeddings = False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def _is_adapted(layer: nn.Module) -> bool:
    return isinstance(layer, BaseTunerLayer) or hasattr(layer, "modules_to_save")


def active_adapter(model: PeftModel) -> str:
    """Return the name of the adapter that is on.

    Raises:
        ConfigError: Several are on at once, which no saved adapter could say.
    """
    active = model.active_adapters
    if len(active) != 1:
        raise ConfigError(
            f"One adapter must be active, but {', '.join(active) or 'none'} is: call set_adapter with one."
        )
    return active[0]


def write_adapter(model: PeftModel, folder: Path, base: str, options: dict[str, Any]) -> None:
    """Write the adapter that is on, and the name of its base, right into ``folder``."""
    name = active_adapter(model)
    # Without this option PEFT asks the hub whether the vocabulary was resized. Such a base is saved as a whole.
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False, **options)
    # PEFT puts an adapter with a name of its own into a folder of that name.
    if (folder / name / ADAPTER_CONFIG).is_file():
        for file in (folder / name).iterdir():
            shutil.move(file, folder / file.name)
        (folder / name).rmdir()
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    # An adapter that was loaded names the base that it was saved with, and not the one that it was put on.
    settings["base_model_name_or_path"] = base or settings.get("base_model_name_or_path")
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def save_base(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the network without its adapters, by the names that its weights have without them."""
    network: Any = model.get_base_model()
    own = (getattr(model.base_model, "prefix", None) or "no prefix", ".modules_to_save.", ".trainable_tokens_")
    weights = {}
    for name, value in network.state_dict().items():
        if not any(part in name for part in own):
            for wrapping in (".token_adapter.", ".base_layer.", ".original_module."):
                name = name.replace(wrapping, ".")
            weights[name] = value
    network.save_pretrained(str(folder), state_dict=weights)
    tokenizer.save_pretrained(str(folder))


def largest_difference(model: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest element of the first."""
    scale = model.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((model - other).abs().max() / scale)
