"""The model's thread: whatever a policy or a generator does, all get a reply and the next one is served."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from contextlib import suppress
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blm.backbone import build_nano
from blm.backbone.generation.generator import Generation
from blm.serving.requests import ChatJob, FairQueue, Snapshot
from blm.serving.scheduler import BusyError, Engine, EngineLimits, ModelError
from blm.types import ActionChunk, BlmError, Message, Observation, Sampling
from tests.support.serving import EchoPolicy, EchoSpeaker, EndlessSpeaker, Words, body, observation, running

T = TypeVar("T")
HELLO = (Message("user", ("hello there",)),)


def run(scenario: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(30):
            return await scenario()

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def answer(engine: Engine, messages: Sequence[Message] = HELLO, way: Sampling | None = None) -> str:
    talk = engine.talk(messages, [way or Sampling(max_tokens=4)])
    try:
        last: list[Snapshot] = []
        async for snapshots in talk:
            last = snapshots
        return last[0].text
    finally:
        engine.leave(talk)


def stop(engine: Engine) -> None:
    engine.close()
    engine.join()


# --- actions ---


class Scripted(EchoPolicy):
    """Answers each batch as `script` says, but for the observations that the engine itself tries."""

    def __init__(self, script: Callable[[Sequence[Observation]], Any]) -> None:
        super().__init__()
        self.script, self.hold = script, threading.Event()
        self.hold.set()
        self.batches = list[list[str]]()

    def act_batch(self, observations: Sequence[Observation]) -> Any:
        if observations[0].instruction == "hold still.":
            return [self.act(one) for one in observations]
        self.hold.wait(10)
        self.batches.append([one.instruction for one in observations])
        return self.script(observations)


def good(observations: Sequence[Observation]) -> list[ActionChunk]:
    return [EchoPolicy().act(one) for one in observations]


def raising(error: BaseException) -> Callable[[Any], Any]:
    def script(observations: Any) -> Any:
        raise error

    return script


def changed(change: Callable[[np.ndarray], Any]) -> Callable[[Any], Any]:
    return lambda observations: [ActionChunk(actions=change(c.actions.copy())) for c in good(observations)]


def with_nan(actions: np.ndarray) -> np.ndarray:
    actions[-1, -1] = np.nan
    return actions


HOSTILE_POLICIES: dict[str, Callable[[Any], Any]] = {
    "too few": lambda seen: good(seen)[:-1],
    "too many": lambda seen: good(seen) * 2,
    "none": lambda seen: None,
    "a generator": lambda seen: iter(good(seen)),
    "an endless one": lambda seen: iter(int, 1),
    "text": lambda seen: "x" * len(seen),
    "a number": lambda seen: 3,
    "arrays": lambda seen: [chunk.actions for chunk in good(seen)],
    "NaN": changed(with_nan),
    "infinite": changed(lambda a: a * np.float32("inf")),
    "another robot's": changed(lambda a: a[:, :-1]),
    "one step": changed(lambda a: a[0]),
    "no step": changed(lambda a: a[:0]),
    "objects": changed(lambda a: a.astype(object)),
    "words": changed(lambda a: a.astype(str)),
    "complex": changed(lambda a: a.astype(complex)),
    "a list": changed(lambda a: "nothing"),
    **{
        repr(error): raising(error)
        for error in (
            RuntimeError("no weights"),
            MemoryError(),
            StopIteration(3),
            StopAsyncIteration(),
            GeneratorExit(),
            SystemExit(3),
            KeyboardInterrupt(),
            asyncio.CancelledError(),
            FutureCancelledError(),
            BaseException("bare"),
            RecursionError(),
        )
    },
}


@pytest.mark.parametrize("name", HOSTILE_POLICIES)
def test_everyone_gets_a_reply_from_a_policy_that_misbehaves(name: str) -> None:
    policy = Scripted(HOSTILE_POLICIES[name])

    async def scenario() -> None:
        engine = Engine(policy, None)
        policy.hold.clear()
        jobs = [asyncio.create_task(engine.act(observation(seed=seed))) for seed in range(5)]
        await asyncio.sleep(0.05)
        policy.hold.set()
        replies = await asyncio.gather(*jobs, return_exceptions=True)
        if name == "too many":  # asked alone it gives two for one
            assert all(isinstance(reply, ModelError) for reply in replies)
        assert all(isinstance(reply, Exception) for reply in replies), replies
        policy.script = good
        acted = await engine.act(observation())
        assert (acted.chunk.actions == EchoPolicy().act(observation()).actions).all()
        assert engine.health().status == "ok" and engine.failed is None
        stop(engine)

    run(scenario)


def test_a_bad_chunk_is_kept_from_its_robot_and_no_other() -> None:
    def third_is_nan(observations: Sequence[Observation]) -> list[ActionChunk]:
        chunks = good(observations)
        return [
            ActionChunk(actions=with_nan(c.actions.copy())) if one.seed == 3 else c
            for c, one in zip(chunks, observations, strict=True)
        ]

    async def scenario() -> None:
        engine = Engine(Scripted(third_is_nan), None)
        jobs = [engine.act(observation(seed=seed)) for seed in range(6)]
        replies = await asyncio.gather(*jobs, return_exceptions=True)
        assert [isinstance(reply, ModelError) for reply in replies] == [seed == 3 for seed in range(6)]
        stop(engine)

    run(scenario)


def named(client: str, number: int = 0) -> Observation:
    return Observation(**{**vars(observation(seed=number)), "instruction": client})


def test_one_clients_rows_do_not_starve_another() -> None:
    policy = Scripted(good)

    async def scenario() -> None:
        engine = Engine(policy, None, EngineLimits(actions_together=4, actions_per_client=50))
        await until(engine.ready.is_set)
        policy.hold.clear()
        flood = [asyncio.create_task(engine.act(named("flood"), client="flood"))]
        await until(lambda: not engine._actions and not engine._idle)
        flood += [asyncio.create_task(engine.act(named("flood", n), client="flood")) for n in range(50)]
        await until(lambda: len(engine._actions) == 50)
        others = [asyncio.create_task(engine.act(named(who), client=who)) for who in ("a", "b")]
        await asyncio.sleep(0.05)
        policy.hold.set()
        await asyncio.gather(*others)
        done = [name for batch in policy.batches for name in batch]
        assert done[0] == "flood" and set(done[1:5]) == {"flood", "a", "b"}, (
            "each has a turn in the next pass"
        )
        replies = await asyncio.gather(*flood, return_exceptions=True)
        assert not [reply for reply in replies if isinstance(reply, Exception)]
        policy.hold.clear()
        flood = [asyncio.create_task(engine.act(named("flood", n), client="flood")) for n in range(60)]
        await asyncio.sleep(0.05)
        policy.hold.set()
        replies = await asyncio.gather(*flood, return_exceptions=True)
        busy = [str(reply) for reply in replies if isinstance(reply, BusyError)]
        assert busy and all("50 action requests of this client" in reply for reply in busy)
        stop(engine)

    run(scenario)


def test_cancelled_observations_free_their_places_at_once() -> None:
    policy = Scripted(good)

    async def scenario() -> None:
        engine = Engine(policy, None, EngineLimits(actions_together=1, actions_waiting=4))
        await until(engine.ready.is_set)
        policy.hold.clear()
        first = asyncio.create_task(engine.act(named("first"), client="first"))
        await until(lambda: len(engine._actions) == 0 and not engine._idle)
        for _ in range(20):
            jobs = [asyncio.create_task(engine.act(named("gone"), client="gone")) for _ in range(4)]
            await asyncio.sleep(0)
            assert engine.waiting["actions"] == 4
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            assert engine.waiting["actions"] == 0
        policy.hold.set()
        await first
        assert [name for batch in policy.batches for name in batch] == ["first"]
        stop(engine)

    run(scenario)


operations = st.lists(
    st.tuples(st.sampled_from(["put", "pop", "remove"]), st.integers(0, 3), st.integers(0, 30))
)


@settings(max_examples=300, deadline=None)
@given(operations)
def test_the_queue_is_fair_and_bounded_whatever_happens(steps: list[tuple[str, int, int]]) -> None:
    queue, model, number = FairQueue[tuple[Hashable, int]]("action", 8, 3), list[tuple[Hashable, int]](), 0
    since = dict[Hashable, int]()
    for what, client_number, pick in steps:
        client: Hashable = client_number or None
        if what == "put":
            number += 1
            mine = [job for job in model if job[0] == client]
            full = len(model) >= 8 or (client is not None and len(mine) >= 3)
            try:
                queue.put((client, number), client)
                assert not full
                model.append((client, number))
                since.setdefault(client, 0)
            except BusyError:
                assert full
        elif what == "remove" and model:
            job = model[pick % len(model)]
            assert queue.remove(job, job[0]) and not queue.remove(job, job[0])
            model.remove(job)
        elif what == "pop":
            first = queue.first()
            taken = queue.pop()
            assert taken == first and (taken is None) == (not model)
            if taken is not None:
                assert taken == next(job for job in model if job[0] == taken[0]), "in order for each client"
                model.remove(taken)
                since = {who: count + 1 for who, count in since.items()} | {taken[0]: 0}
        since = {who: count for who, count in since.items() if any(job[0] == who for job in model)}
        assert len(queue) == len(model) and all(count <= 3 for count in since.values()), "a turn for each"


# --- chat ---


def test_a_temperature_of_almost_nothing_ends_no_chat() -> None:
    """It left a half-started answer behind; from then on every chat was a 500."""

    async def scenario() -> None:
        engine = Engine(None, Generation(build_nano()))
        expected = await answer(engine)
        for temperature in (1e-38, 5e-324, 1e-320, 1e-7):
            for top_p in (1.0, 1e-320, 1e-46):
                assert (
                    await answer(engine, way=Sampling(max_tokens=4, temperature=temperature, top_p=top_p))
                    == expected
                )
        assert await answer(engine) == expected
        assert engine.health().status == "ok"
        stop(engine)

    run(scenario)


class FailingGenerator(EchoSpeaker):
    """Fails where `where` says, on conversations that say "break"."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self.error = where, error
        self.broken = False

    def fail(self, where: str, *answers: Words) -> None:
        if self.where == where and (self.broken or any("break" in word for a in answers for word in a.words)):
            raise self.error

    def begin(self, messages: Sequence[Message], sampling: Sampling) -> Words:
        made = Words("user: " + messages[-1].text, 3, sampling.max_tokens)
        self.fail("start", made)
        return made

    def step(self) -> None:
        try:
            self.fail("step", *[a for a in self.running if len(a.tokens) > 0])
        except BaseException:
            self.running = []
            raise
        super().step()

    def text(self, answer: Words) -> str:
        self.fail("text", answer)
        return super().text(answer)

    def drop(self, answer: Words) -> None:
        super().drop(answer)
        self.fail("drop", answer)


