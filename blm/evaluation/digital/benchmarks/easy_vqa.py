"""easy-VQA: one coloured shape on a small image, 13 possible answers, train and test splits.

Layout, that of the package `easy-vqa` 1.0: FOLDER/data/test/questions.json, a list of [question,
answer, number of the image], FOLDER/data/test/images/<number>.png and FOLDER/data/answers.txt; the
same for train. Checked with the installed package: 1,000 images and 9,673 questions in test, 4,000
and 38,575 in train. A model that sees no image reaches 67 %: the most common answer to the same
words in the training split.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.layout import Row, read_values
from blm.types import BlmError, Message, Question

SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")
GET = (
    "Install it with `pip install easy-vqa` (3.2 MB) and name the folder of the package: "
    "`python -c 'import easy_vqa; print(easy_vqa.__path__[0])'`. Expected: FOLDER/data/test/questions.json, "
    "FOLDER/data/test/images/*.png and FOLDER/data/answers.txt."
)


def load_split(folder: Path, split: str) -> list[Question]:
    """Return the questions of 'train' or 'test', clustered by image.

    Their kinds are yes_no, shape and colour.
    """
    listed = folder / "data/answers.txt"
    if not listed.is_file():
        raise BlmError(f"'{listed}' is missing. {GET}")
    valid = listed.read_text().split()
    questions = []
    for number, (where, value) in enumerate(read_values(folder / f"data/{split}/questions.json", GET)):
        if not isinstance(value, list) or len(value) != 3:
            raise BlmError(f"{where}: it is {str(value)[:80]!r}; needed: [question, answer, image]")
        row = Row(where, dict(zip(("question", "answer", "picture"), value, strict=True)))
        answer = row.text("answer")
        if answer not in valid:
            raise row.error(f"answer {answer!r} is not in answers.txt; valid: {', '.join(sorted(valid))}")
        picture = row.picture(f"data/{split}/images/{row.text('picture')}.png", folder)
        questions.append(
            Question(
                id=f"{split}/{number}",
                kind="yes_no" if answer in YES_NO else "shape" if answer in SHAPES else "colour",
                messages=(Message("user", (picture, row.text("question"))),),
                answer=answer,
                group=str(picture.path),
            )
        )
    return questions


EASY_VQA = Benchmark(
    name="easy_vqa",
    title="easy-VQA",
    get=GET,
    licence="MIT",
    load=partial(load_split, split="test"),
    max_tokens=8,
)
