"""Loss switches: which answers of a row its author wants trained.

Published rows name the switch in many ways. An answer is excluded if any of its switches says so,
and a switch that we cannot follow is a fault: never is a turn trained that its author excluded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blm.corpora.format.faults import RowError

TRAINED = (
    "loss",
    "loss_scale",
    "loss_weight",
    "weight",
    "train",
    "training",
    "train_on_turn",
    "trainable",
    "output_with_loss",
)
"""Keys of a message whose value 0 or false excludes it from the loss."""
EXCLUDED = ("masked", "no_loss", "ignore_loss")
"""Keys of a message whose value 1 or true excludes it from the loss."""
REFUSED = ("mask", "loss_mask", "train_detail", "training_detail", "train_mask")
"""Keys that have two meanings in published rows, or choose parts of a text."""
MASKS = ("loss_mask", "train_mask", "loss_weights", *(key for key in TRAINED if key != "training"))
"""Keys of a row whose list has one switch for each message, or for each answer."""


def read_loss(message: Mapping[str, Any]) -> bool:
    """Return whether the switches of a message leave it in the loss, as they do if it has none.

    Raises RowError for a value other than true, false, 0 and 1, and for the keys in `REFUSED`.
    """
    if unclear := [key for key in REFUSED if message.get(key) is not None]:
        raise RowError(
            "unclear loss switch", f"'{unclear[0]}' of a turn; use 'loss': false, or a 'loss_mask' of the row"
        )
    said = [_switch(key, message[key]) for key in TRAINED if message.get(key) is not None]
    said += [not _switch(key, message[key]) for key in EXCLUDED if message.get(key) is not None]
    return all(said)


def read_row_loss(row: Mapping[str, Any], roles: Sequence[str]) -> list[bool]:
    """Return for each message whether the switches of its row leave it in the loss.

    Only answers can be excluded: other turns are never learnt anyway.

    `roles` are those of the messages. Raises RowError for a row that is
    excluded as a whole, and for switches that are unclear.
    """
    kept = [True] * len(roles)
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    for key in dict.fromkeys((*MASKS, "mask", "masks")):
        value = row.get(key)
        if value is None:
            continue
        if key in ("mask", "masks"):
            raise RowError(
                "unclear loss switch", f"'{key}' of the row; use 'loss_mask', 1 for a trained turn"
            )
        if not isinstance(value, list):
            if not _switch(key, value):
                raise RowError("nothing to learn", f"'{key}' of the row is {value!r}")
            continue
        places = range(len(roles)) if len(value) == len(roles) else answers
        if len(value) != len(places):
            raise RowError(
                "unclear loss switch",
                f"'{key}' has {len(value)} values for {len(roles)} messages with {len(answers)} answers",
            )
        for place, one in zip(places, value, strict=True):
            kept[place] = kept[place] and _switch(key, one)
    return [role != "assistant" or keep for role, keep in zip(roles, kept, strict=True)]


def _switch(key: str, value: Any) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowError("unclear loss switch", f"'{key}' is {value!r}")
