"""Paired comparison of two results on the same items: overall, by stratum, and as a text table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from blm.evaluation.physical.result import PhysicalResult
from blm.evaluation.protocol import PhysicalProtocol, require_equal
from blm.evaluation.results import EvaluationResult, ScoredItem
from blm.evaluation.statistics import Difference, holm, paired_difference
from blm.types import BlmError, ContractError, Training

_UNLIKE = "results of different protocols cannot be compared"
Pair = tuple[ScoredItem, ScoredItem]
"""The same item in two results."""


TRAINING_LABELS: Mapping[Training, str] = {
    "plain": "zero-shot",
    "randomized": "augmented",
    "none": "not trained",
    "unknown": "training unknown",
}
"""Record of a policy's training -> its label beside results of perturbed protocols."""


def compare(
    first: EvaluationResult,
    second: EvaluationResult,
    *,
    but: Collection[str] = (),
    across_training: bool = False,
) -> Difference:
    """Return the paired difference of two results, first minus second.

    `but` names fields of the protocol that may differ, because they are under comparison. Raises
    ContractError, which prints both sides, for different protocols, items or scenes, and BlmError
    for a replay check or a validation: they are not scores. Without `across_training`, raises
    ContractError as `require_same_training` does.
    """
    return _difference(_pairs(first, second, but, across_training))


def require_same_training(results: Mapping[str, EvaluationResult]) -> None:
    """Raise ContractError, which names them, if results of a perturbed protocol (name -> result) mix
    policies that were trained with randomized scenes and others.

    Policies that were not trained, such as the expert, stand beside both.
    """
    known = {
        name: result.training
        for name, result in results.items()
        if isinstance(result, PhysicalResult) and result.protocol.conditions and result.training != "none"
    }
    if len({*known.values()}) > 1:
        sides = ", ".join(f"'{name}' is {TRAINING_LABELS[training]}" for name, training in known.items())
        raise ContractError(
            f"augmented and zero-shot results of a perturbed protocol are not compared, and {sides}; give "
            "--across-training (across_training=True) to compare them with labels"
        )


def compare_cells(
    first: EvaluationResult, second: EvaluationResult, *, across_training: bool = False
) -> dict[str, Difference]:
    """Return paired differences by phrasing of the instruction (physical) and by stratum.

    A stratum is one robot and task, one condition, or one kind of question. Raises like `compare`.
    """
    pairs = _pairs(first, second, across_training=across_training)
    parts: dict[str, list[Pair]] = {}
    for phrasing in ("seen", "held_out"):
        part = [pair for pair in pairs if pair[0].phrasing == phrasing]
        if 0 < len(part) < len(pairs):
            parts[f"wording {phrasing}"] = part
    for pair in pairs:
        parts.setdefault(pair[0].stratum, []).append(pair)
    return {name: _difference(part) for name, part in parts.items()}


def format_comparison(
    first: EvaluationResult,
    second: EvaluationResult,
    names: tuple[str, str] = ("A", "B"),
    *,
    across_training: bool = False,
) -> str:
    """Format a text table: overall, then in parts, with intervals. Raises like `compare`.

    The p-values of the parts are corrected for their number (Holm 1979, Scand. J. Statistics 6:65).
    """
    whole = compare(first, second, across_training=across_training)
    parts = compare_cells(first, second, across_training=across_training)
    corrected = holm([part.p_value for part in parts.values()])
    rows = [("all", whole, whole.p_value)]
    rows += [(name, part, p) for (name, part), p in zip(parts.items(), corrected, strict=True)]
    width = max(len(name) for name, _, _ in rows)
    lines = [
        f"A: {names[0]} (model {first.model}{_label(first)})",
        f"B: {names[1]} (model {second.model}{_label(second)})",
        f"{first.score} on the same {whole.n} items, protocol {first.protocol_hash}",
        "",
        f"{'':{width}}      n       A       B      A - B (95 % interval)  only A  only B  p",
    ]
    for name, part, p in rows:
        gap = f"{100 * part.difference:+.1f} ({100 * part.low:+.1f} to {100 * part.high:+.1f})"
        lines.append(
            f"{name:{width}}  {part.n:5d}  {100 * part.first:5.1f}%  {100 * part.second:5.1f}%  {gap:>25}"
            f"  {part.only_first:6d}  {part.only_second:6d}  {'-' if p is None else f'{p:.2g}'}"
        )
    tested = "p: McNemar's exact test; in all rows but the first corrected for their number (Holm)."
    clustered = "No p: items share scenes; the intervals are clustered by scene."
    return "\n".join([*lines, "", clustered if whole.p_value is None else tested])


def _label(result: EvaluationResult) -> str:
    """Return the label of a result's training under a perturbed protocol; empty elsewhere."""
    if not isinstance(result, PhysicalResult) or not result.protocol.conditions:
        return ""
    return f", {TRAINING_LABELS[result.training]}"


def _pairs(
    first: EvaluationResult,
    second: EvaluationResult,
    but: Collection[str] = (),
    across_training: bool = False,
) -> list[Pair]:
    for side in (first, second):
        if isinstance(side.protocol, PhysicalProtocol) and side.protocol.purpose != "evaluation":
            raise BlmError(
                f"the result of '{side.model}' is a {side.protocol.purpose}, which is not a score; "
                "compare evaluations on evaluation seeds"
            )
    ours, theirs = (
        {name: value for name, value in result.protocol.to_json().items() if name not in but}
        for result in (first, second)
    )
    require_equal(ours, theirs, _UNLIKE, "there")
    if not across_training:
        require_same_training({"the first": first, "the second": second})
    items = first.items()
    others = {item.id: item for item in second.items()}
    if len(others) != len(items):
        raise ContractError(f"{_UNLIKE}: {len(items)} items here, {len(others)} there")
    pairs = []
    for item in items:
        other = others.get(item.id)
        if other is None or item.scene != other.scene:
            there = None if other is None else other.scene
            raise ContractError(
                f"item '{item.id}' started from another scene ({item.scene} here, {there} there), or is "
                "missing; evaluate again"
            )
        pairs.append((item, other))
    return pairs


def _difference(pairs: Sequence[Pair]) -> Difference:
    names = [item.group for item, _ in pairs if item.group is not None]
    groups = names if len(set(names)) < len(names) else None
    return paired_difference([a.score for a, _ in pairs], [b.score for _, b in pairs], groups)
