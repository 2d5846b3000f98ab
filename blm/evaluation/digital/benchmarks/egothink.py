"""EgoThink: first-person questions about one image, on abilities from recognition to planning.

Layout: FOLDER/<dimension>/annotations.json, a list of {"source_dataset", "image_path": ["1.jpg"],
"question", "answer"}, and FOLDER/<dimension>/images/1.jpg, for the twelve dimensions below. Checked
in data/ of AdaCheng/EgoThink: the folders, the fields, the place of the images, 30 new tokens and
300 for planning.

Deliberate differences from upstream: all models get the prompt below (upstream: one prompt per
model); an answer that the judge could not rate counts as wrong (upstream: it is left out of the
mean).
"""

from __future__ import annotations

from pathlib import Path

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.layout import read_rows
from blm.types import BlmError, Message, Question

DIMENSIONS = (
    "Activity",
    "Forecast",
    "Localization/location",
    "Localization/spatial",
    "Object/affordance",
    "Object/attribute",
    "Object/existence",
    "Planning/assistance",
    "Planning/navigation",
    "Reasoning/comparing",
    "Reasoning/counting",
    "Reasoning/situated",
)
"""Folders, as published; the last part in lower case is the kind of the questions."""
PLANNING = ("assistance", "navigation")
"""Kinds with long answers."""
SHORT = "You see this through your own eyes. {question} Answer as briefly as possible."
LONG = "You see this through your own eyes. {question} Answer in detail and helpfully."
GET = (
    "Get it with `git clone https://github.com/AdaCheng/EgoThink` and name its folder data (186 MB), or with "
    "`hf download --repo-type dataset EgoThink/EgoThink --local-dir FOLDER`. Expected: "
    "FOLDER/Activity/annotations.json, FOLDER/Activity/images/*.jpg and the same for eleven more dimensions."
)


def _load(folder: Path) -> list[Question]:
    found = {file.parent.relative_to(folder).as_posix() for file in folder.rglob("annotations.json")}
    if unknown := sorted(found - {*DIMENSIONS}):
        raise BlmError(
            f"'{folder}/{unknown[0]}' is not a dimension of EgoThink; valid: {', '.join(DIMENSIONS)}"
        )
    return [question for dimension in DIMENSIONS for question in _read(folder, dimension)]


def _read(folder: Path, dimension: str) -> list[Question]:
    kind = dimension.split("/")[-1].lower()
    form = LONG if kind in PLANNING else SHORT
    questions = []
    for number, row in enumerate(read_rows(folder / dimension / "annotations.json", GET)):
        names = [Path(str(name)).name for name in row.items("image_path")]
        pictures = [row.picture(f"{dimension}/images/{name}", folder) for name in names]
        questions.append(
            Question(
                id=f"{dimension}/{number}",
                kind=kind,
                messages=(Message("user", (*pictures, form.format(question=row.text("question")))),),
                answer=row.text("answer"),
                group=str(pictures[0].path),
                scorer="judge",
            )
        )
    return questions


EGOTHINK = Benchmark(
    name="egothink",
    title="EgoThink",
    get=GET,
    licence="annotations: Apache-2.0; pictures: Ego4D, its own licence, not to be passed on",
    load=_load,
    max_tokens=30,
    long=dict.fromkeys(PLANNING, 300),
    average="kinds",
)
