"""Compare the predictions of ``vpd plan`` with measurements on this machine, and predict the paper's runs on a GPU.

    python -m benchmarks.step --against none --workload a b c --output step.json
    python -m benchmarks.plans --measured step.json

The first table compares predictions and measurements on this machine. The second shows what the same counting predicts
for the paper's settings on hardware that this project has not run on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import Qwen3Config

from benchmarks.step.ours import settings
from benchmarks.step.specs import WORKLOADS, Side
from vpd.config import VPDConfig
from vpd.planning.calibration import this_machine
from vpd.planning.plan import GPUS, Hardware, Plan, network_size_of, predict
from vpd.planning.step_passes import Lengths
from vpd.policy.load import config_of

_FEEDBACK_TOKENS = 58
"""How many tokens the teachers' prompts of the workloads have after the question, on average."""

_QWEN3 = {
    "Qwen3-1.7B": Qwen3Config(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=6144, vocab_size=151936, tie_word_embeddings=True,
    ),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False,
    ),
}  # fmt: skip


def measured(path: Path) -> None:
    """Print the table of predictions against measurements."""
    print("| workload | algorithm | part | measured s | predicted s | difference |")
    print("|---|---|---|---|---|---|")
    for name, result in json.loads(path.read_text())["workloads"].items():
        workload = WORKLOADS[name]
        for found in result["sides"]:
            if found["side"]["library"] != "ours":
                continue
            side = Side(**found["side"])
            run = settings(side, workload, "runs")
            lengths = Lengths(workload.prompt_tokens, workload.completion_tokens, _FEEDBACK_TOKENS)
            network = config_of(side.model)
            hardware = this_machine(run, network, lengths)
            expected = predict(run, network_size_of(network), lengths, hardware).seconds
            # The harness reports E-steps separately.
            rows = {
                "all": (found["seconds"]["median"], expected.total - expected.e_step),
                "rollout": (found["phases"]["rollout"], expected.rollout),
            }
            for part, (seconds, predicted) in rows.items():
                difference = f"{predicted / seconds - 1:+.0%}"
                print(
                    f"| {name} | {side.algorithm} | {part} | {seconds:.2f} | {predicted:.2f} | {difference} |",
                    flush=True,
                )


def paper(hardware: Hardware) -> None:
    """Print the table of the paper's settings: 32 prompts of 8 rollouts, VPD with F = 5."""
    values = {
        "rollout": {"prompts_per_step": 32, "num_generations": 8, "batch_size": 256},
        "feedback": {"sources": ["sibling"]},
        "algorithm": {"type": "vpd", "e_step_every": 5, "top_k": 100},
        "model": {"gradient_checkpointing": True},
        "optim": {"micro_batch_tokens": 20480},
    }
    config = VPDConfig.parse(values)
    lengths = Lengths(prompt=250, completion=500, feedback=560)
    print(f"\n{hardware.name}: {lengths}, siblings' answers as feedback, nothing of it measured.\n")
    print("| model | | tokens trained | PFLOP a step | s a step | GB |")
    print("|---|---|---|---|---|---|")
    for name, network in _QWEN3.items():
        plan = predict(config, network_size_of(network), lengths, hardware)
        # The plan without prefix sharing starts from one without KV reuse, in which the teacher computes the questions
        # itself.
        apart = VPDConfig.parse(values | {"model": values["model"] | {"packed_attention": "flex"}})
        unshared = _without_sharing(predict(apart, network_size_of(network), lengths, hardware))
        tokens = plan.tokens.student + plan.tokens.teacher
        print(
            f"| {name} | shared | {tokens:,.0f} | {plan.flops.total / 1e15:.1f} | {plan.seconds.total:.0f} "
            f"| {plan.memory / 1e9:.0f} |"
        )
        print(
            f"| {name} | every sequence by itself | {plan.tokens_unshared:,.0f} | {unshared[0] / 1e15:.1f} "
            f"| {unshared[1]:.0f} | |"
        )


def _without_sharing(plan: Plan) -> tuple[float, float]:
    """Return operations and seconds for training passes that grow in proportion to their tokens."""
    growth = plan.tokens_unshared / (plan.tokens.student + plan.tokens.teacher)
    training = [plan.flops.student + plan.flops.teacher + plan.flops.e_step]
    training.append(plan.seconds.student + plan.seconds.teacher + plan.seconds.e_step)
    return (
        plan.flops.total + (growth - 1) * training[0],
        plan.seconds.total + (growth - 1) * training[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, help="a JSON file that benchmarks.step wrote")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    options = parser.parse_args()
    if options.measured is not None:
        measured(options.measured)
    paper(GPUS[options.gpu])


if __name__ == "__main__":
    main()
