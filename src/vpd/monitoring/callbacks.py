"""transformers' callbacks, called at their usual places with the state and the arguments they expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    DefaultFlowCallback,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, ExportableState

from vpd.config import VPDConfig
from vpd.runs.folder import TRAINER_STATE


class Callbacks:
    """Holds the callbacks with their ``TrainerState`` and ``TrainerControl``.

    The run does what they ask for through the control: ``should_evaluate``, ``should_save``, ``should_training_stop``.
    A step is a rollout batch. The state is part of checkpoints, as ``trainer_state.json``.

    Attributes:
        handler: The handler of transformers, to which callbacks are added and from which they are removed.
        control: The ``TrainerControl`` that holds what the callbacks ask for.
        state: The ``TrainerState`` of the run.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        args: TrainingArguments,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        accelerator: Accelerator,
    ) -> None:
        self._args = args
        self.handler = CallbackHandler([DefaultFlowCallback(), *callbacks], model, tokenizer, optimizer, scheduler)
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=args.max_steps,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
            logging_steps=1,
            eval_steps=int(args.eval_steps or 0),
            save_steps=int(args.save_steps),
        )
        self._call("on_init_end")

    def train_begin(self) -> None:
        """Training begins, or goes on."""
        self.control.should_training_stop = False
        self._call("on_train_begin")

    def step_begin(self) -> None:
        """A rollout batch begins."""
        self._call("on_step_begin")

    def step_end(self) -> None:
        """A rollout batch is done, and logged."""
        self._call("on_step_end")

    def log(self, logs: Mapping[str, Any]) -> None:
        """Keep numbers in the state's history, and show them to the callbacks."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.handler.on_log(self._args, self.state, self.control, dict(logs))

    def evaluate(self, metrics: Mapping[str, Any]) -> None:
        """An evaluation is done; its metrics are logged by :meth:`log`."""
        self.control = self.handler.on_evaluate(self._args, self.state, self.control, dict(metrics))

    def save(self) -> None:
        """A checkpoint is saved."""
        self._call("on_save")

    def push_begin(self) -> None:
        """The model is about to be uploaded."""
        self._call("on_push_begin")

    def train_end(self) -> None:
        """Training ends."""
        self._call("on_train_end")

    def save_state(self, folder: Path) -> None:
        """Write the state into a checkpoint, as transformers does."""
        exportable = [callback for callback in self.handler.callbacks if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks  # pyright: ignore
        self.state.save_to_json(str(folder / TRAINER_STATE))

    def load_state(self, folder: Path) -> None:
        """Take over the state of a checkpoint."""
        loaded = TrainerState.load_from_json(str(folder / TRAINER_STATE))
        for name in ("global_step", "log_history", "best_metric", "best_global_step", "best_model_checkpoint"):
            setattr(self.state, name, getattr(loaded, name))

    def _call(self, event: str) -> None:
        self.control = getattr(self.handler, event)(self._args, self.state, self.control)


def training_arguments(config: VPDConfig) -> TrainingArguments:
    """The settings in the form that callbacks know. To be made before the accelerator, whose state it resets."""
    return TrainingArguments(
        output_dir=config.run.output_dir,
        max_steps=config.run.max_steps,
        learning_rate=config.optim.learning_rate,
        logging_steps=1,
        eval_strategy="steps" if config.eval.eval_steps else "no",
        eval_steps=config.eval.eval_steps,
        save_strategy="steps" if config.run.save_steps else "no",
        save_steps=config.run.save_steps or 500,
        seed=config.run.seed,
        report_to=[],
    )
