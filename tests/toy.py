"""A run small enough for a test: a random two-layer Llama, bytes as tokens, and tasks that a coin would half solve."""

from __future__ import annotations

import string
from typing import Any

from tiny import llama, tokenizer

from vpd import Environment, Task, Verdict, VPDConfig, VPDTrainer
from vpd.types import Demonstration

ALPHABET = string.ascii_letters + string.digits


class ToyEnvironment(Environment):
    """Right is whatever ends with an even character; the text says so, and about what was written."""

    def tasks(self, split):
        count, first = {"train": (40, 0), "selection": (12, 100), "final": (8, 200)}[split]
        return [
            Task(f"{split}-{i}", [{"role": "user", "content": f"Number {i}."}]) for i in range(first, first + count)
        ]

    def judge(self, task, completion):
        is_even = bool(completion) and ord(completion[-1]) % 2 == 0
        return Verdict(float(is_even), f"It ends with {completion[-1:]}, which is {'even' if is_even else 'odd'}.")

    def demonstrations(self, count):
        # Attempts differ, so that so do the texts about them.
        return [Demonstration(task, "b", "acegi"[i % 5]) for i, task in enumerate(self.tasks("train")[:count])]


def toy_config(output_dir, **sections: dict[str, Any]) -> VPDConfig:
    """Two prompts of four rollouts a step; each section's settings replace or extend the toy's."""
    values: dict[str, dict[str, Any]] = {
        "model": {"autocast": "none"},
        "rollout": {
            "prompts_per_step": 2,
            "num_generations": 4,
            "max_prompt_length": 400,
            "max_completion_length": 16,
            "dtype": "float32",
            # A random model hardly ever ends a sequence by itself.
            "stop_strings": list(ALPHABET),
        },
        "feedback": {"sources": ["environment"], "max_prompt_length": 1000},
        "algorithm": {"type": "vpd", "e_step_every": 2},
        "optim": {"learning_rate": 1e-3},
        "eval": {"preflight_tasks": 2, "final_tasks": 4, "eval_steps": 0},
        "run": {"output_dir": str(output_dir), "max_steps": 2},
    }
    for name, settings in sections.items():
        is_other_kind = settings.get("type", "vpd") != "vpd"
        values[name] = settings if is_other_kind else {**values.get(name, {}), **settings}
    return VPDConfig.parse(values)


def toy_trainer(
    output_dir, callbacks=None, peft_config=None, feedback_sources=None, **sections: dict[str, Any]
) -> VPDTrainer:
    return VPDTrainer(
        model=toy_model(),
        args=toy_config(output_dir, **sections),
        environment=ToyEnvironment(),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
        feedback_sources=feedback_sources,
    )


def toy_model():
    model = llama()
    model.config.max_position_embeddings = 2048
    return model