ERRORS = [RuntimeError("no weights"), MemoryError(), StopIteration(), SystemExit(1), asyncio.CancelledError()]


@pytest.mark.parametrize("where", ["start", "step", "text", "drop"])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_everyone_gets_a_reply_from_a_generator_that_misbehaves(where: str, error: BaseException) -> None:
    async def scenario() -> None:
        engine = Engine(EchoPolicy(), FailingGenerator(where, error))
        bad = (Message("user", ("please break now ok",)),)
        replies = await asyncio.gather(
            *(answer(engine, bad if number % 2 else HELLO) for number in range(6)), return_exceptions=True
        )
        assert all(isinstance(reply, Exception | str) for reply in replies)
        if where in ("start", "text"):
            assert [isinstance(reply, str) for reply in replies] == [True, False] * 3
        assert await answer(engine) == "user: hello there"
        assert (await engine.act(observation())).chunk.actions.shape == (4, 8)
        await until(lambda: engine.health().status == "ok")
        stop(engine)

    run(scenario)


def test_health_tells_whether_a_token_can_be_made_now() -> None:
    generator = FailingGenerator("start", RuntimeError("no weights"))

    async def scenario() -> None:
        engine = Engine(EchoPolicy(), generator, EngineLimits(check_s=0.05))
        await until(lambda: engine.health().status == "ok")
        generator.broken = True
        with pytest.raises(RuntimeError, match="no weights"):
            await answer(engine)
        await until(lambda: engine.health().status == "failed")
        assert "no weights" in engine.health().reason and "no weights" in str(engine.failed)
        assert (await engine.act(observation())).chunk.actions.shape == (4, 8), "robots are served"
        generator.broken = False
        await until(lambda: engine.health().status == "ok")  # nobody asked: it was tried
        assert await answer(engine) == "user: hello there"
        stop(engine)
        assert engine.health().status == "closing"

    run(scenario)


