"""One seam for long work: run keyed units over worker processes or a Ray cluster, resumably.

A unit is a key and a picklable payload. Results are small JSON-able dicts appended to a journal, one line
per finished unit, so a killed run continues where it stopped. Heavy products (episodes, feature shards) are
written by the unit itself, atomically, before it returns; a unit that runs twice changes nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import platform
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blm.types import BlmError, lookup

Result = dict[str, Any]
ATTEMPTS = 3
"""How often a unit may cost a worker its life before the run gives up."""
START_SECONDS = 600.0
"""How long to wait for the first worker of a Ray cluster; one that grows on demand takes minutes."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_ONE_THREAD = dict.fromkeys(_THREAD_VARIABLES, "1")
"""For workers: two busy two-thread processes on two cores stall both."""
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Unit:
    """One idempotent piece of work."""

    key: str
    payload: Any


@dataclass(frozen=True)
class _Job:
    """What every worker must know."""

    work: Callable[[Any], Result]
    setup: Callable[..., None] | None
    setup_args: tuple[Any, ...]
    workers: int
    folder: Path
    """Absolute folder of the journal, and beside it, of what the units write."""

    def begin(self) -> None:
        if self.setup is not None:
            self.setup(*self.setup_args)


_Runs = Generator[tuple[str, Result], None, None]


def run_units(
    work: Callable[[Any], Result],
    units: Sequence[Unit],
    *,
    journal: Path,
    workers: int = 2,
    title: str = "working",
    setup: Callable[..., None] | None = None,
    setup_args: tuple[Any, ...] = (),
    engine: str = "local",
) -> dict[str, Result]:
    """Run `work(payload)` for every unit that the journal lacks; return key -> result for all of them.

    `work` and `setup` are module-level functions; `setup` runs once in each worker. With `workers=0`
    everything runs in this process. A worker that dies (out of memory, kill -9, a lost node) is replaced and
    its unit runs again, ATTEMPTS times at most; an exception raised by `work` stops the run with the unit's
    key. What had finished is in the journal, which only this process writes, a line in full or not at all.

    Engine "local" spawns processes. "ray" uses the Ray cluster that RAY_ADDRESS names, or else the one that
    `ray start` made on this machine, or else starts one here for the time of the run; every worker takes one
    CPU of it. All nodes need this package, and must share the folder of the journal and every folder that
    units write to.

    Raises BlmError for duplicate keys, a unit that keeps killing workers, and a journal that another run is
    using or that cannot be written; UnknownNameError for another engine.
    """
    run = lookup("engine", engine, ENGINES)
    if len({unit.key for unit in units}) != len(units):
        raise BlmError("work units have duplicate keys; a key must name one piece of work")
    with _appending(journal) as append:
        finished = read_journal(journal)
        todo = [unit for unit in units if unit.key not in finished]
        job = _Job(work, setup, setup_args, workers, journal.parent.resolve())
        with (
            _progress(title, total=len(units), done=len(units) - len(todo)) as advance,
            closing(
                (run if workers else _inline)(job, todo)
            ) as results,  # ends the workers, whatever happens
        ):
            for key, result in results:
                append(key, result)
                finished[key] = result
                advance()
    return {unit.key: finished[unit.key] for unit in units}


# --- the journal --------------------------------------------------------------------------------------------


