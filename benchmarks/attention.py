"""Attention of one layer over a packed batch in bfloat16: PyTorch's kernel, and matrix products as the package has it.

    python -m benchmarks.attention

For each workload the student's batch and the teacher's, with random queries, keys, values and gradients: the time of a
forward and of a backward pass, and how far the gradient of the queries is from that in float32, as a part of its
length.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from torch import Tensor

from benchmarks.passes import seconds_of
from benchmarks.step.specs import WORKLOADS, Workload
from vpd.packing import attention, pack
from vpd.packing.kernels import products
from vpd.packing.layout import PackedLayout

_FEEDBACK_TOKENS = 58
_KEY_HEADS, _ROWS, _WIDTH = 3, 3, 64
"""SmolLM2-135M's."""


def layout_of(workload: Workload, feedback: int) -> PackedLayout:
    """The packed sequences of one batch, none of whose tokens stands in two parts."""
    names = iter(range(10**6))

    def text(length: int) -> list[int]:
        return [next(names) for _ in range(length)]

    prompts = [text(workload.prompt_tokens) for _ in range(workload.prompts)]
    sequences = [
        prompt + text(feedback) + text(workload.completion_tokens)
        for prompt, _ in product(prompts, range(workload.num_generations))
    ]
    return pack(sequences, [workload.prompt_tokens + feedback] * len(sequences)).layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["a", "b", "c"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| batch | | forward, ms | backward, ms | distance of the queries' gradient |\n|---|---|---|---|---|")
    for name, (view, feedback) in product(options.workloads, (("student", 0), ("teacher", _FEEDBACK_TOKENS))):
        layout = layout_of(WORKLOADS[name], feedback)
        generator = torch.Generator().manual_seed(0)
        tokens = layout.token_count
        query, key, value, grad = (
            torch.randn(tokens, _KEY_HEADS * rows, _WIDTH, generator=generator).bfloat16()
            for rows in (_ROWS, 1, 1, _ROWS)
        )
        query = query * 4

        def kernel(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout = layout) -> Tensor:
            folded = q.unflatten(1, (_KEY_HEADS, _ROWS)).transpose(0, 1).flatten(1, 2)
            output = attention._attend(folded, k.transpose(0, 1), v.transpose(0, 1), layout, _ROWS, None, 0.0, None)
            return output.unflatten(1, (-1, _ROWS)).transpose(0, 1).flatten(1, 2)

        def by_products(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout = layout) -> Tensor:
            tiling = layout.tiling(None, _KEY_HEADS * _ROWS, _KEY_HEADS)
            return products.attend(q, k, v, tiling, _WIDTH**-0.5, layout.workspace)

        exact = [tensor.float().requires_grad_() for tensor in (query, key, value)]
        expected = torch.autograd.grad(kernel(*exact), exact[:1], grad.float())[0].double()
        for way, attend in (("kernel", kernel), ("products", by_products)):
            inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            with torch.no_grad():
                forward = seconds_of(lambda f=attend, x=inputs: f(*x), options.repeats)
            output = attend(*inputs)
            backward = seconds_of(
                lambda o=output, x=inputs, g=grad: torch.autograd.grad(o, x, g, retain_graph=True), options.repeats
            )
            found = torch.autograd.grad(output, inputs[:1], grad)[0].double()
            distance = float((found - expected).norm() / expected.norm())
            print(
                f"| ({name}) {view} | {way} | {1e3 * forward:.1f} | {1e3 * backward:.1f} | {distance:.4f} |", flush=True
            )


if __name__ == "__main__":
    main()
