"""A subset of a benchmark: evenly spaced questions."""

from __future__ import annotations

from collections.abc import Sequence

from blm.types import BlmError, Question


def evenly_spaced(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return `limit` of the questions, evenly spaced, or all of them.

    Raises BlmError for a limit below 1.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    if limit < 1:
        raise BlmError(f"--limit {limit} must be 1 or more")
    return [questions[index * len(questions) // limit] for index in range(limit)]
