"""Closed-loop evaluation of any `Policy`: our checkpoint, a socket, a baseline, an expert."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blm.evaluation.physical.episode import Privileged, close, run_episode, set_up, tear_down
from blm.evaluation.physical.outcome import REASONS
from blm.evaluation.physical.policy_host import ActsInBatches, HostedPolicy, PolicyHost
from blm.evaluation.protocol import PhysicalProtocol, digest, protocol_hash
from blm.evaluation.results import TIMES, machine, require_free, write_result
from blm.evaluation.statistics import success_rate
from blm.jobs import WorkUnit, run_units
from blm.tasks import gl_backend
from blm.types import BlmError, Policy, PolicyContract

SCORES = ("success_once", "success_at_end")
"""Judged in every episode; success_at_limit is judged in those of evaluations."""
ROWS = "rows 2"
"""Version of a row's fields; episodes that another version journaled are driven again."""


def evaluate_physical(
    make_policy: Callable[[], Policy],
    protocol: PhysicalProtocol,
    out: Path,
    *,
    workers: int = 2,
    videos_per_cell: int = 1,
    engine: str = "local",
    share_policy: bool | None = None,
    max_batch: int = 64,
) -> dict[str, Any]:
    """Run every episode of the protocol; write `out`/result.json and videos; return the result.

    `make_policy` is picklable; it is called here, to compare contracts. By default a policy that has
    `act_batch` and a `device` other than "cpu" stays in this process and answers all local workers, up to
    `max_batch` observations in one call; others are made once in each worker, on a CPU twice as fast.
    `share_policy` decides otherwise: True asks one that has no `act_batch` observation by observation. A
    policy whose batches round differently from single calls gives the same bits every time with max_batch=1.
    Under a measured latency nobody shares a call. Policies that look into the simulator (`Privileged`), and
    engine "ray", need one in each worker. A killed run continues from `out`/journal.jsonl.
    Raises ContractError when the policy does not fit the protocol.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        policy = make_policy()
        stack.callback(close, policy)
        contract = _accepted(policy, protocol, out)
        host: PolicyHost | None = None
        if _shared(policy, share_policy, possible=workers > 0 and engine == "local"):
            size = 1 if protocol.latency == "measured" else max_batch
            host = stack.enter_context(PolicyHost(policy, max_batch=size))
            make_policy = partial(HostedPolicy, *host.door)
        else:
            close(policy)
        stack.callback(tear_down)  # of this process, when workers is 0
        results = run_units(
            run_episode,
            _units(protocol, _run_of(protocol, contract), videos_per_cell),
            journal=out / "journal.jsonl",
            workers=workers,
            title="episodes",
            setup=set_up,
            setup_args=(make_policy, protocol, out.resolve()),
            engine=engine,
        )
    rows = list(results.values())
    return write_result(
        out,
        protocol,
        start,
        kind="physical",
        score="success_once",
        model=contract.revision or "unnamed",
        workers=workers,
        **summarise(rows),
        machine={**machine(), "rendering": gl_backend()},
        shared_policy=host.served if host else None,
        **{name: sum(row[name] for row in rows) for name in TIMES if name.startswith("seconds")},
        rows=rows,
    )


def _run_of(protocol: PhysicalProtocol, contract: PolicyContract) -> str:
    """What episodes in a journal share that are of one run: their form, the protocol, the whole contract."""
    return f"{ROWS}/{protocol_hash(protocol)}/{digest(contract.to_json())}"


def _accepted(policy: Policy, protocol: PhysicalProtocol, out: Path) -> PolicyContract:
    """Return the contract of a policy that fits the protocol, and that may go on with what is in `out`.

    Raises BlmError when nobody can tell whether that is this program's, and this policy's own.
    """
    contract = policy.contract
    protocol.require_fits(contract)
    require_free(out)
    journal = out / "journal.jsonl"
    if not contract.revision and journal.exists():
        raise BlmError(
            f"'{journal}' holds episodes, and this policy has no revision in its contract to tell whether "
            "they are its own: choose another folder, or name the model of a server each time (--server-name)"
        )
    return contract


def _shared(policy: Policy, wanted: bool | None, *, possible: bool) -> bool:
    """Whether one policy answers all workers. Raises BlmError where that is wanted and cannot be."""
    possible = possible and not isinstance(policy, Privileged)
    if wanted and not possible:
        raise BlmError(
            "share_policy needs workers, engine 'local', and a policy that does not see the simulator"
        )
    accelerated = getattr(policy, "device", "cpu") != "cpu"
    return possible and (isinstance(policy, ActsInBatches) and accelerated if wanted is None else wanted)


def _units(protocol: PhysicalProtocol, run: str, videos_per_cell: int) -> list[WorkUnit]:
    """One unit an episode; the first `videos_per_cell` of each cell are filmed."""
    seen: Counter[tuple[str, str]] = Counter()
    units = []
    for robot, task, seed in protocol.scenes:
        film = seen[robot, task] < videos_per_cell
        seen[robot, task] += 1
        units.append(WorkUnit(f"{run}/{videos_per_cell}/{robot}/{task}/{seed}", (robot, task, seed, film)))
    return units


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a result says about its rows: "overall", "phrasings" and "cells", which are in the rows' order."""
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["robot"], row["task"]), []).append(row)
    cells = [
        {"robot": robot, "task": task, **_summary(part), "phrasings": _by_phrasing(part)}
        for (robot, task), part in parts.items()
    ]
    return {"overall": _summary(rows), "phrasings": _by_phrasing(rows), "cells": cells}


def _by_phrasing(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    of = {name: [row for row in rows if row["phrasing"] == name] for name in ("seen", "held_out")}
    return {name: _summary(part) for name, part in of.items() if part}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rates with Wilson's intervals, failures by reason, and the median time of a decision.

    The rate at the step limit is left out where episodes ended after their success: it was not measured.
    """
    rates = {score: asdict(success_rate([row[score] for row in rows])) for score in SCORES}
    reasons = Counter(row["reason"] for row in rows)
    if all(row.get("success_at_limit") is not None for row in rows):
        rates["success_at_limit"] = asdict(success_rate([row["success_at_limit"] for row in rows]))
    return {
        "n": len(rows),
        **rates,
        "reasons": {reason: reasons[reason] for reason in REASONS},
        "act_ms": float(np.median([row["act_ms"] for row in rows])),
    }
