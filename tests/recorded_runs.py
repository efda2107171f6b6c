"""Fixed-seed runs of every algorithm and option that has its own code path, recorded and compared.

Whoever moves code about records the runs before and after it, on one machine, and compares the two files:

    python tests/recorded_runs.py write before.json
    python tests/recorded_runs.py write after.json
    python tests/recorded_runs.py compare before.json after.json

A recording holds what the toy runs wrote to their ``metrics.jsonl``, apart from timings, and the sums and norms of the
weights that they ended with. It knows the toy's trainer, its settings and the run's folder, and no module of the
package, so that the modules may move.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

STEPS = 4
EVENTS = ("train", "eval", "gap", "gap_permuted")
TIMINGS = ("seconds", "train_seconds", "tokens_per_second", "peak_memory")

RELATIVE_TOLERANCE = 1e-6
ABSOLUTE_TOLERANCE = 1e-9
# Sums that nearly cancel keep the rounding of what they are made of.
CANCELLING_TOLERANCE = 1e-6
CANCELLING = ("margin", "reward_shift", "sum of ")
POLICY_GRADIENTS = ("grpo", "joint", "reshape", "reweight", "opsa")

Sections = Mapping[str, Mapping[str, Any]]
"""Settings by section, as :func:`toy.toy_trainer` takes them."""
Scenario = dict[str, Any]
"""What is recorded of one run: ``algorithm``, ``expected_to_change`` and ``entries``, or an ``error``."""

COMMON: Sections = {
    "eval": {"preflight_tasks": 2, "final_tasks": 4, "eval_steps": 2, "load_best_model_at_end": False},
    "run": {"max_steps": STEPS, "stop_on": []},
    "algorithm": {"truncated": "failure"},
}
MINIBATCHES = {"m_minibatch_prompts": 1}

SCENARIOS: dict[str, Sections] = {
    # The M-step's divergences.
    "vpd": {},
    "vpd_forward_kl": {"algorithm": {"divergence": "forward_kl"}},
    "vpd_js": {"algorithm": {"divergence": "js"}},
    "vpd_js_alpha": {"algorithm": {"divergence": "js", "alpha": 0.2}},
    "vpd_top_k": {"algorithm": {"top_k": 5}},
    "vpd_forward_kl_top_k": {"algorithm": {"divergence": "forward_kl", "top_k": 5}},
    "vpd_js_top_k": {"algorithm": {"divergence": "js", "top_k": 5}},
    "vpd_intersection_renormalise": {
        "algorithm": {"top_k": 5, "support": "intersection", "correction": "renormalise"},
    },
    "vpd_stopgrad": {"algorithm": {"top_k": 5, "correction": "stopgrad"}},
    "vpd_sampled": {"algorithm": {"divergence": "sampled"}},
    "vpd_sampled_clip": {"algorithm": {"divergence": "sampled", "importance_clip": 1.0}},
    "vpd_sampled_unweighted": {"algorithm": {"divergence": "sampled", "importance_clip": 0}},
    "vpd_sampled_plain": {"algorithm": {"divergence": "sampled", "control_variate": False}},
    "vpd_importance_clip": {"algorithm": {"importance_clip": 1.0, **MINIBATCHES}},
    "vpd_teacher_share": {"algorithm": {"teacher_share": 0.3}},
    "vpd_representation": {"algorithm": {"representation_weight": 1.0}},
    "vpd_representation_layers": {"algorithm": {"representation_weight": 1.0, "representation_layers": [1]}},
    "vpd_sequence_mean": {"algorithm": {"loss_aggregation": "sequence_mean"}},
    "vpd_sum": {"algorithm": {"loss_aggregation": "sum"}},
    "vpd_truncated_mask": {"algorithm": {"truncated": "mask"}, "rollout": {"max_completion_length": 6}},
    "vpd_truncated_failure": {"rollout": {"max_completion_length": 6}},
    # The E-step.
    "vpd_minibatches": {"algorithm": {"e_minibatch_prompts": 1, **MINIBATCHES}},
    "vpd_e_minibatches": {"algorithm": {"e_minibatch_prompts": 1}},
    "vpd_e_epochs": {"algorithm": {"e_epochs": 2}},
    "vpd_prior_fixed": {"algorithm": {"prior": "fixed"}},
    "vpd_shift_momentum": {"algorithm": {"shift_momentum": 0.5}},
    "vpd_length_reference": {"algorithm": {"length_reference": 8.0}},
    "vpd_e_learning_rate_factor": {"algorithm": {"e_learning_rate_factor": 0.5}},
    "vpd_margin_tasks": {"eval": {"margin_tasks": 2}},
    # The teachers.
    "vpd_frozen": {"algorithm": {"teacher": "frozen", **MINIBATCHES}},
    "vpd_ema": {"algorithm": {"teacher": "ema"}},
    "vpd_trust_region": {"algorithm": {"teacher": "trust_region"}},
    "vpd_teacher_lora": {"algorithm": {"teacher": "lora", "teacher_lora": {"r": 2}}},
    "vpd_teacher_lora_minibatches": {
        "algorithm": {"teacher": "lora", "teacher_lora": {"r": 2}, "e_minibatch_prompts": 1, **MINIBATCHES},
    },
    # How the model computes and is optimised.
    "vpd_micro_batches": {"optim": {"micro_batch_tokens": 300}},
    "vpd_gradient_checkpointing": {"model": {"gradient_checkpointing": True}},
    "vpd_unfused_layers": {"model": {"fused_layers": False}},
    "vpd_logits_chunks": {"model": {"logits_chunk_tokens": 5}},
    "vpd_lora": {"model": {"lora": {"r": 2}}},
    "vpd_lora_gradient_checkpointing": {"model": {"lora": {"r": 2}, "gradient_checkpointing": True}},
    "vpd_lora_prior_fixed": {"model": {"lora": {"r": 2}}, "algorithm": {"prior": "fixed"}},
    "vpd_scheduler": {"optim": {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1}},
    "vpd_extrapolation": {
        "optim": {"extrapolation": True, "extrapolation_tasks": 8},
        # Greedy answers of a random network are all wrong, and no jump would be kept.
        "eval": {"temperature": 1.0},
    },
    "vpd_warm_start": {"warm_start": {"demonstrations": 4, "cache": False, "learning_rate": 1e-3}},
    "vpd_warm_start_plain": {
        "warm_start": {"demonstrations": 4, "cache": False, "learning_rate": 1e-3, "feedback": False},
    },
    # Feedback, rollouts and evaluations.
    "vpd_sibling": {"feedback": {"sources": ["sibling"]}},
    "vpd_sibling_environment": {"feedback": {"sources": ["sibling", "environment"]}},
    "vpd_shortest_sibling_alone": {
        "feedback": {
            "sources": ["sibling", "environment"],
            "sibling": "shortest",
            "feedback_only_without_solution": True,
        },
    },
    "vpd_critique": {
        "feedback": {"sources": ["critique", "environment"], "critique": {"max_tokens": 16}},
    },
    "vpd_permuted": {"feedback": {"permute": True}, "eval": {"preflight_permuted": True}},
    "vpd_temperature": {"rollout": {"temperature": 0.7}},
    "vpd_cut_sampling": {"rollout": {"top_p": 0.9, "top_k": 50, "min_p": 0.001, "batch_size": 3}},
    "vpd_sampled_evaluations": {"eval": {"k": 2, "temperature": 0.6, "top_p": 0.9}},
    "vpd_best_model": {"eval": {"load_best_model_at_end": True, "eval_steps": 1}},
    # The other algorithms.
    "sdpo": {"algorithm": {"type": "sdpo"}},
    "sdpo_live": {"algorithm": {"type": "sdpo", "teacher": "live"}},
    "sdpo_sampled": {"algorithm": {"type": "sdpo", "divergence": "sampled"}},
    "sdpo_minibatches": {"algorithm": {"type": "sdpo", **MINIBATCHES}},
    "sdpo_lora": {"algorithm": {"type": "sdpo"}, "model": {"lora": {"r": 2}}},
    "grpo": {"algorithm": {"type": "grpo"}},
    "grpo_beta_minibatches": {"algorithm": {"type": "grpo", "beta": 0.1, **MINIBATCHES}},
    "grpo_scaled_clipped": {
        "algorithm": {"type": "grpo", "scale_rewards": True, "epsilon": 0.01, "epsilon_high": 0.01, **MINIBATCHES},
    },
    "grpo_truncated_mask": {
        "algorithm": {"type": "grpo", "truncated": "mask"},
        "rollout": {"max_completion_length": 6},
    },
    "grpo_micro_batches": {"algorithm": {"type": "grpo"}, "optim": {"micro_batch_tokens": 60}},
    "grpo_lora_beta": {"algorithm": {"type": "grpo", "beta": 0.1}, "model": {"lora": {"r": 2}}},
    "joint": {"algorithm": {"type": "joint", "divergence": "js"}},
    "joint_minibatches": {"algorithm": {"type": "joint", "divergence": "js", **MINIBATCHES}},
    "joint_sampled_minibatches": {"algorithm": {"type": "joint", "divergence": "sampled", **MINIBATCHES}},
    "joint_ema": {"algorithm": {"type": "joint", "teacher": "ema"}},
    "joint_representation": {"algorithm": {"type": "joint", "representation_weight": 1.0}},
    "joint_sibling": {"algorithm": {"type": "joint"}, "feedback": {"sources": ["sibling"]}},
    "reshape": {"algorithm": {"type": "reshape"}},
    "reshape_sibling_minibatches": {
        "algorithm": {"type": "reshape", **MINIBATCHES},
        "feedback": {"sources": ["sibling"]},
    },
    "reweight": {"algorithm": {"type": "reweight", "mixing_steps": 3}},
    "opsa": {"algorithm": {"type": "opsa"}},
}
EXPECTED_TO_CHANGE = {"vpd_critique"}


def record(name: str, make_trainer: Callable[..., Any]) -> Scenario:
    """Run one scenario; one that raises is recorded by its error, so that the others go on."""
    scenario = SCENARIOS[name]
    found: Scenario = {
        "algorithm": scenario.get("algorithm", {}).get("type", "vpd"),
        "expected_to_change": name in EXPECTED_TO_CHANGE,
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            return found | {"entries": entries_of_run(Path(folder) / "run", scenario, make_trainer)}
    except Exception as error:
        traceback.print_exc()
        return found | {"error": f"{type(error).__name__}: {error}"}


def entries_of_run(
    folder: Path, scenario: Sections, make_trainer: Callable[..., Any]
) -> dict[str, dict[str, float | None]]:
    """Train the toy and read what it has left: numbers by name, by what they are about."""
    sections = {name: {**COMMON.get(name, {}), **scenario.get(name, {})} for name in COMMON.keys() | scenario.keys()}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = make_trainer(folder, **sections)
        trainer.train()
    entries: dict[str, dict[str, float | None]] = {}
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["event"] in EVENTS:
            where = " ".join(str(line[key]) for key in ("event", "step", "split", "name") if key in line)
            if where in entries:
                raise ValueError(f"The run wrote two lines for {where!r}.")
            entries[where] = {name: value for name, value in numbers_in(line) if name != "step"}
    entries["weights"] = {}
    for name, weight in trainer.model.state_dict().items():
        values = weight.double()
        entries["weights"][f"sum of {name}"] = number(values.sum())
        entries["weights"][f"norm of {name}"] = number(values.norm())
    return entries


def numbers_in(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """The numbers of a line and of the mappings in it by name, apart from timings and texts."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{prefix}{name}.")
        elif not isinstance(value, str) and not name.startswith(TIMINGS):
            yield f"{prefix}{name}", number(value)


