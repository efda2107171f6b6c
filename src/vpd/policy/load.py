"""Loads a network with its tokenizer by name, and saves them to a folder that transformers and vLLM read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vpd.config import ConfigError
from vpd.policy import gguf
from vpd.policy.adapter import TEACHER, has_teacher_adapter, plain_name, without_teacher_adapter
from vpd.policy.model_cache import whole_folder
from vpd.policy.saved_adapter import (
    ADAPTER_CONFIG,
    BASE,
    active_adapter,
    adapter_folder,
    base_of,
    merged,
    save_base,
    write_adapter,
)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and the tokenizer that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Source:
    """The place where transformers finds a model.

    Attributes:
        location: The path or the hub id.
        local: Whether the model must be found without the hub.
    """

    location: str
    local: bool


def load_policy(name: str, *, dtype: torch.dtype = torch.float32, chats: bool = True) -> LoadedModel:
    """Load a chat model from a hub id, a folder, a GGUF file, or the short name ``smollm2-135m-instruct``.

    Local names never reach the network. A folder with an adapter loads its base model, which may be an adapter's result
    itself, and merges the adapter into it; the tokenizer is the folder's own where it has one. Afterwards the tokenizer
    has a chat template and a pad token, which is its end-of-sequence token where it had none, and
    ``model.name_or_path`` is ``name``.

    Args:
        name: The model to load.
        dtype: The dtype of the weights in memory.
        chats: Whether the model must be able to write chats: its tokenizer then has a chat template and a pad token.

    Raises:
        ConfigError: There is no such model, it cannot be reached, or it is of a kind that cannot be trained here:
            vision-language, encoder-decoder, or without a chat template.
    """
    source = _find(name)
    adapter = adapter_folder(Path(source.location)) if source.local else None
    if adapter is not None:
        return _load_adapter(name, adapter, dtype, chats)
    try:
        config = AutoConfig.from_pretrained(source.location, local_files_only=source.local)
        _check_kind(name, config)
        model = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, local_files_only=source.local)
        tokenizer = AutoTokenizer.from_pretrained(source.location, local_files_only=source.local)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(_not_loaded(name, source, error)) from error
    return _named(LoadedModel(model, tokenizer), name, chats)


def _named(loaded: LoadedModel, name: str, chats: bool) -> LoadedModel:
    """Give a loaded model the name that it was loaded by, and check that its parts are whole and fit."""
    loaded.model.config._name_or_path = loaded.model.name_or_path = name
    loaded.tokenizer.name_or_path = name
    if chats:
        check_chat_template(loaded)
        _fill_pad_token(loaded.tokenizer)
    _check_vocabulary(loaded)
    return loaded


def config_of(name: str) -> PretrainedConfig:
    """Return the config of a model that :func:`load_policy` would load; for an adapter, that of its base model.

    Raises:
        ConfigError: There is no such model, or it cannot be reached.
    """
    source = _find(name)
    adapter = adapter_folder(Path(source.location)) if source.local else None
    if adapter is not None:
        return config_of(base_of(adapter))
    try:
        return AutoConfig.from_pretrained(source.location, local_files_only=source.local)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(name, source, error)) from error


def check_chat_template(loaded: LoadedModel) -> None:
    """Raise ConfigError unless the tokenizer can write chats, since every prompt is a chat."""
    if not loaded.tokenizer.chat_template:
        raise ConfigError(
            f"{loaded.tokenizer.name_or_path or 'The tokenizer'} has no chat template, so it is probably of a base "
            "model, not trained for chats: use the instruct version, or put a chat_template.jinja into the model's "
            "folder."
        )


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    keep_base: bool | Literal["always"] = False,
) -> None:
    """Write the model and its tokenizer in Hugging Face layout; a PEFT model is written as its adapter.

    The folder appears whole or not at all. Where it holds a model already, it is replaced. Call this on one process.

    Args:
        model: A transformers model or a PEFT model.
        tokenizer: The tokenizer that is saved beside it, with its chat template.
        folder: The folder to write.
        state_dict: The weights, where the model itself holds only a shard of them.
        keep_base: Whether an adapter gets the network that it adapts beside it, in the folder ``base``, where plain
            PEFT could not load it by its name; ``always`` saves it whatever its name.

    Raises:
        ConfigError: Several adapters are on at once.
        OSError: The folder cannot be written, and nothing half-written is left; or it holds other things than a model,
            which would be lost.
    """
    folder = Path(folder)
    if folder.exists() and not _is_model_folder(folder) and (folder.is_file() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and does not hold a model, so it is not replaced: choose another name.")
    options: dict[str, Any] = {} if state_dict is None else {"state_dict": dict(state_dict)}
    if has_teacher_adapter(model):
        model, options["state_dict"] = without_teacher_adapter(model)  # pyright: ignore
    try:
        with whole_folder(folder, replace=True) as fresh:
            if isinstance(model, PeftModel):
                base = str(getattr(model.get_base_model(), "name_or_path", "") or "")
                if keep_base == "always" or (keep_base and not _is_plain(base)):
                    save_base(model, tokenizer, fresh / BASE)
                    base = str(folder.absolute() / BASE)
                write_adapter(model, fresh, base, options)
            else:
                model.save_pretrained(fresh, **options)
            tokenizer.save_pretrained(fresh)
    except (OSError, SafetensorError) as error:
        raise OSError(f"The model could not be written to {folder}: {error}. Nothing was left behind.") from error


def _is_plain(name: str) -> bool:
    """Whether transformers finds a whole model by this name: a folder with one, or a name on the hub."""
    if not name:
        return False
    path = Path(name).expanduser()
    return (path / "config.json").is_file() or (
        not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    )


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Give a model, PEFT-wrapped or not, the weights that :func:`save_policy` wrote for it."""
    if isinstance(model, PeftModel) and not has_teacher_adapter(model):
        set_peft_model_state_dict(model, load_peft_weights(str(folder)), adapter_name=active_adapter(model))
        return
    dtype = next(model.parameters()).dtype
    weights = load_policy(str(folder), dtype=dtype).model.state_dict()
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        wrapped = {plain_name(name): name for name in base.state_dict() if f".{TEACHER}." not in name}
        base.load_state_dict({wrapped[name]: value for name, value in weights.items()}, strict=False)
        return
    model.load_state_dict(weights)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the token ids that end a completion, sorted.

    Three places know of them and often disagree: the generation config, the tokenizer, and the chat template, which
    closes the assistant's turn with a token such as ``<|im_end|>``.
    """
    configured: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own: Any = tokenizer.eos_token_id
    found = [*(configured if isinstance(configured, list | tuple) else [configured]), own, _end_of_turn(tokenizer)]
    return tuple(sorted({token for token in found if token is not None}))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that closes an answer: the chat template's, or else the tokenizer's end of sequence.

    Raises:
        ConfigError: The tokenizer has neither.
    """
    token: Any = _end_of_turn(tokenizer)
    token = tokenizer.eos_token_id if token is None else token
    if token is None:
        raise ConfigError(f"The tokenizer of {tokenizer.name_or_path} has no end-of-sequence token: set its eos_token.")
    return token


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template writes right after an assistant's message, if it does."""
    if not tokenizer.chat_template:
        return None
    answer = "vpd"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert isinstance(text, str)
    closing = tokenizer(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)["input_ids"]
    return closing[0] if closing and closing[0] in tokenizer.added_tokens_decoder else None


