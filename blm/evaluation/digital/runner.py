"""Ask any Chat the questions of any benchmark: resumable, in batches, beside baselines without pictures."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from blm.evaluation.digital.answers import AnswerError, answer_all
from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.scene_questions import SCENE
from blm.evaluation.digital.judge import Asked, Judge, calibrate
from blm.evaluation.digital.parsers.compat import COMPAT
from blm.evaluation.digital.parsers.coordinates import Coordinates, read_metric, read_numbers
from blm.evaluation.digital.parsers.extraction import normalise
from blm.evaluation.digital.scoring import Rules, score
from blm.evaluation.digital.summary import Row, summarise, versus
from blm.evaluation.protocol import DigitalProtocol, digest
from blm.evaluation.results import require_free, write_result
from blm.jobs import WorkUnit, run_units
from blm.media import locate, split_time, with_pixels
from blm.types import BlmError, Chat, Image, Message, Question, base_kind, lookup, require_numbers


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the questions are put to one model."""

    root: Path | None = None
    """Folder of the pictures; None when all are in memory."""
    coordinates: str = "thousandths"
    """How this model writes places: thousandths, unit, yx1000, pixels or pixels:WIDTHxHEIGHT."""
    compat: str = ""
    """Upstream parser of digital/compat.py that reads the answers instead of ours."""
    batch: int = 16
    """Questions handed over at once, and lost at most when the run is killed."""

    def __post_init__(self) -> None:
        require_numbers(self, batch=(1, 100_000))


def evaluate_digital(
    chat: Chat,
    questions: Sequence[Question],
    out: Path,
    *,
    model: str,
    train_questions: Sequence[Question] = (),
    benchmark: Benchmark = SCENE,
    judge: Judge | None = None,
    asking: Asking = Asking(),
) -> dict[str, Any]:
    """Ask every question, score, compare with the baselines; write `out`/result.json and return it.

    `train_questions` feed the baselines only. `model` names the weights: a killed run continues from
    `out`/journal.jsonl only under the same name. Raises BlmError for no questions, duplicate ids, a missing
    picture, questions that need a judge where there is none, and a model that cannot be reached.
    """
    start = monotonic()
    require_free(out)
    _check(questions, judge, asking)
    protocol = _protocol(questions, benchmark, judge, asking)
    rules = Rules(protocol, Coordinates.parse(asking.coordinates), asking.root)
    about_judge = _examine(judge) if judge and protocol.judge else {}
    raw = _ask(chat, questions, protocol, out, model, asking)
    rows = [_row(question, *answer, rules) for question, answer in zip(questions, raw, strict=True)]
    if judge:
        _grade(rows, judge)
    baselines = {}
    if train_questions and not protocol.judge:
        for name, guess in _baselines(train_questions).items():
            ours = replace(protocol, compat="")
            guessed = [_row(q, guess(q), None, Rules(ours, root=asking.root)) for q in questions]
            baselines[name] = versus(rows, guessed, benchmark.average)
    parts = {"kind": "digital", "score": "score", "model": model, "coordinates": asking.coordinates}
    summary = summarise(rows, benchmark.average)
    return write_result(
        out, protocol, start, **parts, **summary, judge=about_judge, baselines=baselines, rows=rows
    )


def _check(questions: Sequence[Question], judge: Judge | None, asking: Asking) -> None:
    if not questions:
        raise BlmError("no questions; check the benchmark's folder, or the limit")
    twice = [name for name, count in Counter(q.id for q in questions).items() if count > 1]
    if twice:
        raise BlmError(f"question ids must differ; '{twice[0]}' occurs more than once")
    free = [question.id for question in questions if question.scorer == "judge"]
    if free and judge is None:
        raise BlmError(
            f"{len(free)} of {len(questions)} questions (first: '{free[0]}') have free-form answers, which a "
            "judge grades: --judge openai:MODEL@URL; --judge match compares words: not the paper's metric"
        )
    if asking.compat:
        upstream = lookup("compat parser", asking.compat, COMPAT)
        scorers = {q.scorer for q in questions}
        parts = {"choice": upstream.choice, "points": upstream.points, "judge": upstream.rating}
        if not any(part for scorer, part in parts.items() if scorer in scorers):
            able = ", ".join(scorer for scorer, part in parts.items() if part)
            raise BlmError(f"'{asking.compat}' reads {able} answers; here are {', '.join(sorted(scorers))}")


def _protocol(
    questions: Sequence[Question], benchmark: Benchmark, judge: Judge | None, asking: Asking
) -> DigitalProtocol:
    judged = judge is not None and any(question.scorer == "judge" for question in questions)
    return DigitalProtocol(
        benchmark=benchmark.name,
        items=digest([_key(question, asking.root) for question in questions]),
        count=len(questions),
        max_tokens=benchmark.max_tokens,
        long=dict(benchmark.long),
        prompt=benchmark.system,
        average=benchmark.average,
        compat=asking.compat,
        judge=judge.name if judge and judged else "",
        judge_prompt=judge.prompt if judge and judged else "",
    )


def _key(question: Question, root: Path | None) -> list[Any]:
    """What identifies a question: its words, its pictures, its answer."""
    parts = [
        part if isinstance(part, str) else _picture(part, root, question.id)
        for message in question.messages
        for part in (message.role, *message.content)
    ]
    mask = [_picture(question.mask, root, question.id)] if question.mask else []
    about = [question.id, question.kind, question.answer, question.group, question.scorer]
    return [*about, list(question.options), parts, mask]


