"""Samples completions with the network itself: a decode loop over a copy of the weights that shares what it can."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vpd.device import multiplies_bfloat16
from vpd.policy.adapter import has_teacher_adapter, switch_teacher_adapter
from vpd.rollout.decode_attention import ROLLOUT_ATTENTION
from vpd.rollout.kv_cache import PreallocatedCache, StatefulCache, make_cache
from vpd.rollout.onednn_linear import PackedLinear, make_packable
from vpd.rollout.prefill import Prefill, last_place, mask_of, padded
from vpd.rollout.sampling import Sampler, sequence_uniforms
from vpd.rollout.stopping import StopCondition

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Sample:
    """One sampled completion.

    Attributes:
        token_ids: the sampled tokens, T of them, the end-of-sequence token included where one was sampled.
        log_probs: log-probability of each at the sampling temperature, before top-p, top-k or min-p cut the
            distribution (at temperature 1 when greedy); T of them.
        truncated: the length limit ended it, not an end-of-sequence token or a stop string.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    truncated: bool = True


class LocalEngine:
    """Samples from a transformers causal language model in this process.

    Sampling runs on a twin of the model: its own modules, in evaluation mode, with an attention for decoding. A
    parameter that need not be converted is shared with the model; others are bfloat16 copies, which :meth:`sync`
    brings up to date and :meth:`release` gives up for as long as nothing is sampled. On a processor linear layers hold
    theirs as oneDNN reads it (:class:`vpd.rollout.onednn_linear.PackedLinear`), and in its rows only where something
    else reads it. The model's modes, settings and hooks are never touched.

    Each distinct prompt is computed once; on a processor, where the model can be packed, also what prompts of a batch
    begin with, such as a system message. A prompt's cache is expanded to its generations, or shared by them: on a
    processor, where that saves enough, positions are rotary, and no layer has a sliding window or a state. Sequences
    that end leave the batch at once.

    Args:
        model: a causal language model of transformers or PEFT, on its device, without wrappers such as DDP.
        tokenizer: decodes completions in search of stop strings.
        dtype: ``bfloat16`` samples from a bfloat16 copy of wider weights, ``float32`` from the model's own, and
            ``auto`` makes the copy where the processor computes bfloat16 natively.
        batch_size: sequences decoded at the same time.

    Raises:
        ValueError: the model's forward has been replaced by a wrapper that would still run the original.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        batch_size: int = 64,
    ):
        self._source = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._device = next(model.parameters()).device
        self._last = last_place(self._device)
        if dtype == "auto":
            dtype = "bfloat16" if computes_bfloat16(self._device) else "float32"
        self._twin = make_twin(model, bfloat16=dtype == "bfloat16")
        self._has_teacher_adapter = has_teacher_adapter(self._twin)
        if self._has_teacher_adapter:
            switch_teacher_adapter(self._twin, on=False)
        self._packed = make_packable(self._twin)
        self._alone = _weights_of_one(self._packed, self._twin, model)
        self.sync()
        if self._alone:
            self._keep_rows_where_read()
        self._prefill = Prefill(self._twin)

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the model's current weights and buffers into the twin; call it after optimizer steps."""
        for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
            targets = dict(kind(self._twin))
            sources = dict(kind(self._source))
            if targets.keys() != sources.keys():
                raise RuntimeError(
                    "The model's modules have changed since the LocalEngine was made (an adapter added or merged?): "
                    "make a new engine."
                )
            for name, source in sources.items():
                target = targets[name]
                if target is source:
                    continue
                if name in self._alone:
                    # Its rows would be read by nothing.
                    target.data = target.data.new_empty(0)
                    self._alone[name].pack(source)
                    continue
                if target.shape != source.shape:
                    target.data = torch.empty_like(source, dtype=target.dtype)
                target.copy_(source)
        for name, layer in self._packed.items():
            if f"{name}.weight" not in self._alone:
                layer.pack(layer.weight)
        self._is_released = False

    def release(self) -> None:
        """Free the copies of the weights; the next :meth:`generate` makes them anew from the weights as they are then.

        Called before a training pass, whose activations need the room.
        """
        if self._is_released:
            return
        sources = dict(self._source.named_parameters())
        for name, parameter in self._twin.named_parameters():
            if parameter is not sources.get(name):
                parameter.data = parameter.data.new_empty(0)
        for layer in self._packed.values():
            layer.unpack()
        self._is_released = True

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Within it, the teacher's own adapter is on, where the network has one."""
        if self._has_teacher_adapter:
            switch_teacher_adapter(self._twin, on=True)
        try:
            yield
        finally:
            if self._has_teacher_adapter:
                switch_teacher_adapter(self._twin, on=False)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        num_generations: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[Sample]]:
        """Sample ``num_generations`` completions of each prompt.

        What a sequence draws depends on the seed, its prompt's place in ``prompts`` and its number among the
        prompt's generations, not on the batch it is in (up to rounding, which depends on the batch's shape). No
        global random state is read or changed.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: limit of a completion.
            eos_token_ids: each of them ends a completion and is part of it.
            temperature: 0 is greedy.
            top_p, top_k, min_p: see :class:`vpd.rollout.sampling.Sampler`.
            stop_strings: a completion ends with the first token after which its text contains one of them.
            seed: at least 0.

        Returns:
            For each prompt, in order, its samples.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("num_generations", num_generations)):
            if value < 1:
                raise ValueError(f"{name} is {value}, but it must be at least 1.")
        if empty := [index for index, prompt in enumerate(prompts) if not prompt]:
            raise ValueError(f"Prompt {empty[0]} is empty: sampling needs at least one token to start from.")
        sampler = Sampler(temperature, top_p, top_k, min_p)
        stop = StopCondition(self._tokenizer, eos_token_ids, stop_strings)
        if self._is_released:
            self.sync()
        samples = [[Sample() for _ in range(num_generations)] for _ in prompts]
        for chunk in self._chunks(prompts, num_generations):
            self._decode(
                prompts=[tuple(prompts[prompt]) for prompt, _ in chunk],
                samples=[samples[prompt][generation] for prompt, generation in chunk],
                uniforms=torch.stack(
                    [sequence_uniforms(seed, prompt, generation, max_new_tokens) for prompt, generation in chunk], dim=1
                ).to(self._device),
                sampler=sampler,
                stop=stop,
            )
        return samples

    @torch.no_grad()
    def _keep_rows_where_read(self) -> None:
        """Keep all rearranged layers' weights in their rows too, where a forward reads some itself (DoRA's does)."""
        try:
            padded(self._twin, [[0]], self._make_cache(max_length=1))
        except Exception as error:
            # Whatever it is: what is tried for memory must not stop a run.
            logger.info("Weights are kept in their rows too, which a forward reads: %s", error)
            self._alone = {}
            self.sync()

    def _chunks(self, prompts: Sequence[Sequence[int]], num_generations: int) -> Iterator[list[tuple[int, int]]]:
        """Batches of (prompt, generation), in whole groups where these fit.

        Prompts of like length come together, which saves padding, and equal prompts too, which are computed once.
        """
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), list(prompts[index])))
        if isinstance(self._make_cache(max_length=1), StatefulCache):
            blocks = [[(index, generation) for generation in range(num_generations)] for index in order]
        else:
            blocks = [[(index, generation) for index in order for generation in range(num_generations)]]
        whole_groups = self._batch_size // num_generations * num_generations
        size = whole_groups or self._batch_size
        for block in blocks:
            for start in range(0, len(block), size):
                yield block[start : start + size]

    def _make_cache(self, max_length: int):
        return make_cache(self._twin.config, max_length)  # pyright: ignore[reportArgumentType]

    def _decode(
        self,
        prompts: list[tuple[int, ...]],
        samples: list[Sample],
        uniforms: torch.Tensor,
        sampler: Sampler,
        stop: StopCondition,
    ) -> None:
        """Decode one batch of sequences to their ends.

        Args:
            prompts: B prompts, equal ones included.
            samples: B empty samples, filled in place.
            uniforms: [steps, B] random numbers; their first dimension is the length limit.
        """
        steps = len(uniforms)
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        longest = max(map(len, distinct))
        cache = self._make_cache(max_length=longest + steps)
        logits = self._prefill(list(distinct), cache)
        mask = mask_of(list(distinct), self._device)

        places = [distinct[prompt] for prompt in prompts]
        rows = torch.tensor(places, device=self._device)
        if not (self._prefill.shares and isinstance(cache, PreallocatedCache) and cache.share(places, mask)):
            cache.expand(rows)
        logits = logits[rows]
        position_ids = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=self._device)
        if mask is not None:
            mask = nn.functional.pad(mask[rows], (0, steps), value=1)
        active = list(range(len(prompts)))
        for step in range(steps):
            tokens, log_probs = sampler(logits, uniforms[step, active])
            kept = []
            for row, (token, log_prob) in enumerate(zip(tokens.tolist(), log_probs.tolist(), strict=True)):
                sample = samples[active[row]]
                sample.token_ids.append(token)
                sample.log_probs.append(log_prob)
                if stop(sample.token_ids):
                    sample.truncated = False
                else:
                    kept.append(row)
            if not kept or step == steps - 1:
                return
            if len(kept) < len(active):
                order = cache.drop(kept, self._device)
                active = [active[row] for row in order]
                tokens, position_ids = tokens[order], position_ids[order]
                mask = mask if mask is None else mask[order]
            position_ids = position_ids + 1
            seen = None if mask is None or cache.is_shared else mask[:, : longest + step + 1]
            logits = self._forward(tokens[:, None], seen, position_ids, cache)

    def _forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor, cache: object
    ) -> torch.Tensor:
        """Logits of the last position, [rows, V]."""
        output = self._twin(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._last,
        )
        return output.logits[:, -1]


def _weights_of_one(packed: dict[str, PackedLinear], twin: nn.Module, source: nn.Module) -> dict[str, PackedLinear]:
    """Of the rearranged layers those whose weight is read by no other module and no part of the source, by its name."""
    users = Counter(id(parameter) for _, parameter in twin.named_parameters(remove_duplicate=False))
    shared = {id(parameter) for parameter in source.parameters()}
    return {
        f"{name}.weight": layer
        for name, layer in packed.items()
        if users[id(layer.weight)] == 1 and id(layer.weight) not in shared
    }


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively, so that they are faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and multiplies_bfloat16()


def make_twin(model: nn.Module, *, bfloat16: bool) -> nn.Module:
    """A copy of the modules that shares the parameters, or holds bfloat16 copies of those that are wider.

    Ties between parameters are kept. Buffers are copied in their own dtype: rotary frequencies lose too much in
    bfloat16, and so do the parameters that transformers keeps in float32.
    """
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and not isinstance(forward, MethodType):
            raise ValueError(
                f"The forward of {name or 'the model'} has been replaced by a wrapper, so that a copy would still run "
                "the original: give the engine the bare model (accelerator.unwrap_model(model, "
                "keep_fp32_wrapper=False))."
            )
    kept_wide = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    replaced: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        wide = parameter.is_floating_point() and parameter.dtype.itemsize > 2
        if bfloat16 and wide and not any(part in name.split(".") for part in kept_wide):
            converted = parameter.detach().to(torch.bfloat16, copy=True)
            replaced[id(parameter)] = nn.Parameter(converted, requires_grad=False)
        else:
            replaced[id(parameter)] = parameter
    twin = copy.deepcopy(model, replaced).eval()
    base = cast(PreTrainedModel, twin.get_base_model() if isinstance(twin, PeftModel) else twin)
    # Older architectures choose among classes of their own by name.
    sdpa = ROLLOUT_ATTENTION if base._supports_attention_backend else "sdpa"
    base.set_attn_implementation(sdpa if base._supports_sdpa else "eager")
    return twin
