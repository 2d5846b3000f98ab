"""Predictions -> scores with intervals, by kind and overall, and balanced accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np

from blm.evaluation.digital.parsers.extraction import normalise
from blm.evaluation.digital.result import (
    AnswerSummary,
    BalancedAccuracy,
    BaselineResult,
    DigitalSummary,
    Headline,
    Prediction,
)
from blm.evaluation.statistics import Rate, paired_difference, success_rate
from blm.types import base_kind

YES_NO = {"yes", "no"}
Average = Literal["items", "kinds"]


def summarise(predictions: Sequence[Prediction], average: Average) -> DigitalSummary:
    """Summarise the predictions of one model or baseline; `average` defines the headline score."""
    kinds = sorted({p.kind for p in predictions})
    strata = [p.kind for p in predictions] if average == "kinds" else None
    return DigitalSummary(
        headline=Headline(**asdict(_rate(predictions, strata)), average=average),
        overall=_answer_summary(predictions),
        kinds={kind: _answer_summary([p for p in predictions if p.kind == kind]) for kind in kinds},
        balanced=balanced_accuracy(predictions),
    )


def _rate(predictions: Sequence[Prediction], strata: Sequence[str] | None = None) -> Rate:
    return success_rate([p.score for p in predictions], [p.group for p in predictions], strata)


def _answer_summary(predictions: Sequence[Prediction]) -> AnswerSummary:
    """Summarise answers: rate clustered by group, unparsed and unjudged counts, median errors."""
    counts = [p.points for p in predictions if p.points is not None]
    return AnswerSummary(
        **asdict(_rate(predictions)),
        unread=sum(p.parsed is None for p in predictions),
        refused=sum(p.failure is not None for p in predictions),
        unjudged=sum(bool(p.unjudged) for p in predictions),
        median_error=_median_error([p for p in predictions if p.scorer == "point"]),
        median_error_cm=_median_error([p for p in predictions if p.scorer == "metric"]),
        points_per_answer=float(np.mean(counts)) if counts else None,
        truncated=sum(p.truncated for p in predictions),
    )


def _median_error(predictions: Sequence[Prediction]) -> float | None:
    """Return the median error; unparsed answers have an infinite error. None if it is infinite."""
    errors = [np.inf if p.error is None else p.error for p in predictions]
    median = float(np.median(errors)) if errors else np.inf
    return median if np.isfinite(median) else None


def balanced_accuracy(predictions: Sequence[Prediction]) -> dict[str, BalancedAccuracy]:
    """Return the mean recall of yes and no, for each base kind whose references are all yes or no.

    Kinds named `<base>_positive` and `<base>_negative` have one base kind. A model that always says
    no scores 0.5. The entry "all" is added for more than one base kind.
    """
    references: dict[str, set[str]] = {}
    for p in predictions:
        references.setdefault(p.kind, set()).add(normalise(p.reference))
    parts: dict[str, list[Prediction]] = {}
    for p in predictions:
        if references[p.kind] <= YES_NO:
            parts.setdefault(base_kind(p.kind), []).append(p)
    both = {kind: part for kind, part in parts.items() if {normalise(p.reference) for p in part} == YES_NO}
    if len(both) > 1:
        both["all"] = [p for part in both.values() for p in part]
    return {kind: _recalls(part) for kind, part in both.items()}


def _recalls(predictions: Sequence[Prediction]) -> BalancedAccuracy:
    references = [normalise(p.reference) for p in predictions]
    said_yes = [normalise(p.parsed or "").split()[:1] == ["yes"] for p in predictions]
    return BalancedAccuracy(
        **asdict(_rate(predictions, references)),
        yes=_rate([p for p, reference in zip(predictions, references, strict=True) if reference == "yes"]),
        no=_rate([p for p, reference in zip(predictions, references, strict=True) if reference == "no"]),
        said_yes=float(np.mean(said_yes)),
    )


def compare_with_baseline(
    predictions: Sequence[Prediction], baseline: Sequence[Prediction], average: Average
) -> BaselineResult:
    """Summarise a baseline, and the model's gain over it on the same questions."""
    gain = paired_difference(
        [p.score for p in predictions],
        [p.score for p in baseline],
        [p.group for p in predictions],
    )
    return BaselineResult(summarise(baseline, average), gain)