def test_a_thread_that_hangs_is_not_healthy() -> None:
    policy = Scripted(good)

    async def scenario() -> None:
        engine = Engine(policy, None, EngineLimits(stall_s=0.2))
        await until(engine.ready.is_set)
        await asyncio.sleep(0.4)
        assert engine.health().status == "ok", "nobody waits for anything"
        policy.hold.clear()
        job = asyncio.create_task(engine.act(observation()))
        await asyncio.sleep(0.05)
        assert engine.health().status == "ok"
        await asyncio.sleep(0.4)
        assert engine.health().status == "failed" and "has not moved" in engine.health().reason
        policy.hold.set()
        await job
        await until(lambda: engine.health().status == "ok")
        stop(engine)

    run(scenario)


def test_when_the_thread_dies_everyone_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, policy = EndlessSpeaker(), Scripted(good)

    async def scenario() -> None:
        engine = Engine(policy, speaker)
        await until(engine.ready.is_set)
        talking = asyncio.create_task(answer(engine, way=Sampling(max_tokens=4096)))
        await until(lambda: bool(speaker.running))
        policy.hold.clear()
        acting = [asyncio.create_task(engine.act(observation())) for _ in range(3)]
        await asyncio.sleep(0.05)
        monkeypatch.setattr(engine, "_has_work", lambda: 1 / 0)
        policy.hold.set()
        late = [asyncio.create_task(engine.act(observation())), asyncio.create_task(answer(engine))]
        replies = await asyncio.gather(talking, *acting, *late, return_exceptions=True)
        assert isinstance(replies[0], ModelError) and "has ended" in str(replies[0])
        assert all(isinstance(reply, Exception) for reply in replies[-2:])
        engine.join()
        for _ in range(2):
            with pytest.raises(ModelError, match="has ended"):
                await engine.act(observation())
            with pytest.raises(ModelError, match="has ended"):
                await answer(engine)
        assert engine.health().status == "failed" and "ZeroDivisionError" in engine.health().reason

    run(scenario)


