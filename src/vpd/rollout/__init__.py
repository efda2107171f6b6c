"""Samples completions from the student."""

from vpd.rollout.local import LocalEngine, Sample

__all__ = ["LocalEngine", "Sample"]
