"""ShareRobot planning: ten kinds of questions about the frames of an episode, free or yes/no.

Layout: FOLDER/planning/test/*.json, lists of {"id": ".../rt_frames_success/<episode>", "task":
"Future_Prediction_Task", "selected_step", "conversations", "image"}. The conversations are {"from":
"human", "value": "<image> <image> ..\\n<the question>"} and {"from": "gpt", "value": "<the
answer>"}; the images "rt_frames_success/<episode>/frame_0.png", .. lie below
FOLDER/planning/images. With FOLDER/split.json, which `blm corpus sharerobot` writes,
planning/heldout is asked instead. Checked against the README of FlagOpen/ShareRobot, the listings
of the hub (planning/jsons, train and test with ten files each) and three public programs that read
them. Assumed: the place of the frames after unpacking (three are tried), and that the published
test rows are what papers score.

Deliberate differences from upstream: at most 8 frames of up to 30, evenly spaced, the last
included; questions whose reference is yes or no ask for just that and are compared, not judged; the
others go to the judge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.layout import Row, find_files, read_rows
from blm.evaluation.digital.benchmarks.sharerobot_split import SPLIT, episodes_of, kind_of, read_split
from blm.types import Image, Message, Question

MAX_FRAMES = 8
"""Maximum number of frames that a question shows."""
YES_NO = "Answer yes or no."
FRAME_ROOTS = (
    "planning/images",
    "planning",
    "planning/images/mnt/hpfs/baaiei/jyShi/ShareRobot/planning",
)
"""Folders where the frames may be, depending on how the archive was unpacked."""
GET = (
    "Get it with `hf download --repo-type dataset BAAI/ShareRobot --include 'planning/*' --local-dir FOLDER` "
    "(2.4 GB of questions, 510 GB of frames in 95 parts), then `cat "
    "FOLDER/planning/images/rt_frames_success.tar.gz.part.* | "
    "tar xz --strip-components=6 -C FOLDER/planning/images`. Expected: FOLDER/planning/test/*.json (or "
    "FOLDER/split.json of `blm corpus sharerobot`) and "
    "FOLDER/planning/images/rt_frames_success/*/*/frame_*.png."
)


def _load(folder: Path) -> list[Question]:
    if (folder / SPLIT).exists():
        rows = read_split(folder)
    else:
        files = find_files(folder, ("planning/test/*.json",), GET)
        rows = [row for file in files for row in read_rows(file, GET)]
    return [_question(number, row, folder) for number, row in enumerate(rows)]


def _question(number: int, row: Row, folder: Path) -> Question:
    kind, episode = kind_of(row), episodes_of(row)[0]
    human, answer = question_and_answer(row)
    published = [str(name) for name in row.items("image")]
    marks = human.count("<image>")
    if marks and marks != len(published):
        raise row.error(f"{marks} <image> marks for {len(published)} pictures")
    text = re.sub(r"<image[^>]*>", " ", human).strip()
    if not text:
        raise row.error("the question has no words")
    yes_no = answer.strip(" .").lower() in ("yes", "no")
    pictures = [_picture(row, name, folder) for name in evenly_spaced_frames(published, MAX_FRAMES)]
    return Question(
        id=f"{kind}/{episode}/{number}",
        kind=kind,
        messages=(Message("user", (*pictures, f"{text} {YES_NO}" if yes_no else text)),),
        answer=answer.strip(" .").lower() if yes_no else answer,
        group=episode,
        scorer="exact" if yes_no else "judge",
    )


def evenly_spaced_frames(values: Sequence[str], most: int) -> list[str]:
    """Return at most `most` values, evenly spaced, with the last and, of two or more, the first."""
    count = min(most, len(values))
    return [values[-1 - (index * (len(values) - 1)) // max(count - 1, 1)] for index in reversed(range(count))]


def question_and_answer(row: Row) -> tuple[str, str]:
    """Return question and answer of a row. Raises BlmError unless there is one of each."""
    turns = [Row(row.where, t if isinstance(t, dict) else {}) for t in row.items("conversations")]
    speakers = [turn.text("from") for turn in turns]
    if speakers != ["human", "gpt"]:
        raise row.error(f"turns are from {', '.join(speakers)}; needed: human, gpt")
    return turns[0].text("value"), turns[1].text("value")


def _picture(row: Row, name: str, folder: Path) -> Image:
    below = name[name.find("rt_frames_success/") :] if "rt_frames_success/" in name else name.lstrip("/")
    for root in FRAME_ROOTS:
        if (folder / root / below).is_file():
            return row.picture(f"{root}/{below}", folder)
    raise row.error(f"'{below}' is not in '{folder}' below any of: {', '.join(FRAME_ROOTS)}. {GET}")


SHAREROBOT = Benchmark(
    name="sharerobot",
    title="ShareRobot",
    get=GET,
    licence="see the card of BAAI/ShareRobot; frames from 23 Open X-Embodiment datasets, each with its own",
    load=_load,
    max_tokens=64,
    long={"planning_remaining_steps": 128},
    average="kinds",
)