def number(value: Any) -> float | None:
    """Ten digits of a number, or None for one that is missing or not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{float(value):.10g}")


def differences(old: Scenario | None, new: Scenario | None) -> Iterator[str]:
    """What tells two recordings of one scenario apart, a line each; None is for one that was not recorded."""
    if old is None or new is None:
        yield "missing" if new is None else "additional"
        return
    if "error" in old or "error" in new:
        yield f"raised: {old.get('error', 'nothing')} -> {new.get('error', 'nothing')}"
        return
    for where in in_order(old["entries"], new["entries"]):
        if where not in new["entries"]:
            yield f"{where}: missing"
        elif where not in old["entries"]:
            yield f"{where}: additional"
        else:
            before, after = old["entries"][where], new["entries"][where]
            for name in in_order(before, after):
                if name not in after:
                    yield f"{where}: {name} is missing, was {before[name]}"
                elif name not in before:
                    yield f"{where}: {name} is additional, {after[name]}"
                elif not is_near(before[name], after[name], absolute_tolerance(name, old["algorithm"])):
                    yield f"{where}: {name} was {before[name]} and is {after[name]}{how_far(before[name], after[name])}"


def in_order(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The keys of both, in the order of the first and then of the second."""
    return list(dict.fromkeys([*first, *second]))


