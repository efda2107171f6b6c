"""The weights that did best on the selection split, kept in the run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from vpd.policy.load import load_weights, save_policy


class BestWeights:
    """Saves weights as ``best-{step}``, so that a resume finds those that its checkpoint knows of.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def save(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
        """To be called on one process."""
        save_policy(model, tokenizer, self._path(step))  # pyright: ignore[reportArgumentType]

    def load(self, model: nn.Module, step: int) -> None:
        """Give the model the weights that were saved after ``step``."""
        load_weights(model, self._path(step))

    def keep_only(self, step: int) -> None:
        """Remove all but those of ``step``."""
        for path in self._folder.glob("best-*"):
            if path != self._path(step):
                shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self._folder / f"best-{step}"
