"""Rows of answers -> scores with intervals, per kind and over all, and what a mean hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from blm.evaluation.digital.parsers.extraction import normalise
from blm.evaluation.statistics import paired_difference, success_rate
from blm.types import base_kind

Row = dict[str, Any]
YES_NO = {"yes", "no"}


def summarise(rows: Sequence[Row], average: Literal["items", "kinds"]) -> dict[str, Any]:
    """`headline` is the benchmark's own mean, `overall` that over all questions, `kinds` each kind's."""
    kinds = sorted({row["kind"] for row in rows})
    of_kind = {kind: _part([row for row in rows if row["kind"] == kind]) for kind in kinds}
    strata = [row["kind"] for row in rows] if average == "kinds" else None
    headline = {"average": average, **_rate(rows, strata)}
    return {"headline": headline, "overall": _part(rows), "kinds": of_kind, "balanced": balanced(rows)}


def _rate(rows: Sequence[Row], strata: Sequence[str] | None = None) -> dict[str, Any]:
    scores, groups = [row["score"] for row in rows], [row["group"] for row in rows]
    return asdict(success_rate(scores, groups, strata))


def _part(rows: Sequence[Row]) -> dict[str, Any]:
    """Rate clustered by group, what could not be read or judged, and medians of the distances.

    An unread place is infinitely far away; a median that is infinite is given as None.
    """
    given = [row["points"] for row in rows if row["points"] is not None]
    return {
        **_rate(rows),
        "unread": sum(row["parsed"] is None for row in rows),
        "refused": sum(row["failure"] is not None for row in rows),
        "unjudged": sum(bool(row.get("unjudged")) for row in rows),
        "median_error": _median([row for row in rows if row["scorer"] == "point"]),
        "median_error_cm": _median([row for row in rows if row["scorer"] == "metric"]),
        "points_per_answer": float(np.mean(given)) if given else None,
    }


def _median(rows: Sequence[Row]) -> float | None:
    far = [np.inf if row["error"] is None else row["error"] for row in rows]
    middle = float(np.median(far)) if far else np.inf
    return middle if np.isfinite(middle) else None


def balanced(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean of the recalls on yes and on no, for each stem of kinds that only know yes and no.

    Kinds named `<stem>_positive` and `<stem>_negative` are one stem. A model that always says no has 0.5.
    """
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row["kind"], set()).add(normalise(row["reference"]))
    stems: dict[str, list[Row]] = {}
    for row in rows:
        if answers[row["kind"]] <= YES_NO:
            stems.setdefault(base_kind(row["kind"]), []).append(row)
    both = {name: part for name, part in stems.items() if {normalise(r["reference"]) for r in part} == YES_NO}
    if len(both) > 1:
        both["all"] = [row for part in both.values() for row in part]
    return {name: _recalls(part) for name, part in both.items()}


def _recalls(rows: Sequence[Row]) -> dict[str, Any]:
    references = [normalise(row["reference"]) for row in rows]
    sides = {
        word: _rate([row for row, reference in zip(rows, references, strict=True) if reference == word])
        for word in ("yes", "no")
    }
    said = [normalise(row["parsed"] or "").split()[:1] == ["yes"] for row in rows]
    return {**_rate(rows, references), **sides, "said_yes": float(np.mean(said))}


def versus(
    rows: Sequence[Row], guessed: Sequence[Row], average: Literal["items", "kinds"]
) -> Mapping[str, Any]:
    """A baseline's summary, and the model's gain over it on the same questions."""
    ours, theirs = ([row["score"] for row in side] for side in (rows, guessed))
    gain = paired_difference(ours, theirs, [row["group"] for row in rows])
    return {**summarise(guessed, average), "model_minus_baseline": asdict(gain)}
