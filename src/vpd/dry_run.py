"""``vpd train --dry-run`` shows one group as student and teacher see it."""

from __future__ import annotations

from rich.console import Console

from vpd.trainer import VPDTrainer


def show_one_group(trainer: VPDTrainer, console: Console) -> None:
    """Sample the rollouts of the first training prompt, judge them, and print prompts, tokens and verdicts."""

    def show(title: str, text: str) -> None:
        console.rule(title)
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    trainer.sampler.engine.sync()
    task = trainer.curriculum.tasks_of_step(1)[0]
    sampled = trainer.sampler.sample([task], trainer.args.rollout.num_generations, seed=trainer.args.run.seed)
    batch = trainer.with_feedback(sampled)
    student = batch.rollouts[0].turns[0].prompt_ids
    show(f"student's prompt, {len(student)} tokens", str(trainer.processing_class.decode(student)))
    show("as tokens", str(trainer.processing_class.convert_ids_to_tokens(student)))
    for index, (rollout, success, view) in enumerate(zip(batch.rollouts, batch.is_success, batch.views, strict=True)):
        verdict = rollout.verdict
        outcome = "ungraded" if verdict is None else f"reward {verdict.reward:g}, {'success' if success else 'failure'}"
        show(f"rollout {index + 1}, {len(rollout.completion_ids)} tokens: {outcome}", rollout.text)
        show("verdict's text", "none" if verdict is None or verdict.feedback is None else verdict.feedback)
        if view is None:
            show("teacher's prompt", "none: this rollout has no feedback and is left out of both steps")
        else:
            show(f"teacher's prompt ({view.source}), {len(view.first.prompt_ids)} tokens", view.first.text)
    view = next((view for view in batch.views if view is not None), None)
    if view is not None:
        show(
            "the first teacher's prompt as tokens",
            str(trainer.processing_class.convert_ids_to_tokens(view.first.prompt_ids)),
        )
