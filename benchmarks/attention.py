"""Time the attention of one layer over a packed batch in bfloat16: PyTorch's kernel against the package's products.

    python -m benchmarks.attention

For the student's and the teacher's batch of each workload, with random queries, keys, values and gradients, the table
shows the time of a forward and of a backward pass. It also shows how far the gradient of the queries is from the one in
float32, as a share of that gradient's length.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from torch import Tensor

from benchmarks.passes import seconds_of
from benchmarks.step.specs import WORKLOADS, Workload
from vpd.packing import pack
from vpd.packing.kernels import products, sdpa
from vpd.packing.layout import PackedLayout

_FEEDBACK_TOKENS = 58
_KEY_HEADS, _ROWS, _WIDTH = 3, 3, 64
"""The key heads, the query heads for each of them, and the head's width of SmolLM2-135M."""


def layout_of(workload: Workload, feedback: int) -> PackedLayout:
    """Lay out the packed sequences of one batch, with no token in two parts."""
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
            query, key, value = (tensor.transpose(0, 1) for tensor in (q, k, v))
            return sdpa.attend(query, key, value, layout, None, 0.0, None)

        def by_products(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout = layout) -> Tensor:
            prepared = layout.prepared(products.Prepared)
            tiling = prepared.tiling(None, _KEY_HEADS * _ROWS, _KEY_HEADS)
            return products.attend(q, k, v, tiling, _WIDTH**-0.5, prepared.workspace)

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
