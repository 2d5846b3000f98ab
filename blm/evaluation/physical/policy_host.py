"""One policy for many environments: concurrent requests of worker processes form batches.

The policy runs on a thread of the evaluating process; the workers need neither torch nor weights.
Requests travel over a local connection that a random key protects. No request waits for a batch to
fill: each call takes the requests that arrived during the previous call.

Two batching queues exist because their clients differ: here every worker waits for its answer,
which is never late or refused; `blm.serving.scheduler` serves clients in turn, with deadlines,
limits on queues, and chat between the batches.
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

from blm.evaluation.physical.result import SharedPolicy
from blm.types import ActionChunk, BlmError, ContractError, Observation, Policy, PolicyContract

_GONE = (EOFError, OSError)
"""Raised by a connection when the process at its other end has ended."""


@runtime_checkable
class ActsInBatches(Protocol):
    """A policy that decides on several independent observations in one call."""

    def act_batch(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]: ...


class PolicyHost:
    """Serves one policy to worker processes, from a thread, while the `with` block lasts.

    A worker that dies is dropped, and a new one may connect at any time. When the policy raises,
    the error goes to the workers whose observations were in that batch. A policy without
    `act_batch` is called once for each observation.
    """

    def __init__(self, policy: Policy, *, max_batch: int = 64) -> None:
        """`max_batch` is the maximum number of observations per call."""
        if max_batch < 1:
            raise BlmError(f"max_batch is {max_batch}, must be 1 or more")
        self._policy = policy
        self._size = max_batch if isinstance(policy, ActsInBatches) else 1
        self._key = secrets.token_bytes(32)
        family = "AF_UNIX" if hasattr(socket, "AF_UNIX") else "AF_INET"
        self._listener = Listener(family=family, backlog=128, authkey=self._key)
        self._workers: list[Connection] = []
        self._wake_receiver, self._wake_sender = Pipe(duplex=False)
        self._ended = False
        self._threads = [threading.Thread(target=call, daemon=True) for call in (self._accept, self._serve)]
        self.calls = self.observations = 0
        """Number of calls of the policy, and of observations in them."""

    @property
    def connection_info(self) -> tuple[Any, bytes, PolicyContract]:
        """Arguments of `HostedPolicy` in a worker: address, key, contract."""
        return self._listener.address, self._key, self._policy.contract

    @property
    def served(self) -> SharedPolicy:
        """The number of calls and observations so far."""
        return SharedPolicy(max_batch=self._size, calls=self.calls, observations=self.observations)

    def __enter__(self) -> PolicyHost:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._wake_sender.send_bytes(b"end")
        with suppress(*_GONE):
            Client(self._listener.address, authkey=self._key).close()  # wakes `_accept`
        for thread in self._threads:
            thread.join()
        self._listener.close()
        for connection in (*self._workers, self._wake_receiver, self._wake_sender):
            connection.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                self._workers.append(self._listener.accept())
            except (*_GONE, AuthenticationError):  # the worker died, or has no key
                time.sleep(0.01)
                continue
            self._wake_sender.send_bytes(b"new")

    def _serve(self) -> None:
        while not self._ended:
            ready = wait([self._wake_receiver, *self._workers])
            if self._wake_receiver in ready:
                self._wake_receiver.recv_bytes()
            waiting: list[tuple[Connection, Observation]] = []
            for worker in ready:
                if worker is not self._wake_receiver and isinstance(worker, Connection):
                    try:
                        waiting.append((worker, worker.recv()))
                    except _GONE:
                        self._workers.remove(worker)
            for first in range(0, len(waiting), self._size):
                self._answer(waiting[first : first + self._size])

    def _answer(self, requests: Sequence[tuple[Connection, Observation]]) -> None:
        """Call the policy once; send each worker its actions and the duration of the call [s]."""
        begin, error = time.perf_counter(), None
        try:
            chunks = _decide(self._policy, [observation for _, observation in requests])
        except Exception as raised:  # reraised in the worker
            user = isinstance(raised, BlmError)
            error = (user, str(raised) if user else traceback.format_exc())
        seconds = time.perf_counter() - begin
        self.calls += 1
        self.observations += len(requests)
        for index, (worker, _) in enumerate(requests):
            with suppress(*_GONE):  # `_serve` drops it when it reads from it
                worker.send((error, None if error else chunks[index].actions, seconds))


def _decide(policy: Policy, observations: Sequence[Observation]) -> Sequence[ActionChunk]:
    if len(observations) == 1 or not isinstance(policy, ActsInBatches):
        return [policy.act(observation) for observation in observations]
    chunks = policy.act_batch(observations)
    if len(chunks) != len(observations):
        raise ContractError(f"act_batch gave {len(chunks)} chunks for {len(observations)} observations")
    return chunks


class HostedPolicy:
    """The worker's side of a `PolicyHost`: a `Policy` without weights."""

    def __init__(self, address: Any, key: bytes, contract: PolicyContract) -> None:
        self.contract = contract
        self.seconds = 0.0
        """Duration of the call that gave the last chunk, without the wait in the queue [s]."""
        self._host = Client(address, authkey=key)

    def act(self, observation: Observation) -> ActionChunk:
        """Request a chunk. Raises the policy's BlmError, or RuntimeError with its traceback."""
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
        """Do nothing: a shared policy has no memory of an episode."""

    def close(self) -> None:
        self._host.close()
