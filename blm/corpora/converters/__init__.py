"""Converters of published corpora to the messages format, listed in `CONVERTERS`.

No row is dropped silently: rows that cannot be converted are collected with their reasons and
raised together, or returned if the caller asks to skip them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from blm.corpora.converters.chats import chats, finevision, internvl
from blm.corpora.converters.cosmos import cosmos_reason1
from blm.corpora.converters.easy_vqa import easy_vqa, package_folder
from blm.corpora.converters.grounding import from_unit
from blm.corpora.converters.lerobot import lerobot
from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import ConverterConfig, Rows
from blm.corpora.converters.sharerobot import sharerobot, sharerobot_affordance, sharerobot_trajectory
from blm.corpora.converters.vlmevalkit import vlmevalkit
from blm.corpora.format.faults import Fault, RowError, count_faults, summarise
from blm.corpora.format.messages import Conversation
from blm.corpora.format.writing import write_corpus
from blm.types import BlmError, lookup

__all__ = ["CONVERTERS", "Conversion", "Converter", "ConverterConfig", "convert"]


CONVERSION_FILE = "conversion.json"


@dataclass(frozen=True, kw_only=True)
class Converter:
    """The converter of one published data format."""

    reads: str
    """Description of the source files."""
    origin: str
    """Where such data are published."""
    rows: Callable[[Path, ConverterConfig, Tally], Rows]
    media: Callable[[Path, ConverterConfig], Path | None] = lambda source, settings: None
    """Returns the folder that references without a file are relative to; None if there are none."""


CONVERTERS: dict[str, Converter] = {
    "sharerobot": Converter(
        reads="folder planning/train (or a file of it): questions about up to 30 frames of an episode",
        origin="https://huggingface.co/datasets/BAAI/ShareRobot: planning/train, planning/images unpacked",
        rows=sharerobot,
    ),
    "sharerobot_affordance": Converter(
        reads="JSON with instruction, affordance (x, y, width, height) and the picture's path as id",
        origin="https://huggingface.co/datasets/BAAI/ShareRobot: affordance",
        rows=sharerobot_affordance,
    ),
    "sharerobot_trajectory": Converter(
        reads="JSON with instruction, points and the picture's path as id",
        origin="https://huggingface.co/datasets/BAAI/ShareRobot: trajectory",
        rows=sharerobot_trajectory,
    ),
    "cosmos_reason1": Converter(
        reads="folder robovqa, bridgev2, holoassist or agibot: conversations about clips",
        origin="https://huggingface.co/datasets/nvidia/Cosmos-Reason1-SFT-Dataset, with RoboVQA clips",
        rows=cosmos_reason1,
    ),
    "llava": Converter(
        reads="JSON, JSONL or parquet: conversations (from, value), tags <image> <video>, image(s), video(s)",
        origin="LLaVA, LLaVA-NeXT, LLaVA-OneVision, Cambrian, ALLaVA, ShareGPT4V, qwen-vl-finetune",
        rows=partial(chats, name="llava"),
    ),
    "internvl": Converter(
        reads="JSONL of LLaVA's form, <ref> and <box> in the texts; or the file that lists such files",
        origin="InternVL fine-tuning data (a JSON of name -> root, annotation)",
        rows=internvl,
    ),
    "robopoint": Converter(
        reads="as llava; points 0..1 in the answers become integers 0..1000, and so does the question's rule",
        origin="RoboPoint (https://huggingface.co/datasets/wentao-yuan/robopoint-data), RefSpatial",
        rows=partial(chats, name="robopoint", change=from_unit),
    ),
    "sharegpt": Converter(
        reads="JSON, JSONL or parquet: conversations or messages, tags, images, videos, system",
        origin="LLaMA-Factory data folders (formatting: sharegpt)",
        rows=partial(chats, name="sharegpt"),
    ),
    "messages": Converter(
        reads="JSON, JSONL or parquet: messages (role, content as text or parts) or prompt+completion, "
        "images, videos, objects",
        origin="OpenAI fine-tuning files, LLaMA-Factory (v1 too), TRL, axolotl, ms-swift",
        rows=partial(chats, name="messages"),
    ),
    "alpaca": Converter(
        reads="JSON, JSONL or parquet: instruction, input, output, history, system, images",
        origin="LLaMA-Factory data folders (formatting: alpaca), ms-swift (query, response)",
        rows=partial(chats, name="alpaca"),
    ),
    "finevision": Converter(
        reads="parquet: images, and texts (user, assistant); the images are shown first",
        origin="https://huggingface.co/datasets/HuggingFaceM4/FineVision, the Cauldron",
        rows=finevision,
    ),
    "vlmevalkit": Converter(
        reads="TSV: index, image (base64), question, hint, A, B, .., answer, category",
        origin="VLMEvalKit benchmarks (train on them only if you never report them)",
        rows=vlmevalkit,
    ),
    "easy_vqa": Converter(
        reads="train or test: questions about one shape in an image; one conversation per image",
        origin="https://pypi.org/project/easy-vqa (MIT), installed with blm[easy-vqa]",
        rows=easy_vqa,
        media=lambda source, settings: package_folder(),
    ),
    "lerobot": Converter(
        reads="folder of one LeRobotDataset (v2.0, v2.1, v3.0): instruction, progress, primitives if known",
        origin="`blm collect`, or any LeRobotDataset with videos",
        rows=lerobot,
        media=lambda source, settings: source.absolute(),
    ),
}
"""Name -> converter."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Counts of a conversion. Without qa_pairs, `read` = `written` + the number of `skipped`."""

    read: int
    written: int
    skipped: tuple[Fault, ...]
    tally: Tally
    """Where the fields of the rows went."""

    def to_json(self) -> dict[str, Any]:
        """Return the contents of OUT/conversion.json."""
        counts = {"read": self.read, "written": self.written, "skipped": count_faults(self.skipped)}
        return {**counts, **self.tally.to_json()}


def convert(
    name: str, source: Path, out: Path, settings: ConverterConfig | None = None, *, skip_bad: bool = False
) -> Conversion:
    """Convert `source` into the new corpus folder `out`; media are linked or copied.

    All rows are read before faulty ones are reported. Then a BlmError gives the counts and places
    of each reason, and `out` is not created; with `skip_bad`, faulty rows are returned instead.
    `out/conversion.json` tells where each field of the rows went.
    After an interrupted run, the same call reuses the media that were stored. Raises
    UnknownNameError for an unknown converter.
    """
    converter = lookup("converter", name, CONVERTERS)
    settings = settings or ConverterConfig()
    faults: list[Fault] = []
    tally, count, written = Tally(), 0, 0

    def good() -> Iterator[Conversation]:
        nonlocal count, written
        rows = converter.rows(source, settings, tally)
        for where, row in track(rows, f"converting {source.name}", console=Console(stderr=True)):
            count += 1
            if isinstance(row, RowError):
                faults.append(Fault(where, row.reason, row.detail))
            else:
                written += 1
                tally.written(row)
                yield row
        if faults and not skip_bad:
            raise BlmError(
                f"{len(faults)} of {count} rows of '{source}' cannot be converted; fix them or skip them "
                f"(--skip-bad):\n{summarise(faults)}"
            )
        if count == len(faults):
            raise BlmError(f"'{source}' has no row that can be converted\n{summarise(faults)}")

    def done() -> Conversion:
        return Conversion(read=count, written=written, skipped=tuple(faults), tally=tally)

    media = converter.media(source, settings)
    write_corpus(out, good(), media=media, notes={CONVERSION_FILE: lambda: done().to_json()})
    return done()
