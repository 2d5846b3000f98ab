"""What a conversion did with each field of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from blm.corpora.format.messages import Conversation

NOT_USED = "not used"


class Tally:
    """Counts where the fields of rows went, so that nothing is lost silently."""

    def __init__(self) -> None:
        self.fields: dict[str, Counter[str]] = {}
        """Field -> where it went -> number of rows, turns or parts."""
        self.notes = Counter[str]()
        """What else was done to rows, and how often."""
        self.trained = self.context = self.pictures = 0

    def count(self, values: Mapping[str, Any], uses: Mapping[str, str], where: str = "") -> None:
        """Count the fields of a row; `uses` says where they go. The others are not used.

        `where` precedes the names of fields that are not of the row itself. Empty fields are not
        counted.
        """
        for key, value in values.items():
            if value is not None and not (isinstance(value, str | list | dict) and not value):
                self.fields.setdefault(f"{where}{key}", Counter())[uses.get(key, NOT_USED)] += 1

    def add(self, other: Tally) -> None:
        """Add the fields and notes of another tally, such as that of one row."""
        for name, counts in other.fields.items():
            self.fields.setdefault(name, Counter()).update(counts)
        self.notes.update(other.notes)

    def note(self, text: str, count: int = 1) -> None:
        """Count something that was done to rows."""
        self.notes[text] += count

    def written(self, row: Conversation) -> None:
        """Count a conversation that is written."""
        self.trained += sum(row.learnt)
        self.context += len(row.learnt) - sum(row.learnt)
        self.pictures += len(row.media)

    def to_json(self) -> dict[str, Any]:
        return {
            "fields": {name: dict(counts) for name, counts in sorted(self.fields.items())},
            "notes": dict(self.notes),
            "answers": {"learnt": self.trained, "context only": self.context},
            "pictures": self.pictures,
        }