def read_journal(journal: Path) -> dict[str, Result]:
    """Return the finished units of a journal; a last line cut short by a kill is removed from the file.

    Raises BlmError for a line that is not one of ours.
    """
    if not journal.exists():
        return {}
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(journal, whole)  # in place: it must also work on a full disk
    try:
        rows = [json.loads(line) for line in data[:whole].splitlines()]
        return {row["key"]: row["result"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise BlmError(
            f"journal '{journal}' is damaged ({error}); delete it, and all of its units run again"
        ) from error


@contextmanager
def _appending(journal: Path) -> Iterator[Callable[[str, Result], None]]:
    """Hold the journal for this process; yield a function that appends one line in full or not at all."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        log = journal.open("ab", buffering=0)
    except OSError as error:
        raise BlmError(
            f"cannot write the journal '{journal}': {error.strerror}; choose a folder that you may write to"
        ) from error

    def append(key: str, result: Result) -> None:
        line = (json.dumps({"key": key, "result": result}) + "\n").encode()
        size = os.fstat(log.fileno()).st_size
        try:
            while line:  # a disk that is nearly full takes a part
                line = line[log.write(line) :]
        except OSError as error:
            with suppress(OSError):
                log.truncate(size)
            raise BlmError(
                f"cannot write to the journal '{journal}': {error.strerror}; what is finished is kept "
                "in it: make room, and the same command continues there"
            ) from error

    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlmError(
                f"another run is using the journal '{journal}'; wait for its end, or use another folder"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        yield append


@contextmanager
def _progress(title: str, *, total: int, done: int) -> Iterator[Callable[[], None]]:
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)


# --- in this process, and in processes of this machine ------------------------------------------------------


def _inline(job: _Job, units: Sequence[Unit]) -> _Runs:
    job.begin()
    for unit in units:
        try:
            result = job.work(unit.payload)
        except Exception as error:
            raise _named(f"work unit '{unit.key}'", error) from error
        yield unit.key, result


def _named(what: str, error: Exception) -> Exception:
    """The error of one unit with its key; what a user can mend is a BlmError."""
    mendable = isinstance(error, BlmError) or (isinstance(error, OSError) and error.errno in _MENDABLE)
    return (BlmError if mendable else RuntimeError)(f"{what} failed: {error}")


def _local(job: _Job, units: Sequence[Unit]) -> _Runs:
    todo = list(units)
    deaths = 0
    while todo:
        pending = {unit.key: unit for unit in todo}
        try:
            with (
                _environment(_ONE_THREAD),
                ProcessPoolExecutor(
                    min(job.workers, len(todo)), multiprocessing.get_context("spawn"), _begin_process, (job,)
                ) as pool,
            ):
                futures: dict[Future[Result], Unit] = {pool.submit(job.work, u.payload): u for u in todo}
                try:
                    for future in as_completed(futures):
                        unit = futures[future]
                        try:
                            result = future.result()
                        except BrokenProcessPool:
                            raise
                        except Exception as error:
                            raise _named(f"work unit '{unit.key}'", error) from error
                        del pending[unit.key]
                        yield unit.key, result
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool as error:
            deaths = deaths + 1 if len(pending) == len(todo) else 1
            if deaths >= ATTEMPTS:
                raise BlmError(
                    f"worker processes died {deaths} times in a row with none of {len(pending)} units "
                    f"finished (first: '{next(iter(pending))}'); check memory, or run with workers=0"
                ) from error
        todo = list(pending.values())


def _begin_process(job: _Job) -> None:
    """Set up a worker process that ends with its parent: one left by kill -9 would wait for ever."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.begin()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that start meanwhile: they inherit them."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- on a Ray cluster ---------------------------------------------------------------------------------------


class _RayWorker:
    """One actor: set up once, then one unit after another."""

    def begin(self, job: _Job, working_folder: str) -> None:
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


def _ray(job: _Job, units: Sequence[Unit]) -> _Runs:
    """Hand out units one at a time to actors that are ready; who has none yet holds up nothing."""
    if not units:
        return
    with _ray_cluster(job.workers) as ray:
        lost = ray.exceptions.RayError  # of these, RayTaskError comes from the work, the rest from machines
        options = {"num_cpus": 1, "runtime_env": {"env_vars": _ONE_THREAD}}
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
                    raise _named(what, error.cause) from error
                except lost as error:
                    ray.kill(actor)  # it may be alive where it cannot be reached
                    deaths[what] += 1
                    if deaths[what] >= ATTEMPTS:
                        raise BlmError(
                            f"{what} cost {deaths[what]} Ray workers their lives; check memory and nodes"
                        ) from error
                    if unit:
                        todo.appendleft(unit)
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
        with _environment({"RAY_USAGE_STATS_ENABLED": "0"}):
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


ENGINES: dict[str, Callable[[_Job, Sequence[Unit]], _Runs]] = {"local": _local, "ray": _ray}
