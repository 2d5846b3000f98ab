"""Fields of published rows without which a row would be trained as something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blm.corpora.format.faults import RowError

ROW = {
    **dict.fromkeys(("tools", "functions"), "tools"),
    **dict.fromkeys(("audio", "audios"), "sound"),
    **dict.fromkeys(
        ("rejected_response", "rejected_messages", "rejected_images", "rejected", "chosen", "kto_tag"),
        "a preference between answers; keep the preferred one as the answer",
    ),
}
"""Fields of a row -> what they hold."""
TURN = ("tool_calls", "function_call", "tools", "audio", "refusal", "images", "image", "videos", "video")
"""Fields of a turn."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of an answer that hold the thought before it."""


def require_supported(row: Mapping[str, Any]) -> None:
    """Raise RowError for a row with one of the fields in `ROW`, or with the label of an answer."""
    for key, what in ROW.items():
        if row.get(key) is not None and row[key] not in ("", [], {}):
            raise RowError("unsupported content", f"'{key}' of the row: {what}")
    if isinstance(row.get("label"), bool):
        raise RowError("unsupported content", "'label' of the row: whether an answer is wanted (KTO)")


def require_supported_turn(turn: Mapping[str, Any]) -> None:
    """Raise RowError for a turn with one of the fields in `TURN`."""
    if unread := [key for key in TURN if turn.get(key)]:
        raise RowError("unsupported content", f"a turn has {', '.join(unread)}")
