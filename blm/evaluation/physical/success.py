"""Success rates of a set of episodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from blm.evaluation.statistics import Rate, wilson


@dataclass(frozen=True, kw_only=True)
class SuccessSummary:
    """Success rates of a set of episodes, and the reasons of failures."""

    n: int
    success_once: Rate
    success_at_end: Rate
    success_strict: Rate | None
    """Success with the object at rest (`TaskSpec.is_settled`); None in results of older versions."""
    success_at_limit: Rate | None
    """None if episodes ended after their success, so that it was not measured."""
    reasons: Mapping[str, int]
    """Reason -> number of episodes that failed for it."""
    act_ms: float
    """Median duration of a decision [ms]."""

    def failed_for(self, reason: str) -> Rate:
        """Return the share of episodes that failed for a reason, with its Wilson interval."""
        hits = self.reasons.get(reason, 0)
        return Rate(hits, self.n, hits / self.n, *wilson(hits / self.n, self.n))

    def to_json(self) -> dict[str, Any]:
        optional = {"success_strict": self.success_strict, "success_at_limit": self.success_at_limit}
        return {
            "n": self.n,
            "success_once": asdict(self.success_once),
            "success_at_end": asdict(self.success_at_end),
            **{name: asdict(rate) for name, rate in optional.items() if rate is not None},
            "reasons": dict(self.reasons),
            "act_ms": self.act_ms,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        strict, limit = (value.get(name) for name in ("success_strict", "success_at_limit"))
        return cls(
            n=value["n"],
            success_once=Rate(**value["success_once"]),
            success_at_end=Rate(**value["success_at_end"]),
            success_strict=None if strict is None else Rate(**strict),
            success_at_limit=None if limit is None else Rate(**limit),
            reasons=value["reasons"],
            act_ms=value["act_ms"],
        )
