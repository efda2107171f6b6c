"""Measure the sampled tokens per second of our engine, of transformers' ``generate``, and optionally of vLLM.

    python -m benchmarks.rollouts --workload a --vllm PYTHON_OF_AN_ENVIRONMENT_WITH_VLLM

All sample N completions of the same prompts from the same bfloat16 weights at temperature 1, and every completion is as
long as the workload says. They take turns, each round on prompts that none has seen before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.step import models
from benchmarks.step.specs import WORKLOADS, Workload
from benchmarks.step.tasks import STEPS_OF_TASKS, ImposedVerdicts
from vpd.rollout import LocalEngine, SamplingParameters

Prompts = list[list[int]]


class Vllm:
    """vLLM in a process with an environment of its own, because it pins other versions of everything."""

    def __init__(self, python: str, folder: str, threads: int, longest: int) -> None:
        worker = str(Path(__file__).with_name("vllm_worker.py"))
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # With this setting vLLM computes in its own process; otherwise it keeps one core for itself and computes on
            # the others.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, worker, folder, str(longest)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._ask({})

    def generate(self, prompts: Prompts, workload: Workload) -> int:
        """Sample, and return the number of sampled tokens."""
        sizes = {"n": workload.num_generations, "tokens": workload.completion_tokens}
        return self._ask({"prompts": prompts, **sizes})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, request: dict[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(b"TOKENS "):
                return int(line.split()[1])
        raise RuntimeError("vLLM's process ended; what it said is above.")


@torch.inference_mode()
def generated(network: torch.nn.Module, prompts: Prompts, workload: Workload) -> int:
    """Sample by transformers' ``generate`` from the same prompts (all of one length), with its default settings."""
    output = network.generate(  # pyright: ignore[reportCallIssue]
        input_ids=torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
        do_sample=True,
        num_return_sequences=workload.num_generations,
        min_new_tokens=workload.completion_tokens,
        max_new_tokens=workload.completion_tokens,
    )
    return len(output) * (output.shape[1] - len(prompts[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="a")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="the Python of an environment with vLLM; by default vLLM is left out"
    )
    counted = range(1, STEPS_OF_TASKS)
    parser.add_argument(
        "--rounds", type=int, choices=counted, default=counted[-1], help="counted rounds, after one that does not count"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workload = WORKLOADS[options.workload]

    tokenizer = models.tokenizer_of("smollm2-135m-instruct")
    tasks = ImposedVerdicts(tokenizer, workload).tasks("train")
    encoded = [
        tokenizer.apply_chat_template(task.prompt, add_generation_prompt=True, return_dict=False) for task in tasks
    ]
    rounds = [encoded[start : start + workload.prompts] for start in range(0, len(encoded), workload.prompts)]
    network = models.network("smollm2-135m-instruct", "bfloat16").eval()
    engine = LocalEngine(models.network("smollm2-135m-instruct", "float32"), tokenizer, dtype="bfloat16")

    def ours(prompts: Prompts) -> int:
        parameters = SamplingParameters(
            max_new_tokens=workload.completion_tokens, num_generations=workload.num_generations
        )
        samples = engine.generate(prompts, parameters, seed=0)
        return sum(len(sample.token_ids) for group in samples for sample in group)

    sides: dict[str, Callable[[Prompts], int]] = {
        "ours": ours,
        "generate": lambda prompts: generated(network, prompts, workload),
    }
    with tempfile.TemporaryDirectory() as folder:
        vllm = None
        if options.vllm:
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            vllm = Vllm(options.vllm, folder, options.threads, workload.prompt_tokens + workload.completion_tokens)
            sides["vLLM"] = lambda prompts: vllm.generate(prompts, workload)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, sample in sides.items():
                start = time.perf_counter()
                tokens = sample(rounds[number])
                seconds = time.perf_counter() - start
                assert tokens == workload.rollouts * workload.completion_tokens, (name, tokens)
                if number:
                    rates[name].append(tokens / seconds)
        if vllm is not None:
            vllm.close()
    print("| | tokens/s (range) | ours / it, median of the rounds (range) |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(rates["ours"], values, strict=True)]
        print(
            f"| {name} | {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
