"""Episodes -> success rates with intervals: overall, by phrasing, robot and task, and by condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from blm.evaluation.conditions import PLAIN, Condition, chance
from blm.evaluation.physical.outcome import REASONS
from blm.evaluation.physical.perturbed import AxisSummary, ConditionSummary, PerturbedSummary
from blm.evaluation.physical.result import CellSummary, EpisodeResult, PhysicalSummary
from blm.evaluation.physical.success import SuccessSummary
from blm.evaluation.statistics import Difference, Rate, paired_difference, success_rate


def summarise(episodes: Sequence[EpisodeResult]) -> PhysicalSummary:
    """Summarise the episodes of a result; cells are in the episodes' order.

    Raises BlmError if there is no plain episode.
    """
    plain = [episode for episode in episodes if episode.condition == PLAIN]
    cells: dict[tuple[str, str], list[EpisodeResult]] = {}
    for episode in plain:
        cells.setdefault((episode.robot, episode.task), []).append(episode)
    return PhysicalSummary(
        overall=_success_summary(plain),
        phrasings=_by_phrasing(plain),
        cells=tuple(
            CellSummary(robot, task, _success_summary(part), _by_phrasing(part))
            for (robot, task), part in cells.items()
        ),
        perturbed=_summarise_perturbed(episodes, plain) if len(plain) < len(episodes) else None,
    )


def _summarise_perturbed(
    episodes: Sequence[EpisodeResult], plain: Sequence[EpisodeResult]
) -> PerturbedSummary:
    """Summarise the perturbed episodes.

    The headline is the unweighted mean of the axes. One scene is run under several axes, so its
    outcomes are correlated: the interval is stratified by axis and clustered by scene (see
    `success_rate`), in place of a bootstrap, which is degenerate at 0 and 100 %.
    """
    twins = {episode.id: episode for episode in plain}
    parts: dict[Condition, list[EpisodeResult]] = {}
    for episode in episodes:
        if episode.condition != PLAIN:
            parts.setdefault(episode.condition, []).append(episode)
    summaries = [
        ConditionSummary(condition=condition, summary=_success_summary(part), drop=_drop(part, twins))
        for condition, part in parts.items()
    ]
    graded = [episode for condition, part in parts.items() if condition.is_graded for episode in part]
    scenes, axes = [one.twin for one in graded], [one.condition.axis for one in graded]
    odds = chance({episode.task for episode in plain})
    return PerturbedSummary(
        mean_of_axes=success_rate([e.success_once for e in graded], scenes, axes) if graded else None,
        drop=_drop(graded, twins) if graded else None,
        axes=tuple(_axis_summary(axis, graded, twins, summaries) for axis in dict.fromkeys(axes)),
        dynamics=tuple(one for one in summaries if one.condition.axis == "dynamics"),
        controls=tuple(one for one in summaries if one.condition.is_control),
        chance=odds,
        wrong_object=None if odds is None else _success_summary(plain).failed_for("wrong_object"),
    )


def _axis_summary(
    axis: str,
    graded: Sequence[EpisodeResult],
    twins: Mapping[str, EpisodeResult],
    summaries: Sequence[ConditionSummary],
) -> AxisSummary:
    mine = [episode for episode in graded if episode.condition.axis == axis]
    return AxisSummary(
        axis=axis,
        success=success_rate([episode.success_once for episode in mine]),
        drop=_drop(mine, twins),
        levels=tuple(one for one in summaries if one.condition.axis == axis),
    )


def _drop(perturbed: Sequence[EpisodeResult], twins: Mapping[str, EpisodeResult]) -> Difference:
    """Return success of perturbed episodes minus that of their twins, clustered by scene if it recurs."""
    scenes = [episode.twin for episode in perturbed]
    pairs = [(float(one.success_once), float(twins[one.twin].success_once)) for one in perturbed]
    first, second = zip(*pairs, strict=True)
    return paired_difference(first, second, scenes if len({*scenes}) < len(scenes) else None)


def _by_phrasing(episodes: Sequence[EpisodeResult]) -> dict[str, SuccessSummary]:
    parts = {
        name: [episode for episode in episodes if episode.phrasing == name] for name in ("seen", "held_out")
    }
    return {name: _success_summary(part) for name, part in parts.items() if part}


def _rate_if_measured(successes: Sequence[bool | None]) -> Rate | None:
    """Return the rate, or None if it was not measured in every episode."""
    measured = [success for success in successes if success is not None]
    return success_rate(measured) if len(measured) == len(successes) else None


def _success_summary(episodes: Sequence[EpisodeResult]) -> SuccessSummary:
    reasons = Counter(episode.reason for episode in episodes)
    return SuccessSummary(
        n=len(episodes),
        success_once=success_rate([episode.success_once for episode in episodes]),
        success_at_end=success_rate([episode.success_at_end for episode in episodes]),
        success_strict=_rate_if_measured([episode.success_strict for episode in episodes]),
        success_at_limit=_rate_if_measured([episode.success_at_limit for episode in episodes]),
        reasons={reason: reasons[reason] for reason in REASONS},
        act_ms=float(np.median([episode.act_ms for episode in episodes])),
    )