def absolute_tolerance(name: str, algorithm: str) -> float:
    """How far apart two values of a metric may be, however small they are."""
    cancels = name.startswith(CANCELLING) or (name == "m_loss" and algorithm in POLICY_GRADIENTS)
    return CANCELLING_TOLERANCE if cancels else ABSOLUTE_TOLERANCE


def is_near(before: float | None, after: float | None, absolute: float) -> bool:
    """Whether two numbers are the same but for rounding; None, which stands for nan, is equal to itself alone."""
    if before is None or after is None:
        return before is after
    return math.isclose(before, after, rel_tol=RELATIVE_TOLERANCE, abs_tol=absolute)


def how_far(before: float | None, after: float | None) -> str:
    """The relative difference of two numbers, in brackets."""
    if before is None or after is None:
        return ""
    return f" (relative difference {abs(after - before) / max(abs(before), abs(after)):.1e})"


def write(path: Path, names: Sequence[str]) -> int:
    """Record scenarios into a file; 1 where one of them raised."""
    # Both are read when torch is imported. Where the work is split among threads, sums are rounded otherwise.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    from toy import toy_trainer

    recording, start = {}, time.perf_counter()
    for name in names:
        scenario_start = time.perf_counter()
        recording[name] = record(name, toy_trainer)
        result = recording[name].get("error", "recorded")
        print(f"{name}: {result}, {time.perf_counter() - scenario_start:.1f} s", file=sys.stderr, flush=True)
    path.write_text(json.dumps(recording, indent=0) + "\n", encoding="utf-8")
    errors = sum("error" in scenario for scenario in recording.values())
    print(f"{len(recording)} scenarios, {errors} of them raised, {time.perf_counter() - start:.0f} s, in {path}.")
    return int(errors > 0)


