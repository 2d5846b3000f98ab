"""Limits on msgpack messages, checked before any object is built.

One byte of msgpack can stand for an empty map, which takes 64 bytes in memory: a frame of 16 MiB
took more than a gigabyte and 16 seconds. The check reads type bytes and lengths only, skips text
and binary data, and stops at the first item beyond the limit, so that a refused message costs no
more than an accepted one. Source of the type bytes:
https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

from itertools import pairwise

from blm.types import MAX_INSTRUCTION, BlmError

MAX_DEPTH = 8
"""Maximum nesting of maps and lists; an observation of GR00T needs five levels."""
MAX_TEXT = 4096
"""Maximum length of one text [bytes]; names, keys and instructions are far shorter."""
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8} | {
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,
}  # fmt: skip
"""Number of bytes after the type byte of nil, booleans, numbers and fixed-size extensions."""
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Size of the length field of binary data, extensions and text [bytes]."""
_NESTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Lists and maps: size of the length field [bytes], and items per entry."""


def check_limits(data: bytes, max_items: int) -> list[slice]:
    """Check a message; return the slices of keys and values of its outermost map.

    Keys and values alternate. The list is empty if the message is not a map. Raises BlmError for
    more than `max_items` items (keys, values and elements on all levels), more than MAX_DEPTH
    levels, a text of more than MAX_TEXT bytes, and for data that is not exactly one msgpack value.
    """
    position, items, starts = 0, 1, list[int]()
    missing = [1]
    """Number of items still to come on each open level; the first level is the message itself."""
    while missing:
        if not missing[-1]:
            missing.pop()
            continue
        if len(missing) == 2:
            starts.append(position)
        missing[-1] -= 1
        position, inside = _step(data, position)
        items += inside
        if items > max_items:
            raise BlmError(f"the message has more than {max_items} items; send arrays, not lists of numbers")
        missing.append(inside)
        if inside and len(missing) > MAX_DEPTH + 1:
            raise BlmError(f"the message has more than {MAX_DEPTH} levels of maps and lists")
    if position != len(data):
        raise BlmError(f"{len(data) - position} bytes follow the end of the message")
    if not (data[0] & 0xF0 == 0x80 or data[0] in (0xDE, 0xDF)):
        return []
    return [slice(*ends) for ends in pairwise([*starts, position])]


def _step(data: bytes, position: int) -> tuple[int, int]:
    """Read one type byte; return the position of the next one, and the number of items inside."""
    kind, width, inside, length = data[position] if position < len(data) else -1, 0, 0, 0
    position += 1
    if 0x80 <= kind <= 0x9F:
        inside = (kind & 0x0F) * (2 if kind < 0x90 else 1)
    elif kind in _NESTED:
        width, entry = _NESTED[kind]
        inside = entry * int.from_bytes(data[position : position + width], "big")
    elif kind in _SIZED or 0xA0 <= kind <= 0xBF:
        width = _SIZED.get(kind, 0)
        length = int.from_bytes(data[position : position + width], "big") if width else kind & 0x1F
        if length > MAX_TEXT and 0xD9 <= kind <= 0xDB:
            raise BlmError(
                f"a text has {length} bytes; at most {MAX_TEXT}, and {MAX_INSTRUCTION} as instruction"
            )
        length += 0xC7 <= kind <= 0xC9  # the type of an extension
    elif kind == 0xC1:
        raise BlmError("byte 0xc1 is not msgpack")
    elif 0x80 <= kind < 0xE0:
        length = _FIXED[kind]
    if kind < 0 or position + width + length > len(data):
        raise BlmError("the message is truncated")
    return position + width + length, inside
