"""Result of a question benchmark: every prediction, and scores by kind and overall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

from blm.evaluation.digital.facts import FactCheck
from blm.evaluation.protocol import DigitalProtocol
from blm.evaluation.results import EvaluationResult, Machine, ScoredItem
from blm.evaluation.statistics import Difference, Rate
from blm.types import Scorer


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one question, and its score."""

    id: str
    kind: str
    group: str
    """Cluster: questions about one image or video."""
    scorer: Scorer
    question: str
    reference: str
    raw: str
    """The model's raw answer; empty if it refused."""
    failure: str | None
    """Reason why there is no answer; None if there is one."""
    score: float
    """0 wrong .. 1 right."""
    parsed: str | None
    """The parsed answer; None if it could not be parsed."""
    error: float | None
    """Distance of a point to the reference [thousandths of the image], or of a length [cm]."""
    points: int | None
    """Number of points, if several may be given."""
    unjudged: bool | None = None
    """Whether the judge failed; None for an answer that was not judged."""
    judgement: str | None = None
    """The judge's reply; None for an answer that was not judged."""
    facts: FactCheck | None = None
    """The key facts in an answer in free words; None for all other answers."""
    truncated: bool = False
    """Whether the answer was cut at the limit of its tokens."""

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if self.unjudged is None:
            del value["unjudged"], value["judgement"]
        if self.facts is None:
            del value["facts"]
        if not self.truncated:
            del value["truncated"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        facts = FactCheck.from_json(value["facts"]) if "facts" in value else None
        return cls(**{**value, "facts": facts})


@dataclass(frozen=True)
class AnswerSummary(Rate):
    """Score of a set of questions, and the failures in it."""

    unread: int
    refused: int
    unjudged: int
    median_error: float | None
    """Median error of points [thousandths of the image].

    None without points, or if half of the answers could not be parsed.
    """
    median_error_cm: float | None
    """Median error of lengths [cm], None as above."""
    points_per_answer: float | None
    truncated: int | None = None
    """Answers that were cut at the limit of their tokens; None: an older result, which does not say."""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "truncated" or value is not None}


@dataclass(frozen=True)
class Headline(Rate):
    """The benchmark's own score."""

    average: Literal["items", "kinds"]

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        return {"average": value.pop("average"), **value}


@dataclass(frozen=True)
class BalancedAccuracy(Rate):
    """Mean of the recalls of yes and of no."""

    yes: Rate
    """Recall of the questions whose reference is yes."""
    no: Rate
    said_yes: float
    """Fraction of the questions that were answered with yes."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(**{**value, "yes": Rate(**value["yes"]), "no": Rate(**value["no"])})


@dataclass(frozen=True, kw_only=True)
class DigitalSummary:
    """Scores of one model, or of a baseline."""

    headline: Headline
    overall: AnswerSummary
    """Score over all questions."""
    kinds: Mapping[str, AnswerSummary]
    balanced: Mapping[str, BalancedAccuracy]
    """Balanced accuracies of kinds whose references are yes and no."""

    def to_json(self) -> dict[str, Any]:
        return {
            "headline": self.headline.to_json(),
            "overall": self.overall.to_json(),
            "kinds": {kind: part.to_json() for kind, part in self.kinds.items()},
            "balanced": {kind: asdict(part) for kind, part in self.balanced.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            headline=Headline(**value["headline"]),
            overall=AnswerSummary(**value["overall"]),
            kinds={kind: AnswerSummary(**part) for kind, part in value["kinds"].items()},
            balanced={kind: BalancedAccuracy.from_json(part) for kind, part in value["balanced"].items()},
        )


@dataclass(frozen=True)
class BaselineResult:
    """A baseline that sees no image, on the same questions."""

    summary: DigitalSummary
    model_minus_baseline: Difference

    def to_json(self) -> dict[str, Any]:
        return {**self.summary.to_json(), "model_minus_baseline": asdict(self.model_minus_baseline)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(DigitalSummary.from_json(value), Difference(**value["model_minus_baseline"]))


@dataclass(frozen=True)
class JudgeCalibration:
    """How well a judge grades answers with known grades."""

    n: int
    agree: int
    failed: int
    """Number of replies without a rating."""
    mean_gap: float
    """Mean distance to the known grade; a failed reply counts as grade 0."""


@dataclass(frozen=True)
class JudgeRecord:
    """The judge of free-form answers."""

    model: str
    prompt: str
    """Hash of its prompt."""
    calibration: JudgeCalibration

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(value["model"], value["prompt"], JudgeCalibration(**value["calibration"]))


@dataclass(frozen=True, kw_only=True)
class DigitalResult(EvaluationResult):
    """One model on one question benchmark."""

    kind: ClassVar[str] = "digital"
    score: ClassVar[str] = "score"

    protocol: DigitalProtocol
    coordinates: str
    """Convention in which the model writes coordinates (`DigitalEvalConfig.coordinates`)."""
    summary: DigitalSummary
    judge: JudgeRecord | None
    """None if no question needed a judge."""
    baselines: Mapping[str, BaselineResult]
    predictions: tuple[Prediction, ...]
    """Empty for a published summary."""

    def items(self) -> list[ScoredItem]:
        return [ScoredItem(id=p.id, score=p.score, stratum=p.kind, group=p.group) for p in self.predictions]

    def to_json(self) -> dict[str, Any]:
        value = super().to_json() | {"coordinates": self.coordinates} | self.summary.to_json()
        value["judge"] = {} if self.judge is None else asdict(self.judge)
        value["baselines"] = {name: baseline.to_json() for name, baseline in self.baselines.items()}
        if self.predictions:
            value["rows"] = [prediction.to_json() for prediction in self.predictions]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            protocol=DigitalProtocol(**value["protocol"]),
            machine=Machine.from_json(value["machine"]),
            seconds=value["seconds"],
            model=value["model"],
            coordinates=value["coordinates"],
            summary=DigitalSummary.from_json(value),
            judge=JudgeRecord.from_json(value["judge"]) if value["judge"] else None,
            baselines={name: BaselineResult.from_json(part) for name, part in value["baselines"].items()},
            predictions=tuple(Prediction.from_json(row) for row in value.get("rows", ())),
        )
