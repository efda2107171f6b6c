"""Turns token sequences into batches that share prefixes and pad no sequence."""

from vpd.device import PackedKernel
from vpd.packing.attention import IMPLEMENTATIONS, enable_packed_attention, packed_attention_forward
from vpd.packing.batch import PackedBatch, PackedRow, hidden_states, pack
from vpd.packing.compatibility import PackingDifference, check_packed_equals_separate, packable
from vpd.packing.kernels import reuses_keys
from vpd.packing.layout import PackedLayout
from vpd.packing.planning import plan_micro_batches

__all__ = [
    "IMPLEMENTATIONS",
    "PackedBatch",
    "PackedKernel",
    "PackedLayout",
    "PackedRow",
    "PackingDifference",
    "check_packed_equals_separate",
    "enable_packed_attention",
    "hidden_states",
    "pack",
    "packable",
    "packed_attention_forward",
    "plan_micro_batches",
    "reuses_keys",
]