def compare(old_path: Path, new_path: Path, only: Sequence[str] | None) -> int:
    """Print every difference of two recordings; 1 where there are any, expected ones left aside.

    An error is never expected, and one in both recordings is told too, since nothing was compared.
    """
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (old_path, new_path))
    names = [name for name in in_order(old, new) if only is None or name in only]
    unexpected = expected = 0
    for name in names:
        found = list(differences(old.get(name), new.get(name)))
        may_change = is_expected_to_change(old.get(name), new.get(name))
        if may_change:
            expected += len(found)
        else:
            unexpected += len(found)
        for line in found:
            print(f"{name}{' (expected to change)' if may_change else ''}: {line}")
    print(f"{len(names)} scenarios: {unexpected} differences, and {expected} where they are expected.")
    return int(unexpected > 0)


def is_expected_to_change(old: Scenario | None, new: Scenario | None) -> bool:
    """Whether the differences of two recordings of one scenario count for nothing."""
    if old is None or new is None or "error" in old or "error" in new:
        return False
    return old["expected_to_change"] or new["expected_to_change"]


def main() -> int:
    """Read the command line and do what it asks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writes = commands.add_parser("write", help="run the scenarios and record them")
    writes.add_argument("out", type=Path)
    compares = commands.add_parser("compare", help="tell two recordings apart; the exit status is 1 if they differ")
    compares.add_argument("old", type=Path)
    compares.add_argument("new", type=Path)
    for command in (writes, compares):
        command.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="NAME", help="these scenarios alone")
    arguments = parser.parse_args()
    if arguments.command == "write":
        return write(arguments.out, arguments.only or list(SCENARIOS))
    return compare(arguments.old, arguments.new, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
