"""Errors that a user can cause and fix, and safe quotation of a user's values in messages."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def shorten(value: object, most: int = 160, *, quote: bool = True) -> str:
    """Return `value` for an error message: one printable line of about `most` characters.

    Text is quoted as in Python and followed by its length if it was cut; with `quote=False` it is
    not quoted, and its white space is collapsed. The cost does not grow with the size of `value`.
    """
    numpy = sys.modules.get("numpy")  # not imported, because `blm --help` would wait for it
    if numpy is not None and isinstance(value, numpy.ndarray):
        return f"array of {value.dtype} {value.shape}"
    size = ""
    if isinstance(value, str | bytes) and len(value) > most:
        size = f" ({len(value)} long)" if quote else ""
        value = value[: most if quote else 4 * most]
    if isinstance(value, Exception) or (isinstance(value, str) and not quote):
        text = str(value)[: 4 * most]
    else:
        text = repr(value) if isinstance(value, str | bytes) else reprlib.repr(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    if not quote:
        text = " ".join(text.split())
    return (text if len(text) <= most else text[: most - 1] + "…") + size


class BlmError(ValueError):
    """Base class of errors that a user can cause and fix.

    The message names the value, the rule and the valid choices.
    """


class UnknownNameError(BlmError):
    """An unknown name in a registry or recipe; lists valid names and the closest match."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        names = sorted(valid)
        # The search is quadratic in the length, so only short values, which may be typing errors, qualify.
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5) if len(name) <= 80 else []
        hint = f" Did you mean '{close[0]}'?" if close else ""
        super().__init__(f"unknown {kind} {shorten(name)}.{hint} Valid: {', '.join(names)}.")
        self._made_of = kind, name[:200], names

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of  # so that it can be unpickled from a worker process


class ContractError(BlmError):
    """Two parties disagree on action space, rate, cameras or shapes; the message prints both."""


class LateError(BlmError):
    """An action would come after its deadline; a late chunk is worse than none."""


def lookup(kind: str, name: str, registry: Mapping[str, T]) -> T:
    """Return `registry[name]`. Raises UnknownNameError with the closest match."""
    if name not in registry:
        raise UnknownNameError(kind, name, registry)
    return registry[name]


def require_numbers(owner: object, **limits: tuple[float, float]) -> None:
    """Raise BlmError unless fields of `owner` lie within their limits.

    The message names field, value and limits. A field is a number, several numbers, or None, which
    is always valid. NaN never is.
    """
    for name, (low, high) in limits.items():
        value = getattr(owner, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not low <= one <= high:
                raise BlmError(f"{name} is {value}; it must be {low:,} to {high:,}")
