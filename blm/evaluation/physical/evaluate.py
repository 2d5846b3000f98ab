"""Closed-loop evaluation of any `Policy`: a checkpoint, a server, a reference policy, the expert."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from blm.evaluation.physical.episode import PrivilegedPolicy, close, run_episode, set_up, tear_down
from blm.evaluation.physical.policy_host import ActsInBatches, HostedPolicy, PolicyHost
from blm.evaluation.physical.result import EpisodeResult, Execution, PhysicalResult, SharedPolicy
from blm.evaluation.physical.summary import summarise
from blm.evaluation.protocol import PhysicalProtocol, digest, protocol_hash
from blm.evaluation.result_files import require_free, write_result
from blm.evaluation.results import this_machine
from blm.jobs import WorkUnit, run_units
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

    `make_policy` is picklable; it is called here, to compare contracts. By default, a policy that
    has `act_batch` and a `device` other than "cpu" stays in this process and answers all local
    workers, up to `max_batch` observations in one call. Other policies are created once in each
    worker, which is twice as fast on a CPU. `share_policy` overrides this choice; True also shares
    a policy without `act_batch`, which is then called once for each observation. max_batch=1 makes
    results independent of batching. A measured latency forbids batches. Privileged policies and
    engine "ray" need a policy in each worker.

    A killed run resumes from `out`/journal.jsonl. Raises ContractError when the policy does not fit
    the protocol, and BlmError when `out` belongs to another program or may belong to another
    policy.
    """
    start = time.monotonic()
    with ExitStack() as stack:
        policy = make_policy()
        stack.callback(close, policy)
        contract = _require_accepted(policy, protocol, out)
        host: PolicyHost | None = None
        if _is_shared(policy, share_policy, possible=workers > 0 and engine == "local"):
            size = 1 if protocol.latency == "measured" else max_batch
            host = stack.enter_context(PolicyHost(policy, max_batch=size))
            make_policy = partial(HostedPolicy, *host.connection_info)
        else:
            close(policy)
        stack.callback(tear_down)  # with 0 workers, the episodes ran in this process
        results = run_units(
            run_episode,
            _units(protocol, _run_key(protocol, contract), videos_per_cell),
            journal=out / "journal.jsonl",
            workers=workers,
            title="episodes",
            setup=set_up,
            setup_args=(make_policy, protocol, out.resolve()),
            engine=engine,
        )
    episodes = [EpisodeResult.from_json(row) for row in results.values()]
    result = PhysicalResult(
        protocol=protocol,
        machine=this_machine(rendering=gl_backend()),
        seconds=time.monotonic() - start,
        model=contract.revision or "unnamed",
        training=contract.training,
        summary=summarise(episodes),
        execution=_execution(episodes, workers, host.served if host else None),
        episodes=tuple(episodes),
    )
    return write_result(out, result)


def _execution(
    episodes: Sequence[EpisodeResult], workers: int, shared_policy: SharedPolicy | None
) -> Execution:
    return Execution(
        workers=workers,
        shared_policy=shared_policy,
        seconds_policy=sum(episode.seconds_policy for episode in episodes),
        seconds_physics=sum(episode.seconds_physics for episode in episodes),
        seconds_rendering=sum(episode.seconds_rendering for episode in episodes),
    )


def _run_key(protocol: PhysicalProtocol, contract: PolicyContract) -> str:
    """Return the key of a run's journaled episodes: row version, protocol, whole contract."""
    return f"{ROWS}/{protocol_hash(protocol)}/{digest(contract.to_json())}"


def _require_accepted(policy: Policy, protocol: PhysicalProtocol, out: Path) -> PolicyContract:
    """Return the contract of a policy that fits the protocol and may resume the run in `out`.

    Raises ContractError for a policy that does not fit, and BlmError when `out` belongs to another
    program, or when the policy has no revision that shows whether journaled episodes are its own.
    """
    contract = policy.contract
    protocol.require_fits(contract)
    require_free(out)
    journal = out / "journal.jsonl"
    if not contract.revision and journal.exists():
        raise BlmError(
            f"'{journal}' holds episodes, and this policy has no revision in its contract that tells whether "
            "they are its own: choose another folder, or name the model of a server each time (--server-name)"
        )
    return contract


def _is_shared(policy: Policy, wanted: bool | None, *, possible: bool) -> bool:
    """Return whether one policy answers all workers.

    Raises BlmError for settings that require it and do not allow it.
    """
    possible = possible and not isinstance(policy, PrivilegedPolicy)
    if wanted and not possible:
        raise BlmError(
            "share_policy needs workers, engine 'local', and a policy that does not see the simulator"
        )
    accelerated = getattr(policy, "device", "cpu") != "cpu"
    return possible and (isinstance(policy, ActsInBatches) and accelerated if wanted is None else wanted)


def _units(protocol: PhysicalProtocol, run: str, videos_per_cell: int) -> list[WorkUnit]:
    """Return one unit per episode; the first `videos_per_cell` of each cell record videos."""
    seen: Counter[tuple[str, str]] = Counter()
    units = []
    for key in protocol.keys:
        film = seen[key.robot, key.task] < videos_per_cell
        seen[key.robot, key.task] += 1
        units.append(WorkUnit(f"{run}/{videos_per_cell}/{key.id}", (key, film)))
    return units
