"""The four multiple-choice sets of Cosmos-Reason1-Benchmark: questions about video clips.

Layout, for a set `robovqa`: FOLDER/robovqa/robovqa_benchmark_qa_pairs.json, a list of {"video":
"clips/x.mp4", "qa_pairs": {"question", "index2ans": {"A": ...}, "answer"} or a list of such}, and
FOLDER/robovqa/clips/x.mp4. Checked against examples/benchmark/tools/eval of
nvidia-cosmos/cosmos-reason1 (loader, prompt, letter mode with 10 tokens, `correct_answer` as
another name of `answer`) and the listing of the hub. Assumed: that options are lettered A, B, ..
without a gap.

Deliberate differences from upstream: 4 frames a second as upstream, but at most 8 (upstream: all);
models with video inputs receive them as one video (`Backbone.videos_as`), others as images; an
answer that cannot be parsed is wrong (upstream: asked again, up to ten times, at rising
temperature); a missing clip is an error (upstream: its questions are skipped).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from string import ascii_uppercase

from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.layout import Row, letter_of, read_rows
from blm.types import BlmError, Message, Question

FRAME_RATE = 4.0
"""Frames per second."""
MAX_FRAMES = 8
"""Maximum number of frames that a question shows."""
ASK = "Answer with the option's letter from the given choices directly."
_GET = (
    "Get it with `hf download --repo-type dataset nvidia/Cosmos-Reason1-Benchmark --local-dir FOLDER` "
    "(257 MB; {clips}), unpack clips.tar.gz in FOLDER/{name}, and name FOLDER. Expected: "
    "FOLDER/{name}/{name}_benchmark_qa_pairs.json and FOLDER/{name}/clips/*.mp4."
)


def cosmos(name: str, title: str, clips: str, licence: str) -> Benchmark:
    """Return the benchmark of one set. `clips` describes the source of the clips."""
    get = _GET.format(name=name, clips=clips)
    return Benchmark(
        name=name,
        title=title,
        get=get,
        licence=f"annotations: NVIDIA (see the dataset card); {licence}",
        load=partial(_load, name=name, get=get),
        system="Answer the questions.",
        max_tokens=10,
    )


def _load(folder: Path, *, name: str, get: str) -> list[Question]:
    rows = read_rows(folder / name / f"{name}_benchmark_qa_pairs.json", get)
    if not (folder / name / "clips").is_dir():
        raise BlmError(f"'{folder / name}' has questions but no clips. {get}")
    questions = []
    for place, row in enumerate(rows):
        clip = f"{name}/{row.text('video')}"
        pictures = row.frames(clip, folder, rate=FRAME_RATE, most=MAX_FRAMES)
        pairs = row.field("qa_pairs")
        for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
            if not isinstance(pair, dict):
                raise row.error(f"qa_pairs holds {str(pair)[:80]!r}; needed: an object")
            asked = Row(row.where, pair)
            options = _options(asked)
            lines = [f"({letter}) {text}" for letter, text in zip(ascii_uppercase, options, strict=False)]
            text = "\n".join([asked.text("question"), *lines, ASK])
            answer = asked.text("answer" if "answer" in pair else "correct_answer")
            questions.append(
                Question(
                    id=f"{Path(clip).stem}/{place}.{number}",  # a clip may occur in several rows
                    kind=f"{name}_choice",
                    messages=(Message("user", (*pictures, text)),),
                    answer=letter_of(asked, answer, options),
                    group=clip,
                    scorer="choice",
                    options=options,
                )
            )
    return questions


def _options(row: Row) -> tuple[str, ...]:
    texts = row.field("index2ans")
    if not isinstance(texts, dict) or len(texts) < 2:
        raise row.error(f"index2ans is {str(texts)[:80]!r}; needed: two or more options by letter")
    letters = sorted(texts)
    if letters != list(ascii_uppercase[: len(letters)]):
        raise row.error(f"index2ans has the letters {', '.join(letters)}; needed: A, B, .. without a gap")
    return tuple(str(texts[letter]) for letter in letters)
