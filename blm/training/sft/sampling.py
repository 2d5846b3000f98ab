"""Measure a sample of a corpus, before hours of validation: do the limits suit its conversations?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from blm.backbone import Backbone
from blm.corpora.format.faults import RowError
from blm.corpora.format.find_media import find_media, image_size
from blm.corpora.format.messages import Conversation, corpus_file, parse_json_line, parse_row
from blm.media import VIDEOS, split_time, video_size
from blm.training.sft.measure import measure_row, with_blank_pictures
from blm.training.sft.tokenize import TokenizationConfig
from blm.types import BlmError

BLOCK = 65_536
"""Bytes that are read at once to find the beginning of a line."""


@dataclass(frozen=True, kw_only=True)
class SampledLengths:
    """Lengths of sampled conversations of a corpus."""

    name: str
    """Name of the corpus."""
    lengths: tuple[int, ...]
    """Whole length of each [tokens]."""
    pictures: float
    """Share of these tokens that stand for pictures."""
    cut: int
    """Conversations that would lose turns."""
    dropped: int
    """Conversations that would be left out."""
    max_length: int

    @property
    def summary(self) -> str:
        """One sentence for the user."""
        middle, high = np.percentile(self.lengths, (50, 95)) if self.lengths else (0, 0)
        return (
            f"{self.name}: {len(self.lengths)} sampled conversations have {middle:.0f} tokens (median; "
            f"95 % at most {high:.0f}, longest {max(self.lengths, default=0)}), {self.pictures:.0%} of them "
            "for pictures"
        )

    @property
    def warning(self) -> str:
        """What the limits would do to the sample; "" if nothing. Raises BlmError if it leaves out all."""
        if not self.cut and not self.dropped:
            return ""
        count, longest = len(self.lengths), max(self.lengths)
        long = self.cut + self.dropped
        message = (
            f"{long} of {count} sampled conversations of '{self.name}' are longer than max_length = "
            f"{self.max_length} tokens (up to {longest}): {self.dropped} would be left out, and {self.cut} "
            f"lose their last turns. Set limits.max_length to {longest} or more, or limits.max_pixels to "
            "shrink large pictures"
        )
        if self.dropped == count:
            raise BlmError(message)
        return message


def sample_lengths(
    backbone: Backbone, folder: Path, limits: TokenizationConfig, count: int
) -> SampledLengths:
    """Measure about `count` conversations, evenly spaced in the corpus file.

    No picture is decoded: sizes are read from headers. Rows with faults are left out. `backbone` needs
    no weights.
    """
    whole = replace(limits, max_length=10**9)
    lengths, shown, outcomes = list[int](), 0, Counter[str]()
    for row in sampled_rows(folder, count):
        try:
            blank = with_blank_pictures(row, partial(_size, folder))
            example = measure_row(backbone, blank, whole, Counter())
            assert example is not None
            own = Counter[str]()
            if len(example) > limits.max_length:
                own["dropped" if measure_row(backbone, blank, limits, Counter()) is None else "cut"] += 1
        except (RowError, BlmError):
            continue
        lengths.append(len(example))
        shown += int((example.tokens == backbone.placeholder_id).sum())
        outcomes += own
    return SampledLengths(
        name=folder.name,
        lengths=tuple(lengths),
        pictures=shown / max(1, sum(lengths)),
        cut=outcomes["cut"],
        dropped=outcomes["dropped"],
        max_length=limits.max_length,
    )


def sampled_rows(folder: Path, count: int) -> Iterator[Conversation]:
    """Yield at most `count` rows without faults of format, evenly spaced by bytes."""
    file = corpus_file(folder)
    size, end = file.stat().st_size, 0
    with file.open("rb") as source:
        for place in np.linspace(0, size, count, endpoint=False).astype(int).tolist():
            if place < end:  # inside the line that was read last
                continue
            source.seek(_line_start(source, place))
            line = source.readline()
            end = source.tell()
            try:
                if line.strip():
                    yield parse_row(parse_json_line(line), end)
            except RowError:
                continue


def _line_start(source: BinaryIO, place: int) -> int:
    """Return where the line begins that contains the byte at `place`."""
    while place > 0:
        begin = max(0, place - BLOCK)
        source.seek(begin)
        found = source.read(place - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        place = begin
    return 0


def _size(folder: Path, reference: str) -> tuple[int, int]:
    """Return height and width of a picture from its header. Raises RowError or BlmError."""
    name = split_time(reference)[0]
    path = find_media(name, folder)
    if path.suffix.lower() in VIDEOS:
        return video_size(path)
    found = image_size(path, name)
    if found is None:
        raise RowError("media unreadable", name)
    return found[1], found[0]
