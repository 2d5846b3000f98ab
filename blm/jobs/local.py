"""Units in this process, and in processes of this machine."""

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

from blm.jobs.unit import ONE_THREAD, Job, Lost, Runs, Unit, environment, named
from blm.types import BlmError

END_SECONDS = 30.0
"""What a worker may take to end by itself."""


def run_inline(job: Job, units: Sequence[Unit]) -> Runs:
    job.begin()
    for unit in units:
        try:
            result = job.work(unit.payload)
        except Exception as error:
            raise named(f"work unit '{unit.key}'", error) from error
        yield unit.key, result


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    unit: Unit | None = None
    """What it is doing; None while it sets up."""


def run_locally(job: Job, units: Sequence[Unit]) -> Runs:
    """Give each worker one unit at a time, so that it is known which one a worker died of."""
    todo, deaths, left = deque(units), Counter[str](), len(units)
    workers, finished = [_hire(job) for _ in range(min(job.workers, left))], list[_Worker]()
    try:
        while left:
            for worker in _ready(workers):
                what = f"work unit '{worker.unit.key}'" if worker.unit else "the set-up of a worker"
                answer = _answer(worker)
                if answer is None:
                    workers.remove(worker)
                    deaths[what] += 1
                    reason = f"{_how_it_ended(worker)}, {deaths[what]} times"
                    if worker.unit and deaths[what] < job.attempts:
                        todo.append(worker.unit)  # last: what others can finish is finished first
                    elif worker.unit:
                        left -= 1
                        yield worker.unit.key, Lost(reason)
                    elif deaths[what] >= job.attempts:
                        raise BlmError(f"{what} failed: its process {reason}; check memory")
                    if len(workers) < min(job.workers, left):
                        workers.append(_hire(job))
                    continue
                good, value, trace = answer
                if not good:
                    value.add_note(trace)
                    raise named(what, value) from value
                if worker.unit:
                    left -= 1
                    yield worker.unit.key, value
                worker.unit = todo.popleft() if todo else None
                if worker.unit:
                    with suppress(OSError):  # it has died: that shows in a moment
                        worker.pipe.send(worker.unit.payload)
                else:  # it ends when its pipe does; a unit that comes back finds another one
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


def _hire(job: Job) -> _Worker:
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, job))
    with environment(ONE_THREAD):
        process.start()
    its.close()  # so that the pipe ends with the process
    return _Worker(process, mine)


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait for workers that have answered or ended."""
    ready = wait([one for worker in workers for one in (worker.pipe, worker.process.sentinel)])
    return [worker for worker in workers if worker.pipe in ready or worker.process.sentinel in ready]


def _answer(worker: _Worker) -> tuple[bool, Any, str] | None:
    """What a worker says: whether all went well, result or error, and where that arose; None if it died."""
    try:
        if worker.pipe.poll():
            answer: tuple[bool, Any, str] = worker.pipe.recv()
            return answer
    except (EOFError, OSError):
        pass
    worker.process.kill()  # it may have closed the pipe only
    worker.process.join()
    worker.pipe.close()
    return None


def _how_it_ended(worker: _Worker) -> str:
    code = worker.process.exitcode or 0
    return f"killed its worker (signal {-code})" if code < 0 else f"ended its worker (exit status {code})"


# --- inside a worker ----------------------------------------------------------------------------------------


def _serve(pipe: Connection, job: Job) -> None:
    """Work until the pipe ends. A worker ends with its parent: one left by kill -9 would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job.begin()
    except Exception as error:
        pipe.send((False, _portable(error), traceback.format_exc()))
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
            pipe.send((False, _portable(error), traceback.format_exc()))


def _portable(error: Exception) -> Exception:
    """The error, or its words where it cannot travel between processes."""
    try:
        same: Exception = ForkingPickler.loads(ForkingPickler.dumps(error))
        return same
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
