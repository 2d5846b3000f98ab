"""Run a question benchmark on any Chat: resumable, in batches, with text-only baselines."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, runtime_checkable

import numpy as np

from blm.evaluation.digital.answers import AnswerError, complete_all
from blm.evaluation.digital.benchmarks.benchmark import Benchmark
from blm.evaluation.digital.benchmarks.scene_questions import SCENE
from blm.evaluation.digital.judge import AnswerToGrade, Judge, calibrate
from blm.evaluation.digital.parsers.compat import COMPAT
from blm.evaluation.digital.parsers.coordinates import Coordinates
from blm.evaluation.digital.result import DigitalResult, JudgeRecord, Prediction
from blm.evaluation.digital.scoring import UNREAD, ScoringConfig, score
from blm.evaluation.digital.summary import compare_with_baseline, summarise
from blm.evaluation.digital.text_baselines import text_baselines
from blm.evaluation.digital.thinking import (
    AT_ONCE,
    Thinking,
    ThinkingMode,
    cut_while_thinking,
    thinking_mode,
)
from blm.evaluation.protocol import DigitalProtocol, digest
from blm.evaluation.result_files import require_free, write_result
from blm.evaluation.results import this_machine
from blm.jobs import Result, WorkUnit, run_units
from blm.media import locate, split_time, with_pixels
from blm.types import BlmError, Chat, Image, Message, Question, lookup, require_numbers


@dataclass(frozen=True, kw_only=True)
class DigitalEvalConfig:
    """How a model is asked, and how its answers are parsed."""

    root: Path | None = None
    """Folder of the images; None if all of them are in memory."""
    coordinates: str = "thousandths"
    """Convention of the model, as `Coordinates.parse` reads it."""
    compat: str = ""
    """Upstream parser of digital/parsers/compat.py that parses the answers instead of ours."""
    max_tokens: int | None = None
    """Longest answer [tokens], thoughts included; None: that of the benchmark, and as much more for
    thinking as `thinking` says."""
    thinking: Thinking = "auto"
    """Whether the model thinks before it answers; "auto": as its chat template has it."""
    batch: int = 16
    """Number of questions per batch, which is the maximum that a killed run loses."""

    def __post_init__(self) -> None:
        require_numbers(self, batch=(1, 100_000), max_tokens=(1, 10**6))


def evaluate_digital(
    chat: Chat,
    questions: Sequence[Question],
    out: Path,
    *,
    model: str,
    train_questions: Sequence[Question] = (),
    benchmark: Benchmark = SCENE,
    judge: Judge | None = None,
    config: DigitalEvalConfig = DigitalEvalConfig(),
) -> DigitalResult:
    """Ask every question, score the answers, compare with baselines; write and return the result.

    `train_questions` are used for the baselines only. `model` identifies the weights: a killed run
    resumes from `out`/journal.jsonl only under the same name. The result is written to
    `out`/result.json. A picture that cannot be decoded fails its question alone. Raises BlmError for
    no questions, duplicate ids, a missing image, questions that need a judge if there is none, a
    model that cannot be reached, and one that cannot be told whether to think.
    """
    start = monotonic()
    require_free(out)
    _check(questions, judge, config)
    mode = thinking_mode(chat, config.thinking)
    protocol = _protocol(questions, benchmark, judge, config, mode)
    scoring = _scoring(chat, protocol, config)
    record = _calibrate_judge(judge) if judge and protocol.judge else None
    raw = _ask(chat, questions, protocol, out, model, config)
    predictions = [
        _predict(question, answer, scoring, mode) for question, answer in zip(questions, raw, strict=True)
    ]
    if judge:
        predictions = _grade(predictions, judge)
    baselines = {}
    if train_questions and not protocol.judge:
        ours = ScoringConfig(replace(protocol, compat=""), root=config.root)
        for name, guess in text_baselines(train_questions).items():
            guesses = [_predict(question, RawAnswer(guess(question)), ours) for question in questions]
            baselines[name] = compare_with_baseline(predictions, guesses, benchmark.average)
    result = DigitalResult(
        protocol=protocol,
        machine=this_machine(),
        seconds=monotonic() - start,
        model=model,
        coordinates=config.coordinates,
        summary=summarise(predictions, benchmark.average),
        judge=record,
        baselines=baselines,
        predictions=tuple(predictions),
    )
    return write_result(out, result)


def _check(questions: Sequence[Question], judge: Judge | None, config: DigitalEvalConfig) -> None:
    if not questions:
        raise BlmError("no questions; check the benchmark's folder, or the limit")
    twice = [name for name, count in Counter(q.id for q in questions).items() if count > 1]
    if twice:
        raise BlmError(f"question ids must differ; '{twice[0]}' occurs more than once")
    free = [question.id for question in questions if question.scorer == "judge"]
    if free and judge is None:
        raise BlmError(
            f"{len(free)} of {len(questions)} questions (first: '{free[0]}') have free-form answers and "
            "need a judge: --judge openai:MODEL@URL; --judge match compares words, not the paper's metric"
        )
    if config.compat:
        upstream = lookup("compat parser", config.compat, COMPAT)
        scorers = {q.scorer for q in questions}
        parts = {"choice": upstream.choice, "points": upstream.points, "judge": upstream.rating}
        if not any(part for scorer, part in parts.items() if scorer in scorers):
            able = ", ".join(scorer for scorer, part in parts.items() if part)
            raise BlmError(
                f"'{config.compat}' reads {able} answers; these questions need {', '.join(sorted(scorers))}"
            )


@runtime_checkable
class SaysSizes(Protocol):
    """A Chat that knows to which size its processor resizes a picture."""

    def seen_size(self, width: int, height: int) -> tuple[int, int]: ...


def _scoring(chat: Chat, protocol: DigitalProtocol, config: DigitalEvalConfig) -> ScoringConfig:
    """Return the rules of scoring. Raises BlmError for pixels in pictures of unknown size."""
    convention = Coordinates.parse(config.coordinates)
    resize = chat.seen_size if isinstance(chat, SaysSizes) else None
    if convention.kind == "pixels" and convention.size is None and convention.frame == "seen":
        if resize is None:
            raise BlmError(
                "this model does not say to which size it resizes pictures, so its pixels have no scale; "
                "give --coordinates pixels:qwen2_5_vl, pixels:original or pixels:WIDTHxHEIGHT"
            )
        resize(64, 64)  # a family that does not count pixels is refused before any question is asked
    return ScoringConfig(protocol, convention, config.root, resize)


def _protocol(
    questions: Sequence[Question],
    benchmark: Benchmark,
    judge: Judge | None,
    config: DigitalEvalConfig,
    mode: ThinkingMode,
) -> DigitalProtocol:
    fixed = config.max_tokens
    judged = judge is not None and any(question.scorer == "judge" for question in questions)
    return DigitalProtocol(
        benchmark=benchmark.name,
        items=digest([_key(question, config.root) for question in questions]),
        count=len(questions),
        max_tokens=fixed or benchmark.max_tokens + mode.tokens,
        long={} if fixed else {kind: tokens + mode.tokens for kind, tokens in benchmark.long.items()},
        thinking=mode.thinks,
        prompt=benchmark.system,
        average=benchmark.average,
        compat=config.compat,
        judge=judge.name if judge and judged else "",
        judge_prompt=judge.prompt if judge and judged else "",
    )


def _key(question: Question, root: Path | None) -> list[Any]:
    """Return everything that identifies a question: its words, images and answer."""
    parts = [
        part if isinstance(part, str) else _picture(part, root, question.id)
        for message in question.messages
        for part in (message.role, *message.content)
    ]
    mask = [_picture(question.mask, root, question.id)] if question.mask else []
    about = [question.id, question.kind, question.answer, question.group, question.scorer]
    facts = [asdict(question.facts)] if question.facts else []
    return [*about, list(question.options), parts, mask, *facts]


def _picture(image: Image, root: Path | None, name: str) -> str:
    """Hash an image without decoding it: its file and the time of a video frame, or its pixels."""
    if image.pixels is not None:
        return hashlib.sha256(np.asarray(image.pixels).tobytes()).hexdigest()
    if root is None or image.path is None:
        raise BlmError(f"question '{name}' has an image that is not in memory; name its folder")
    file = locate(image.path, root)
    try:
        state = file.stat()
    except OSError as error:
        raise BlmError(f"question '{name}': cannot read image {file}: {error.strerror}") from error
    return f"{_hash(file, state.st_mtime_ns, state.st_size)}{split_time(image.path)[1] or ''}"


@lru_cache(65536)
def _hash(file: Path, modified: int, size: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class RawAnswer:
    """What a model said, before any rule reads it."""

    text: str
    failure: str | None = None
    """Reason why there is no answer; None if there is one."""
    truncated: bool = False
    """Whether it was cut at the limit of its tokens."""


def _ask(
    chat: Chat,
    questions: Sequence[Question],
    protocol: DigitalProtocol,
    out: Path,
    model: str,
    config: DigitalEvalConfig,
) -> list[RawAnswer]:
    """Return the raw answers. They depend on neither parser nor judge, which may change later."""
    system = (Message("system", (protocol.prompt,)),) if protocol.prompt else ()
    limits = [protocol.long.get(question.kind, protocol.max_tokens) for question in questions]
    order = sorted(range(len(questions)), key=limits.__getitem__)  # a batch has one token limit

    def answer(places: Sequence[int]) -> Result:
        failures = dict[str, str]()
        asked = dict[int, tuple[Message, ...]]()
        for i, place in enumerate(places):
            try:
                asked[i] = (*system, *_loaded(questions[place], config.root))
            except BlmError as error:
                failures[str(i)] = f"question '{questions[place].id}': {error}"
        texts, truncated = [""] * len(places), list[int]()
        said = complete_all(chat, list(asked.values()), limits[places[0]]) if asked else []
        for i, reply in zip(asked, said, strict=True):
            if isinstance(reply, AnswerError):
                failures[str(i)] = str(reply)
                continue
            texts[i] = reply.text
            truncated += [i] if reply.truncated else []
        return {"raw": texts, "failures": failures, "truncated": truncated}

    mode = [protocol.thinking, config.thinking, "with endings"]
    name = digest([protocol.items, protocol.max_tokens, dict(protocol.long), protocol.prompt, *mode])
    batches: list[list[int]] = []
    for place in order:
        if not batches or len(batches[-1]) == config.batch or limits[batches[-1][0]] != limits[place]:
            batches.append([])
        batches[-1].append(place)
    units = [WorkUnit(f"{name}/{model}/{config.batch}/{i}", batch) for i, batch in enumerate(batches)]
    done = run_units(answer, units, journal=out / "journal.jsonl", workers=0, title="questions")
    answers: dict[int, RawAnswer] = {}
    for unit, result in zip(units, done.values(), strict=True):
        for i, (place, text) in enumerate(zip(unit.payload, result["raw"], strict=True)):
            answers[place] = RawAnswer(text, result["failures"].get(str(i)), i in result["truncated"])
    return [answers[place] for place in range(len(questions))]


def _loaded(question: Question, root: Path | None) -> tuple[Message, ...]:
    return question.messages if root is None else with_pixels(question.messages, root)


def _predict(
    question: Question, raw: RawAnswer, scoring: ScoringConfig, mode: ThinkingMode = AT_ONCE
) -> Prediction:
    """Score an answer. One that failed, or was cut while the model thought, is unread."""
    unfinished = cut_while_thinking(raw.text, truncated=raw.truncated, mode=mode)
    scored = UNREAD if unfinished or raw.failure is not None else score(question, raw.text, scoring)
    return Prediction(
        id=question.id,
        kind=question.kind,
        group=question.group,
        scorer=question.scorer,
        question=question.messages[-1].text,
        reference=question.answer,
        raw=raw.text,
        failure=raw.failure,
        truncated=raw.truncated,
        score=scored.score,
        parsed=scored.parsed,
        error=scored.error,
        points=scored.points,
        facts=scored.facts,
    )


def _calibrate_judge(judge: Judge) -> JudgeRecord:
    """Calibrate the judge before any question is asked; raises BlmError when it cannot be reached."""
    return JudgeRecord(judge.name, judge.prompt, calibrate(judge))


def _grade(predictions: Sequence[Prediction], judge: Judge) -> list[Prediction]:
    """Grade the free-form predictions. Empty answers are wrong and are not sent to the judge."""
    free = [p for p in predictions if p.scorer == "judge" and p.parsed is not None]
    verdicts = judge.grade([AnswerToGrade(p.question, p.reference, p.parsed or "") for p in free])
    graded = {
        p.id: replace(p, score=verdict.score or 0.0, unjudged=verdict.score is None, judgement=verdict.reply)
        for p, verdict in zip(free, verdicts, strict=True)
    }
    return [graded.get(p.id, p) for p in predictions]
