"""The policy: a causal language model whose forward takes packed batches and computes one objective from them.

The loss is computed inside this forward, so that the hooks of DDP and the sharding of FSDP see every use of the
weights. A forward goes one way: the pass over the batch, then the pass that is conditioned on its keys and values where
there is one, then the objective, which is a plain function of what the two passes gave.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vpd.losses import DEFAULT_CHUNK_SIZE
from vpd.packing import PackedBatch, PackedKernel, enable_packed_attention, hidden_states, reuses_keys
from vpd.policy.adapter import has_teacher_adapter, switch_teacher_adapter
from vpd.policy.architecture import backbone_of, causal_lm_of, head_of
from vpd.policy.cpu import recompute
from vpd.policy.objectives import Forward, Objective, Outputs, ScoredStates, scored_states

_IS_RANDOM = re.compile("drop|jitter")
_OF_OTHER_HEADS = re.compile("classifier|summary")


def _is_random(config: Mapping[str, Any]) -> bool:
    for name, value in config.items():
        if isinstance(value, Mapping) and _is_random(value):
            return True
        is_positive = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if is_positive and _IS_RANDOM.search(name) and not _OF_OTHER_HEADS.match(name):
            return True
    return False


class PolicyModule(nn.Module):
    """Wraps the language model that plays student and teacher.

    Args:
        model: A causal language model, PEFT-wrapped or not.
        share_prefixes: Whether batches are packed. It is off for architectures that carry state across tokens, whose
            sequences run one by one.
        kernel: How packed attention is computed.
        recomputes: Whether training passes recompute what :func:`vpd.policy.cpu.recompute` describes.
        chunk_size: How many tokens' logits a loss holds at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        share_prefixes: bool = True,
        kernel: PackedKernel = "blocks",
        *,
        recomputes: bool = False,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> None:
        super().__init__()
        self.model = model
        self.share_prefixes = share_prefixes
        self.kernel: PackedKernel = kernel
        self.recomputes = recomputes
        self.chunk_size = chunk_size
        self.has_teacher_adapter = has_teacher_adapter(model)
        if share_prefixes:
            enable_packed_attention(causal_lm_of(model), kernel)

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass may give other numbers than a scoring pass.

        Modules and config are both asked, since dropout, dropped layers and the jitter of routers may be functions.
        """
        in_modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        return in_modules or _is_random(causal_lm_of(self.model).config.get_text_config().to_dict())

    @property
    def can_reuse_keys(self) -> bool:
        """Whether a second pass may be conditioned on the keys and values of a training pass over the same prefixes.

        It may not where training drops activations, where the student's network is not the teacher's, where the kernel
        cannot do it, or where rotary positions depend on the length of the longest sequence in a pass.
        """
        rotary = getattr(causal_lm_of(self.model).config.get_text_config(), "rope_parameters", None) or {}
        kinds = {nested.get("rope_type") for nested in (rotary, *rotary.values()) if isinstance(nested, Mapping)}
        is_fixed = not kinds & {"dynamic", "longrope"}
        is_same = not (self.has_dropout or self.has_teacher_adapter)
        return self.share_prefixes and reuses_keys(self.kernel) and is_same and is_fixed

    def forward(self, batch: PackedBatch, objective: Objective, conditioned: PackedBatch | None = None) -> Outputs:
        """Compute ``objective`` from a pass over ``batch``, and from one over ``conditioned`` where it is given.

        Every process makes the same passes, whether or not it has rollouts left: an empty batch runs a single token,
        whose zero loss is joined to every weight, and an empty ``conditioned`` runs a single token, too.

        Args:
            batch: The tokens of the first pass, which has a gradient where gradients are on. It must have been packed
                with ``keeps_keys`` if ``conditioned`` holds tokens.
            objective: What to compute.
            conditioned: A batch that was packed with ``conditioned_on=batch``. Its pass has no gradient and takes keys
                and values from the first one (KV reuse), which are forgotten afterwards.
        """
        layers = self._layers(objective)
        head = head_of(self.model)
        with recompute() if self.recomputes and torch.is_grad_enabled() else nullcontext():
            hidden = self._states(batch, layers)
        scored: ScoredStates | None = None
        if conditioned is not None:
            with torch.no_grad():
                found = self._states(conditioned, layers)
                scored = None if conditioned.is_empty else scored_states(found, conditioned)
            batch.layout.forget()
        if batch.is_empty:
            bias = 0.0 if head.bias is None else head.bias.sum()
            return Outputs(loss=0.0 * (hidden.sum() + head.weight.sum() + bias))
        return objective(Forward(hidden, head, batch, scored, self.chunk_size))

    def _states(self, batch: PackedBatch, layers: Sequence[int]) -> Tensor:
        """The last hidden states [T, H] of a batch, with those of ``layers`` side by side; [1, H] for an empty one."""
        if self.has_teacher_adapter:
            switch_teacher_adapter(self.model, on=batch.as_teacher)
        backbone = backbone_of(self.model)
        if batch.is_empty:
            token = torch.zeros(1, 1, dtype=torch.long, device=batch.input_ids.device)
            return backbone(input_ids=token, use_cache=False).last_hidden_state[0]
        return hidden_states(backbone, batch, layers)

    def _layers(self, objective: Objective) -> Sequence[int]:
        """The layers whose states the objective wants beside the last ones."""
        if objective.layers is None:
            return range(1, causal_lm_of(self.model).config.num_hidden_layers + 1)
        return objective.layers
