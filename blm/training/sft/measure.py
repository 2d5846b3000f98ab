"""Measure the rows of a corpus in parallel: their lengths in tokens, and what is wrong with them.

A row is tokenised exactly as for training, from the sizes of its pictures: pixels do not change how
many tokens a picture becomes. So no media file is opened, and pictures of one size are processed
once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature

from blm.backbone import Backbone
from blm.backbone.outline import BackboneOutline
from blm.corpora.format.faults import Fault, RowError
from blm.corpora.format.media_index import MediaIndex
from blm.corpora.format.messages import Conversation
from blm.corpora.format.row_index import MEASURED, CorpusRows
from blm.corpora.format.validate import check_answers, check_reserved, reserved_tokens
from blm.io import write_array
from blm.jobs import Result, WorkUnit, run_units
from blm.training.sft.tokenize import TokenizationConfig, TokenizedExample, tokenize_conversation
from blm.training.sft.tokenize_corpora import without_scan_turns
from blm.types import Image

ROWS_PER_UNIT = 512
"""Rows that are measured as one work unit."""
REMEMBERED = 32
"""Numbers of sizes of pictures whose processed form is kept."""


@dataclass(frozen=True, kw_only=True)
class MeasureSetup:
    """What a process needs to measure rows."""

    corpus: Path
    places: Path
    """Index of the rows without faults of format (`PLACE`)."""
    media: Path
    """Folder of the `MediaIndex`."""
    outline: BackboneOutline | None
    """None: only the media of the rows are checked."""
    limits: TokenizationConfig


class _Measurer:
    """Measures rows in one process."""

    def __init__(self, setup: MeasureSetup) -> None:
        self.rows = CorpusRows(setup.corpus, setup.places)
        self.media = MediaIndex(setup.media)
        self.limits = setup.limits
        self.backbone = None if setup.outline is None else sizes_only(setup.outline.load())
        self.reserved = [] if self.backbone is None else reserved_tokens(self.backbone)

    def measure(self, row: Conversation, counts: Counter[str]) -> TokenizedExample | None:
        """Return the example of a row, with pictures without content. Raises RowError for its fault."""
        for image in row.media:
            self.media.size(str(image.path))
        if self.backbone is None:
            return None
        check_reserved(row, self.reserved)
        check_answers(row, self.backbone)
        blank = with_blank_pictures(row, self.media.size)
        return measure_row(self.backbone, blank, self.limits, counts)


_measurer: list[_Measurer] = []
"""The measurer of this process."""


def set_up(setup: MeasureSetup) -> None:
    """Prepare this process to measure rows."""
    _measurer[:] = [_Measurer(setup)]


def measure_part(payload: tuple[int, int, Path]) -> Result:
    """Measure some rows; write those without faults, and return the faults and what became of them."""
    begin, end, out = payload
    own = _measurer[0]
    counts, faults, measured = Counter[str](), list[tuple[str, str, str]](), list[tuple[int, ...]]()
    for number in range(begin, end):
        tokens = answers = video = 0
        try:
            example = own.measure(own.rows[number], counts)
        except RowError as error:
            faults.append((own.rows.location(number), error.reason, error.detail))
            continue
        if example is not None:
            tokens, answers, video = len(example), int(example.loss_mask.sum()), int(example.shows_video)
        measured.append((*own.rows.places[number].tolist(), tokens, answers, video))
    write_array(out, np.array(measured, dtype=MEASURED))
    return {"faults": faults, "counts": dict(counts)}


def measure_rows(
    setup: MeasureSetup, folder: Path, *, workers: int
) -> tuple[np.ndarray, list[Fault], Counter[str]]:
    """Measure all rows in worker processes, with 0 in this one.

    Returns the index (`MEASURED`) of the rows without faults, the faults, and what became of the
    rows. A killed run goes on in `folder`.
    """
    total = len(np.load(setup.places, mmap_mode="r"))
    units = [
        WorkUnit(f"{begin}", (begin, min(begin + ROWS_PER_UNIT, total), folder / f"rows-{begin:09d}.npy"))
        for begin in range(0, total, ROWS_PER_UNIT)
    ]
    workers = workers if len(units) > 1 else 0  # a process takes longer to start
    results = run_units(
        measure_part,
        units,
        journal=folder / "journal-rows.jsonl",
        workers=workers,
        title=f"rows of {setup.corpus.name}",
        setup=set_up,
        setup_args=(setup,),
    )
    parts = [np.load(unit.payload[2]) for unit in units]
    faults = [Fault(*fault) for result in results.values() for fault in result["faults"]]
    counts = sum((Counter(result["counts"]) for result in results.values()), Counter[str]())
    return np.concatenate([np.zeros(0, dtype=MEASURED), *parts]), faults, counts


def measure_row(
    backbone: Backbone, row: Conversation, limits: TokenizationConfig, counts: Counter[str]
) -> TokenizedExample | None:
    """Return the example of a row whose pictures are in memory. Raises RowError if it has none."""
    row = without_scan_turns(row)
    try:
        return tokenize_conversation(
            backbone, row.messages, limits, None, counts, independent=row.independent
        )
    except ValueError as error:  # of Backbone.check, or of the model's own processor
        long = "the context holds" in str(error)
        raise RowError("too long" if long else "placeholders differ from features", str(error)) from None


def with_blank_pictures(row: Conversation, size: Callable[[str], tuple[int, int]]) -> Conversation:
    """Return a row with black pictures, which take no memory and keep their references.

    `size` returns height and width [px] of a reference.
    """

    def blank(part: str | Image) -> str | Image:
        if isinstance(part, str):
            return part
        return Image(np.broadcast_to(np.uint8(0), (*size(str(part.path)), 3)), part.path)

    messages = (replace(m, content=tuple(blank(part) for part in m.content)) for m in row.messages)
    return replace(row, messages=tuple(messages))


def sizes_only(backbone: Backbone) -> Backbone:
    """Let a backbone without weights process pictures of the same sizes once only; return it."""
    processor = backbone.processor
    if not isinstance(processor.image_processor, _BySize):
        processor.image_processor = _BySize(processor.image_processor)
    return backbone


class _BySize:
    """An image processor that processes pictures of the same sizes once, whatever they show."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._known = OrderedDict[object, Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, *arguments: Any, **settings: Any) -> Any:
        key = (_shapes(images), repr(arguments), repr(settings))
        if key not in self._known:
            self._known[key] = self._processor(images, *arguments, **settings)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return BatchFeature(dict(self._known[key]))  # a processor may remove entries


def _shapes(images: Any) -> object:
    if isinstance(images, Sequence):
        return tuple(map(_shapes, images))
    return np.shape(images) if images is not None else None
