"""Run work units on a Ray cluster: one actor per worker, one unit at a time."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blm.jobs.unit import (
    ONE_THREAD,
    FailedUnit,
    JobSpec,
    Result,
    UnitResults,
    WorkUnit,
    describe_failure,
    environment_variables,
)
from blm.types import BlmError

START_SECONDS = 600.0
"""Time to wait for the first worker [s]; a cluster that scales on demand takes minutes."""


class _RayWorker:
    """A Ray actor that is set up once and then runs one unit at a time."""

    def set_up(self, job: JobSpec, working_folder: str) -> None:
        if not job.folder.is_dir():
            raise BlmError(
                f"node '{platform.node()}' has no folder '{job.folder}'; all nodes must share the run folder"
            )
        if Path(working_folder).is_dir():
            os.chdir(working_folder)  # paths in payloads may be relative
        self.job = job
        job.set_up()

    def run(self, payload: Any) -> Result:
        return self.job.work(payload)


def run_on_ray(job: JobSpec, units: Sequence[WorkUnit]) -> UnitResults:
    """Run units on Ray actors, one at a time each; actors that are not ready yet delay nothing."""
    if not units:
        return
    with _ray_cluster(job.workers) as ray:
        # Of Ray's errors, RayTaskError is raised by the work function, the others by machines.
        worker_lost = ray.exceptions.RayError
        options = {"num_cpus": 1, "runtime_env": {"env_vars": ONE_THREAD}}
        actor_class = ray.remote(**options)(_RayWorker)
        pending = deque(units)
        left = len(units)
        deaths = Counter[str]()
        running: dict[Any, tuple[Any, WorkUnit | None]] = {}  # future -> actor, unit (None: set-up)
        started = False

        def start_worker() -> None:
            actor = actor_class.remote()
            running[actor.set_up.remote(job, str(Path.cwd()))] = actor, None

        try:
            for _ in range(min(job.workers, left)):
                start_worker()
            while left:
                ready, _ = ray.wait(list(running), timeout=None if started else START_SECONDS)
                if not ready:
                    raise BlmError(f"no Ray worker started in {START_SECONDS:.0f} s; {_describe_cpus(ray)}")
                actor, unit = running.pop(ready[0])
                what = f"work unit '{unit.key}'" if unit else "the set-up of a worker"
                try:
                    result = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    raise describe_failure(what, error.cause) from error
                except worker_lost as error:
                    ray.kill(actor)  # it may be alive but unreachable
                    deaths[what] += 1
                    if deaths[what] >= job.attempts:
                        if unit is None:
                            raise BlmError(
                                f"{what} failed: it killed {deaths[what]} Ray workers; check memory and nodes"
                            ) from error
                        left -= 1
                        yield unit.key, FailedUnit(f"it cost {deaths[what]} Ray workers their lives")
                    elif unit:
                        pending.append(unit)  # to the end of the queue: the other units go first
                    if left:
                        start_worker()
                    continue
                started = True
                deaths[what] = 0
                if unit:
                    left -= 1
                    yield unit.key, result
                if pending:
                    unit = pending.popleft()
                    running[actor.run.remote(unit.payload)] = actor, unit
        finally:
            for actor, _ in running.values():
                ray.kill(actor)


def _describe_cpus(ray: Any) -> str:
    have, free = (resources().get("CPU", 0) for resources in (ray.cluster_resources, ray.available_resources))
    return f"the cluster has {have:g} CPUs, {free:g} of them free, and each worker needs one"


@contextmanager
def _ray_cluster(workers: int) -> Iterator[Any]:
    """Connect to a Ray cluster and yield the module `ray`.

    On exit, disconnect; a cluster that was started here is stopped.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise BlmError("Ray is not installed; run: pip install 'blm[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    try:
        with environment_variables({"RAY_USAGE_STATS_ENABLED": "0"}):
            try:
                ray.init(num_cpus=workers, include_dashboard=False, **quiet)
            except ValueError:  # a running cluster refuses a number of CPUs
                ray.init(**quiet)
    except ConnectionError as error:
        raise BlmError(
            f"cannot reach the Ray cluster: {error}; start it with `ray start --head`, or set RAY_ADDRESS to "
            "its address, or to 'local' for a cluster on this machine"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise BlmError if nothing listens at "host:port"; Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise BlmError(f"no Ray cluster answers at RAY_ADDRESS '{address}': {error}") from error
