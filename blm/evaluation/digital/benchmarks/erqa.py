"""ERQA: embodied reasoning about one or several photographs, with lettered options.

Layout: FOLDER/data/*.parquet as on the hub, with question_id, question, question_type, images,
visual_indices and answer; or FOLDER/erqa.jsonl with the same fields, where images are paths below
FOLDER. The images in the parquet are written once to FOLDER/unpacked. `visual_indices` are
positions in the text of the question: an image stands before the character of its index; without
indices, or with zeros only, all images come first. Checked against the loader of FlagEvalMM
(tasks/erqa/process.py), which interleaves in this way, the task of lmms-eval and a published
example. Assumed: the names of the parquet files, and all of the jsonl form.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.layout import Row, find_files, letter_of, read_rows
from blm.types import Image, Message, Question

GET = (
    "Get it with `hf download --repo-type dataset FlagEval/ERQA --local-dir FOLDER` (400 questions). "
    "Expected: FOLDER/data/*.parquet, or FOLDER/erqa.jsonl with its images next to it."
)


def _load(folder: Path) -> list[Question]:
    files = find_files(folder, ("data/*.parquet", "erqa.jsonl"), GET)
    return [_question(row, folder) for file in files for row in read_rows(file, GET)]


def _question(row: Row, folder: Path) -> Question:
    text = str(row.field("question"))  # not stripped: the indices count its characters
    pictures = [row.picture(value, folder) for value in row.items("images")]
    options = options_in(text)
    if len(options) < 2:
        raise row.error('the question lists no options; needed: "Choices: A. .. B. .."')
    return Question(
        id=row.text("question_id"),
        kind=re.sub(r"\W+", "_", row.text("question_type").lower()) + "_choice",
        messages=(Message("user", interleave(row, text, pictures)),),
        answer=letter_of(row, row.text("answer"), options),
        group=str(pictures[0].path),
        scorer="choice",
        options=options,
    )


def options_in(question: str) -> tuple[str, ...]:
    """Return the options after "Choices:", "A. .. B. ..", without the request at the end.

    Without that word, the whole question is searched.
    """
    listed = (question.partition("Choices:")[2] or question).partition("Please answer")[0]
    options: list[str] = []
    rest = re.sub(r"^.*?(?=\sA\.)", "", f" {listed}", flags=re.DOTALL)
    for letter, following in pairwise(ascii_uppercase):
        found = re.match(rf"\s+{letter}\.(.*?)(?=\s{following}\.(?:\s|$)|$)", rest, re.DOTALL)
        if found is None:
            break
        options.append(found[1].strip().rstrip("."))
        rest = rest[found.end() :]
    return tuple(options)


def interleave(row: Row, text: str, pictures: list[Image]) -> tuple[str | Image, ...]:
    """Return text and images in reading order, each image at its `visual_indices`."""
    places = row.data.get("visual_indices") or [0] * len(pictures)
    if len(places) != len(pictures) or not all(isinstance(p, int) and p >= 0 for p in places):
        raise row.error(f"visual_indices {places} for {len(pictures)} pictures; needed: one place >= 0 each")
    parts: list[str | Image] = []
    start = 0
    for place, picture in sorted(zip(places, pictures, strict=True), key=lambda pair: pair[0]):
        parts += [text[start:place], picture]
        start = max(start, min(place, len(text)))
    return tuple(part for part in (*parts, text[start:]) if part)


ERQA = Benchmark(
    name="erqa",
    title="ERQA",
    get=GET,
    licence="code Apache-2.0, data CC-BY-4.0 (as a mirror states; see the card)",
    load=_load,
    max_tokens=32,
)
