"""How far a run has come: a handful of numbers, the same on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(kw_only=True)
class Progress:
    """Where the run stands; stored with every checkpoint, so it counts over restarts."""

    step: int = 0
    """Optimizer steps done, skipped ones among them."""
    samples: int = 0
    """The data position: samples consumed by all ranks together."""
    tokens: int = 0
    """Real tokens consumed by all ranks together, padding left out."""
    seconds: float = 0.0
    """Wall-clock seconds of training, this and earlier starts."""
    skipped: int = 0
    """Steps whose gradient norm wasn't finite."""
    rollbacks: int = 0
    """Times that the run went back to its last checkpoint."""

    def to_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)
