"""The work of the model thread: batches of actions, and chat in bounded steps.

No exception of a policy or a generator leaves this module: every request receives a result or an
error.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from blm.serving.requests import (
    ActionRequest,
    ActionResult,
    BatchPolicy,
    ChatRequest,
    ChunkedPrefillGenerator,
    GeneratedSequence,
    ModelError,
    PreparedPrompt,
    SchedulerLimits,
    Snapshot,
    TokenGenerator,
    as_exception,
    blank_observation,
    check_chunk,
)
from blm.types import ActionChunk, BlmError, LateError, Message, Observation, Policy, Sampling

log = logging.getLogger(__name__)
CHECK_MESSAGES = (Message("user", ("Hello",)),)
"""The conversation of the health check, which generates one token."""


class ActionRunner:
    """Runs a policy on batches of action requests."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.error: Exception | None = None
        """Why the last health check failed; None after a success."""
        self.needs_check = False
        """The policy raised on a request. Only a health check tells whether the request was at
        fault."""

    def check(self) -> None:
        """Health check: decide on a blank observation of each robot."""
        contract, self.needs_check = self.policy.contract, False
        try:
            blanks = [blank_observation(contract, robot) for robot in contract.action_spaces]
            for chunk, blank in zip(self._act(blanks), blanks, strict=True):
                check_chunk(chunk, blank, contract)
            self.error = None
        except BaseException as error:
            if self.error is None:
                log.exception("the policy failed its health check")
            self.error = as_exception(error)

    def run(self, requests: Sequence[ActionRequest]) -> None:
        """Run one batch. If it fails, each request runs alone, so one cannot fail others."""
        start = time.monotonic()
        requests = [request for request in requests if request.done.set_running_or_notify_cancel()]
        for request in requests:
            if start > request.deadline:
                request.done.set_exception(LateError("the deadline passed while the observation waited"))
        requests = [request for request in requests if not request.done.done()]
        if not requests:
            return
        try:
            chunks = self._act([request.observation for request in requests])
        except BaseException as error:
            if len(requests) == 1:
                self._fail(requests[0], error)
            else:
                for request in requests:
                    self._run_alone(request)
            return
        self._reply(requests, chunks, start)

    def _run_alone(self, request: ActionRequest) -> None:
        start = time.monotonic()
        try:
            chunks = self._act([request.observation])
        except BaseException as error:
            self._fail(request, error)
        else:
            self._reply([request], chunks, start)

    def _reply(self, requests: Sequence[ActionRequest], chunks: Sequence[ActionChunk], start: float) -> None:
        now = time.monotonic()
        for request, chunk in zip(requests, chunks, strict=True):
            try:
                checked = check_chunk(chunk, request.observation, self.policy.contract)
            except BaseException as error:
                self._fail(request, error)
                continue
            if now > request.deadline:
                request.done.set_exception(LateError("the deadline passed while the model ran"))
            else:
                self.error, self.needs_check = None, False
                request.done.set_result(ActionResult(checked, 1000 * (now - start), len(requests)))

    def _fail(self, request: ActionRequest, error: BaseException) -> None:
        reported = as_exception(error)
        self.needs_check |= not isinstance(reported, BlmError)
        request.done.set_exception(reported)

    def _act(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]:
        """Call the policy.

        Raises the policy's exceptions, and ModelError for a wrong number of chunks.
        """
        if not isinstance(self.policy, BatchPolicy):
            return [self.policy.act(observation) for observation in observations]
        chunks: Any = self.policy.act_batch(observations)
        if not isinstance(chunks, Sequence) or len(chunks) != len(observations):
            got = f"{len(chunks)} chunks" if isinstance(chunks, Sequence) else type(chunks).__name__
            raise ModelError(f"act_batch returned {got} for {len(observations)} observation(s)")
        return chunks


