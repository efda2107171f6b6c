"""The policy: a causal language model whose forward takes a packed batch and what to compute from it.

Losses are computed inside this forward, so that the hooks of DDP and the sharding of FSDP see all uses of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vpd.packing import PackedBatch, PackedKernel, enable_packed_attention, hidden_states
from vpd.policy.adapter import has_teacher_adapter, switch_teacher_adapter
from vpd.policy.head import backbone_of, causal_lm_of, head_of
from vpd.policy.objectives import Objective, Outputs


class PolicyModule(nn.Module):
    """Wraps the language model that plays student and teacher.

    Args:
        model: a causal language model, PEFT-wrapped or not.
        share_prefixes: run batches packed; off for architectures that carry state across tokens, whose sequences are
            then run one by one.
        kernel: how packed attention is computed.
    """

    def __init__(self, model: nn.Module, share_prefixes: bool = True, kernel: PackedKernel = "blocks") -> None:
        super().__init__()
        self.model = model
        self.share_prefixes = share_prefixes
        self.has_teacher_adapter = has_teacher_adapter(model)
        if share_prefixes:
            enable_packed_attention(causal_lm_of(model), kernel)

    @property
    def has_dropout(self) -> bool:
        """Whether a training pass gives other numbers than a scoring pass."""
        in_modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        return in_modules or bool(getattr(causal_lm_of(self.model).config, "attention_dropout", 0.0))

    def forward(self, batch: PackedBatch, objective: Objective) -> Outputs:
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
        return objective(hidden_states(backbone, batch, self._layers(objective)), head, batch)

    def _layers(self, objective: Objective) -> Sequence[int]:
        """The layers whose states the objective wants behind the last ones; None stands for all."""
        layers = getattr(objective, "layers", ())
        return range(1, causal_lm_of(self.model).config.num_hidden_layers + 1) if layers is None else layers
