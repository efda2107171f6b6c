"""The phases of a run around its EM loop prepare it, evaluate and save during it, and write its result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from vpd.algorithms.base import TokenNumbers
from vpd.algorithms.warm_start import demonstration_sequences, warm_start
from vpd.base_trainer import BaseTrainer
from vpd.batch import Batch
from vpd.feedback import CritiqueSource
from vpd.monitoring.warnings import fall_warning
from vpd.policy.load import end_of_turn, load_weights
from vpd.report import write_report
from vpd.runs.files import RunError
from vpd.runs.result import TrainOutput, finished_result, mean_loss


@dataclass(frozen=True)
class OpenRun:
    """A run that may begin or go on.

    Attributes:
        goes_on: Whether a checkpoint was loaded.
        finished: The result of a run that had finished already, and is left as it is; None for others.
    """

    goes_on: bool
    finished: TrainOutput | None = None


@contextmanager
def open_run(trainer: BaseTrainer, resume: bool | str | Path | None) -> Iterator[OpenRun]:
    """Hold the run's folder open, with the checkpoint loaded that was asked for, until the block ends.

    Raises:
        RunError: In the block, logits were not finite.
    """
    args, journal = trainer.args, trainer.journal
    try:
        opened = trainer.checkpoints.open(resume)
        finished = _finished_run(trainer, opened.checkpoint) if resume is True else None
        if finished is not None:
            yield OpenRun(opened.checkpoint is not None, finished)
            return
        damaged = [*opened.damaged, trainer.checkpoints.rewind()]
        journal.folder = trainer.checkpoints.folder
        if opened.checkpoint is not None:
            trainer.sampler.engine.sync()
            journal.say(f"Going on from {opened.checkpoint}.")
        elif opened.began_before:
            journal.say("The run ended before its first checkpoint, so it begins again.")
        _warn_of_what_changed(trainer, [text for text in damaged if text is not None])
        if args.run.report_to:
            trainer.accelerator.init_trackers("vpd", config={"config": args.model_dump_json()})
        # The settings as they are now decide anew whether the run ends.
        trainer.run_state.stopped_by = None
        yield OpenRun(opened.checkpoint is not None)
    except FloatingPointError as error:
        raise RunError(
            f"{error} Go on from the newest checkpoint by --resume, with a lower optim.learning_rate."
        ) from error
    finally:
        trainer.checkpoints.close()


def _warn_of_what_changed(trainer: BaseTrainer, damaged: Sequence[str]) -> None:
    """Write the settings, and warn where they are others than before, and of what is damaged in the folder."""
    journal, step = trainer.journal, trainer.run_state.step
    for text in damaged:
        journal.warn("damaged_files", text, step)
    if journal.folder is not None and (changed := journal.folder.write_config(trainer.args)):
        journal.warn("changed_settings", f"The run began with other settings: {changed}.", step)


def _finished_run(trainer: BaseTrainer, checkpoint: Path | None) -> TrainOutput | None:
    """Return the result of a run that has nothing left to do, with its final weights loaded; None for others."""
    args, state, folder = trainer.args, trainer.run_state, trainer.checkpoints.folder
    found = None if folder is None else finished_result(folder, args, state.step)
    (result,) = broadcast_object_list([found])
    if result is None:
        return None
    state.rows, state.stopped_by = result["rows"], result["stopped_by"]
    if checkpoint is None:
        load_weights(trainer.model, Path(args.run.output_dir) / "model")
    load_final_weights(trainer)
    trainer.sampler.engine.sync()
    ended = f"was stopped by {state.stopped_by}" if state.stopped_by else "has finished"
    trainer.journal.say(
        f"The run {ended} after step {state.step}, and nothing is done again. With a larger run.max_steps, or other "
        "settings, it goes on from there."
    )
    report = None
    if folder is not None:
        page = folder.path / "report.html"
        # The run may have been killed right before its last file.
        report = str(page if page.exists() else write_report(folder.path))
    return _output(trainer, result, 0.0, report)


def before_training(trainer: BaseTrainer) -> None:
    """Begin a new run: measure the base model, make the warm start, and measure whether there is anything to distil."""
    args = trainer.args
    trainer.sampler.engine.sync()
    if args.eval.eval_on_start:
        trainer.measurements.row("base model")
    if args.warm_start.demonstrations:
        _warm_start(trainer)
        if args.eval.eval_on_start or not args.run.max_steps:
            trainer.measurements.row("after warm start")
    if _selects(trainer) and args.run.max_steps:
        _evaluate_selection(trainer)
    for weights in trainer.learner.copies.values():
        weights.assign(trainer.learner.module)
    for name, text in trainer.algorithm.warnings().items():
        trainer.journal.warn(name, text)
    if args.eval.preflight_tasks and trainer.algorithm.follows_teacher:
        trainer.measurements.preflight()


def _warm_start(trainer: BaseTrainer) -> None:
    args, journal = trainer.args, trainer.journal
    sources = [s for s in trainer.sources if args.warm_start.feedback and not isinstance(s, CritiqueSource)]
    sequences = demonstration_sequences(
        trainer.environment,
        trainer.prompts,
        end_of_turn(trainer.processing_class),
        args.warm_start.demonstrations,
        args.algorithm.threshold,
        args.warm_start.seed,
        sources,
    )
    trainer.sampler.engine.release()
    result = warm_start(trainer.learner, sequences, args.warm_start, trainer.processing_class)
    trainer.sampler.engine.sync()
    how = f"{result.steps} steps, loss {result.loss:.3f}" if result.steps else f"found in {result.folder}"
    journal.say(f"Warm start on {result.sequences} sequences: {how}, {result.seconds:.0f} s.")
    journal.log(0, "warm_start", {"steps": result.steps, "loss": result.loss, "seconds": result.seconds})


def show_progress(trainer: BaseTrainer) -> None:
    """Begin the display of the steps that are left."""
    if trainer.accelerator.is_main_process:
        seconds_left = (trainer.args.run.max_seconds or math.inf) - trainer.run_state.train_seconds
        trainer.journal.progress.start(trainer.args.run.max_steps, trainer.run_state.step, seconds_left)


def write_samples(trainer: BaseTrainer, batch: Batch, tokens: Mapping[int, TokenNumbers]) -> None:
    """Keep rollouts of the newest step for people, and all of them where one of its updates was skipped."""
    folder, step, limit = trainer.journal.folder, trainer.run_state.step, trainer.args.run.logged_samples
    suspicious = trainer.learner.skipped.in_batch > 0
    if folder is None or not (limit or suspicious):
        return
    records = batch.records(step, tokens, trainer.algorithm.reads_feedback)
    if limit:
        folder.write_rollouts(step, records[:limit])
    if suspicious:
        folder.write_skipped(step, records)


def tell_of_skipped(trainer: BaseTrainer) -> None:
    """Warn of updates of the newest step that were skipped, and end the run where too many were."""
    skipped, limit = trainer.learner.skipped, trainer.args.optim.max_skipped_updates
    count = skipped.next_batch()
    if not count:
        return
    step = trainer.run_state.step
    trainer.journal.warn(
        "nonfinite",
        f"Loss or gradient of {count} update{'s' * (count > 1)} of step {step} was not finite, and skipped. "
        f"The rollouts are in skipped/step-{step:06d}.parquet. Lower optim.learning_rate if it goes on.",
        step,
    )
    if skipped.in_a_row >= limit:
        trainer.monitor.stop("nonfinite")


def after_step(trainer: BaseTrainer) -> None:
    """Evaluate and save where the callbacks ask for it, or the clock does."""
    control = trainer.callbacks.control
    # One process alone may have been asked, but evaluating and saving need all of them.
    saves = control.should_save or trainer.checkpoints.is_due
    is_last = _selects(trainer) and trainer.run_state.step >= trainer.args.run.max_steps
    evaluates, saves = trainer.learner.total(control.should_evaluate or is_last, saves)
    if evaluates and trainer.environment.judges:
        _evaluate_selection(trainer)
    if saves:
        save_checkpoint(trainer)


def _selects(trainer: BaseTrainer) -> bool:
    """Tell whether the weights are compared on the selection split, which needs a judge."""
    return bool(trainer.args.eval.eval_steps) and trainer.environment.judges


def _evaluate_selection(trainer: BaseTrainer) -> None:
    """Measure the weights on the selection split, keep the best so far, and see whether the run must end."""
    settings, state, public = trainer.args.eval, trainer.run_state, trainer.state
    by_group = trainer.args.algorithm.success == "group"
    measured = trainer.evaluate("selection")
    accuracy = measured["eval_reward" if by_group else "eval_accuracy"]
    if state.note_evaluation(accuracy, measured["eval_reward"]):
        public.best_metric, public.best_global_step = accuracy, state.step
        if settings.load_best_model_at_end:
            public.best_model_checkpoint = str(trainer.checkpoints.keep_best())
    # Rewards have no scale that tells how far is far.
    warning = None if by_group else fall_warning(state.start_accuracy, accuracy, int(measured["eval_n"]))
    if warning is not None:
        trainer.monitor.warn("worse_than_start", warning)
    if state.stale_evaluations >= (settings.early_stopping_patience or math.inf):
        trainer.monitor.stop("early_stopping")


def evaluate_last(trainer: BaseTrainer) -> bool:
    """Measure the last weights on the selection split, and tell whether this was still to be done."""
    is_due = _selects(trainer) and trainer.run_state.step != trainer.run_state.evaluated_step
    if is_due:
        _evaluate_selection(trainer)
    return is_due


def save_last(trainer: BaseTrainer, has_changed: bool) -> None:
    """Save the newest step as training ends, by itself or by a signal.

    Args:
        trainer: The trainer.
        has_changed: Whether there is more to save than a checkpoint of this step would hold by now.
    """
    if trainer.run_state.step and (has_changed or not trainer.checkpoints.is_saved):
        save_checkpoint(trainer)


def save_checkpoint(trainer: BaseTrainer) -> None:
    """Save what a resume needs, and tell the callbacks."""
    trainer.checkpoints.save()
    trainer.callbacks.save()


def load_final_weights(trainer: BaseTrainer) -> bool:
    """Load the best weights where the run ends with them and they are not the newest, and tell whether it did."""
    if not trainer.args.eval.load_best_model_at_end or trainer.run_state.best_step in (-1, trainer.run_state.step):
        return False
    # A run that began without keeping its best weights has none to go back to.
    if trainer.state.best_model_checkpoint is None:
        return False
    trainer.checkpoints.load_best()
    return True


def after_training(trainer: BaseTrainer) -> None:
    """End a run that was not interrupted: load the best weights, make the final measurements, and save the model."""
    args, state = trainer.args, trainer.run_state
    if load_final_weights(trainer):
        trainer.sampler.engine.sync()
        by_group = args.algorithm.success == "group"
        found = f"a mean reward of {state.best_accuracy:.4g}" if by_group else f"{state.best_accuracy:.1%}"
        trainer.journal.say(
            f"Back to the weights of step {state.best_step}, {found} on the selection split"
            + (": nothing that training made was better." if state.best_step == 0 else ".")
        )
    if state.step or not state.rows:
        trainer.measurements.row(f"after {args.algorithm.title}", state.train_seconds)
    if state.step and args.eval.preflight_tasks and trainer.algorithm.follows_teacher:
        trainer.measurements.gap("After training")
    trainer.save_model()
    trainer.journal.end_tracking()


def finish(trainer: BaseTrainer, seconds: float, interrupted: int | None) -> TrainOutput:
    """Write ``result.json`` and the page, and return the result.

    Args:
        trainer: The trainer whose run has ended.
        seconds: The wall-clock seconds of the whole call.
        interrupted: The number of the signal that ended the run early.
    """
    args, state, folder = trainer.args, trainer.run_state, trainer.journal.folder
    result = {
        "rows": state.rows,
        "environment": args.data.environment if args.data else type(trainer.environment).__name__,
        "model": trainer.model.name_or_path or args.model.name,
        "algorithm": args.algorithm.type,
        "steps": state.step,
        "train_seconds": state.train_seconds,
        "skipped_e_steps": state.skipped_e_steps,
        "seconds_total": seconds,
        "stopped_by": state.stopped_by,
        "interrupted": interrupted,
    }
    report = None
    if folder is not None:
        folder.write_result(result)
        report = str(write_report(folder.path))
    return _output(trainer, result, seconds, report)


def _output(trainer: BaseTrainer, result: Mapping[str, Any], seconds: float, report: str | None) -> TrainOutput:
    """Return the contents of ``result.json`` as the result of a call that took so many seconds."""
    steps, train_seconds = result["steps"], result["train_seconds"]
    metrics = {
        "train_runtime": seconds,
        "train_seconds": train_seconds,
        "train_steps_per_second": steps / train_seconds if train_seconds else 0.0,
        **{name: result[name] for name in ("skipped_e_steps", "stopped_by", "interrupted", "rows")},
        "report": report,
    }
    return TrainOutput(steps, mean_loss(trainer.state.log_history), metrics)
