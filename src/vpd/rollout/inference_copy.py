"""The copy of a network that samples: its own modules, with weights that are shared or converted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from vpd.policy.adapter import has_teacher_adapter, switch_teacher_adapter
from vpd.rollout.decode_attention import ROLLOUT_ATTENTION
from vpd.rollout.kv_cache import make_cache
from vpd.rollout.prefill import prefill_padded
from vpd.rollout.rearranged_weights import RearrangedWeights

logger = logging.getLogger(__name__)


class InferenceCopy:
    """A copy of a network that follows its weights, and whose own memory can be given back.

    Parameters that need no conversion are shared with the model. The others are bfloat16 copies, which :meth:`sync`
    brings up to date and :meth:`release` gives up. On a CPU linear layers hold them in oneDNN's own layout
    (:class:`vpd.rollout.rearranged_weights.RearrangedWeights`). The model's modes, settings and hooks are never
    touched.

    Args:
        source: The model, on its device, without wrappers such as DDP.
        bfloat16: Whether wider weights are converted to bfloat16.

    Attributes:
        network: The copy, in evaluation mode, with an attention for decoding and the teacher's own adapter off.

    Raises:
        ValueError: The model's forward has been replaced by a wrapper that would still run the original.
    """

    def __init__(self, source: nn.Module, *, bfloat16: bool) -> None:
        self._source = source
        self.network = copy_for_inference(source, bfloat16=bfloat16)
        self._has_teacher_adapter = has_teacher_adapter(self.network)
        if self._has_teacher_adapter:
            switch_teacher_adapter(self.network, on=False)
        self._rearranged = RearrangedWeights(self.network, source)
        self.sync()
        if self._rearranged.leaves_rows_out:
            self._keep_rows_where_read()

    @torch.no_grad()
    def sync(self) -> None:
        """Take over the model's current weights and buffers.

        Raises:
            RuntimeError: The model has other parameters or buffers than it had when the copy was made.
        """
        for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
            targets = dict(kind(self.network))
            sources = dict(kind(self._source))
            if targets.keys() != sources.keys():
                raise RuntimeError(
                    "The model's modules have changed since the LocalEngine was made (an adapter added or merged?): "
                    "make a new engine."
                )
            for name, source in sources.items():
                target = targets[name]
                if target is source or self._rearranged.take(name, target, source):
                    continue
                if target.shape != source.shape:
                    target.data = torch.empty_like(source, dtype=target.dtype)
                target.copy_(source)
        self._rearranged.rearrange_rows()
        self.is_released = False

    def release(self) -> None:
        """Give up all weights that are not shared with the model; :meth:`sync` copies them anew."""
        if self.is_released:
            return
        sources = dict(self._source.named_parameters())
        for name, parameter in self.network.named_parameters():
            if parameter is not sources.get(name):
                parameter.data = parameter.data.new_empty(0)
        self._rearranged.free()
        self.is_released = True

    @contextmanager
    def as_teacher(self, on: bool) -> Iterator[None]:
        """Within the block, the teacher's own adapter is on if ``on`` says so and the network has one."""
        switches = on and self._has_teacher_adapter
        if switches:
            switch_teacher_adapter(self.network, on=True)
        try:
            yield
        finally:
            if switches:
                switch_teacher_adapter(self.network, on=False)

    @torch.no_grad()
    def _keep_rows_where_read(self) -> None:
        """Keep the rows of all rearranged weights where a forward reads some of them itself, as DoRA's does."""
        try:
            prefill_padded(self.network, [[0]], make_cache(cast(PreTrainedModel, self.network).config, max_length=1))
        except Exception as error:
            # A forward may fail in any way, and a trial that serves memory alone must not stop a run.
            logger.info("Weights are kept in their rows too, which a forward reads: %s", error)
            self._rearranged.keep_rows()
            self.sync()


def copy_for_inference(model: nn.Module, *, bfloat16: bool) -> nn.Module:
    """Copy the modules of a model and share its parameters, or hold bfloat16 copies of those that are wider.

    Ties between parameters are kept. Buffers are copied in their own dtype, since rotary frequencies lose too much in
    bfloat16, and so are the parameters that transformers keeps in float32.

    Raises:
        ValueError: A module's forward has been replaced by a wrapper that would still run the original.
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
    network = copy.deepcopy(model, replaced).eval()
    base = cast(PreTrainedModel, network.get_base_model() if isinstance(network, PeftModel) else network)
    # Older architectures choose among classes of their own by name.
    sdpa = ROLLOUT_ATTENTION if base._supports_attention_backend else "sdpa"
    base.set_attn_implementation(sdpa if base._supports_sdpa else "eager")
    return network
