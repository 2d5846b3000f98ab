"""Small made data sets, each in the layout that its benchmark publishes. Pictures and texts are made here."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import PIL.Image

from blm.evaluation.digital.benchmarks.egothink import DIMENSIONS
from blm.evaluation.digital.benchmarks.sharerobot_split import KINDS

SIDE = 32


def picture(number: int) -> np.ndarray:
    """A square picture unlike that of any other number."""
    pixels = np.full((SIDE, SIDE, 3), 200, np.uint8)
    pixels[: SIDE // 2, : SIDE // 2] = (number * 37 % 256, number * 91 % 256, number % 256)
    return pixels


def mask(number: int) -> np.ndarray:
    """White in the left upper quarter, or in the right lower one for odd numbers."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    part = slice(SIDE // 2, None) if number % 2 else slice(0, SIDE // 2)
    pixels[part, part] = 255
    return pixels


def write_picture(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(file)


def stored(pixels: np.ndarray, name: str) -> dict[str, object]:
    """A picture as the hub's parquet files hold it."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": name}


def write_clip(file: Path, number: int, seconds: float = 1.0, rate: int = 8) -> None:
    """A clip whose frames grow brighter; `number` sets the colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for index in range(round(seconds * rate)):
            pixels = np.full((SIDE, SIDE, 3), index * 255 // round(seconds * rate), np.uint8)
            pixels[..., number % 3] = 128
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(file: Path, rows: list[dict[str, object]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def make_cosmos(folder: Path, name: str) -> None:
    """Two clips: the first with one question, the second with two, one of them in a row of its own."""
    for number, seconds in enumerate((1.0, 3.0)):
        write_clip(folder / name / f"clips/clip-{number}.mp4", number, seconds)
    four = {
        "question": "What is next?",
        "index2ans": dict(zip("ABCD", ("lift", "push", "pull", "wait"), strict=True)),
    }
    two = {"question": "Did it succeed?", "index2ans": {"A": "yes", "B": "no"}}
    rows = [
        {"video": "clips/clip-0.mp4", "qa_pairs": {**four, "answer": "C"}},
        {"video": "clips/clip-1.mp4", "qa_pairs": [{**two, "correct_answer": "B"}]},
        {"video": "clips/clip-1.mp4", "qa_pairs": {**four, "answer": "a"}},
    ]
    write_json(folder / name / f"{name}_benchmark_qa_pairs.json", rows)


def make_egothink(folder: Path) -> None:
    """Two questions in each of the twelve dimensions."""
    for place, dimension in enumerate(DIMENSIONS):
        rows = []
        for number in (1, 2):
            write_picture(folder / dimension / f"images/{number}.jpg", picture(2 * place + number))
            rows.append(
                {
                    "source_dataset": "made",
                    "image_path": [f"{number}.jpg"],
                    "question": f"What is in picture {number}?",
                    "answer": "A square.",
                }
            )
        write_json(folder / dimension / "annotations.json", rows)


def sharerobot_rows(kind: str, episodes: range, templates: int, frames: int) -> list[dict[str, object]]:
    """Rows of one published file: `templates` questions about each episode."""
    answers = {"positive": "yes", "negative": "no"}
    *_, sign = kind.split("_")
    task = kind.title().replace("_With_", "_with_") + "_Task"
    for name in ("Positive", "Negative"):
        task = task.replace(f"_{name}_", f"_({name})_")
    rows = []
    for episode in episodes:
        name = f"rt_frames_success/rtx_frames_success_1/1_made#episode_{episode}"
        marks = " ".join(["<image>"] * frames)
        for template in range(templates):
            rows.append(
                {
                    "id": f"/mnt/made/{name}",
                    "task": task,
                    "selected_step": template,
                    "conversations": [
                        {
                            "from": "human",
                            "value": f"{marks}\n{kind} <step {template} of {episode}>?",
                        },
                        {"from": "gpt", "value": answers.get(sign, f"<step {template + 1} of {episode}>")},
                    ],
                    "image": [f"{name}/frame_{frame}.png" for frame in range(frames)],
                }
            )
    return rows


def make_sharerobot(
    folder: Path, part: str = "test", episodes: range = range(2), templates: int = 2, frames: int = 3
) -> None:
    """Ten published files of one part, and the frames they name."""
    for kind in KINDS:
        file = kind.replace("_positive", "_(positive)").replace("_negative", "_(negative)") + "_task.json"
        write_json(folder / "planning" / part / file, sharerobot_rows(kind, episodes, templates, frames))
    for episode in episodes:
        place = folder / f"planning/images/rt_frames_success/rtx_frames_success_1/1_made#episode_{episode}"
        for frame in range(frames):
            write_picture(place / f"frame_{frame}.png", picture(31 * episode + frame))


ERQA_END = " Please answer directly with only the letter of the correct option and nothing else."


def erqa_rows(make: Callable[[int], object]) -> list[dict[str, object]]:
    """Three questions: pictures first, pictures inside the text, and a second one about the first picture."""
    text = (
        "Which of these is darker: the first or the second? Choices: A. The first. B. The second. C. Neither."
    )
    place = text.index("the first"), text.index("the second")
    plain = "What is shown? Choices: A. A square. B. A disc. C. A U.S. flag. D. None of them."
    return [
        {
            "question_id": "ERQA_0",
            "question": plain + ERQA_END,
            "question_type": "State Estimation",
            "images": [make(0)],
            "visual_indices": [0],
            "answer": "A",
        },
        {
            "question_id": "ERQA_1",
            "question": text + ERQA_END,
            "question_type": "Multi-view Reasoning",
            "images": [make(1), make(2)],
            "visual_indices": list(place),
            "answer": "B",
        },
        {
            "question_id": "ERQA_2",
            "question": plain.replace("shown", "hidden") + ERQA_END,
            "question_type": "Pointing",
            "images": [make(0)],
            "visual_indices": [0],
            "answer": "D",
        },
    ]


def make_erqa(folder: Path) -> None:
    rows = erqa_rows(lambda number: stored(picture(number), f"{number}.png"))
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)


def make_erqa_lines(folder: Path) -> None:
    for number in range(3):
        write_picture(folder / f"images/{number}.png", picture(number))
    write_lines(folder / "erqa.jsonl", erqa_rows(lambda number: f"images/{number}.png"))


THEIR_REQUEST = (
    "Your answer should be formatted as a list of tuples, i.e. [(x1, y1), (x2, y2), ...], where each tuple "
    "contains the x and y coordinates of a point satisfying the conditions above. The coordinates should be "
    "between 0 and 1, indicating the normalized pixel locations of the points in the image."
)


def make_where2place(folder: Path) -> None:
    rows = []
    for number in range(3):
        write_picture(folder / f"images/{number:02d}.jpg", picture(number))
        write_picture(folder / f"masks/{number:02d}.jpg", mask(number))
        text = f"Find a few spots left of square {number}. {THEIR_REQUEST}"
        rows.append({"question_id": number, "image": f"{number:02d}.jpg", "text": text, "category": "seen"})
    write_lines(folder / "point_questions.jsonl", rows)


def make_where2place_parquet(folder: Path) -> None:
    rows = [
        {
            "question_id": str(number),
            "question": f"Find a few spots left of square {number}.",
            "question_type": "seen",
            "image": stored(picture(number), "a.png"),
            "mask": stored(mask(number), "b.png"),
        }
        for number in range(3)
    ]
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)


def make_refspatial(folder: Path) -> None:
    for part in ("Location", "Placement", "Unseen"):
        rows = []
        for number in range(2):
            write_picture(folder / part / f"image/{number}.png", picture(number + len(part)))
            write_picture(folder / part / f"mask/{number}.png", mask(number))
            rows.append(
                {
                    "id": number,
                    "object": "the square",
                    "prompt": f"Please point out the square next to square {number}.",
                    "suffix": THEIR_REQUEST,
                    "rgb_path": f"image/{number}.png",
                    "mask_path": f"mask/{number}.png",
                    "category": part.lower(),
                    "step": 2,
                }
            )
        write_json(folder / part / "question.json", rows)


def make_refspatial_parquet(folder: Path) -> None:
    for part in ("location", "placement", "unseen"):
        rows = [
            {
                "id": number,
                "image": stored(picture(number + len(part)), f"{number}.png"),
                "mask": stored(mask(number), f"{number}.png"),
                "object": "the square",
                "prompt": f"Please point out the square next to square {number}.",
                "suffix": THEIR_REQUEST,
                "step": 2,
            }
            for number in range(2)
        ]
        write_parquet(folder / f"data/{part}-00000-of-00001.parquet", rows)


def make_easy_vqa(folder: Path) -> None:
    """Two pictures a split, three questions about each: yes/no, shape and colour."""
    for split in ("train", "test"):
        rows: list[list[object]] = []
        for number in range(2):
            write_picture(folder / f"data/{split}/images/{number}.png", picture(number))
            rows += [
                ["is there a red shape?", "yes" if number else "no", number],
                ["what shape is in the image?", "circle", number],
                ["what color is the shape?", "red", number],
            ]
        write_json(folder / f"data/{split}/questions.json", rows)
    (folder / "data/answers.txt").write_text("circle\nrectangle\ntriangle\nred\nblue\nyes\nno\n")


def make_scene(folder: Path) -> None:
    """A corpus folder with two conversations."""
    from blm.corpora import Conversation, write_corpus
    from blm.types import Image, Message

    conversations = [
        Conversation(
            id=f"made/{number}",
            group=f"scene/panda/made/{number}",
            source="made",
            kinds=("count",),
            messages=(
                Message("user", (Image(picture(number)), "How many squares are there?")),
                Message("assistant", ("one",)),
            ),
        )
        for number in range(2)
    ]
    write_corpus(folder, conversations)


FIXTURES: dict[str, Callable[[Path], None]] = {
    **{
        name: lambda folder, name=name: make_cosmos(folder, name)
        for name in ("robovqa", "agibot", "holoassist", "robofail")
    },
    "egothink": make_egothink,
    "sharerobot": make_sharerobot,
    "erqa": make_erqa,
    "where2place": make_where2place,
    "refspatial": make_refspatial,
    "easy_vqa": make_easy_vqa,
    "scene": make_scene,
}
VARIANTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "erqa_lines": ("erqa", make_erqa_lines),
    "where2place_parquet": ("where2place", make_where2place_parquet),
    "refspatial_parquet": ("refspatial", make_refspatial_parquet),
}
"""Second layouts: name -> benchmark, maker."""


def make_fixture(name: str, folder: Path) -> Path:
    """Make the data of one benchmark in `folder`, which must not exist; return it."""
    FIXTURES[name](folder)
    return folder
