"""What the model's thread does: actions in batches, and chat in bounded pieces. Nothing raises out of here.

Whoever waits gets a result or an error, whatever a policy or a generator does.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from blm.serving.requests import (
    Acted,
    ActionJob,
    BatchPolicy,
    ChatJob,
    EngineLimits,
    GeneratedAnswer,
    ModelError,
    PiecewiseGenerator,
    PreparedPrompt,
    Snapshot,
    TokenGenerator,
    as_exception,
    blank_observation,
    check_chunk,
)
from blm.types import ActionChunk, BlmError, LateError, Message, Observation, Policy, Sampling

log = logging.getLogger(__name__)
GREETING = (Message("user", ("Hello",)),)
"""What is asked to see whether a token can be made."""


class ActionWork:
    """Answers observations."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.error: Exception | None = None
        """Why the policy does not work: it failed when it was tried, and has answered nobody since."""
        self.suspect = False
        """It failed on an observation: whose fault it was is not known before it is tried."""

    def check(self) -> None:
        """Answer a blank observation of each robot, to see whether the policy works."""
        contract, self.suspect = self.policy.contract, False
        try:
            blanks = [blank_observation(contract, robot) for robot in contract.action_spaces]
            for chunk, blank in zip(self._chunks(blanks), blanks, strict=True):
                check_chunk(chunk, blank, contract)
            self.error = None
        except BaseException as error:
            if self.error is None:
                log.exception("the policy failed when it was tried")
            self.error = as_exception(error)

    def serve(self, jobs: Sequence[ActionJob]) -> None:
        """Answer jobs in one pass; if that fails, each alone, so that one bad observation harms no other."""
        start = time.monotonic()
        jobs = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        for job in jobs:
            if start > job.deadline:
                job.done.set_exception(LateError("the deadline passed while the observation waited"))
        jobs = [job for job in jobs if not job.done.done()]
        if not jobs:
            return
        try:
            chunks = self._chunks([job.observation for job in jobs])
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                for job in jobs:
                    self._serve_alone(job)
            return
        self._reply(jobs, chunks, start)

    def _serve_alone(self, job: ActionJob) -> None:
        start = time.monotonic()
        try:
            chunks = self._chunks([job.observation])
        except BaseException as error:
            self._fail(job, error)
        else:
            self._reply([job], chunks, start)

    def _reply(self, jobs: Sequence[ActionJob], chunks: Sequence[ActionChunk], start: float) -> None:
        now = time.monotonic()
        for job, chunk in zip(jobs, chunks, strict=True):
            try:
                good = check_chunk(chunk, job.observation, self.policy.contract)
            except BaseException as error:
                self._fail(job, error)
                continue
            if now > job.deadline:
                job.done.set_exception(LateError("the deadline passed while the model ran"))
            else:
                self.error, self.suspect = None, False
                job.done.set_result(Acted(good, 1000 * (now - start), len(jobs)))

    def _fail(self, job: ActionJob, error: BaseException) -> None:
        known = as_exception(error)
        self.suspect |= not isinstance(known, BlmError)
        job.done.set_exception(known)

    def _chunks(self, observations: Sequence[Observation]) -> Sequence[ActionChunk]:
        """Ask the policy. Raises what it raises, and ModelError for another number of chunks."""
        if not isinstance(self.policy, BatchPolicy):
            return [self.policy.act(observation) for observation in observations]
        chunks: Any = self.policy.act_batch(observations)
        if not isinstance(chunks, Sequence) or len(chunks) != len(observations):
            got = f"{len(chunks)} chunks" if isinstance(chunks, Sequence) else type(chunks).__name__
            raise ModelError(f"act_batch gave {got} for {len(observations)} observation(s)")
        return chunks


