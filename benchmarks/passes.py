"""Measure how much of a training pass its matrix products take: the student's, the teacher's and the E-step's pass.

    python -m benchmarks.passes --workload a

The benchmark notes every product of a pass with its shapes and dtypes, and times it again by itself on random numbers.
The efficiency is the time of the products divided by the time of the pass; the rest is elementwise work, casts and
overhead. Attention's products count where matrix products make them; those inside a kernel count as overhead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import models
from benchmarks.step.ours import WholeCompletions, settings
from benchmarks.step.specs import WORKLOADS, Side
from benchmarks.step.tasks import ImposedVerdicts
from vpd.algorithms.e_step import refine_teacher
from vpd.algorithms.example import Example, make_examples, student_view, teacher_view, with_teacher
from vpd.algorithms.m_step import distilling
from vpd.algorithms.minibatches import Counts
from vpd.algorithms.teacher import make_teacher
from vpd.device import rounding_factors
from vpd.policy.objectives import ReadStates
from vpd.trainer import VPDTrainer

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default, torch.ops.aten.addmm.out,
             torch.ops.aten.bmm.default, torch.ops.aten.bmm.out, torch.ops.aten.baddbmm.out}  # fmt: skip

Product = tuple[Any, bool, tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]]
"""A product: the function, whether its factors may be rounded, and the shape, layout and dtype of each operand."""

_ROUNDING = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


class Noted(TorchDispatchMode):
    """A mode that counts the matrix products made inside it, including those of backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            tensors = [value for value in args if isinstance(value, torch.Tensor)][-2:]
            factors = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)
            self.products[func, _ROUNDING.fp32_precision == "bf16", factors] += 1
        return func(*args, **(kwargs or {}))


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """Return the median time of some tries, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def seconds_alone(products: Counter[Product], repeats: int) -> float:
    """Time the same products by themselves, on operands of the same shapes, layouts and dtypes."""
    total = 0.0
    for (_, is_rounded, operands), count in products.items():
        left, right = (torch.empty_strided(shape, stride, dtype=dtype).normal_() for shape, stride, dtype in operands)
        multiply = torch.bmm if left.dim() == 3 else torch.mm
        # Many products are timed together, because one may be shorter than the clock can resolve.
        burst = max(1, min(count, 10))
        with rounding_factors(left.device) if is_rounded else nullcontext():
            once = seconds_of(lambda m=multiply, a=left, b=right, n=burst: [m(a, b) for _ in range(n)], repeats) / burst
        total += once * count
    return total


def passes(workload: str, overrides: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Return the three passes over one batch of rollouts."""
    side, shape = Side("ours", "vpd", overrides=overrides), WORKLOADS[workload]
    tokenizer = models.tokenizer_of(side.model)
    environment = ImposedVerdicts(tokenizer, shape)
    network = models.network(side.model, side.precision)
    trainer = VPDTrainer(
        model=network,
        args=settings(side, shape, tempfile.mkdtemp()),
        environment=environment,
        processing_class=tokenizer,
    )
    made = trainer.sampler
    trainer.sampler = WholeCompletions(
        made.engine, made.tokenizer, environment, made.prompts, made.settings, eos_token_ids=()
    )
    batch = trainer.with_feedback(trainer.sample(1))
    examples = with_teacher(make_examples(batch.rollouts, batch.is_success, batch.views))
    learner, algorithm = trainer.learner, trainer.args.algorithm
    tokens = sum(len(example.completion) for example in examples)
    who = make_teacher(algorithm)  # pyright: ignore[reportArgumentType]
    is_conditioned = who.reuses_keys(learner)
    parts = learner.micro_batches(examples, student_view, teacher_view, conditioned=is_conditioned)
    states = [who.read(learner, part) for part in parts]
    students = [learner.pack(part, student_view, keeps_keys=is_conditioned) for part in parts]
    for batch in students:
        learner.score(batch, ReadStates())

    def student() -> None:
        learner.policy.train()
        for part, read in zip(parts, states, strict=True):
            batch = learner.pack(part, student_view)
            objective = distilling(learner, part, algorithm, Counts(tokens, len(examples)), read)  # pyright: ignore[reportArgumentType]
            learner.accelerator.backward(learner.policy(batch, objective).loss)
        learner.optimizer.zero_grad()

    def teacher() -> None:
        for part, packed in zip(parts, students, strict=True):
            if is_conditioned:
                learner.score(learner.pack(part, teacher_view, conditioned_on=packed), ReadStates())
            else:
                who.read(learner, part)

    def e_step() -> None:
        refine(examples)

    def refine(taught: list[Example]) -> None:
        refine_teacher(learner, taught, algorithm, shape.prompts, measures_after=False)  # pyright: ignore[reportArgumentType]

    return {"student": student, "teacher": teacher, "E-step, its optimizer step included": e_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="a")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| pass | seconds | its products alone | efficiency |")
    print("|---|---|---|---|")
    for name, work in passes(options.workload, tuple(options.overrides)).items():
        work()
        with Noted() as noted:
            work()
        whole, alone = seconds_of(work, options.repeats), seconds_alone(noted.products, options.repeats)
        print(f"| {name} | {whole:.2f} | {alone:.2f} | {alone / whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
