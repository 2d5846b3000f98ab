"""Where2Place: point to free space that a sentence describes; scored by the share inside a mask.

Layout, original: FOLDER/point_questions.jsonl with question_id, image, text and category,
FOLDER/images and FOLDER/masks; the mask has the name of its image, or the number of its line in two
digits, from 00. Layout, FlagEval: FOLDER/data/*.parquet with question_id, question, question_type,
image and mask. Checked against both dataset cards, summarize_vqa.py of wentaoyuan/RoboPoint (number
of the line) and the loaders of FlagEvalMM and lmms-eval. Unknown: whether every row has a category;
without one the kind is 'free_space'.

Deliberate differences from upstream: one form of coordinates (pointing.py); masks are binary; an
answer without points is wrong (RoboPoint's script leaves it out of the mean).
"""

from __future__ import annotations

from pathlib import Path

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.layout import Row, find_files, read_rows
from blm.evaluation.digital.benchmarks.pointing import SEVERAL, point_question
from blm.types import Question

KIND = "free_space"
GET = (
    "Get it with `hf download --repo-type dataset wentao-yuan/where2place --local-dir FOLDER` or "
    "`... FlagEval/Where2Place ...` (100 questions, 4.4 MB). Expected: FOLDER/point_questions.jsonl, "
    "FOLDER/images and FOLDER/masks; or FOLDER/data/*.parquet."
)


def _load(folder: Path) -> list[Question]:
    files = find_files(folder, ("point_questions.jsonl", "data/*.parquet"), GET)
    return [
        (_original if file.suffix == ".jsonl" else _stored)(row, number, folder)
        for file in files
        for number, row in enumerate(read_rows(file, GET))
    ]


def _original(row: Row, number: int, folder: Path) -> Question:
    name = row.text("image")
    mask = f"masks/{name}"
    if not (folder / mask).is_file():
        mask = f"masks/{number:02d}.jpg"
    return point_question(
        row,
        row.text("question_id"),
        kind=str(row.data.get("category") or KIND),
        text=row.text("text"),
        ask=SEVERAL,
        picture=row.picture(f"images/{name}", folder),
        mask=row.picture(mask, folder),
    )


def _stored(row: Row, number: int, folder: Path) -> Question:
    return point_question(
        row,
        row.text("question_id"),
        kind=str(row.data.get("question_type") or KIND),
        text=row.text("question"),
        ask=SEVERAL,
        picture=row.picture(row.field("image"), folder),
        mask=row.picture(row.field("mask"), folder),
    )


WHERE2PLACE = Benchmark(
    name="where2place",
    title="Where2Place",
    get=GET,
    licence="Apache-2.0",
    load=_load,
    max_tokens=128,
)