class ChatWork:
    """Reads conversations and makes tokens, one bounded piece a call."""

    def __init__(self, generator: TokenGenerator, limits: EngineLimits) -> None:
        self.generator, self.limits = generator, limits
        self.error: Exception | None = None
        """Why no token can be made: the last try failed, and nobody got one since."""
        self.suspect = False
        """A conversation failed: whose fault it was is not known before a token is tried."""
        self.answering = list[ChatJob]()
        self._prepared = deque[tuple[ChatJob, PreparedPrompt | None]]()
        self._reading = deque[tuple[ChatJob, Any]]()
        self._read_last = False
        self._greeting_prompt: PreparedPrompt | None = None

    @property
    def busy(self) -> bool:
        return bool(self.answering or self._reading or self._prepared)

    def before_first_token(self) -> list[ChatJob]:
        """Conversations that are being read, or wait for that."""
        return [job for job, _ in (*self._prepared, *self._reading)]

    def check(self) -> None:
        """Make one token, to see whether the model can."""
        self.suspect = False
        try:
            answers = self._greeting()
            self._require(answers)
            for answer in answers:
                self.generator.text(answer)
                self.generator.drop(answer)
            self.error = None
        except BaseException as error:
            if self.error is None:
                log.exception("the chat failed when it was tried")
            self.error = as_exception(error)

    def add(self, job: ChatJob, prompt: PreparedPrompt | None) -> None:
        """Take on a conversation; without a prompt the generator reads it at once."""
        job.cache_tokens = 0 if prompt is None else prompt.cache_tokens
        self._prepared.append((job, prompt))

    def work(self) -> None:
        """Read a piece of one prompt, or make the next token of some answers; by turns if there are both."""
        while self._prepared and self._fits(self._prepared[0][0]):
            self._begin(*self._prepared.popleft())
        if self._reading and not (self._read_last and self.answering):
            self._read_last = True
            self._read()
        elif self.answering:
            self._read_last = False
            self._step()

    def forget(self, job: ChatJob) -> None:
        """Give up a conversation."""
        job.left = True
        self._prepared = deque(pair for pair in self._prepared if pair[0] is not job)
        self._reading = deque(pair for pair in self._reading if pair[0] is not job)
        if job in self.answering:
            self.answering.remove(job)
        for answer in job.answers:
            try:
                self.generator.drop(answer)
            except BaseException as error:
                self._note(error)

    def end(self, error: Exception) -> None:
        """Tell everybody that it is over."""
        for job in [*self.before_first_token(), *self.answering]:
            self.fail(job, error)

    def fail(self, job: ChatJob, error: BaseException) -> None:
        known = self._note(error)
        self.forget(job)
        job.tell(known)

    def _note(self, error: BaseException) -> Exception:
        known = as_exception(error)
        if not isinstance(known, BlmError):
            log.error("the chat failed: %r", known, exc_info=error)
            self.suspect = True
        return known

    def _fits(self, job: ChatJob) -> bool:
        others = [*self.answering, *(other for other, _ in self._reading)]
        answers = sum(len(other.samplings) for other in (*others, job))
        tokens = sum(other.cache_tokens for other in (*others, job))
        return not others or (answers <= self.limits.answers_together and tokens <= self.limits.cache_tokens)

    def _begin(self, job: ChatJob, prompt: PreparedPrompt | None) -> None:
        try:
            if prompt is not None:
                assert isinstance(self.generator, PiecewiseGenerator)
                self._reading.append((job, self.generator.begin(prompt)))
            else:
                self._answer(job, self.generator.start([job.messages] * len(job.samplings), job.samplings))
        except BaseException as error:
            self.fail(job, error)

    def _read(self) -> None:
        job, prefill = self._reading.popleft()
        try:
            assert isinstance(self.generator, PiecewiseGenerator)
            answers = self.generator.advance(prefill)
            if answers is None:
                self._reading.append((job, prefill))
            else:
                self._answer(job, answers)
        except BaseException as error:
            self.fail(job, error)

    def _answer(self, job: ChatJob, answers: Sequence[GeneratedAnswer]) -> None:
        job.answers = answers
        self._require(answers, len(job.samplings))
        job.prompt_tokens = answers[0].prompt_tokens
        self.answering.append(job)
        self._tell(job)

    def _require(self, answers: Sequence[GeneratedAnswer], count: int = 1) -> None:
        if len(answers) != count or not all(answer.tokens for answer in answers):
            raise ModelError(f"the generator gave {len(answers)} answers for {count}, or no token")

    def _step(self) -> None:
        try:
            self.generator.step()
        except BaseException as error:
            for job in list(self.answering):
                self.fail(job, error)
            return
        for job in list(self.answering):
            try:
                self._tell(job)
            except BaseException as error:
                self.fail(job, error)

    def _tell(self, job: ChatJob) -> None:
        for answer in job.answers:
            if (error := getattr(answer, "error", None)) is not None:
                raise error
        job.tell([Snapshot(self.generator.text(a), len(a.tokens), a.ended) for a in job.answers])
        self.error, self.suspect = None, False
        if all(answer.ended for answer in job.answers):
            self.answering.remove(job)

    def _greeting(self) -> Sequence[GeneratedAnswer]:
        way = Sampling(max_tokens=1)
        if not isinstance(self.generator, PiecewiseGenerator):
            return self.generator.start([GREETING], [way])
        if self._greeting_prompt is None:  # kept: the tokeniser may be busy when the model is tried again
            self._greeting_prompt = self.generator.prepare(GREETING, [way])
        prefill = self.generator.begin(self._greeting_prompt)
        while (answers := self.generator.advance(prefill)) is None:
            pass
        return answers
