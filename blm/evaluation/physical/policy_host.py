"""One policy for many environments: what worker processes ask at the same time is answered in one call.

The policy lives in the process that evaluates, on a thread; the workers need neither torch nor weights.
Requests travel over a local connection with a random key. Nothing waits for company: a call takes whatever
came in while the one before it ran.

Why there are two batching queues: here every worker waits for its answer, which is never late or
refused; `blm.serving.scheduler` serves clients in turn, with deadlines, limits on queues, and chat
between the batches.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, Protocol, runtime_checkable

from blm.types import ActionChunk, BlmError, ContractError, Observation, Policy, PolicyContract

_GONE = (EOFError, OSError)
"""What a connection raises when the process at its other end has ended."""


@runtime_checkable
class ActsInBatches(Protocol):
    """A policy that decides on several observations at once, on each as if it had seen no other."""

    def act_batch(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]: ...


class PolicyHost:
    """Serves one policy to worker processes, from a thread, while the `with` block lasts.

    A worker that dies is forgotten, and a new one may connect at any time. When the policy raises, those
    whose observations were in that call get the error. A policy without `act_batch` is asked one by one.
    """

    def __init__(self, policy: Policy, *, max_batch: int = 64) -> None:
        """`max_batch`: most observations in one call."""
        if max_batch < 1:
            raise BlmError(f"max_batch is {max_batch}, must be 1 or more")
        self._policy = policy
        self._size = max_batch if isinstance(policy, ActsInBatches) else 1
        self._key = secrets.token_bytes(32)
        family = "AF_UNIX" if hasattr(socket, "AF_UNIX") else "AF_INET"
        self._listener = Listener(family=family, backlog=128, authkey=self._key)
        self._workers: list[Connection] = []
        self._bell, self._ring = Pipe(duplex=False)
        self._ended = False
        self._threads = [threading.Thread(target=call, daemon=True) for call in (self._accept, self._serve)]
        self.calls = self.observations = 0
        """How often the policy was called, and for how many observations."""

    @property
    def door(self) -> tuple[Any, bytes, PolicyContract]:
        """What makes a `HostedPolicy` in another process: address, key, contract."""
        return self._listener.address, self._key, self._policy.contract

    @property
    def served(self) -> dict[str, int]:
        """What was done, for the record: with batches, a policy may round differently from run to run."""
        return {"max_batch": self._size, "calls": self.calls, "observations": self.observations}

    def __enter__(self) -> PolicyHost:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._ring.send_bytes(b"end")
        with suppress(*_GONE):
            Client(self._listener.address, authkey=self._key).close()  # wakes the thread that accepts
        for thread in self._threads:
            thread.join()
        self._listener.close()
        for connection in (*self._workers, self._bell, self._ring):
            connection.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                self._workers.append(self._listener.accept())
            except (*_GONE, AuthenticationError):  # it died while it knocked, or has no business here
                time.sleep(0.01)
                continue
            self._ring.send_bytes(b"new")

    def _serve(self) -> None:
        while not self._ended:
            ready = wait([self._bell, *self._workers])
            if self._bell in ready:
                self._bell.recv_bytes()
            waiting: list[tuple[Connection, Observation]] = []
            for worker in ready:
                if worker is not self._bell and isinstance(worker, Connection):
                    try:
                        waiting.append((worker, worker.recv()))
                    except _GONE:
                        self._workers.remove(worker)
            for first in range(0, len(waiting), self._size):
                self._answer(waiting[first : first + self._size])

    def _answer(self, asked: Sequence[tuple[Connection, Observation]]) -> None:
        """Decide on these observations in one call, and send each its actions and the call's seconds."""
        begin, error = time.perf_counter(), None
        try:
            chunks = _decide(self._policy, [observation for _, observation in asked])
        except Exception as raised:  # the run has to end with it, in the process that runs the episode
            user = isinstance(raised, BlmError)
            error = (user, str(raised) if user else traceback.format_exc())
        seconds = time.perf_counter() - begin
        self.calls, self.observations = self.calls + 1, self.observations + len(asked)
        for index, (worker, _) in enumerate(asked):
            with suppress(*_GONE):  # its end is noticed when it is read from
                worker.send((error, None if error else chunks[index].actions, seconds))


def _decide(policy: Policy, observations: Sequence[Observation]) -> Sequence[ActionChunk]:
    if len(observations) == 1 or not isinstance(policy, ActsInBatches):
        return [policy.act(observation) for observation in observations]
    chunks = policy.act_batch(observations)
    if len(chunks) != len(observations):
        raise ContractError(f"act_batch gave {len(chunks)} chunks for {len(observations)} observations")
    return chunks


class HostedPolicy:
    """A worker's end of a `PolicyHost`: a `Policy` without weights. Made from the host's `door`."""

    def __init__(self, address: Any, key: bytes, contract: PolicyContract) -> None:
        self.contract = contract
        self.seconds = 0.0
        """How long the call took that gave the last answer, without the wait for its turn."""
        self._host = Client(address, authkey=key)

    def act(self, observation: Observation) -> ActionChunk:
        """Ask for a chunk. Raises what the policy raised: BlmError, or RuntimeError with its traceback."""
        try:
            self._host.send(observation)
            error, actions, self.seconds = self._host.recv()
        except _GONE as gone:
            raise RuntimeError("the process with the policy has ended") from gone
        if error is not None:
            user, text = error
            raise BlmError(text) if user else RuntimeError(text)
        return ActionChunk(actions=actions, rate_hz=self.contract.rate_hz)

    def reset(self) -> None:
        """Nothing: a policy that several environments share keeps no memory of an episode."""

    def close(self) -> None:
        self._host.close()
