"""What the machine at hand does with a network of a model's shape: the seconds behind ``vpd plan`` on this machine.

The network has random weights and the model's sizes, with fewer layers where it would be large. It makes one
micro-batch of the run, with and without gradient, and some steps of decoding. What these reach of the machine's plain
matrix products and of its bandwidth is what the plan reckons with.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vpd.config import VPDConfig
from vpd.packing import PackedBatch, pack
from vpd.plan import Hardware, Lengths, decoding_bytes, pass_flops, shape_of_config
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import Imitate, Objective, TokenLogProbs
from vpd.rollout.local import LocalEngine, computes_bfloat16

_LARGEST = 200e6
"""Parameters of the network that is timed; a larger model's layers are left out, and counted as so many more."""

_DECODED = 5
"""Steps of decoding that are timed."""

_TRIES = 2
"""Of each measurement; the best one counts, since others may use the machine too."""


def this_machine(settings: VPDConfig, config: Any, lengths: Lengths) -> Hardware:
    """This machine's processor or first GPU, by what it does with the run's own work in some seconds.

    Args:
        settings: of the run.
        config: of the model.
        lengths: of a typical rollout.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = computes_bfloat16(device)
    plain = _plain(device, torch.bfloat16 if bfloat16 else torch.float32)

    config = copy.deepcopy(config)
    text = config.get_text_config()
    shape = shape_of_config(config)
    while shape.parameters > _LARGEST and text.num_hidden_layers > 2:
        text.num_hidden_layers //= 2
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        shape = shape_of_config(config)
    dtype = torch.bfloat16 if settings.model.dtype == "bfloat16" else torch.float32
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    if settings.model.gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    autocasts = bfloat16 and dtype == torch.float32 and settings.model.autocast != "none"

    decoding = _decoding_seconds(network, settings, lengths)
    policy = PolicyModule(network).train()
    batch, groups = _micro_batch(settings, lengths, text.vocab_size)
    batch = batch.to(device)
    tokens = len(batch.targets)
    flops, head = pass_flops(shape, lengths, groups * settings.rollout.num_generations, batch.token_count)

    def run(objective: Objective, learns: bool) -> None:
        with torch.set_grad_enabled(learns), torch.autocast(device.type, torch.bfloat16, enabled=autocasts):
            loss = policy(batch, objective).loss
        if loss is not None and learns:
            loss.backward()
            policy.zero_grad(set_to_none=True)

    scoring = _seconds(lambda: run(TokenLogProbs(1.0), learns=False), device)
    training = _seconds(lambda: run(Imitate(tokens), learns=True), device)
    read = decoding_bytes(shape, settings, replace(lengths, completion=_DECODED))
    passes = 3 + settings.model.gradient_checkpointing
    # The loss's head is computed once more in its backward pass.
    return replace(
        plain,
        score_share=(flops + head) / scoring / plain.flops,
        train_share=(passes * flops + 4 * head) / training / plain.flops,
        decode_share=read / decoding / plain.bandwidth,
    )


def _micro_batch(settings: VPDConfig, lengths: Lengths, vocabulary: int) -> tuple[PackedBatch, int]:
    """As many groups of a teacher's sequences as a micro-batch holds, one at least, and how many these are."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    of_group = lengths.prompt + settings.rollout.num_generations * (lengths.feedback + lengths.completion)
    groups = min(settings.rollout.prompts_per_step, max(1, settings.optim.micro_batch_tokens // of_group))
    prompts = [draw(lengths.prompt) for _ in range(groups)]
    sequences = [
        prompt + draw(lengths.feedback + lengths.completion)
        for prompt in prompts
        for _ in range(settings.rollout.num_generations)
    ]
    return pack(sequences, [lengths.prompt + lengths.feedback] * len(sequences)), groups


def _decoding_seconds(network: Any, settings: VPDConfig, lengths: Lengths) -> float:
    """Of one step of decoding a whole batch of sequences."""
    rollouts = settings.rollout.prompts_per_step * settings.rollout.num_generations
    groups = max(1, min(rollouts, settings.rollout.batch_size) // settings.rollout.num_generations)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(network.config.get_text_config().vocab_size, (groups, lengths.prompt), generator=generator)
    # No tokenizer: it would decode completions in search of stop strings.
    engine = LocalEngine(network, None, settings.rollout.dtype, settings.rollout.batch_size)  # pyright: ignore
    device = network.device

    def sample(steps: int) -> Callable[[], object]:
        return lambda: engine.generate(
            prompts.tolist(),
            max_new_tokens=steps,
            eos_token_ids=(),
            num_generations=settings.rollout.num_generations,
        )

    return max((_seconds(sample(_DECODED + 1), device) - _seconds(sample(1), device)) / _DECODED, 1e-9)


def _plain(device: torch.device, dtype: torch.dtype) -> Hardware:
    """Products of large matrices, and reading of memory, in a second or so."""
    matrix = torch.randn(2048, 2048, device=device, dtype=dtype)
    products = 2 * 2048**3 / _seconds(lambda: matrix @ matrix, device, tries=10)
    block = torch.zeros(64 * 2**20, device=device)
    reads = block.numel() * 4 / _seconds(lambda: block.sum(), device, tries=10)
    if device.type == "cuda":
        memory = float(torch.cuda.get_device_properties(device).total_memory)
        return Hardware(torch.cuda.get_device_name(device), products, reads, memory)
    return Hardware("this processor", products, reads, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def _seconds(work: Callable[[], object], device: torch.device, tries: int = _TRIES) -> float:
    """The best of some tries, after one that does not count."""
    best = float("inf")
    for number in range(tries + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return best
