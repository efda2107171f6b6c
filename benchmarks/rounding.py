"""Measure how far autocast moves the gradient of the M-step, and how much of that the head's products contribute.

    make quickstart
    python -m benchmarks.rounding runs/quickstart

The benchmark takes some rollouts of a finished run, conditioned on the prompts of student and teacher there. It
compares the gradient of all weights in float32 with three others: with the head's factors rounded to bfloat16, with
autocast, and with both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

from vpd.algorithms import VPDSettings
from vpd.config import ModelSettings
from vpd.packing import PackedBatch, pack
from vpd.policy.cpu import optimise
from vpd.policy.load import load_policy
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import Distil, ReadStates, ScoredStates

_KINDS = ("js", "reverse_kl")


def batches(run: Path, tokenizer, count: int) -> tuple[PackedBatch, PackedBatch]:
    """Pack a run's first ``count`` rollouts with feedback, after the student's prompt and after the teacher's."""
    rows = pd.concat([pd.read_parquet(path) for path in sorted(run.glob("rollouts/*.parquet"))])
    views: list[tuple[list[list[int]], list[int]]] = [([], []), ([], [])]
    for row in rows[rows["teacher_prompt"].notna()].head(count).to_dict(orient="records"):
        chat = [{"role": "user", "content": row["prompt"]}]
        student = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for (sequences, starts), prompt in zip(views, (student, row["teacher_prompt"]), strict=True):
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            sequences.append(ids + [int(token) for token in row["completion_ids"]])
            starts.append(len(ids))
    return pack(*views[0]), pack(*views[1])


def gradient(
    policy: PolicyModule, views: tuple[PackedBatch, PackedBatch], kind, *, autocast: bool, head: bool
) -> Tensor:
    """Return the gradient of the M-step's loss in one row; ``head`` rounds the factors of the head's products."""
    policy.zero_grad()
    count = len(views[0].targets)
    # The module is found by its name, because `vpd.losses.divergence` is the function.
    losses = sys.modules["vpd.losses.divergence"]
    with (
        mock.patch.object(losses, "may_round_products", return_value=head),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        with torch.no_grad():
            teacher = policy(views[1], ReadStates()).values
        weights = torch.full((count,), 1 / count)
        states = ScoredStates(teacher["hidden"], teacher["rows"])
        objective = Distil(states, weights, VPDSettings(divergence=kind), temperature=1.0)
        loss = policy(views[0], objective).loss
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--rollouts", type=int, default=16)
    options = parser.parse_args()
    loaded = load_policy(str(options.run / "model"))
    optimise(loaded.model, ModelSettings())
    policy = PolicyModule(loaded.model).eval()
    views = batches(options.run, loaded.tokenizer, options.rollouts)
    print(f"{len(views[0].targets)} completion tokens; distance from the gradient in float32, as a part of its length")
    print("| divergence | head's factors rounded | autocast | both |")
    print("|---|---|---|---|")
    for kind in _KINDS:
        exact = gradient(policy, views, kind, autocast=False, head=False)
        distances = [
            (gradient(policy, views, kind, autocast=autocast, head=head) - exact).norm() / exact.norm()
            for autocast, head in ((False, True), (True, False), (True, True))
        ]
        print(f"| {kind} | " + " | ".join(f"{float(distance):.3f}" for distance in distances) + " |", flush=True)


if __name__ == "__main__":
    main()
