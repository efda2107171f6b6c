"""The policy: a causal language model whose forward takes a packed batch and what to compute from it.

Losses are computed inside this forward, so that the hooks of DDP and the sharding of FSDP see all uses of the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from vpd.losses import DEFAULT_CHUNK_SIZE
from vpd.packing import PackedBatch, PackedKernel, enable_packed_attention, hidden_states
from vpd.policy.adapter import has_teacher_adapter, switch_teacher_adapter
from vpd.policy.architecture import backbone_of, causal_lm_of, head_of
from vpd.policy.cpu.recompute import remaking
from vpd.policy.objectives import Objective, Outputs

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
        model: a causal language model, PEFT-wrapped or not.
        share_prefixes: run batches packed; off for architectures that carry state across tokens, whose sequences are
            then run one by one.
        kernel: how packed attention is computed.
        remakes: keep less of a training pass for its backward pass: :mod:`vpd.policy.cpu.recompute`.
        chunk_size: tokens whose logits a loss holds at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        share_prefixes: bool = True,
        kernel: PackedKernel = "blocks",
        *,
        remakes: bool = False,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> None:
        super().__init__()
        self.model = model
        self.share_prefixes = share_prefixes
        self.kernel: PackedKernel = kernel
        self.remakes = remakes
        self.chunk_size = chunk_size
        self.has_teacher_adapter = has_teacher_adapter(model)
        if share_prefixes:
            enable_packed_attention(causal_lm_of(model), kernel)

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass may give other numbers than a scoring pass, by the modules or by the config, since
        dropout, dropped layers and jitter of routers may be functions."""
        in_modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        return in_modules or _is_random(causal_lm_of(self.model).config.get_text_config().to_dict())

    @property
    def can_lend_keys(self) -> bool:
        """Whether a scoring pass may take the keys and values of a training pass over the same beginnings.

        Not where training drops some, where the student's network is not the teacher's, where the kernel cannot, or
        where rotary positions depend on how long the pass's longest sequence is.
        """
        rotary = getattr(causal_lm_of(self.model).config.get_text_config(), "rope_parameters", None) or {}
        kinds = {nested.get("rope_type") for nested in (rotary, *rotary.values()) if isinstance(nested, Mapping)}
        is_fixed = not kinds & {"dynamic", "longrope"}
        is_same = not (self.has_dropout or self.has_teacher_adapter)
        return self.share_prefixes and self.kernel == "blocks" and is_same and is_fixed

    def forward(self, batch: PackedBatch, objective: Objective) -> Outputs:
        """:meth:`compute`, in whatever accelerate wraps around it."""
        return self.compute(batch, objective)

    def compute(self, batch: PackedBatch, objective: Objective) -> Outputs:
        """Compute ``objective`` on ``batch``.

        An empty batch runs one token and returns a zero loss joined to every weight: in a distributed run each process
        makes the same number of passes, whether or not it has rollouts left.
        """
        if self.has_teacher_adapter:
            switch_teacher_adapter(self.model, on=batch.as_teacher)
        backbone, head = backbone_of(self.model), head_of(self.model)
        if batch.is_empty:
            token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
            hidden = backbone(input_ids=token, use_cache=False).last_hidden_state
            zero = 0.0 * (hidden.sum() + head.weight.sum() + (0.0 if head.bias is None else head.bias.sum()))
            return Outputs(loss=zero)
        with remaking() if self.remakes and torch.is_grad_enabled() else nullcontext():
            hidden = hidden_states(backbone, batch, self._layers(objective))
        return objective(hidden, head, batch, self.chunk_size)

    def _layers(self, objective: Objective) -> Sequence[int]:
        """The layers whose states the objective wants behind the last ones; None stands for all."""
        layers = getattr(objective, "layers", ())
        return range(1, causal_lm_of(self.model).config.num_hidden_layers + 1) if layers is None else layers
