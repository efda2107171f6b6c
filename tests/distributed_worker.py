"""One process of a distributed update on recorded rollouts; started by the test of the same name."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from toy import ToyEnvironment, toy_trainer

from vpd.rollout import Sampled
from vpd.types import Rollout, Turn


def recorded(trainer, scenario: str) -> list[Rollout]:
    """Two prompts of four rollouts; those of the second are ungraded in ``one_rank_idle``, and without a text in
    ``one_rank_untaught``."""
    environment, generator = ToyEnvironment(), torch.Generator().manual_seed(0)
    rollouts = []
    for group, task in enumerate(environment.tasks("train")[:2]):
        prompt = trainer.prompts.student(task.prompt)
        for index in range(4):
            text = "".join(chr(int(c)) for c in torch.randint(97, 123, (3 + index,), generator=generator))
            ids = trainer.processing_class(text, add_special_tokens=False)["input_ids"]
            # Both outcomes in both groups, whatever the letters say.
            verdict = environment.judge(task, "b" if index % 2 else "a")
            if scenario == "one_rank_untaught" and group == 1:
                verdict = replace(verdict, feedback=None)
            graded = scenario != "one_rank_idle" or group == 0
            rollouts.append(
                Rollout(task, group, [Turn(prompt, ids, [0.0] * len(ids), False, text)], verdict if graded else None)
            )
    return rollouts


def main(folder: Path, scenario: str, algorithm: str) -> None:
    trainer = toy_trainer(folder / "run", algorithm=json.loads(algorithm))
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    mine = [rollout for rollout in recorded(trainer, scenario) if rollout.group % processes == process]
    metrics, _ = trainer.update(trainer.with_feedback(Sampled(mine, seed=0)), step=1)
    if trainer.accelerator.is_main_process:
        torch.save({"metrics": metrics, "weights": trainer.model.state_dict(), "before": before}, folder / "result.pt")
    trainer.accelerator.wait_for_everyone()
    # Not by the interpreter's own way out: a thread of gloo may wait for it to let go of a finished collective's
    # tensors, while the process group's destructor waits for that thread.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
