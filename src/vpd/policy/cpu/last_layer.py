"""A last layer that computes its queries and its MLP for the tokens alone that predict a completion's token.

Of the other tokens, most of a prompt's and of a feedback's, a packed batch needs the last layer's keys and values; what
follows them nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from vpd.packing import PackedLayout
from vpd.policy.architecture import backbone_of
from vpd.policy.cpu.norms import only_projects

_BY_ROW = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of the layer that take each token by itself, after its attention has been called."""


@dataclass
class _Rows:
    """The tokens that the layer computes in the pass under way; None for all."""

    scored: Tensor | None = None


def trim_last_layer(model: nn.Module) -> bool:
    """Let the last layer compute as this module describes in packed batches, for good; return whether it does.

    In place of what it leaves out stand zeros; the hidden states of tokens that predict nothing then mean nothing. Not
    where there is a GPU, nor in layers built otherwise.

    Args:
        model: a language model on the CPU.
    """
    layers = getattr(backbone_of(model), "layers", None)
    if torch.accelerator.is_available() or not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return False
    last = layers[-1]
    try:
        parts = [last.get_submodule(name) for name in _BY_ROW]
    except AttributeError:
        return False
    is_used_once = all(layer is not last for layer in list(layers)[:-1])
    if not (is_used_once and only_projects(last) and all(map(_takes_rows, parts))):
        return False
    rows = _Rows()
    # The attention is told of the batch, in gradient checkpointing's second pass too.
    attention = last.get_submodule("self_attn")
    vars(attention)["rows"] = rows
    attention.register_forward_pre_hook(_note_rows, with_kwargs=True)
    for part in parts:
        vars(part)["rows"] = rows
        # On the instance, and under this name, as norms.py has it.
        part.forward = MethodType(forward, part)
    return True


@torch.no_grad()
def _takes_rows(part: nn.Module) -> bool:
    """Whether the part makes one tensor of one, each row by itself, and has no forward of its own."""
    first = next((module for module in part.modules() if isinstance(module, nn.Linear)), None)
    if first is None or "forward" in vars(part):
        return False
    x = torch.linspace(-1.0, 1.0, 3 * first.in_features, dtype=first.weight.dtype).view(1, 3, -1)
    was_training = part.training
    part.eval()
    try:
        together, alone = part(x), part(x[:, 1:2])
        return torch.allclose(together[:, 1:2].float(), alone.float(), rtol=1e-2, atol=1e-3)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        part.train(was_training)


def _note_rows(attention: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
    packed: PackedLayout | None = kwargs.get("packed")
    cast(_Rows, attention.rows).scored = None if packed is None else packed.scored


def forward(part: nn.Module, x: Tensor, *others: Any) -> Tensor:
    """The ``forward`` of a part: [1, T, in] to [1, T, out]."""
    scored, compute = cast(_Rows, part.rows).scored, type(part).forward
    if scored is None or others:
        return compute(part, x, *others)
    found = compute(part, x.index_select(1, scored))
    return found.new_zeros(1, x.shape[1], found.shape[-1]).index_copy(1, scored, found)
