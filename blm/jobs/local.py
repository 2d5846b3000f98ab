"""Run work units in this process, or in worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from multiprocessing.reduction import ForkingPickler
from typing import Any

from blm.jobs.unit import (
    ONE_THREAD,
    FailedUnit,
    JobSpec,
    UnitResults,
    WorkUnit,
    describe_failure,
    environment_variables,
)
from blm.types import BlmError

END_SECONDS = 30.0
"""Time that a worker process has to exit by itself [s]."""


def run_inline(job: JobSpec, units: Sequence[WorkUnit]) -> UnitResults:
    """Run all units in this process. An exception of a unit is raised with the unit's key."""
    job.set_up()
    for unit in units:
        try:
            result = job.work(unit.payload)
        except Exception as error:
            raise describe_failure(f"work unit '{unit.key}'", error) from error
        yield unit.key, result


@dataclass
class _Worker:
    """A worker process and the unit that it runs."""

    process: BaseProcess
    pipe: Connection
    unit: WorkUnit | None = None
    """The unit in progress; None during set-up."""


def run_locally(job: JobSpec, units: Sequence[WorkUnit]) -> UnitResults:
    """Run units in worker processes.

    A worker gets one unit at a time, so that its death is attributed to that unit.
    """
    pending = deque(units)
    deaths = Counter[str]()
    left = len(units)
    workers = [_start_worker(job) for _ in range(min(job.workers, left))]
    finished = list[_Worker]()
    try:
        while left:
            for worker in _wait_for_replies(workers):
                what = f"work unit '{worker.unit.key}'" if worker.unit else "the set-up of a worker"
                reply = _receive_reply(worker)
                if reply is None:
                    workers.remove(worker)
                    deaths[what] += 1
                    reason = f"{_describe_exit(worker)}, {deaths[what]} times"
                    if worker.unit and deaths[what] < job.attempts:
                        pending.append(worker.unit)  # to the end of the queue: the other units go first
                    elif worker.unit:
                        left -= 1
                        yield worker.unit.key, FailedUnit(reason)
                    elif deaths[what] >= job.attempts:
                        raise BlmError(f"{what} failed: its process {reason}; check memory")
                    if len(workers) < min(job.workers, left):
                        workers.append(_start_worker(job))
                    continue
                succeeded, value, trace = reply
                if not succeeded:
                    value.add_note(trace)
                    raise describe_failure(what, value) from value
                if worker.unit:
                    left -= 1
                    yield worker.unit.key, value
                worker.unit = pending.popleft() if pending else None
                if worker.unit:
                    with suppress(OSError):  # a dead worker is noticed in the next iteration
                        worker.pipe.send(worker.unit.payload)
                else:  # the worker exits when its pipe closes; a retried unit starts a new worker
                    workers.remove(worker)
                    finished.append(worker)
                    worker.pipe.close()
        for worker in finished:
            worker.process.join(END_SECONDS)
    finally:
        for worker in (*workers, *finished):
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _start_worker(job: JobSpec) -> _Worker:
    context = multiprocessing.get_context("spawn")
    pipe, worker_pipe = context.Pipe()
    process = context.Process(target=_worker_main, args=(worker_pipe, job))
    with environment_variables(ONE_THREAD):
        process.start()
    worker_pipe.close()  # so that the pipe closes when the process exits
    return _Worker(process, pipe)


def _wait_for_replies(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait until workers have replied or exited; return them."""
    ready = wait([one for worker in workers for one in (worker.pipe, worker.process.sentinel)])
    return [worker for worker in workers if worker.pipe in ready or worker.process.sentinel in ready]


def _receive_reply(worker: _Worker) -> tuple[bool, Any, str] | None:
    """Return a worker's reply (success, result or error, traceback), or None if the worker died."""
    try:
        if worker.pipe.poll():
            reply: tuple[bool, Any, str] = worker.pipe.recv()
            return reply
    except (EOFError, OSError):
        pass
    worker.process.kill()  # it may have closed its pipe without exiting
    worker.process.join()
    worker.pipe.close()
    return None


def _describe_exit(worker: _Worker) -> str:
    code = worker.process.exitcode or 0
    return f"killed its worker (signal {-code})" if code < 0 else f"ended its worker (exit status {code})"


# --- inside a worker ----------------------------------------------------------------------------------------


def _worker_main(pipe: Connection, job: JobSpec) -> None:
    """Run units until the pipe closes.

    A worker exits with its parent; otherwise the workers of a parent that got kill -9 would wait
    for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        job.set_up()
    except Exception as error:
        pipe.send((False, _picklable_error(error), traceback.format_exc()))
        return
    pipe.send((True, None, ""))
    while True:
        try:
            payload = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, job.work(payload), ""))
        except Exception as error:
            pipe.send((False, _picklable_error(error), traceback.format_exc()))


def _picklable_error(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its message if it cannot be pickled."""
    try:
        same: Exception = ForkingPickler.loads(ForkingPickler.dumps(error))
        return same
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def exit_with_parent() -> None:
    """Wait in a thread of a worker for the end of its parent, and end the worker."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
