"""Questions about simulated scenes: accuracy by kind, beside two baselines that see no picture."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from blm.engine import Unit, run_units
from blm.evaluation.digital.scoring import normalise, parse_point, score
from blm.evaluation.intervals import paired_difference, success_rate
from blm.evaluation.protocol import DigitalProtocol, digest, protocol_hash
from blm.evaluation.results import write_result
from blm.types import BlmError, Chat, Message, Question

BATCH = 16
Row = dict[str, Any]


@runtime_checkable
class AnswersBatches(Protocol):
    """A Chat that answers several conversations at once."""

    def answer_batch(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 64
    ) -> Sequence[str]: ...


def evaluate_digital(
    chat: Chat,
    questions: Sequence[Question],
    out: Path,
    *,
    train_questions: Sequence[Question],
    model: str,
    max_tokens: int = 32,
    prompt: str = "",
) -> dict[str, Any]:
    """Ask every question, score, compare with the baselines; write `out`/result.json and return it.

    `train_questions` feed the baselines only. `model` names the weights: a killed run continues from
    `out`/journal.jsonl only under the same name. `prompt` is the system message. Pictures must be in memory.
    """
    start = time.monotonic()
    items = digest([_key(question) for question in questions])
    protocol = DigitalProtocol(items=items, count=len(questions), max_tokens=max_tokens, prompt=prompt)
    raw = _ask(chat, questions, protocol, out, model)
    rows = [_judge(question, text, protocol) for question, text in zip(questions, raw, strict=True)]
    baselines = {
        name: _versus(rows, [_judge(question, guess(question), protocol) for question in questions])
        for name, guess in _baselines(train_questions).items()
    }
    parts = {"kind": "digital", "score": "correct", "model": model, **_summary(rows)}
    return write_result(out, protocol, start, **parts, baselines=baselines, rows=rows)


def _key(question: Question) -> list[str]:
    """What identifies a question: its words, its pictures, its answer."""
    pixels = [image.pixels for message in question.messages for image in message.images]
    if any(picture is None for picture in pixels):
        raise BlmError(f"question '{question.id}' has a picture that is not in memory; load it first")
    pictures = [hashlib.sha256(np.asarray(picture).tobytes()).hexdigest() for picture in pixels]
    words = [part for message in question.messages for part in message.content if isinstance(part, str)]
    return [question.id, question.kind, question.answer, question.group, question.scorer, *words, *pictures]


def _ask(
    chat: Chat, questions: Sequence[Question], protocol: DigitalProtocol, out: Path, model: str
) -> list[str]:
    system = (Message("system", (protocol.prompt,)),) if protocol.prompt else ()

    def answer(batch: Sequence[Question]) -> dict[str, Any]:
        asked = [(*system, *question.messages) for question in batch]
        if isinstance(chat, AnswersBatches):
            return {"raw": list(chat.answer_batch(asked, max_tokens=protocol.max_tokens))}
        return {"raw": [chat.answer(messages, max_tokens=protocol.max_tokens) for messages in asked]}

    starts = range(0, len(questions), BATCH)
    units = [Unit(f"{protocol_hash(protocol)}/{model}/{i}", questions[i : i + BATCH]) for i in starts]
    done = run_units(answer, units, journal=out / "journal.jsonl", workers=0, title="questions")
    return [text for result in done.values() for text in result["raw"]]


def _judge(question: Question, raw: str, protocol: DigitalProtocol) -> Row:
    row = {name: getattr(question, name) for name in ("id", "kind", "group", "scorer")}
    row |= {"question": question.messages[-1].text, "reference": question.answer, "raw": raw}
    return row | asdict(score(question, raw, protocol.point_radius))


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    kinds = sorted({row["kind"] for row in rows})
    of_kind = {kind: _accuracy([row for row in rows if row["kind"] == kind]) for kind in kinds}
    return {"overall": _accuracy(rows), "kinds": of_kind}


def _accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    """Rate clustered by scene, answers that could not be read, and the median distance of points.

    An unread point is infinitely far away; a median that is infinite is given as None.
    """
    rate = success_rate([row["correct"] for row in rows], [row["group"] for row in rows])
    far = [np.inf if row["error"] is None else row["error"] for row in rows if row["scorer"] == "point"]
    middle = float(np.median(far)) if far else np.inf
    unread = sum(row["parsed"] is None for row in rows)
    return {**asdict(rate), "unread": unread, "median_error": middle if np.isfinite(middle) else None}


def _versus(rows: Sequence[Row], guessed: Sequence[Row]) -> dict[str, Any]:
    right, theirs = ([row["correct"] for row in side] for side in (rows, guessed))
    gain = paired_difference(right, theirs, [row["group"] for row in rows])
    return {**_summary(guessed), "model_minus_baseline": asdict(gain)}


def _baselines(train: Sequence[Question]) -> dict[str, Callable[[Question], str]]:
    """Guess from the training answers: the usual one of the kind, or of the very same question text."""
    alike: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in train:
        alike[(question.kind,)].append(question)
        alike[question.kind, question.messages[-1].text].append(question)
    usual = {key: _usual(part) for key, part in alike.items()}

    def majority(question: Question) -> str:
        return usual.get((question.kind,), "")

    def question_only(question: Question) -> str:
        return usual.get((question.kind, question.messages[-1].text), majority(question))

    return {"majority": majority, "question_only": question_only}


def _usual(questions: Sequence[Question]) -> str:
    """The most frequent answer, or the median point."""
    if questions[0].scorer == "point":
        x, y = np.median([parse_point(question.answer) for question in questions], axis=0).round().astype(int)
        return f"({x}, {y})"
    return Counter(normalise(question.answer) for question in questions).most_common(1)[0][0]
