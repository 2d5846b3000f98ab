"""A tiny corpus in words."""

from pathlib import Path

from blm.corpora.format.messages import Conversation
from blm.corpora.format.writing import write_corpus
from blm.types import Message


def write_conversations(folder: Path) -> Path:
    """Write a corpus of eight questions and answers; return its folder."""
    rows = [
        Conversation(
            id=f"c{number}",
            group=f"c{number}",
            source="test",
            kinds=("yes_no",),
            messages=(
                Message("user", (f"Is the number {number} even?",)),
                Message("assistant", ("yes" if number % 2 == 0 else "no, it is odd",)),
            ),
        )
        for number in range(8)
    ]
    write_corpus(folder, rows)
    return folder
