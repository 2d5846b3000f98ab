"""The key facts of free questions in a row of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from blm.corpora.format.faults import RowError
from blm.types import KeyFacts

FREE = "free_"
"""Prefix of the kinds of free questions, whose answers are scored by key facts."""
_LISTS = tuple(field.name for field in fields(KeyFacts))


def facts_to_json(facts: Sequence[KeyFacts | None]) -> dict[str, Any]:
    """Return the field "facts" of a row; nothing for a row without free questions."""
    if not any(facts):
        return {}
    return {"facts": [None if one is None else asdict(one) for one in facts]}


def read_facts(value: Any, free: Sequence[bool]) -> tuple[KeyFacts | None, ...]:
    """Return the key facts of every answer of a row, of which `free` tells whether it needs them.

    `value` is the row's field "facts". Empty if no answer needs them. Raises RowError if they are
    malformed, or are with other answers than those that need them.
    """
    if value is None and not any(free):
        return ()
    if not isinstance(value, list) or len(value) != len(free):
        raise RowError("malformed row", f"'facts' is {str(value)[:60]!r}, not a list of {len(free)}")
    for turn, (one, needed) in enumerate(zip(value, free, strict=True)):
        if (one is not None) != needed:
            rule = "a free question needs facts" if needed else "only free questions have facts"
            raise RowError("malformed row", f"'facts' of answer {turn}: {rule}")
    return tuple(None if one is None else _facts(one) for one in value)


def _facts(value: Any) -> KeyFacts:
    if not isinstance(value, dict) or not value.keys() <= set(_LISTS):
        raise RowError("malformed row", f"facts are {str(value)[:60]!r}, no object of {', '.join(_LISTS)}")
    for name, listed in value.items():
        if not isinstance(listed, list) or not all(isinstance(fact, str) and fact for fact in listed):
            raise RowError(
                "malformed row", f"'{name}' of the facts is {str(listed)[:60]!r}, no list of texts"
            )
    return KeyFacts(**{name: tuple(listed) for name, listed in value.items()})
