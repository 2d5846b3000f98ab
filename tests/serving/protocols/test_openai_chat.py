"""Chat in the OpenAI form: hostile sizes, pictures of all kinds, fields, thinking, tokens."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from blm.backbone import build_nano
from blm.backbone.generation.generator import Generation
from blm.serving.errors import MESSAGE_CHARACTERS, RequestError, quoted
from blm.serving.protocols.openai import request_body
from blm.serving.protocols.openai.conversation import DEFAULT_CAPACITY, ChatLimits, parse_request
from blm.serving.protocols.openai.reply import ChoiceState, VisibleText, overlap
from blm.serving.protocols.openai.request_body import MemoryBudget, Reservation
from blm.serving.protocols.openai.schema import DEFAULTS, IGNORED
from blm.types import ChatCapacity, Message, Sampling
from tests.support.memory import MEGABYTE, data_uri, memory_below
from tests.support.serving import (
    CONTRACT,
    JSON,
    PNG,
    EchoGenerator,
    EchoPolicy,
    Words,
    ask,
    body,
    picture,
    png,
    running,
)

LIMITS = ChatLimits()


def refused(
    request: dict[str, Any] | bytes, limits: ChatLimits = LIMITS, capacity: ChatCapacity = DEFAULT_CAPACITY
) -> str:
    """The message with which a request is refused, which must be short and quick."""
    data = request if isinstance(request, bytes) else json.dumps(request).encode()
    start = time.process_time()
    with pytest.raises(RequestError) as caught:
        parse_request(data, limits, capacity).conversation.decoded()
    assert time.process_time() - start < 1.5
    assert caught.value.status == 400 and len(json.dumps(caught.value.to_json())) < 2 * MESSAGE_CHARACTERS
    return str(caught.value)


# --- sizes ---

NANO = ChatCapacity(context_tokens=4096, image_tokens=16, max_text_bytes=65_536, max_images=8)
BIG_PNG = data_uri(Pillow.new("1", (3900, 3900)), compress_level=9)
HOSTILE: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "10 MB of text": (body("a" * 10 * MEGABYTE), "10485760 bytes of text.*4096 tokens"),
    "10 MB of text in parts": (
        body([{"type": "text", "text": "a" * MEGABYTE}] * 10),
        "10485760 bytes of text",
    ),
    "invalid messages": ({**body("x"), "messages": [{"role": "robot"}] * 12_000}, "messages.0.role"),
    "invalid messages that are many": ({**body("x"), "messages": [7] * 500_000}, "at most"),
    "invalid parts": (body([{"type": "nothing"}] * 12_000), "parts are not supported"),
    "messages": ({**body("x"), "messages": [{"role": "user", "content": "a"}] * 10_000}, "10000 messages"),
    "empty parts": (body([{"type": "text", "text": ""}] * 10_000), "10001 messages and parts"),
    "60 large pictures of 1 bit": (body(picture(BIG_PNG) * 60), "60 images; at most 8"),
    "8 large pictures of 1 bit": (body(picture(BIG_PNG) * 8), "at most 32000000 together"),
    "30 ordinary pictures": (body(picture(PNG + png((1, 2, 3))) * 30), "30 images; at most 8"),
    "stop strings": (body("x", stop=["a"] * 2_000_000), "characters"),
    "many stop strings": (body("x", stop=["a"] * 1000), "stop.*at most 16"),
    "a long stop string": (body("x", stop="a" * MEGABYTE), "stop.*at most 256"),
    "a long stop string in a list": (body("x", stop=["a" * MEGABYTE]), "stop.*at most 256"),
    "a deep body": (b'{"a":' * 10_000, "not JSON"),
    "a deep list": (b'{"messages":' + b"[" * 9_000, "not JSON"),
    "a long model name": ({**body("x"), "model": 5, "user": "a" * MEGABYTE}, "model"),
    "a long role": ({**body("x"), "messages": [{"role": "r" * MEGABYTE}]}, "messages.0.role"),
    "a long type of part": (body([{"type": "t" * MEGABYTE}]), "parts are not supported"),
    "a long field name": (body("x", **{"f" * MEGABYTE: 1}), "unknown field"),
    "many field names": (body("x", **{f"field{n}": n for n in range(10_000)}), "unknown field"),
    "a long value": (body("x", response_format="j" * MEGABYTE), "response_format"),
    "a large value": (body("x", tools=[{"a": n} for n in range(9_000)]), "tools: a list of 9000"),
    "a long url": (body(picture("http://" + "a" * MEGABYTE)), "does not load URLs"),
    "a long head of an url": (
        body(picture("data:image/" + "a" * MEGABYTE + ";base64,")),
        "does not load URLs",
    ),
    "parameters of an url": (
        body(picture("data:image/png" + ";a=b" * MEGABYTE + ";base64,")),
        "does not load",
    ),
    "tool calls": (
        {
            "model": "BLM",
            "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a" * 90}}] * 9_000}],
        },
        "bytes of text",
    ),
    "1e400": (b'{"model":"BLM","messages":[{"role":"user"}],"temperature":1e400}', "temperature.*finite"),
    "NaN": (b'{"model":"BLM","messages":[],"temperature":NaN}', "not JSON"),
    "-Infinity": (b'{"model":"BLM","messages":[],"temperature":-Infinity}', "not JSON"),
    "a huge integer": (body("x", seed=10**4000), "seed.*an integer of more than 40 digits"),
    "a million digits": (b'{"seed":' + b"1" * MEGABYTE + b"}", "not JSON"),
    "half a surrogate pair": (b'{"model":"\\ud800"}', "not JSON"),
    "a surrogate in UTF-8": (b'{"model":"\xed\xa0\x80"}', "not JSON"),
    "no UTF-8": (b'{"model":"\xff"}', "not JSON"),
    "two documents": (b"{} {}", "not JSON"),
    "a list": (b"[1]", "a list of 1; expected a JSON object"),
    "nothing": (b"", "not JSON"),
}


@pytest.mark.parametrize("request_, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_requests_are_refused_soon_and_in_a_few_words(request_, message: str) -> None:
    import re

    assert re.search(message, refused(request_, capacity=NANO))


def test_a_refusal_takes_little_memory() -> None:
    requests = [
        json.dumps(HOSTILE[name][0]).encode() for name in ("8 large pictures of 1 bit", "10 MB of text")
    ]
    for data in requests:
        with memory_below(4 * len(data) + 4 * MEGABYTE):
            refused(data, capacity=NANO)


def test_a_name_given_twice_has_its_last_value() -> None:
    data = b'\xef\xbb\xbf{"model":"a","model":"BLM","messages":[{"role":"user","content":"x\\u0000"}]}'
    parsed = parse_request(data, LIMITS)
    assert parsed.request.model == "BLM"
    assert parsed.conversation.decoded() == (Message("user", ("x\0",)),)


def test_requests_that_fit_the_context_are_accepted() -> None:
    """The largest requests of each kind that a model could answer are not refused for their size."""
    for content in (
        "{" * NANO.context_tokens * 8,
        "a" * NANO.max_text_bytes,
        [{"type": "text", "text": "a"}] * (NANO.context_tokens - 1),
        picture(PNG + png((1, 2, 3), size=(2000, 2000))) * 8,
    ):
        data = json.dumps(body(content)).encode()
        assert len(data) <= LIMITS.body(NANO)
        parse_request(data, LIMITS, NANO)


def test_the_body_limit_follows_from_what_the_model_holds() -> None:
    few = ChatCapacity(context_tokens=512, image_tokens=64, max_text_bytes=8192, max_images=1)
    assert LIMITS.body(few) < 5 * MEGABYTE < 16 * MEGABYTE < LIMITS.body(NANO) < 20 * MEGABYTE
    assert ChatLimits(body_bytes=7).body(NANO) == 7
    with running(None, EchoGenerator()) as address:
        url, most = f"http://{address}/v1/chat/completions", LIMITS.body(DEFAULT_CAPACITY)
        reply = httpx.post(url, content=b"{" + b" " * most, headers=JSON, timeout=30)
        assert reply.status_code == 413 and str(most) in reply.json()["error"]["message"]


class Announced:
    """A request whose body never comes."""

    headers = {"content-length": str(10**12)}  # noqa: RUF012

    async def stream(self) -> Any:
        raise AssertionError("the body was read")
        yield b""


def test_an_announced_body_that_is_too_large_is_not_read() -> None:
    reservation = Reservation(MemoryBudget(100))
    with pytest.raises(RequestError) as caught:
        asyncio.run(request_body.read_body(Announced(), 1000, reservation))  # type: ignore[arg-type]
    assert caught.value.status == 413


def test_memory_of_all_requests_is_bounded_and_comes_back() -> None:
    budget = MemoryBudget(100)
    first, second = Reservation(budget), Reservation(budget)
    first.hold(250)  # alone, it may exceed the budget
    with pytest.raises(RequestError) as caught:
        second.hold(1)
    assert caught.value.status == 503
    first.hold(60)
    second.hold(40)
    with pytest.raises(RequestError):
        second.hold(41)
    assert budget.held == 100
    first.release()
    first.release()
    second.hold(5)
    assert budget.held == 5
    second.release()
    assert budget.held == 0


def test_many_large_bodies_neither_stall_the_server_nor_fill_its_memory() -> None:
    """Twenty at once: each is answered or told to come again; health and the smallest chat stay quick."""
    limits = ChatLimits(memory_bytes=48 * MEGABYTE)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    large = json.dumps(body(picture(data_uri(Pillow.fromarray(noise), compress_level=0)))).encode()
    app_memory = list[int]()
    with running(EchoPolicy(), EchoGenerator(), chat_limits=limits) as address:
        url, statuses = f"http://{address}/v1/chat/completions", list[int]()

        def post() -> None:
            reply = httpx.post(url, content=large, headers=JSON, timeout=60)
            statuses.append(reply.status_code)
            assert reply.status_code == 200 or reply.headers["retry-after"] == "1"

        threads = [threading.Thread(target=post) for _ in range(20)]
        for thread in threads:
            thread.start()
        slowest = 0.0
        with httpx.Client(timeout=30) as client:
            while any(thread.is_alive() for thread in threads):
                start = time.monotonic()
                assert client.get(f"http://{address}/health").status_code == 200
                slowest = max(slowest, time.monotonic() - start)
                app_memory.append(1)
                time.sleep(0.01)
            for thread in threads:
                thread.join()
            assert len(statuses) == 20 and set(statuses) <= {200, 503} and 200 in statuses
            assert slowest < 2, "on two busy cores; 30 s before"
            assert client.post(url, content=large, headers=JSON).status_code == 200, (
                "what was held has come back"
            )


def test_refused_and_abandoned_requests_give_their_memory_back() -> None:
    from blm.serving.app import create_app

    app = create_app(None, EchoGenerator())
    from tests.support.serving import running_app

    with running_app(app) as address:
        url = f"http://{address}/v1/chat/completions"
        budget: MemoryBudget = app.state.chat.budget
        for asked in (
            body("x"),
            body("x", stream=True),
            body("break"),
            body("long", stream=True),
            body("x", n=99),
        ):
            httpx.post(url, json=asked)
        for asked in (body("x" * 200_000), {**body("x"), "model": "other"}, body(picture("data:no"))):
            httpx.post(url, json=asked)
        with httpx.stream("POST", url, json=body("word " * 4000, stream=True, max_tokens=4000)) as reply:
            next(reply.iter_lines())
        end = time.monotonic() + 10
        while budget.held and time.monotonic() < end:
            time.sleep(0.01)
        assert budget.held == 0


@pytest.mark.parametrize("value", ["a" * 500, "\n\0é" * 100, 10**4000, 1.5, None, True, [1] * 9, {"a": 1}])
def test_quoted_values_are_short_and_on_one_line(value: object) -> None:
    assert len(quoted(value)) <= 62 and quoted(value).isprintable()


# --- fields ---


UNSUPPORTED: dict[str, list[Any]] = {
    "logprobs": [True, 5],
    "top_logprobs": [3],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, "text"],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "functions": [[{"name": "f"}]],
    "presence_penalty": [0.5, -2],
    "frequency_penalty": [1],
    "top_k": [40],
    "min_p": [0.1],
    "logit_bias": [{"50256": -100}],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "modalities": [["text", "audio"], ["audio"]],
    "prediction": [{"type": "content", "content": "x"}],
    "best_of": [3],
    "echo": [True],
    "store": [True],
    "guided_json": [{}],
    "guided_regex": ["a+"],
    "guided_choice": [["a"]],
    "structured_outputs": [{"regex": "a"}],
    "web_search_options": [{}],
    "min_tokens": [5],
    "ignore_eos": [True],
    "stop_token_ids": [[2]],
    "chat_template": ["{{ x }}"],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "continue_final_message": [True],
    "add_generation_prompt": [False],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, vs in UNSUPPORTED.items() for v in vs])
def test_unsupported_fields_are_refused_by_name(client: openai.OpenAI, name: str, value: Any) -> None:
    with pytest.raises(
        openai.BadRequestError, match=rf"{name}: .* not supported by this server; accepted"
    ) as told:
        ask(client, "x", extra_body={name: value})
    assert told.value.param == name and told.value.code == "unsupported_parameter"


@pytest.mark.parametrize("name", sorted({*DEFAULTS, *IGNORED}))
def test_defaults_of_unsupported_fields_are_accepted(client: openai.OpenAI, name: str) -> None:
    for value in (None, *DEFAULTS.get(name, ("anything",))):
        assert ask(client, "x", extra_body={name: value}).choices[0].message.content == "user: x"


@pytest.mark.parametrize(
    "name, close", [("max_token", "max_tokens"), ("temprature", "temperature"), ("stops", "stop")]
)
def test_misspelt_fields_get_a_hint(client: openai.OpenAI, name: str, close: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"unknown field '{name}'; did you mean '{close}'"):
        ask(client, "x", extra_body={name: 1})
    with pytest.raises(openai.BadRequestError, match="unknown field 'zzzzzzz'; supported: model, messages"):
        ask(client, "x", extra_body={"zzzzzzz": 1})


def test_common_extra_fields_are_accepted(client: openai.OpenAI) -> None:
    done = ask(
        client,
        "x",
        logprobs=False,
        n=1,
        response_format={"type": "text"},
        stop=None,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        seed=1,
        reasoning_effort="low",
        extra_body={"tools": [], "tool_choice": "auto", "stream": None, "stream_options": None, "top_k": -1},
    )
    assert done.choices[0].message.content == "user: x" and done.system_fingerprint == CONTRACT.revision
    assert ask(client, "x", extra_body={"stream_options": {"include_usage": True}}).usage.total_tokens == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_tokens": 0}, "max_tokens: .*greater than or equal to 1, got 0"),
        ({"max_completion_tokens": -5}, "max_completion_tokens: .*got -5"),
        ({"max_tokens": True}, "max_tokens.*integer, got true"),
        ({"max_tokens": "5"}, "max_tokens.*integer, got '5'"),
        ({"max_tokens": 5.5}, "max_tokens.*integer"),
        ({"temperature": 2.1}, "temperature.*got 2.1"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature.*number, got 'hot'"),
        ({"top_p": 1.01}, "top_p"),
        ({"n": 0}, "n: "),
        ({"stream": "yes"}, "stream.*boolean, got 'yes'"),
        ({"stop": 5}, "stop: .*got 5"),
        ({"stop": [5]}, "stop"),
        ({"messages": "hi"}, "messages.*list, got 'hi'"),
        ({"messages": [[]]}, "messages.0: .*got a list of 0"),
        ({"messages": [{"content": "x"}]}, "messages.0.role: Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: .*got 5"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content.0.text: Field required"),
        ({"model": None}, "model"),
    ],
)
def test_wrong_values_are_named_with_their_rule(server: str, change: dict[str, Any], message: str) -> None:
    import re

    reply = httpx.post(f"http://{server}/v1/chat/completions", json=body("x") | change)
    assert reply.status_code == 400 and re.search(message, reply.json()["error"]["message"]), reply.text


@pytest.mark.parametrize("kind", ["input_audio", "video_url", "file", "audio_url", "thinking"])
def test_parts_that_the_model_cannot_see_are_refused_by_name(client: openai.OpenAI, kind: str) -> None:
    with pytest.raises(
        openai.BadRequestError, match=f"content.1.type: '{kind}' parts are not supported; accepted: 'te"
    ):
        ask(client, [{"type": "text", "text": "x"}, {"type": kind, kind: {"data": "aaaa"}}])


def sampled(**fields: Any) -> Sampling:
    return parse_request(json.dumps(body("x", **fields)).encode(), LIMITS, NANO).request.samplings(4096)[0]


def test_sampling_parameters_are_parsed() -> None:
    assert sampled(max_tokens=10**30).max_tokens == 4096, "cut to the context, not refused"
    assert sampled(max_tokens=7, max_completion_tokens=9).max_tokens == 9
    assert sampled().max_tokens == 256 and sampled().temperature == 0
    assert sampled(temperature=1e-38).temperature == 0 and sampled(temperature=2).temperature == 2
    assert sampled(temperature=5e-324).temperature == 0
    assert 0 < sampled(top_p=0).top_p < 1e-6 and sampled(top_p=1).top_p == 1
    assert sampled(seed=-(2**63)).seed == 0 and sampled(seed=-1).seed == 2**63 - 1
    assert sampled(repetition_penalty=1.5).repetition_penalty == 1.5


def told(messages: list[dict[str, Any]]) -> tuple[Message, ...]:
    request = {"model": "BLM", "messages": messages}
    return parse_request(json.dumps(request).encode(), LIMITS).conversation.decoded()


def test_tool_calls_in_a_history_become_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "cube"}'}}
    history = told(
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "what is it"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call, {**call, "id": None}],
                "refusal": None,
            },
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "a cube"}]},
            {"role": "tool", "tool_call_id": "c9", "content": "?"},
            {"role": "assistant", "content": "hm", "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "1"},
            {
                "role": "assistant",
                "content": [{"type": "refusal", "refusal": "no"}],
                "reasoning_content": "so",
            },
            {"role": "user", "content": "and now", "name": "me", "tool_calls": None},
        ]
    )
    assert [(message.role, message.text) for message in history] == [
        ("system", "be brief"),
        ("user", "what is it"),
        ("assistant", 'Call of look({"at": "cube"})\nCall of look({"at": "cube"})'),
        ("user", "Result of look: a cube"),
        ("user", "Result of a tool: ?"),
        ("assistant", "hm\nCall of f({})"),
        ("user", "Result of f: 1"),
        ("assistant", "no"),
        ("user", "and now"),
    ]


def test_a_history_of_many_tools_is_read_in_linear_time() -> None:
    call = {"id": "c", "function": {"name": "f"}}
    turns = [{"role": "assistant", "tool_calls": [{**call, "id": f"c{n}"}]} for n in range(2000)]
    turns += [{"role": "tool", "tool_call_id": f"c{n % 2000}", "content": ""} for n in range(2000)]
    start = time.process_time()
    parse_request(json.dumps({"model": "BLM", "messages": turns}).encode(), LIMITS, NANO)
    assert time.process_time() - start < 1


def test_forms_of_content(client: openai.OpenAI) -> None:
    uri = PNG + png((200, 10, 30))
    for part in (
        {"type": "image_url", "image_url": uri},
        {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        {"type": "input_image", "image_url": uri},
    ):
        answer = ask(client, [part, {"type": "input_text", "text": "colour?"}]).choices[0].message.content
        assert answer == "user: colour? (200, 10, 30)"
    assert (
        told([{"role": "user", "content": None}, {"role": "user", "content": []}, {"role": "user"}])
        == (Message("user", ()),) * 3
    )


# --- answers ---


class Thinker(EchoGenerator):
    """Thinks before it answers; a token is a character."""

    ANSWER = "<think>two cubes </think>\n 2 cubes"

    def begin(self, messages: Sequence[Message], sampling: Sampling) -> Words:
        words = Words("", 3, sampling.max_tokens)
        words.words = list(self.ANSWER)
        return words


@pytest.fixture(scope="module")
def thinker() -> Iterator[str]:
    with running(None, Thinker(), reasoning="separate") as address:
        yield address


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, str]:
    chunks = list(ask(client, "x", stream=True, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    return (
        "".join(delta.content or "" for delta in deltas),
        "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
    )


@pytest.mark.parametrize(
    "extra, content, thinking",
    [
        ({}, "2 cubes", "two cubes "),
        ({"separate_reasoning": True}, "2 cubes", "two cubes "),
        ({"separate_reasoning": False}, Thinker.ANSWER, ""),
        ({"include_reasoning": False}, "2 cubes", ""),
    ],
)
def test_reasoning_can_be_separated(thinker: str, extra: dict[str, Any], content: str, thinking: str) -> None:
    with openai.OpenAI(base_url=f"http://{thinker}/v1", api_key="none", max_retries=0) as client:
        message = ask(client, "x", extra_body=extra).choices[0].message
        assert (message.content, getattr(message, "reasoning_content", None) or "") == (content, thinking)
        assert streamed(client, extra_body=extra) == (content, thinking)
        cut = ask(client, "x", max_tokens=12).choices[0]
        assert (cut.finish_reason, cut.message.content, cut.message.reasoning_content) == (
            "length",
            "",
            "two c",
        )
        stopped = ask(client, "x", stop="cubes <").choices[0]
        assert (stopped.finish_reason, stopped.message.reasoning_content) == ("stop", "two ")
        assert ask(client, "x").system_fingerprint is None


TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "think>", "a", "b ", " ", "\n", "</thi", "\ufffd"]),
    max_size=12,
)


@settings(max_examples=500, deadline=None)
@given(
    TEXTS.map("".join), st.lists(st.sampled_from(["a", "ab", "b a", "<", "aa<", " "]), max_size=3), st.data()
)
def test_streams_equal_whole_replies(text: str, stops: list[str], data: st.DataObject) -> None:
    """However an answer is cut into steps, content and thinking are the same, and nothing is taken back."""
    for reasoning in ("inline", "separate", "hidden"):
        whole = ChoiceState(0, stops, reasoning)
        whole.add(text, 9, "stop")
        steps = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
        answer, content, thinking = ChoiceState(0, stops, reasoning), "", ""
        for end in steps:
            if answer.finish is None:
                delta = answer.add(text[:end], end, None)
                content, thinking = content + delta.content, thinking + delta.reasoning
        if answer.finish is None:
            delta = answer.add(text, 9, "stop")
            content, thinking = content + delta.content, thinking + delta.reasoning
        assert (content, thinking) == (answer.split.content, answer.split.thinking)
        assert (content, thinking) == (whole.split.content, whole.split.thinking)
        assert answer.finish == "stop"
        if reasoning == "inline":
            assert thinking == "" and content == answer.text.sent
        else:
            assert not content.startswith("<think>") or text.count("<think>") > 1


@given(st.text("ab<", max_size=8), st.text("ab<", min_size=1, max_size=5))
def test_overlap_is_the_longest_beginning_at_the_end(text: str, mark: str) -> None:
    assert overlap(text, mark) == max(n for n in range(len(mark)) if text.endswith(mark[:n]) or n == 0)


def test_long_answers_with_hostile_stop_strings_take_linear_time() -> None:
    answer = VisibleText(["a" * 255 + c for c in "bcdefghijklmnopq"])
    start = time.process_time()
    for length in range(1, 4096):
        answer.add("a" * length, length, None)
    assert time.process_time() - start < 4
    assert len(answer.sent) >= 4095 - 256


def test_every_chunk_may_carry_the_token_counts(client: openai.OpenAI) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    chunks = list(ask(client, "a b c", stream=True, stream_options=usage))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert counts == sorted(counts) and counts[-1] == 4 and len(counts) >= 2


def test_an_error_while_an_answer_streams_is_its_last_event() -> None:
    class Breaks(EchoGenerator):
        def step(self) -> None:
            if any(len(answer.tokens) > 2 and len(answer.words) > 5 for answer in self.running):
                self.running = []
                raise RuntimeError("the weights are gone")
            super().step()

    with running(None, Breaks()) as address:
        url = f"http://{address}/v1/chat/completions"
        with httpx.stream("POST", url, json=body("one two three four five six", stream=True)) as reply:
            lines = [line for line in reply.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="the weights are gone"):
                list(ask(client, "one two three four five six", stream=True))
            assert ask(client, "x").choices[0].message.content == "user: x"


# --- models and tokens ---


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[str, Generation]]:
    generation = Generation(build_nano())
    with running(None, generation) as address:
        yield address, generation


def test_the_model_is_listed_with_its_context(nano: tuple[str, Generation], server: str) -> None:
    address, _ = nano
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none") as client:
        (card,) = client.models.list()
        assert card.id == card.root == "BLM" and card.max_model_len == 4096
        assert client.models.retrieve("BLM") == card
        with pytest.raises(openai.NotFoundError, match=r"'org/other' does not exist; this server has 'BLM'"):
            client.models.retrieve("org/other")
    assert httpx.get(f"http://{server}/v1/models").json()["data"][0]["max_model_len"] is None


def test_tokens_are_counted_as_the_model_reads_them(nano: tuple[str, Generation]) -> None:
    address, generation = nano
    uri = PNG + png((200, 10, 30), size=(30, 20))
    for content in ("How many cubes?", [*picture(uri), *picture(uri), {"type": "text", "text": "Which é?"}]):
        reply = httpx.post(f"http://{address}/tokenize", json={"messages": body(content)["messages"]}).json()
        done = httpx.post(
            f"http://{address}/v1/chat/completions", json=body(content, max_tokens=1), timeout=30
        )
        assert reply["count"] == len(reply["tokens"]) == done.json()["usage"]["prompt_tokens"]
        assert reply["max_model_len"] == 4096 and reply["token_strs"] is None
    inputs = generation.backbone.encode([told([{"role": "user", "content": "Which é?"}])])
    asked = {
        "model": "BLM",
        "messages": [{"role": "user", "content": "Which é?"}],
        "add_generation_prompt": True,
    }
    assert (
        httpx.post(f"http://{address}/tokenize", json=asked).json()["tokens"]
        == inputs["input_ids"][0].tolist()
    )


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_tokens_and_back(nano: tuple[str, Generation], text: str) -> None:
    address, _ = nano
    asked = {"prompt": text, "return_token_strs": True, "add_special_tokens": False}
    reply = httpx.post(f"http://{address}/tokenize", json=asked).json()
    assert len(reply["token_strs"]) == reply["count"]
    back = httpx.post(f"http://{address}/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back == {"prompt": text}


TOKENS_REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "neither": ("tokenize", {"model": "BLM"}, 400, "one of prompt and messages"),
    "both": ("tokenize", {"prompt": "a", "messages": [{"role": "user"}]}, 400, "exactly one"),
    "a long prompt": ("tokenize", {"prompt": "a" * MEGABYTE}, 400, "1048576 bytes of text"),
    "a long message": ("tokenize", {"messages": body("a" * MEGABYTE)["messages"]}, 400, "bytes of text"),
    "no picture": ("tokenize", {"messages": body(picture("data:x"))["messages"]}, 400, "does not load URLs"),
    "another model": ("tokenize", {"model": "gpt", "prompt": "a"}, 404, "does not exist"),
    "a slip": ("tokenize", {"promt": "a"}, 400, "did you mean 'prompt'"),
    "a reserved word": ("tokenize", {"messages": body("<image>")["messages"]}, 400, "reserved"),
    "no token": ("detokenize", {"tokens": [10**6]}, 400, "1000000 is not a token id"),
    "a negative token": ("detokenize", {"tokens": [-1]}, 400, "tokens.0"),
    "a huge token": ("detokenize", {"tokens": [10**400]}, 400, "an integer of more than 40 digits"),
    "many tokens": ("detokenize", {"tokens": [1] * 5000}, 400, "5000 tokens"),
    "very many tokens": ("detokenize", {"tokens": [1] * 10**6}, 400, "characters"),
    "text": ("detokenize", {"tokens": "abc"}, 400, "tokens"),
}


@pytest.mark.parametrize("route, asked, status, message", TOKENS_REFUSED.values(), ids=TOKENS_REFUSED)
def test_token_routes_keep_the_limits_of_chat(
    nano: tuple[str, Generation], route: str, asked: dict[str, Any], status: int, message: str
) -> None:
    reply = httpx.post(f"http://{nano[0]}/{route}", json=asked)
    assert reply.status_code == status and message in reply.json()["error"]["message"], reply.text


def test_tokens_are_counted_while_the_model_answers(nano: tuple[str, Generation]) -> None:
    """A tokenizer shared between threads raises 'Already borrowed' in one of them."""
    address, _ = nano
    failures = list[str]()

    def post(route: str, asked: dict[str, Any]) -> None:
        for _ in range(8):
            reply = httpx.post(f"http://{address}/{route}", json=asked, timeout=60)
            if reply.status_code != 200:
                failures.append(reply.text)

    content = [*picture(PNG + png((1, 2, 3))), {"type": "text", "text": "word " * 300}]
    work = itertools.cycle(
        [("tokenize", {"messages": body(content)["messages"]}), ("tokenize", {"prompt": "a b " * 500})]
    )
    threads = [threading.Thread(target=post, args=next(work)) for _ in range(4)]
    threads.append(threading.Thread(target=post, args=("v1/chat/completions", body(content, max_tokens=3))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_keys_guard_models_and_tokens() -> None:
    with running(None, Generation(build_nano()), api_key="sesame") as address:
        for path in ("v1/models", "v1/models/BLM"):
            assert httpx.get(f"http://{address}/{path}").status_code == 401
        for path in ("tokenize", "detokenize", "v1/chat/completions"):
            assert httpx.post(f"http://{address}/{path}", json={}).status_code == 401


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["tokenize", "detokenize"]),
    st.dictionaries(
        st.sampled_from(["model", "prompt", "messages", "tokens", "add_special_tokens", "return_token_strs"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=9)
        | st.lists(st.integers(0, 800) | st.just({"role": "user", "content": "x"}), max_size=4),
        max_size=4,
    ),
)
def test_token_routes_never_fail(nano: tuple[str, Generation], route: str, asked: dict[str, Any]) -> None:
    reply = httpx.post(f"http://{nano[0]}/{route}", json=asked)
    assert reply.status_code in (200, 400, 404), reply.text
