"""Converter of easy-VQA (package `easy-vqa`, MIT license): questions about one coloured shape.

All questions about an image form one conversation, so that they share it. The source is "train" or
"test".
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from blm.corpora.converters.report import Tally
from blm.corpora.converters.rows import ConverterConfig, Rows
from blm.corpora.format.messages import Conversation
from blm.io import read_json
from blm.types import BlmError, Image, Message

SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")


def package_folder() -> Path:
    """Return the folder of the installed package. Raises BlmError if it is not installed."""
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise BlmError("easy-VQA is not installed: `pip install 'blm[easy-vqa]'`")
    return Path(spec.origin).parent


def easy_vqa(source: Path, settings: ConverterConfig, tally: Tally) -> Rows:
    """Convert one split."""
    split = source.name
    if split not in SPLITS:
        raise BlmError(f"easy-VQA has the splits {', '.join(SPLITS)}; got '{source}'")
    turns: dict[int, list[tuple[str, str]]] = {}
    for question, answer, picture in read_json(package_folder() / f"data/{split}/questions.json"):
        turns.setdefault(picture, []).append((question, answer))
    for picture, asked in sorted(turns.items()):
        name = f"easy_vqa/{split}/{picture}"
        image = Image(path=f"data/{split}/images/{picture}.png")
        messages = [
            message
            for place, (question, answer) in enumerate(asked)
            for message in (
                Message("user", (question,) if place else (image, question)),
                Message("assistant", (answer,)),
            )
        ]
        yield (
            name,
            Conversation(
                id=name,
                group=str(image.path),
                source=settings.source or "easy_vqa",
                kinds=tuple(question_kind(answer) for _, answer in asked),
                messages=tuple(messages),
                independent=True,
            ),
        )


def question_kind(answer: str) -> str:
    """Return the kind of a question, which follows from its answer: yes_no, shape or colour."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "shape" if answer in SHAPES else "colour"
