"""What a run is at, besides weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingState:
    """What a resumed run must know besides weights, optimizer, scheduler and callbacks' state.

    Attributes:
        step: rollout batches done.
        train_seconds: spent in them, evaluations left aside.
        skipped_e_steps: E-iterations whose batch held one class only.
        stage: of the curriculum, from 0.
        stage_start: rollout batches that were done before it began.
        history: what :func:`vpd.monitoring.drift.drift_warnings` keeps.
        best_step, best_accuracy: of the best evaluation on the selection split; -1 before there is one.
        stale_evaluations: since then.
        stopped_by: the name of what ended the run before its time; None while nothing has.
        rows: the final table so far.
    """

    step: int = 0
    train_seconds: float = 0.0
    skipped_e_steps: int = 0
    stage: int = 0
    stage_start: int = 0
    history: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    best_accuracy: float = -1.0
    stale_evaluations: int = 0
    stopped_by: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
