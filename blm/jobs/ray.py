"""Units on a Ray cluster: one actor a worker, which gets one unit after another."""

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

from blm.jobs.unit import ONE_THREAD, Job, Lost, Result, Runs, Unit, environment, named
from blm.types import BlmError

START_SECONDS = 600.0
"""How long to wait for the first worker of a Ray cluster; one that grows on demand takes minutes."""


class _RayWorker:
    """One actor: set up once, then one unit after another."""

    def begin(self, job: Job, working_folder: str) -> None:
        if not job.folder.is_dir():
            raise BlmError(
                f"node '{platform.node()}' has no folder '{job.folder}'; all nodes must share the run folder"
            )
        if Path(working_folder).is_dir():
            os.chdir(working_folder)  # paths in payloads may be relative
        self.job = job
        job.begin()

    def run(self, payload: Any) -> Result:
        return self.job.work(payload)


def run_on_ray(job: Job, units: Sequence[Unit]) -> Runs:
    """Hand out units one at a time to actors that are ready; who has none yet holds up nothing."""
    if not units:
        return
    with _ray_cluster(job.workers) as ray:
        lost = ray.exceptions.RayError  # of these, RayTaskError comes from the work, the rest from machines
        options = {"num_cpus": 1, "runtime_env": {"env_vars": ONE_THREAD}}
        actor_class = ray.remote(**options)(_RayWorker)
        todo, left, deaths = deque(units), len(units), Counter[str]()
        running: dict[Any, tuple[Any, Unit | None]] = {}  # future -> actor, and its unit unless it begins
        begun = False

        def hire() -> None:
            actor = actor_class.remote()
            running[actor.begin.remote(job, str(Path.cwd()))] = actor, None

        try:
            for _ in range(min(job.workers, left)):
                hire()
            while left:
                ready, _ = ray.wait(list(running), timeout=None if begun else START_SECONDS)
                if not ready:
                    raise BlmError(f"no Ray worker started in {START_SECONDS:.0f} s; {_free(ray)}")
                actor, unit = running.pop(ready[0])
                what = f"work unit '{unit.key}'" if unit else "the set-up of a worker"
                try:
                    result = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    raise named(what, error.cause) from error
                except lost as error:
                    ray.kill(actor)  # it may be alive where it cannot be reached
                    deaths[what] += 1
                    if deaths[what] >= job.attempts:
                        if unit is None:
                            raise BlmError(
                                f"{what} cost {deaths[what]} Ray workers their lives; check memory and nodes"
                            ) from error
                        left -= 1
                        yield unit.key, Lost(f"it cost {deaths[what]} Ray workers their lives")
                    elif unit:
                        todo.append(unit)  # last: what others can finish is finished first
                    if left:
                        hire()
                    continue
                begun, deaths[what] = True, 0
                if unit:
                    left -= 1
                    yield unit.key, result
                if todo:
                    unit = todo.popleft()
                    running[actor.run.remote(unit.payload)] = actor, unit
        finally:
            for actor, _ in running.values():
                ray.kill(actor)


def _free(ray: Any) -> str:
    have, free = (resources().get("CPU", 0) for resources in (ray.cluster_resources, ray.available_resources))
    return f"the cluster has {have:g} CPUs, {free:g} of them free, and each worker needs one"


@contextmanager
def _ray_cluster(workers: int) -> Iterator[Any]:
    """Yield the module `ray`, connected; at the end leave the cluster, or stop it if it was started here."""
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
        with environment({"RAY_USAGE_STATS_ENABLED": "0"}):
            try:
                ray.init(num_cpus=workers, include_dashboard=False, **quiet)
            except ValueError:  # so it refuses a number of CPUs where a cluster is running
                ray.init(**quiet)
    except ConnectionError as error:
        raise BlmError(
            f"cannot reach the Ray cluster: {error}; start it with `ray start --head`, set RAY_ADDRESS to "
            "where it is, or to 'local' for one on this machine"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise BlmError if nothing listens at "host:port": Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise BlmError(f"no Ray cluster answers at RAY_ADDRESS '{address}': {error}") from error