def _find(name: str) -> _Source:
    if name.lower() == gguf.SMOLLM2:
        return _Source(str(gguf.convert_once(gguf.smollm2_file())), local=True)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{name} is a file, but not a GGUF file: name the folder that it is in, or a .gguf file.")
        return _Source(str(gguf.convert_once(path.resolve())), local=True)
    if path.is_dir():
        return _Source(str(_model_folder(name, path)), local=True)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.lower().endswith(".gguf"):
        raise ConfigError(f"There is no file or folder {name} (looked for {path.absolute()}).")
    return _Source(name, local=False)


def _is_model_folder(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG))


def _model_folder(name: str, folder: Path) -> Path:
    """Return the folder itself if it is in Hugging Face layout, else the conversion of the one GGUF file in it."""
    if _is_model_folder(folder) or adapter_folder(folder) is not None:
        return folder
    match sorted(folder.glob("*.gguf")):
        case [file]:
            return gguf.convert_once(file.resolve())
        case []:
            raise ConfigError(f"The folder {name} holds no model: there is no config.json and no GGUF file in it.")
        case files:
            names = ", ".join(file.name for file in files)
            raise ConfigError(f"The folder {name} holds several GGUF files ({names}): name one of them.")


def _load_adapter(name: str, adapter: Path, dtype: torch.dtype, chats: bool) -> LoadedModel:
    base = load_policy(base_of(adapter), dtype=dtype, chats=False)
    tokenizer = base.tokenizer
    for folder in (adapter, adapter.parent):
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            break
    return _named(LoadedModel(merged(base.model, adapter, tokenizer), tokenizer), name, chats)


def _check_kind(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{name} is an encoder-decoder model ({config.model_type}), and only decoder-only language models can be "
            "trained: choose one of those."
        )
    for modality in ("vision", "audio"):
        if hasattr(config, f"{modality}_config"):
            raise ConfigError(
                f"{name} is a model with {modality} input ({config.model_type}), and only text-only language models "
                "can be trained: choose one, or save the language model of this one on its own."
            )


def _not_loaded(name: str, source: _Source, error: Exception) -> str:
    if isinstance(error, ValueError):
        return f"{name} is not a causal language model that transformers can load: {error}"
    if source.local:
        return f"The model in {name} cannot be loaded: {error}"
    return (
        f"There is no folder {name} here, and a model of that name could not be fetched from the Hugging Face hub: "
        f"{error}\nCheck the spelling and the connection, give the path of a folder or a GGUF file, or use "
        f'"{gguf.SMOLLM2}", which needs no hub.'
    )


def _fill_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"The tokenizer of {tokenizer.name_or_path} has neither a pad token nor an end-of-sequence token: set one."
        )
    # A new token would need a resized embedding. Any token can pad, since padding is masked everywhere.
    tokenizer.pad_token = tokenizer.eos_token


def _check_vocabulary(loaded: LoadedModel) -> None:
    embedding = loaded.model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding) and len(loaded.tokenizer) > embedding.num_embeddings:
        raise ConfigError(
            f"The tokenizer of {loaded.tokenizer.name_or_path} has {len(loaded.tokenizer)} tokens, but its network "
            f"only {embedding.num_embeddings}: they do not belong together."
        )
