"""Episodes -> success rates with intervals, overall, by phrasing, and by robot and task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from blm.evaluation.physical.outcome import REASONS
from blm.evaluation.physical.result import CellSummary, EpisodeResult, PhysicalSummary, SuccessSummary
from blm.evaluation.statistics import success_rate


def summarise(episodes: Sequence[EpisodeResult]) -> PhysicalSummary:
    """Summarise the episodes of a result; cells are in the episodes' order."""
    cells: dict[tuple[str, str], list[EpisodeResult]] = {}
    for episode in episodes:
        cells.setdefault((episode.robot, episode.task), []).append(episode)
    return PhysicalSummary(
        overall=_success_summary(episodes),
        phrasings=_by_phrasing(episodes),
        cells=tuple(
            CellSummary(robot, task, _success_summary(part), _by_phrasing(part))
            for (robot, task), part in cells.items()
        ),
    )


def _by_phrasing(episodes: Sequence[EpisodeResult]) -> dict[str, SuccessSummary]:
    parts = {
        name: [episode for episode in episodes if episode.phrasing == name] for name in ("seen", "held_out")
    }
    return {name: _success_summary(part) for name, part in parts.items() if part}


def _success_summary(episodes: Sequence[EpisodeResult]) -> SuccessSummary:
    reasons = Counter(episode.reason for episode in episodes)
    at_limit = [episode.success_at_limit for episode in episodes if episode.success_at_limit is not None]
    return SuccessSummary(
        n=len(episodes),
        success_once=success_rate([episode.success_once for episode in episodes]),
        success_at_end=success_rate([episode.success_at_end for episode in episodes]),
        success_at_limit=success_rate(at_limit) if len(at_limit) == len(episodes) else None,
        reasons={reason: reasons[reason] for reason in REASONS},
        act_ms=float(np.median([episode.act_ms for episode in episodes])),
    )
