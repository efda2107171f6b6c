"""Measures what the machine at hand does with a network of a model's shape, for ``vpd plan`` on this machine.

The network has random weights and the model's sizes, with fewer layers where it would be large. It computes one
micro-batch of the run, with and without gradient, and some steps of decoding. The plan reckons with the share that
these reach of the machine's plain matrix products and of its bandwidth.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vpd.config import VPDConfig
from vpd.device import (
    autocasts,
    computes_bfloat16,
    default_kernel,
    gpu_names,
    is_cuda,
    memory_bytes,
    optimises_layers,
    packed_kernel,
    training_device,
    wait_for,
)
from vpd.packing import PackedBatch, pack
from vpd.planning.plan import Hardware, NetworkSize, cache_bytes, network_size_of, pass_flops
from vpd.planning.step_passes import Lengths
from vpd.policy.cpu import keep_freed_memory, optimise
from vpd.policy.module import PolicyModule
from vpd.policy.objectives import Imitate, Objective, TokenLogProbs
from vpd.policy.prepare import may_share_prefixes
from vpd.rollout import SamplingParameters, make_engine

_LARGEST = 200e6
"""How many parameters the timed network may have; a larger model is timed with fewer layers."""

_MOST_TOKENS = 8192
"""How many tokens a timed pass may have, where a micro-batch would hold more."""

_DECODED = 5
"""How many steps of decoding are timed."""

_LEAST_PART = 0.1
"""The share of the sampling time that these steps must take: below it they drown in the noise of the prompt's pass."""

_TRIES = 2
"""How often each measurement is made; the best one counts, since others may use the machine too."""


def this_machine(settings: VPDConfig, config: Any, lengths: Lengths) -> Hardware:
    """This machine's CPU or first GPU, measured with the run's own work.

    Where even a few layers of the model are large, as with a large vocabulary, nothing of it is run. The shares are
    guesses then, and the name says so.

    Args:
        settings: The settings of the run.
        config: The transformers config of the model.
        lengths: The lengths of a typical rollout.
    """
    device = training_device()
    # A run does so too.
    keep_freed_memory(device)
    bfloat16 = computes_bfloat16(device)
    plain = _plain(device, torch.bfloat16 if bfloat16 else torch.float32)

    config = copy.deepcopy(config)
    text = config.get_text_config()
    size = network_size_of(config)
    while size.parameters > _LARGEST and text.num_hidden_layers > 2:
        text.num_hidden_layers //= 2
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        size = network_size_of(config)
    if size.parameters > 2 * _LARGEST:
        return replace(plain, name=f"{plain.name} (what a run reaches of it is a guess)")
    dtype = torch.bfloat16 if settings.model.dtype == "bfloat16" else torch.float32
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    # The last layer stays whole: it may be the only one here, and its time stands for those that are left out.
    optimise(network, settings.model, skip={"last_layer"})
    if settings.model.gradient_checkpointing:
        network.activation_checkpointing_enable({"use_reentrant": False})
    half = autocasts(settings.model, device)

    decode_share = _decode_share(network, size, settings, lengths, plain)
    kernel = packed_kernel(settings.model, device)
    recomputes = optimises_layers(settings.model)
    policy = PolicyModule(
        network,
        share_prefixes=may_share_prefixes(network, kernel),
        kernel=kernel,
        recomputes=recomputes,
        chunk_size=settings.model.logits_chunk_tokens,
    ).train()
    batch = _micro_batch(settings, lengths, text.vocab_size, policy.share_prefixes).to(device)
    tokens = len(batch.targets)
    flops, head = pass_flops(size, lengths, batch.rollout_count, batch.token_count)

    def run(objective: Objective, learns: bool) -> None:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=not recomputes)
        with torch.set_grad_enabled(learns), autocast:
            loss = policy(batch, objective).loss
        if loss is not None and learns:
            loss.backward()
            policy.zero_grad(set_to_none=True)

    scoring = _seconds(lambda: run(TokenLogProbs(1.0), learns=False), device)
    training = _seconds(lambda: run(Imitate(tokens), learns=True), device)
    passes = 3 + settings.model.gradient_checkpointing
    # The loss computes the head once more in its backward pass.
    return replace(
        plain,
        score_share=(flops + head) / scoring / plain.flops,
        train_share=(passes * flops + 4 * head) / training / plain.flops,
        decode_share=decode_share,
    )


def _micro_batch(settings: VPDConfig, lengths: Lengths, vocabulary: int, share_prefixes: bool) -> PackedBatch:
    """As many of a step's teacher sequences as a micro-batch holds, and at least one."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    budget = min(settings.optim.micro_batch_tokens, _MOST_TOKENS)
    own = lengths.feedback + lengths.completion
    sequences: list[list[int]] = []
    tokens = 0
    for _ in range(settings.rollout.prompts_per_step):
        prompt = draw(lengths.prompt)
        tokens += lengths.prompt
        for _ in range(settings.rollout.num_generations):
            tokens += own
            if sequences and tokens > budget:
                break
            sequences.append(prompt + draw(own))
    starts = [lengths.prompt + lengths.feedback] * len(sequences)
    return pack(sequences, starts, share_prefixes=share_prefixes)


def _decode_share(network: Any, size: NetworkSize, settings: VPDConfig, lengths: Lengths, plain: Hardware) -> float:
    """The share of the bandwidth that a step of decoding reaches with a batch as full as the run's."""
    rows = min(settings.rollout.prompts_per_step * settings.rollout.num_generations, settings.rollout.batch_size)
    group = min(settings.rollout.num_generations, rows)
    generator = torch.Generator().manual_seed(0)
    vocabulary = network.config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, (rows // group, lengths.prompt), generator=generator).tolist()
    # A tokenizer would decode completions in search of stop strings; there are none.
    whole_batch = settings.rollout.model_copy(update={"batch_size": rows})
    engine = make_engine(network, None, whole_batch)  # pyright: ignore[reportArgumentType]

    def seconds(steps: int) -> float:
        parameters = SamplingParameters(max_new_tokens=steps, num_generations=group)
        return _seconds(lambda: engine.generate(prompts, parameters, seed=0), network.device)

    whole = seconds(_DECODED + 1)
    decoding = whole - seconds(1)
    if decoding < _LEAST_PART * whole:
        return plain.decode_share
    read = 2 * size.parameters + (rows // group * group) * cache_bytes(size) * (lengths.prompt + _DECODED / 2)
    return _DECODED * read / decoding / plain.bandwidth


def _plain(device: torch.device, dtype: torch.dtype) -> Hardware:
    """The rates of large matrix products and of reading memory, measured in about a second."""
    matrix = torch.randn(2048, 2048, device=device, dtype=dtype)
    products = 2 * 2048**3 / _seconds(lambda: matrix @ matrix, device, tries=10)
    block = torch.zeros(64 * 2**20, device=device)
    reads = block.numel() * 4 / _seconds(lambda: block.sum(), device, tries=10)
    name = gpu_names()[0] if is_cuda(device) else "this CPU"
    # Where the system does not tell how much memory it has, no plan is too large for it.
    memory = float(memory_bytes(device) or "inf")
    return Hardware(name, products, reads, memory, kernel=default_kernel(device))


def _seconds(work: Callable[[], object], device: torch.device, tries: int = _TRIES) -> float:
    """The seconds of the best of some tries, after one that does not count."""
    best = float("inf")
    for number in range(tries + 1):
        start = time.perf_counter()
        work()
        wait_for(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return best