def _picture(image: Image, root: Path | None, name: str) -> str:
    """Hash of a picture without decoding it: of its file, with the time of a video frame, or its pixels."""
    if image.pixels is not None:
        return hashlib.sha256(np.asarray(image.pixels).tobytes()).hexdigest()
    if root is None or image.path is None:
        raise BlmError(f"question '{name}' has a picture that is not in memory; say which folder it is in")
    file = locate(image.path, root)
    try:
        state = file.stat()
    except OSError as error:
        raise BlmError(f"question '{name}': cannot read picture {file}: {error.strerror}") from error
    return f"{_hash(file, state.st_mtime_ns, state.st_size)}{split_time(image.path)[1] or ''}"


@lru_cache(65536)
def _hash(file: Path, modified: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


Raw = tuple[str, str | None]
"""What the model said, and why it said nothing."""


def _ask(
    chat: Chat,
    questions: Sequence[Question],
    protocol: DigitalProtocol,
    out: Path,
    model: str,
    asking: Asking,
) -> list[Raw]:
    """The raw answers. They depend on neither parser nor judge: another one of those asks nothing again."""
    system = (Message("system", (protocol.prompt,)),) if protocol.prompt else ()
    limits = [protocol.long.get(question.kind, protocol.max_tokens) for question in questions]
    order = sorted(range(len(questions)), key=limits.__getitem__)  # one limit a batch

    def answer(places: Sequence[int]) -> dict[str, Any]:
        asked = [(*system, *_loaded(questions[place], asking.root)) for place in places]
        said = answer_all(chat, asked, limits[places[0]])
        failures = {str(i): str(reply) for i, reply in enumerate(said) if isinstance(reply, AnswerError)}
        return {"raw": [reply if isinstance(reply, str) else "" for reply in said], "failures": failures}

    name = digest([protocol.items, protocol.max_tokens, dict(protocol.long), protocol.prompt])
    batches: list[list[int]] = []
    for place in order:
        if not batches or len(batches[-1]) == asking.batch or limits[batches[-1][0]] != limits[place]:
            batches.append([])
        batches[-1].append(place)
    units = [WorkUnit(f"{name}/{model}/{asking.batch}/{i}", batch) for i, batch in enumerate(batches)]
    done = run_units(answer, units, journal=out / "journal.jsonl", workers=0, title="questions")
    answers: dict[int, Raw] = {}
    for unit, result in zip(units, done.values(), strict=True):
        for i, (place, text) in enumerate(zip(unit.payload, result["raw"], strict=True)):
            answers[place] = text, result["failures"].get(str(i))
    return [answers[place] for place in range(len(questions))]


def _loaded(question: Question, root: Path | None) -> tuple[Message, ...]:
    return question.messages if root is None else with_pixels(question.messages, root)


def _row(question: Question, raw: str, failure: str | None, rules: Rules) -> Row:
    row = {name: getattr(question, name) for name in ("id", "kind", "group", "scorer")}
    row |= {"question": question.messages[-1].text, "reference": question.answer, "raw": raw}
    return row | {"failure": failure} | asdict(score(question, raw, rules))


def _examine(judge: Judge) -> dict[str, Any]:
    """Before anything is asked: the judge can be reached, and what it makes of answers with known grades."""
    return {"model": judge.name, "prompt": judge.prompt, "calibration": calibrate(judge)}


def _grade(rows: Sequence[Row], judge: Judge) -> None:
    """Grade the free-form rows in place. Empty answers are wrong unasked."""
    graded = [row for row in rows if row["scorer"] == "judge" and row["parsed"] is not None]
    verdicts = judge.grade([Asked(row["question"], row["reference"], row["parsed"]) for row in graded])
    for row, verdict in zip(graded, verdicts, strict=True):
        failed = verdict.score is None
        row |= {"score": verdict.score or 0.0, "unjudged": failed, "judgement": verdict.reply}


def _baselines(train: Sequence[Question]) -> dict[str, Callable[[Question], str]]:
    """Guess from the training answers: the usual one of the kind, or of the very same question text.

    The yes and the no of a pair are one kind: its name would give the answer away.
    """
    alike: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in train:
        alike[(base_kind(question.kind),)].append(question)
        alike[base_kind(question.kind), question.messages[-1].text].append(question)
    usual = {key: _usual(part) for key, part in alike.items()}

    def majority(question: Question) -> str:
        return usual.get((base_kind(question.kind),), "")

    def question_only(question: Question) -> str:
        return usual.get((base_kind(question.kind), question.messages[-1].text), majority(question))

    return {"majority": majority, "question_only": question_only}


def _usual(questions: Sequence[Question]) -> str:
    """The most frequent answer, or the median place or length."""
    read: dict[str, Callable[[str], tuple[float, ...] | None]] = {
        "point": lambda text: next(iter(read_numbers(text, 2)), None),
        "box": lambda text: next(iter(read_numbers(text, 4)), None),
        "metric": read_metric,
    }
    places = [read[q.scorer](q.answer) if q.scorer in read else None for q in questions]
    found = [place for place in places if place is not None]
    usual_length = Counter(map(len, found)).most_common(1)
    if not usual_length:
        return Counter(normalise(question.answer) for question in questions).most_common(1)[0][0]
    same = [place for place in found if len(place) == usual_length[0][0]]
    middle = ", ".join(str(int(value)) for value in np.median(same, axis=0).round())
    text = middle if len(same[0]) == 1 else f"({middle})"
    return f"{text} cm" if questions[0].scorer == "metric" else text