def test_the_endpoint_says_what_the_engine_says() -> None:
    generator = FailingGenerator("start", RuntimeError("no weights"))
    with running(None, generator, room=EngineLimits(check_s=0.05)) as address:
        url = f"http://{address}"
        wait_for_status(url, 200)
        generator.broken = True
        assert httpx.post(f"{url}/v1/chat/completions", json=body("hi")).status_code == 500
        wait_for_status(url, 500)
        generator.broken = False
        wait_for_status(url, 200)


def wait_for_status(url: str, status: int) -> None:
    end = time.monotonic() + 10
    while httpx.get(f"{url}/health").status_code != status:
        assert time.monotonic() < end
        time.sleep(0.02)


# --- chat with a real generator ---


@pytest.fixture(scope="module")
def generation() -> Generation:
    return Generation(build_nano(), piece_tokens=32)


def test_actions_come_between_the_pieces_of_a_long_prompt(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[str]()
    advance, step = Generation.advance, Generation.step

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(*given: Any) -> Any:
            events.append(what)
            time.sleep(0.002)
            return call(*given)

        return note

    monkeypatch.setattr(Generation, "advance", noted("piece", advance))
    monkeypatch.setattr(Generation, "step", noted("step", step))

    def acts(observations: Sequence[Observation]) -> list[ActionChunk]:
        events.append("act")
        return good(observations)

    long = (Message("user", ("What can you do with it? " * 100,)),)

    async def scenario() -> None:
        engine = Engine(Scripted(acts), generation)
        await until(engine.ready.is_set)
        events.clear()
        asking = [asyncio.create_task(answer(engine, long, Sampling(max_tokens=8))) for _ in range(3)]
        while not all(job.done() for job in asking):
            await engine.act(observation())
        texts = [job.result() for job in asking]
        assert len(set(texts)) == 1
        between = max(len(part.split()) for part in " ".join(events).split("act"))
        assert events.count("piece") > 30 and between <= 2, events
        assert await answer(engine, long, Sampling(max_tokens=8)) == texts[0]
        stop(engine)

    run(scenario)


def test_a_short_question_does_not_wait_for_a_long_prompt(generation: Generation) -> None:
    long = (Message("user", ("What can you do with it? " * 250,)),)

    async def scenario() -> None:
        engine = Engine(None, generation)
        await until(engine.ready.is_set)
        reading = asyncio.create_task(answer(engine, long))
        await until(lambda: engine.waiting["answers"] == 1)
        await answer(engine)
        assert not reading.done()
        await reading
        stop(engine)

    run(scenario)


@pytest.mark.parametrize("answers", [1, 8])
def test_who_leaves_at_any_moment_leaves_nothing_behind(generation: Generation, answers: int) -> None:
    long = (Message("user", ("What can you do with it? " * 60,)),)

    async def scenario() -> None:
        engine = Engine(None, generation)
        expected = await answer(engine, long)
        for pause in (0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08):
            talk = engine.talk(long, [Sampling(max_tokens=500, seed=n) for n in range(answers)])
            await asyncio.sleep(pause)
            engine.leave(talk)
        await until(lambda: set(engine.waiting.values()) == {0})
        assert not generation.running
        assert await answer(engine, long) == expected
        stop(engine)

    run(scenario)


def test_what_does_not_fit_is_refused_and_what_fails_harms_no_other(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, fails = generation.backbone.model.forward, threading.Event()

    def failing(*given: Any, **named: Any) -> Any:
        if fails.is_set():
            raise torch.OutOfMemoryError("no memory")
        return forward(*given, **named)

    async def scenario() -> None:
        engine = Engine(None, generation, EngineLimits(check_s=0.05))
        expected = await answer(engine)
        for text in ("x" * 10**6, "0 " * 5000, "<image>"):
            with pytest.raises(BlmError):
                await answer(engine, (Message("user", (text,)),))
        monkeypatch.setattr(generation.backbone.model, "forward", failing)
        running_one = asyncio.create_task(answer(engine, way=Sampling(max_tokens=3000)))
        await until(lambda: bool(generation.running) or running_one.done())
        fails.set()
        with suppress(torch.OutOfMemoryError):
            await running_one
        with pytest.raises(torch.OutOfMemoryError):
            await answer(engine)
        await until(lambda: engine.health().status == "failed")
        fails.clear()
        await until(lambda: engine.health().status == "ok")
        assert await answer(engine) == expected and not generation.running
        stop(engine)

    run(scenario)


def test_a_reader_that_is_slow_keeps_no_more_than_the_last_state() -> None:
    async def scenario() -> None:
        job = ChatJob(HELLO, [Sampling()], asyncio.get_running_loop())
        for count in range(1000):
            job.tell([Snapshot("x" * count, count, None)])
        job.tell([Snapshot("all", 1001, "stop")])
        await asyncio.sleep(0)
        assert [s[0].text async for s in job] == ["all"]

    run(scenario)


def test_a_reader_whose_loop_is_gone_harms_nobody() -> None:
    engine = Engine(None, EchoSpeaker())

    async def leave_without_a_word() -> None:
        engine.talk(HELLO, [Sampling(max_tokens=4)])

    for _ in range(3):
        asyncio.run(leave_without_a_word())
    assert asyncio.run(answer(engine)) == "user: hello there"
    stop(engine)


def test_chats_of_one_client_do_not_starve_another() -> None:
    speaker = EndlessSpeaker()

    async def scenario() -> None:
        engine = Engine(None, speaker, EngineLimits(answers_together=1, chats_per_client=5))
        await until(engine.ready.is_set)
        talks = [engine.talk(HELLO, [Sampling(max_tokens=4096)], client="flood") for _ in range(5)]
        await until(lambda: bool(speaker.running))
        talks.append(engine.talk(HELLO, [Sampling(max_tokens=4096)], client="flood"))
        with pytest.raises(BusyError, match="5 chat requests of this client"):
            engine.talk(HELLO, [Sampling()], client="flood")
        other = engine.talk((Message("user", ("other",)),), [Sampling(max_tokens=3)], client="other")
        engine.leave(talks[0])
        engine.leave(talks[1])
        async for _ in talks[2]:
            break
        engine.leave(talks[2])
        async for _ in other:
            break
        assert not any(talk.answers for talk in talks[3:])
        stop(engine)

    run(scenario)


def test_a_server_without_chat_or_policy_says_so() -> None:
    async def scenario() -> None:
        engine = Engine(None, None)
        with pytest.raises(BlmError, match="no policy"):
            await engine.act(observation())
        with pytest.raises(BlmError, match="no chat"):
            engine.talk(HELLO, [Sampling()])
        await until(lambda: engine.health().status == "ok")
        stop(engine)

    run(scenario)