class ChatRunner:
    """Runs a generator for chat requests, one bounded step per call.

    A request is first *prepared* (tokenized), then *prefilling*, then *decoding* until all of its
    sequences have ended.
    """

    def __init__(self, generator: TokenGenerator, limits: SchedulerLimits) -> None:
        self.generator, self.limits = generator, limits
        self.error: Exception | None = None
        """Why the last health check failed; None after a success."""
        self.needs_check = False
        """A request failed. Only a health check tells whether the request was at fault."""
        self.decoding = list[ChatRequest]()
        self._prepared = deque[tuple[ChatRequest, PreparedPrompt | None]]()
        self._prefilling = deque[tuple[ChatRequest, Any]]()
        self._prefilled_last = False
        self._check_prompt: PreparedPrompt | None = None

    @property
    def busy(self) -> bool:
        return bool(self.decoding or self._prefilling or self._prepared)

    def before_first_token(self) -> list[ChatRequest]:
        """Return the requests that are prefilling or wait for it."""
        return [request for request, _ in (*self._prepared, *self._prefilling)]

    def check(self) -> None:
        """Health check: generate one token."""
        self.needs_check = False
        try:
            sequences = self._generate_check_token()
            self._require(sequences)
            for sequence in sequences:
                self.generator.text(sequence)
                self.generator.drop(sequence)
            self.error = None
        except BaseException as error:
            if self.error is None:
                log.exception("the chat model failed its health check")
            self.error = as_exception(error)

    def add(self, request: ChatRequest, prompt: PreparedPrompt | None) -> None:
        """Accept a request.

        Without a tokenized prompt, the generator prefills all of it at once.
        """
        request.cache_tokens = 0 if prompt is None else prompt.cache_tokens
        self._prepared.append((request, prompt))

    def step(self) -> None:
        """Run one prefill step or one decoding step, alternating if there are both."""
        while self._prepared and self._fits(self._prepared[0][0]):
            self._begin(*self._prepared.popleft())
        if self._prefilling and not (self._prefilled_last and self.decoding):
            self._prefilled_last = True
            self._prefill()
        elif self.decoding:
            self._prefilled_last = False
            self._decode()

    def cancel(self, request: ChatRequest) -> None:
        """Stop work on a request and free its KV cache."""
        request.cancelled = True
        self._prepared = deque(pair for pair in self._prepared if pair[0] is not request)
        self._prefilling = deque(pair for pair in self._prefilling if pair[0] is not request)
        if request in self.decoding:
            self.decoding.remove(request)
        for sequence in request.sequences:
            try:
                self.generator.drop(sequence)
            except BaseException as error:
                self._note(error)

    def fail_all(self, error: Exception) -> None:
        """End every unfinished request with this error."""
        for request in [*self.before_first_token(), *self.decoding]:
            self.fail(request, error)

    def fail(self, request: ChatRequest, error: BaseException) -> None:
        """End one request with this error."""
        reported = self._note(error)
        self.cancel(request)
        request.publish(reported)

    def _note(self, error: BaseException) -> Exception:
        reported = as_exception(error)
        if not isinstance(reported, BlmError):
            log.error("the chat failed: %r", reported, exc_info=error)
            self.needs_check = True
        return reported

    def _fits(self, request: ChatRequest) -> bool:
        """Return whether the request fits next to the running ones.

        A request that exceeds the limits runs alone.
        """
        others = [*self.decoding, *(other for other, _ in self._prefilling)]
        if not others:
            return True
        sequences = sum(len(other.samplings) for other in (*others, request))
        tokens = sum(other.cache_tokens for other in (*others, request))
        return sequences <= self.limits.max_sequences and tokens <= self.limits.cache_tokens

    def _begin(self, request: ChatRequest, prompt: PreparedPrompt | None) -> None:
        try:
            if prompt is not None:
                assert isinstance(self.generator, ChunkedPrefillGenerator)
                self._prefilling.append((request, self.generator.begin(prompt)))
            else:
                conversations = [request.messages] * len(request.samplings)
                self._start_decoding(request, self.generator.start(conversations, request.samplings))
        except BaseException as error:
            self.fail(request, error)

    def _prefill(self) -> None:
        request, prefill = self._prefilling.popleft()
        try:
            assert isinstance(self.generator, ChunkedPrefillGenerator)
            sequences = self.generator.advance(prefill)
            if sequences is None:
                self._prefilling.append((request, prefill))
            else:
                self._start_decoding(request, sequences)
        except BaseException as error:
            self.fail(request, error)

    def _start_decoding(self, request: ChatRequest, sequences: Sequence[GeneratedSequence]) -> None:
        request.sequences = sequences
        self._require(sequences, len(request.samplings))
        request.prompt_tokens = sequences[0].prompt_tokens
        self.decoding.append(request)
        self._publish(request)

    def _require(self, sequences: Sequence[GeneratedSequence], count: int = 1) -> None:
        if len(sequences) != count or not all(sequence.tokens for sequence in sequences):
            raise ModelError(
                f"the generator returned {len(sequences)} sequences for {count} samplings, or no token"
            )

    def _decode(self) -> None:
        try:
            self.generator.step()
        except BaseException as error:
            for request in list(self.decoding):
                self.fail(request, error)
            return
        for request in list(self.decoding):
            try:
                self._publish(request)
            except BaseException as error:
                self.fail(request, error)

    def _publish(self, request: ChatRequest) -> None:
        for sequence in request.sequences:
            if (error := getattr(sequence, "error", None)) is not None:
                raise error
        request.publish(
            [
                Snapshot(self.generator.text(sequence), len(sequence.tokens), sequence.ended)
                for sequence in request.sequences
            ]
        )
        self.error, self.needs_check = None, False
        if all(sequence.ended for sequence in request.sequences):
            self.decoding.remove(request)

    def _generate_check_token(self) -> Sequence[GeneratedSequence]:
        sampling = Sampling(max_tokens=1)
        if not isinstance(self.generator, ChunkedPrefillGenerator):
            return self.generator.start([CHECK_MESSAGES], [sampling])
        if self._check_prompt is None:  # kept, because the tokenizer may be in use at the next check
            self._check_prompt = self.generator.prepare(CHECK_MESSAGES, [sampling])
        prefill = self.generator.begin(self._check_prompt)
        while (sequences := self.generator.advance(prefill)) is None:
            pass
        return sequences
