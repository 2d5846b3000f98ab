"""Group questions about the same pictures into one conversation, so that they share its tokens.

Published corpora have one row for each question: 20 rows about the same 30 frames of an episode. A
row of 8 frames has thousands of tokens for them and a hundred for the question. In one conversation
with independent turns, prefix attention encodes the pictures once, and every turn is still trained
exactly as if it were asked alone (`blm.training.sft.prefix_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from blm.corpora.format.messages import Conversation, corpus_file, end_of_pictures
from blm.corpora.format.row_index import CorpusRows
from blm.corpora.format.scan import key_of, scan_in_parts
from blm.corpora.format.validated import require_clean
from blm.corpora.format.writing import write_corpus
from blm.types import BlmError, Message


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """What grouping did to a corpus."""

    rows: int
    """Conversations before."""
    conversations: int
    """Conversations after."""
    pictures: int
    """Pictures before, each counted as often as it is shown."""
    shared_pictures: int
    """Pictures after."""
    alone: int
    """Rows that cannot be merged: without pictures, with pictures in later turns, or with turns that
    follow each other."""

    @property
    def factor(self) -> float:
        """How many times fewer pictures the model reads."""
        return self.pictures / max(1, self.shared_pictures)


def group_corpus(source: Path, out: Path, *, turns: int = 20, workers: int = 0) -> Grouping:
    """Write the corpus `source` to `out`, with at most `turns` questions in a merged conversation.

    Rows are merged if every question stands for itself and they begin with the same pictures, in the
    same order, with the same text between them and the same system turn. A merged conversation
    stands where the first of its rows stood, under that row's id. `out`/grouping.json states what was
    done. The corpus may be larger than memory. Raises BlmError for rows with faults of format, and if
    `out` exists.
    """
    if turns < 1:
        raise BlmError(f"turns is {turns}; it must be 1 or more")
    corpus_file(source)
    if out.exists():
        raise BlmError(f"folder '{out}' exists; move it away or name another one")
    with TemporaryDirectory(prefix="blm-group-") as folder:
        scan = scan_in_parts(source, Path(folder), workers=workers)
        require_clean(source, scan.rows, scan.faults, scan.counts, skip_bad=False)
        rows = CorpusRows(source, Path(folder) / "places.npy")
        done = _Counts(rows=len(rows))
        write_corpus(
            out,
            _grouped(rows, turns, done),
            media=source,
            notes={"grouping.json": lambda: asdict(done.result())},
        )
    return done.result()


@dataclass
class _Counts:
    rows: int
    conversations: int = 0
    pictures: int = 0
    shared_pictures: int = 0
    alone: int = 0

    def result(self) -> Grouping:
        return Grouping(**asdict(self))


def merge(rows: Sequence[Conversation]) -> Conversation:
    """Return one conversation with the turns of all rows, which show the same pictures first."""
    first = rows[0]
    if len(rows) == 1:
        return first
    messages = list(first.messages)
    for row in rows[1:]:
        asked, *rest = (message for message in row.messages if message.role != "system")
        messages += [Message("user", asked.content[end_of_pictures(asked) :]), *rest]
    free = any(row.facts for row in rows)
    return replace(
        first,
        kinds=tuple(kind for row in rows for kind in row.kinds),
        messages=tuple(messages),
        facts=tuple(fact for row in rows for fact in (row.facts or (None,) * len(row.kinds))) if free else (),
        independent=True,
    )


def shared_beginning(row: Conversation) -> str:
    """Return what the rows that may be merged with this one have in common; "" if none may be.

    It is the system turn and the beginning of the first question up to its last picture.
    """
    system = "".join(message.text for message in row.messages if message.role == "system")
    asked = [message for message in row.messages if message.role == "user"]
    end = end_of_pictures(asked[0])
    apart = row.independent or len(asked) == 1
    bare = not "".join(part for part in asked[0].content[end:] if isinstance(part, str)).strip()
    if not end or not apart or bare or any(message.images for message in asked[1:]):
        return ""
    parts = [part if isinstance(part, str) else {"path": part.path} for part in asked[0].content[:end]]
    return repr((row.source, row.training, system, parts))


def _grouped(rows: CorpusRows, turns: int, counts: _Counts) -> Iterator[Conversation]:
    """Yield the merged conversations, in the order of their first rows."""
    keys = np.zeros(len(rows), dtype=np.uint64)
    sizes = np.zeros(len(rows), dtype=np.int32)
    for number, row in enumerate(rows):
        shared = shared_beginning(row)
        keys[number] = key_of(shared) if shared else 0
        sizes[number] = len(row.kinds)
        counts.pictures += len(row.media)
        counts.alone += not shared
    order = np.argsort(keys, kind="stable")  # the rows of a key in their order
    ends = np.searchsorted(keys[order], keys, side="right")
    places = np.empty(len(rows), dtype=np.int64)
    places[order] = np.arange(len(rows))
    used = np.zeros(len(rows), dtype=bool)
    for number in range(len(rows)):
        if used[number]:
            continue
        members = [number]
        if keys[number]:
            total = int(sizes[number])
            for other in order[places[number] + 1 : ends[number]].tolist():
                total += int(sizes[other])
                if total > turns:
                    break
                members.append(other)
        used[members] = True
        merged = merge([rows[member] for member in members])
        counts.conversations += 1
        counts.shared_pictures += len(merged.media)
        yield merged
