"""RefSpatial-Bench: point to an object or a free place that several spatial relations define.

Layout, either of the two on the hub: FOLDER/Location/question.json (a list of id, object, prompt,
suffix, rgb_path, mask_path, category and step) with image/ and mask/ next to it, the same for
Placement; or FOLDER/data/location-*.parquet and placement-*.parquet with id, image, mask, object,
prompt, suffix and step. Checked against the dataset card, the listing of the hub and RoboRefer's
evaluation script. The set Unseen, 77 more questions, is meant for models trained on RefSpatial and
is not used.

Deliberate differences from upstream: one form of coordinates (pointing.py), and an answer without
points is wrong (upstream: such rows are left out of the mean).
"""

from __future__ import annotations

from pathlib import Path

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.layout import find_files, read_rows
from blm.evaluation.digital.benchmarks.pointing import ONE, point_question
from blm.types import Question

PARTS = ("Location", "Placement")
GET = (
    "Get it with `hf download --repo-type dataset BAAI/RefSpatial-Bench --local-dir FOLDER` (100 + 100 "
    "questions, 43 MB as parquet). Expected: FOLDER/Location/question.json, image/, mask/ and the same for "
    "Placement; "
    "or FOLDER/data/location-*.parquet and placement-*.parquet."
)


def _load(folder: Path) -> list[Question]:
    questions = []
    for part in PARTS:
        kind = part.lower()
        for file in find_files(folder, (f"{part}/question.json", f"data/{kind}-*.parquet"), GET):
            stored = file.suffix == ".parquet"
            for row in read_rows(file, GET):
                picture, mask = (
                    row.picture(row.field(name) if stored else f"{part}/{row.text(f'{path}_path')}", folder)
                    for name, path in (("image", "rgb"), ("mask", "mask"))
                )
                text = f"{row.text('prompt')} {row.data.get('suffix') or ''}"
                questions.append(
                    point_question(
                        row, row.text("id"), kind=kind, text=text, ask=ONE, picture=picture, mask=mask
                    )
                )
    return questions


REFSPATIAL = Benchmark(
    name="refspatial",
    title="RefSpatial-Bench",
    get=GET,
    licence="Apache-2.0",
    load=_load,
    max_tokens=128,
    average="kinds",
)
