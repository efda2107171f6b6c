"""transformers' callbacks, called at their usual places with the state and the arguments they expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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

_STATE_FILE = "trainer_state.json"


class Callbacks:
    """Holds the callbacks with their ``TrainerState`` and ``TrainerControl``.

    What they ask for through the control is honoured: ``should_evaluate``, ``should_save``, ``should_training_stop``.
    A step is a rollout batch.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        args: TrainingArguments,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        is_main_process: bool,
    ) -> None:
        self._args = args
        self._handler = CallbackHandler([DefaultFlowCallback(), *callbacks], model, tokenizer, optimizer, scheduler)
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=args.max_steps,
            is_local_process_zero=is_main_process,
            is_world_process_zero=is_main_process,
            logging_steps=1,
            eval_steps=int(args.eval_steps or 0),
            save_steps=int(args.save_steps),
            stateful_callbacks=[callback for callback in callbacks if isinstance(callback, ExportableState)],
        )
        self._call("on_init_end")

    def train_begin(self) -> None:
        self.control.should_training_stop = False
        self._call("on_train_begin")

    def step_begin(self) -> None:
        self._call("on_step_begin")

    def step_end(self, step: int) -> None:
        self.state.global_step = step
        self._call("on_step_end")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.state.global_step = step
        logs = {**metrics}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self._handler.on_log(self._args, self.state, self.control, logs)

    def evaluate(self, metrics: Mapping[str, Any]) -> None:
        logs = {f"eval_{name}": value for name, value in metrics.items()}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self._handler.on_evaluate(self._args, self.state, self.control, logs)

    def save(self) -> None:
        self._call("on_save")

    def train_end(self) -> None:
        self._call("on_train_end")

    def save_state(self, folder: Path) -> None:
        self.state.save_to_json(str(folder / _STATE_FILE))

    def load_state(self, folder: Path) -> None:
        loaded = TrainerState.load_from_json(str(folder / _STATE_FILE))
        self.state.global_step = loaded.global_step
        self.state.log_history = loaded.log_history

    def _call(self, event: str) -> None:
        self.control = getattr(self._handler, event)(self._args, self.state, self.control)


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
