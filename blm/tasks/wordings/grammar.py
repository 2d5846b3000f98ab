"""Patterns of wordings: `[a|b|]` stands for one of its alternatives, `{...}` is a slot that stays."""

from __future__ import annotations

import re
from itertools import product

from blm.types import BlmError


def expand(pattern: str) -> tuple[str, ...]:
    """List the wordings that a pattern stands for, in the order of its alternatives.

    An alternative may be empty and holds no brackets.

    Raises BlmError for nested or unmatched brackets.
    """
    parts = re.split(r"\[(.*?)\]", pattern)  # every second part was in brackets
    if any(bracket in part for part in parts for bracket in "[]"):
        raise BlmError(f"pattern '{pattern}' has a nested or unmatched bracket; write [a|b] without nesting")
    choices = (part.split("|") if index % 2 else [part] for index, part in enumerate(parts))
    return tuple("".join(chosen) for chosen in product(*choices))
