"""The phases of a run around its EM loop prepare it, evaluate and save during it, and write its result."""

from __future__ import annotations

import math
from pathlib import Path

from vpd.algorithms.warm_start import demonstration_sequences, warm_start
from vpd.base_trainer import BaseTrainer
from vpd.feedback import CritiqueSource
from vpd.policy.load import end_of_turn
from vpd.report import write_report
from vpd.runs.result import TrainOutput, mean_loss


def open_run(trainer: BaseTrainer, resume: bool | str | Path | None) -> bool:
    """Open the run's folder and the trackers, load a checkpoint where asked, and return whether there was one."""
    args, journal, state = trainer.args, trainer.journal, trainer.run_state
    checkpoint = trainer.checkpoints.open(resume)
    journal.folder = trainer.checkpoints.folder
    if checkpoint is not None:
        trainer.sampler.engine.sync()
        journal.say(f"Going on from {checkpoint}.")
    if journal.folder is not None and (changed := journal.folder.write_config(args)):
        journal.warn("changed_settings", f"The run began with other settings: {changed}.", state.step)
    if args.run.report_to:
        trainer.accelerator.init_trackers("vpd", config={"config": args.model_dump_json()})
    # The settings as they are now decide anew whether the run ends.
    state.stopped_by = None
    return checkpoint is not None


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
    for weights in trainer.learner.copies.values():
        weights.assign(trainer.learner.module)
    for name, text in trainer.algorithm.warnings().items():
        trainer.journal.warn(name, text)
    if args.eval.preflight_tasks and trainer.algorithm.reads_feedback:
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


def after_step(trainer: BaseTrainer) -> None:
    """Evaluate and save where the callbacks ask for it."""
    control = trainer.callbacks.control
    # A callback may have asked on one process alone, but evaluating and saving need all of them.
    evaluates, saves = trainer.learner.total(control.should_evaluate, control.should_save)
    if evaluates:
        by_group = trainer.args.algorithm.success == "group"
        _note_accuracy(trainer, trainer.evaluate("selection")["eval_reward" if by_group else "eval_accuracy"])
    if saves:
        save_checkpoint(trainer)


def _note_accuracy(trainer: BaseTrainer, accuracy: float) -> None:
    """Keep the best weights so far, and stop where nothing better has come for long enough."""
    settings, state, public = trainer.args.eval, trainer.run_state, trainer.state
    if state.note_accuracy(accuracy):
        public.best_metric, public.best_global_step = accuracy, state.step
        if settings.load_best_model_at_end:
            public.best_model_checkpoint = str(trainer.checkpoints.keep_best())
    elif state.stale_evaluations >= (settings.early_stopping_patience or math.inf):
        trainer.monitor.stop("early_stopping")


def save_checkpoint(trainer: BaseTrainer) -> None:
    """Save what a resume needs, and tell the callbacks."""
    trainer.checkpoints.save()
    trainer.callbacks.save()


def after_training(trainer: BaseTrainer) -> None:
    """End a run that was not interrupted: load the best weights, make the final measurements, and save the model."""
    args, state = trainer.args, trainer.run_state
    if args.eval.load_best_model_at_end and state.best_step not in (-1, state.step):
        trainer.checkpoints.load_best()
        trainer.sampler.engine.sync()
        by_group = args.algorithm.success == "group"
        found = f"a mean reward of {state.best_accuracy:.4g}" if by_group else f"{state.best_accuracy:.1%}"
        trainer.journal.say(f"Back to the weights of step {state.best_step}, {found} on the selection split.")
    if not args.run.max_steps and args.eval.eval_steps:
        trainer.evaluate("selection")
    if state.step or not state.rows:
        trainer.measurements.row(f"after {args.algorithm.title}", state.train_seconds)
    if state.step and args.eval.preflight_tasks and trainer.algorithm.reads_feedback:
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
    report = None
    if folder is not None:
        folder.write_result(
            {
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
        )
        report = str(write_report(folder.path))
    metrics = {
        "train_runtime": seconds,
        "train_seconds": state.train_seconds,
        "train_steps_per_second": state.step / state.train_seconds if state.train_seconds else 0.0,
        "skipped_e_steps": state.skipped_e_steps,
        "stopped_by": state.stopped_by,
        "interrupted": interrupted,
        "rows": state.rows,
        "report": report,
    }
    return TrainOutput(state.step, mean_loss(trainer.state.log_history), metrics)
