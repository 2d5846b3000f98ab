"""Closed-loop evaluation of any `Policy`: our checkpoint, a socket, a baseline, an expert."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from blm.evaluation.physical.episode import Privileged, close, run_episode, set_up, tear_down
from blm.evaluation.physical.policy_host import ActsInBatches, HostedPolicy, PolicyHost
from blm.evaluation.physical.result import EpisodeResult, Execution, PhysicalResult
from blm.evaluation.physical.summary import summarise
from blm.evaluation.protocol import PhysicalProtocol, digest, protocol_hash
from blm.evaluation.result_files import require_free, write_result
from blm.evaluation.results import this_machine
from blm.jobs import Unit, run_units
from blm.tasks import gl_backend
from blm.types import BlmError, Policy, PolicyContract

ROWS = "rows 2"
"""Version of `EpisodeResult`; journaled episodes of another version are run again."""


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
) -> PhysicalResult:
    """Run every episode of the protocol; write `out`/result.json and videos; return the result.

    `make_policy` is picklable; it is called here, to compare contracts. By default a policy that
    has `act_batch` and a `device` other than "cpu" stays in this process and answers all local
    workers, up to `max_batch` observations in one call; others are made once in each worker, on a
    CPU twice as fast. `share_policy` decides otherwise: True asks one that has no `act_batch`
    observation by observation. A policy whose batches round differently from single calls gives the
    same bits every time with max_batch=1. Under a measured latency nobody shares a call. Policies
    that look into the simulator (`Privileged`), and engine "ray", need one in each worker. A killed
    run continues from `out`/journal.jsonl. Raises ContractError when the policy does not fit the
    protocol.
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
    episodes = tuple(EpisodeResult.from_json(row) for row in results.values())
    execution = Execution(
        workers=workers,
        shared_policy=host.served if host else None,
        seconds_policy=sum(episode.seconds_policy for episode in episodes),
        seconds_physics=sum(episode.seconds_physics for episode in episodes),
        seconds_rendering=sum(episode.seconds_rendering for episode in episodes),
    )
    result = PhysicalResult(
        protocol=protocol,
        machine=this_machine(rendering=gl_backend()),
        seconds=time.monotonic() - start,
        model=contract.revision or "unnamed",
        summary=summarise(episodes),
        execution=execution,
        episodes=episodes,
    )
    return write_result(out, result)


def _run_of(protocol: PhysicalProtocol, contract: PolicyContract) -> str:
    """What episodes in a journal share that are of one run: their form, the protocol, the whole
    contract.
    """
    return f"{ROWS}/{protocol_hash(protocol)}/{digest(contract.to_json())}"


def _accepted(policy: Policy, protocol: PhysicalProtocol, out: Path) -> PolicyContract:
    """Return the contract of a policy that fits the protocol, and that may go on with what is in
    `out`.

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


def _units(protocol: PhysicalProtocol, run: str, videos_per_cell: int) -> list[Unit]:
    """One unit an episode; the first `videos_per_cell` of each cell are filmed."""
    seen: Counter[tuple[str, str]] = Counter()
    units = []
    for robot, task, seed in protocol.scenes:
        film = seen[robot, task] < videos_per_cell
        seen[robot, task] += 1
        units.append(Unit(f"{run}/{videos_per_cell}/{robot}/{task}/{seed}", (robot, task, seed, film)))
    return units
