"""Time the M-step's loss, forward and backward, without the network before it.

    python -m benchmarks.losses

Three ways take turns: one works on the logits of a whole chunk at a time; one on a few rows at a time, which stay in
the cores' caches, as the package does; and one does the same under autocast, where the head's products may round their
factors to bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from unittest import mock

import torch

from vpd.losses import DivergenceKind, Head, divergence

_WAYS = ("whole chunks", "tiles", "tiles, autocast")


def seconds(way: str, kind: DivergenceKind, tokens: int, width: int, words: int) -> float:
    """Time one loss and its gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    teacher = hidden + 0.05 * torch.randn(tokens, width, generator=generator)
    weight = (0.05 * torch.randn(words, width, generator=generator)).requires_grad_()
    hidden.requires_grad_()
    whole = mock.patch("vpd.losses.head.TILE_NUMBERS", 2**40) if way == "whole chunks" else contextlib.nullcontext()
    begin = time.perf_counter()
    with whole, torch.autocast("cpu", torch.bfloat16, enabled="autocast" in way):
        loss = divergence(hidden, teacher, Head(weight), kind=kind).total
    loss.backward()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--words", type=int, default=49152)
    parser.add_argument("--kinds", nargs="+", default=["reverse_kl", "js"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{options.words} words, H = {options.width}, {torch.get_num_threads()} threads; median seconds (range)")
    print("| divergence | tokens | " + " | ".join(_WAYS) + " |")
    print("|---" * (2 + len(_WAYS)) + "|")
    for kind in options.kinds:
        for tokens in options.tokens:
            found: dict[str, list[float]] = {way: [] for way in _WAYS}
            for _ in range(options.rounds + 1):
                for way in _WAYS:
                    found[way].append(seconds(way, kind, tokens, options.width, options.words))
            # The first round warms up.
            cells = [f"{statistics.median(s[1:]):.2f} ({min(s[1:]):.2f} to {max(s[1:]):.2f})" for s in found.values()]
            print(f"| {kind} | {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
