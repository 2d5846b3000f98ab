"""The result of a study: one row per variant, compared with the first on the same scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from blm.evaluation.statistics import Difference, Rate


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """Training cost and success of one variant."""

    variant: str
    models: int
    """Number of models trained for it."""
    steps: int | None
    """Training steps of each model; None in files that were written before it was recorded."""
    samples: int
    """Training samples, summed over all models."""
    training_seconds: float
    success: Rate
    """Rate of episodes with success at any step."""
    success_at_end: Rate | None
    """Rate of episodes with success at the end; None in files of older versions."""
    success_at_limit: Rate | None
    solved: Mapping[str, int]
    """"robot/task" -> number of successful episodes."""
    result: str
    """Folder of the variant's result.json, below studies/variants."""
    gap: Difference | None = None
    """Success rate of this variant minus that of the first; None for the first."""
    p_corrected: float | None = None
    """p-value of the gap, corrected for the number of variants (Holm)."""
    answers: Rate | None = None
    """Rate of correct answers to held-out scene questions after Stage II; None: not asked."""

    @property
    def steps_per_s(self) -> float | None:
        """Training steps per second; None for files without the number of steps."""
        return None if self.steps is None else self.steps * self.models / self.training_seconds

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, without the fields that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        rates = {
            name: Rate(**value[name]) if name in value else None
            for name in ("success", "success_at_end", "success_at_limit", "answers")
        }
        gap = Difference(**value["gap"]) if "gap" in value else None
        return cls(**{"steps": None, **value, **rates, "gap": gap})


@dataclass(frozen=True)
class StudyResult:
    """All variants of a study; the first is the reference."""

    study: str
    recipe: Mapping[str, Any]
    """The recipe that the variants change, as JSON."""
    variants: Sequence[VariantResult]

    def to_json(self) -> dict[str, Any]:
        variants = [variant.to_json() for variant in self.variants]
        return {"study": self.study, "recipe": self.recipe, "variants": variants}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        variants = [VariantResult.from_json(variant) for variant in value["variants"]]
        return cls(value["study"], value["recipe"], variants)

    def to_markdown(self) -> str:
        """Format a table: success of each variant, and its paired difference from the first."""
        first = self.variants[0]
        lines = [
            f"# Study: {self.study}",
            "",
            f"n = {first.success.n} episodes on the same scenes; {first.steps:,} steps per model; "
            "95 % intervals; p: McNemar's exact test, corrected for the number of variants (Holm).",
            "",
            "| variant | models | samples seen | training | success once | at end | at step limit "
            "| against the first | p |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_markdown_row(variant) for variant in self.variants),
        ]
        if first.answers is not None:
            lines += [
                "",
                f"{first.answers.n} held-out scene questions after Stage II; a frozen backbone answers as "
                "before it.",
                "",
                "| variant | correct answers | steps/s |",
                "|---|---|---|",
                *(_language_row(variant) for variant in self.variants),
            ]
        return "\n".join(lines) + "\n"


def _markdown_row(row: VariantResult) -> str:
    once, gap, p = row.success, row.gap, row.p_corrected
    cells = [
        row.variant,
        str(row.models),
        f"{row.samples:,}",
        f"{row.training_seconds / 60:.1f} min",
        f"{once.rate:.1%} ({once.low:.1%} to {once.high:.1%})",
        _percent(row.success_at_end),
        _percent(row.success_at_limit),
        _points(gap) if gap is not None else "-",
        "-" if p is None else f"{p:.2g}",
    ]
    return f"| {' | '.join(cells)} |"


def _language_row(row: VariantResult) -> str:
    rate, speed = row.answers, row.steps_per_s
    answers = "-" if rate is None else f"{rate.rate:.1%} ({rate.low:.1%} to {rate.high:.1%})"
    return f"| {row.variant} | {answers} | {'-' if speed is None else f'{speed:.2f}'} |"


def _percent(rate: Rate | None) -> str:
    return "-" if rate is None else f"{rate.rate:.1%}"


def _points(gap: Difference) -> str:
    return f"{100 * gap.difference:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
