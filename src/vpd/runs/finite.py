"""Keeps weights that are not finite from being saved."""

from __future__ import annotations

from torch import nn

from vpd.runs.files import RunError


def require_finite(model: nn.Module, what: str) -> None:
    """Raise RunError where a weight is infinite or not a number; ``what`` names what would have been saved."""
    broken = [name for name, weight in model.named_parameters() if not bool(weight.detach().isfinite().all())]
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise RunError(
            f"{what} is not saved, because weights of the network are not finite ({broken[0]}{others}). Go on from the "
            "newest checkpoint by --resume, with a lower optim.learning_rate."
        )
