"""Admission of chat requests: from the request queue through the tokenizer thread to the model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from blm.serving.requests import (
    ChatRequest,
    ChunkedPrefillGenerator,
    FairQueue,
    PreparedPrompt,
    SchedulerLimits,
    as_exception,
)
from blm.serving.runners import ChatRunner
from blm.types import BlmError


class ChatAdmission:
    """Chat requests before the model thread takes them: queued, in the tokenizer thread, prepared.

    All methods but `run_tokenizer` are called by a thread that holds `changed`, the scheduler's
    lock.
    """

    def __init__(
        self,
        runner: ChatRunner | None,
        limits: SchedulerLimits,
        changed: threading.Condition,
        wake: Callable[[], None],
    ) -> None:
        """`wake` tells the model thread, with `changed` held, that there is work."""
        self.queue = FairQueue[ChatRequest](
            "chat", limits.max_queued_chats, limits.max_queued_chats_per_client
        )
        self._tokenizing = dict[ChatRequest, float]()
        """Chat requests in the tokenizer thread -> when they got there [s, monotonic]."""
        self._prepared = list[tuple[ChatRequest, PreparedPrompt | None]]()
        self._to_tokenize = queue.SimpleQueue[ChatRequest | None]()
        self._runner, self._limits, self._changed, self._wake = runner, limits, changed, wake

    def __len__(self) -> int:
        return len(self.queue) + len(self._tokenizing) + len(self._prepared)

    @property
    def tokenizing_since(self) -> float:
        """When the tokenizer thread received its oldest request [s, monotonic]; infinite without
        one. May be read without the lock."""
        return min(self._tokenizing.copy().values(), default=float("inf"))

    def has_work(self) -> bool:
        """Whether the model thread can admit or take a request."""
        return bool(self._prepared) or self._can_admit()

    def may_continue(self, close_at: float) -> bool:
        """Whether a request may still come to the model before the server closes at `close_at`
        [s, monotonic]."""
        return bool(self._tokenizing or (time.monotonic() < close_at and self.queue))

    def admit(self) -> None:
        """Pass queued requests to the tokenizer thread, or on at once if the generator needs
        none."""
        while self._can_admit():
            request = self.queue.pop()
            assert request is not None and self._runner is not None
            if isinstance(self._runner.generator, ChunkedPrefillGenerator):
                self._tokenizing[request] = time.monotonic()
                self._to_tokenize.put(request)
            else:
                self._prepared.append((request, None))

    def take_prepared(self) -> list[tuple[ChatRequest, PreparedPrompt | None]]:
        """Remove and return the requests that are ready for the model."""
        prepared, self._prepared = self._prepared, []
        return prepared

    def close(self) -> list[ChatRequest]:
        """Remove and return all requests, and end the tokenizer thread."""
        requests = self.queue.take(len(self.queue))
        requests += [*self._tokenizing, *(request for request, _ in self._prepared)]
        self._tokenizing.clear()
        self._to_tokenize.put(None)
        return requests

    def _can_admit(self) -> bool:
        """Whether the next request fits; one that exceeds the limits is admitted alone."""
        following = self.queue.first()
        if following is None:
            return False
        started = [*self._tokenizing, *(request for request, _ in self._prepared)]
        decoding = list[ChatRequest]()
        if self._runner is not None:
            started += self._runner.before_first_token()
            decoding = self._runner.decoding
        sequences = sum(len(request.samplings) for request in (*started, *decoding, following))
        return len(started) < self._limits.max_prefills and (
            sequences <= self._limits.max_sequences or not (started or decoding)
        )

    def run_tokenizer(self) -> None:
        """Tokenize requests until `close`: the loop of the tokenizer thread."""
        while (request := self._to_tokenize.get()) is not None:
            assert self._runner is not None
            prompt: PreparedPrompt | None = None
            problem: Exception | None = None
            try:
                assert isinstance(self._runner.generator, ChunkedPrefillGenerator)
                if not request.cancelled:
                    prompt = self._runner.generator.prepare(request.messages, request.samplings)
            except BaseException as error:
                problem = as_exception(error)
            with self._changed:
                self._tokenizing.pop(request, None)
                if prompt is not None and not request.cancelled:
                    self._prepared.append((request, prompt))
                if problem is not None and not isinstance(problem, BlmError):
                    self._runner.needs_check = True
                self._wake()
            if problem is not None:
                request.publish(problem)
