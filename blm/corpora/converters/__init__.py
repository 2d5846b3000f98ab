"""Converters of published corpora to the messages format, listed in `CONVERTERS`.

No row is dropped silently: rows that cannot be converted are collected with their reasons and
raised together, or returned if the caller asks to skip them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from blm.corpora.converters import chats
from blm.corpora.converters.cosmos import cosmos_reason1
from blm.corpora.converters.easy_vqa import easy_vqa, package_folder
from blm.corpora.converters.lerobot import lerobot
from blm.corpora.converters.rows import ConverterConfig, Rows, media_root
from blm.corpora.converters.sharerobot import frames_root, sharerobot
from blm.corpora.format.faults import Fault, RowError, summarise
from blm.corpora.format.messages import Conversation
from blm.corpora.format.writing import write_corpus
from blm.types import BlmError, lookup

__all__ = ["CONVERTERS", "Conversion", "Converter", "ConverterConfig", "convert"]


@dataclass(frozen=True, kw_only=True)
class Converter:
    """The converter of one published data format."""

    reads: str
    """Description of the source files."""
    origin: str
    """Where such data are published."""
    rows: Callable[[Path, ConverterConfig], Rows]
    media: Callable[[Path, ConverterConfig], Path] = media_root
    """Returns the folder that the rows' media references are relative to."""


CONVERTERS: dict[str, Converter] = {
    "sharerobot": Converter(
        reads="folder planning/train (or a file of it): questions about up to 30 frames of an episode",
        origin="https://huggingface.co/datasets/BAAI/ShareRobot: planning/train, planning/images unpacked",
        rows=sharerobot,
        media=frames_root,
    ),
    "cosmos_reason1": Converter(
        reads="folder robovqa, bridgev2, holoassist or agibot: conversations about clips",
        origin="https://huggingface.co/datasets/nvidia/Cosmos-Reason1-SFT-Dataset, with RoboVQA clips",
        rows=cosmos_reason1,
    ),
    "llava": Converter(
        reads="JSON or JSONL with conversations (from, value), tags <image> <video>, image(s), video(s)",
        origin="LLaVA, LLaVA-NeXT, Cambrian, ALLaVA, the demo rows of qwen-vl-finetune",
        rows=chats.llava,
    ),
    "sharegpt": Converter(
        reads="JSON or JSONL with conversations or messages, tags, images, videos, system",
        origin="LLaMA-Factory data folders (formatting: sharegpt)",
        rows=chats.sharegpt,
    ),
    "messages": Converter(
        reads="JSON or JSONL with messages (role, content as text or parts), tags, images, videos",
        origin="OpenAI fine-tuning files, LLaMA-Factory mllm_demo.json, TRL datasets",
        rows=chats.messages,
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
    """Counts of a conversion: `read` = `written` + the number of `skipped`."""

    read: int
    written: int
    skipped: tuple[Fault, ...]


def convert(
    name: str, source: Path, out: Path, settings: ConverterConfig | None = None, *, skip_bad: bool = False
) -> Conversion:
    """Convert `source` into the new corpus folder `out`; media are linked or copied.

    All rows are read before faulty ones are reported. Then a BlmError gives the counts and places
    of each reason, and `out` is not created; with `skip_bad`, faulty rows are returned instead.
    After an interrupted run, the same call reuses the media that were stored. Raises
    UnknownNameError for an unknown converter.
    """
    converter = lookup("converter", name, CONVERTERS)
    settings = settings or ConverterConfig()
    faults: list[Fault] = []
    count = 0

    def good() -> Iterator[Conversation]:
        nonlocal count
        rows = converter.rows(source, settings)
        for where, row in track(rows, f"converting {source.name}", console=Console(stderr=True)):
            count += 1
            if isinstance(row, RowError):
                faults.append(Fault(where, row.reason, row.detail))
            else:
                yield row
        if faults and not skip_bad:
            raise BlmError(
                f"{len(faults)} of {count} rows of '{source}' cannot be converted; fix them or skip them "
                f"(--skip-bad):\n{summarise(faults)}"
            )
        if count == len(faults):
            raise BlmError(f"'{source}' has no row that can be converted\n{summarise(faults)}")

    written = write_corpus(out, good(), media=converter.media(source, settings))
    return Conversion(read=count, written=written, skipped=tuple(faults))
