"""Endpoints: a real HTTP server that misbehaves on purpose, and our own server."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from blm.app.chats import load_chat, open_endpoint
from blm.corpora.format.messages import Conversation
from blm.corpora.format.writing import write_corpus
from blm.evaluation import load_result
from blm.evaluation.digital import BENCHMARKS
from blm.evaluation.digital.answers import AnswerError
from blm.evaluation.digital.benchmarks import published
from blm.evaluation.digital.endpoint import Endpoint, EndpointSettings
from blm.evaluation.digital.runner import DigitalEvalConfig, evaluate_digital
from blm.evaluation.digital.thinking import THINKING_TOKENS
from blm.evaluation.result_files import write_result
from blm.types import BlmError, Image, KeyFacts, Message, Question, Sampling
from tests.support.benchmarks import make_fixture
from tests.support.commands import run_command
from tests.support.serving import EchoGenerator, Words, running


class Server(ThreadingHTTPServer):
    """Plays `script`, one step a request, then answers with the question's last word."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.lock, self.busy, self.most, self.delay = threading.Lock(), 0, 0, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None: ...


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def reply(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "small"}, {"id": "large"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.headers_seen.append(dict(self.headers))
            step = server.script.pop(0) if server.script else None
            server.busy += 1
            server.most = max(server.most, server.busy)
        time.sleep(server.delay)
        with server.lock:
            server.busy -= 1
        if step == "drop":
            self.connection.close()
        elif isinstance(step, tuple):
            status, value, *rest = step
            self.reply(status, value, **(rest[0] if rest else {}))
        else:
            text = body["messages"][-1]["content"][-1]["text"].split()[-1]
            self.reply(200, said(text))


def said(text: str | None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text, **more}, "finish_reason": "stop"}]}


def fault(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x"}}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def endpoint(server: Server, waits: list[float]) -> Iterator[Endpoint]:
    settings = EndpointSettings(attempts=3, timeout=10, concurrency=4)
    made = Endpoint("m", server.url, api_key="secret", settings=settings, sleep=waits.append)
    yield made
    made.close()


def ask(text: str) -> tuple[Message, ...]:
    return (Message("system", ("Be brief.",)), Message("user", (text,)))


def test_request_has_the_openai_form(server: Server, endpoint: Endpoint) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    messages = (Message("user", (Image(pixels), "say red")),)
    assert endpoint.answer(messages, max_tokens=7) == "red"
    body, headers = server.bodies[0], server.headers_seen[0]
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("m", 7, 0.0, 0)
    picture, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "say red"}
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), pixels)  # lossless


def test_only_transport_faults_are_tried_again(
    server: Server, endpoint: Endpoint, waits: list[float]
) -> None:
    server.script = ["drop", (503, fault("busy"))]
    assert endpoint.answer(ask("red")) == "red" and len(server.bodies) == 3 and waits == [1.0, 2.0]
    server.script = [(429, fault("slow down"), {"Retry_After": "7"}), (200, b'{"choices": [')]
    assert endpoint.answer(ask("red")) == "red" and waits[2:] == [7.0, 2.0]
    server.bodies.clear()
    server.script = [(200, said("I will not say"))]  # cannot be read as an answer: still asked once
    assert endpoint.answer(ask("red")) == "I will not say" and len(server.bodies) == 1
    assert all(body == server.bodies[0] for body in server.bodies)  # no rising temperature


def test_a_server_that_stays_unavailable_ends_the_run(server: Server, endpoint: Endpoint) -> None:
    server.script = [(500, b"oops")] * 3
    with pytest.raises(
        BlmError, match=r"no answer from 'm@.* in 3 attempts; last: status 500: oops.*are kept"
    ):
        endpoint.answer(ask("red"))
    gone = Endpoint("m", "http://127.0.0.1:9/v1", settings=EndpointSettings(attempts=2), sleep=lambda _: None)
    with pytest.raises(BlmError, match="ConnectError"):
        gone.answer(ask("red"))
    gone.close()


@pytest.mark.parametrize(
    "step, message",
    [
        ((401, fault("bad key")), r"refuses the API key \(status 401: bad key\); set OPENAI_API_KEY"),
        ((404, fault("no such model")), r"has no model 'm' .* it has: small, large"),
        ((418, b"teapot"), r"answers status 418: teapot"),
        ((200, {"choices": []}), r"does not have the OpenAI form"),
    ],
)
def test_permanent_errors_are_reported_clearly(
    server: Server, endpoint: Endpoint, step: tuple[int, Any], message: str
) -> None:
    server.script = [step]
    with pytest.raises(BlmError, match=message) as caught:
        endpoint.answer(ask("red"))
    assert not isinstance(caught.value, AnswerError) and len(server.bodies) == 1


def test_a_refused_question_affects_no_other(server: Server, endpoint: Endpoint) -> None:
    one = replace(endpoint.settings, concurrency=1)
    serial = Endpoint("m", server.url, settings=one, sleep=lambda _: None)
    server.script = [None, (400, fault("prompt too long")), None, (200, said(None, refusal="no faces"))]
    answers = serial.complete([ask(str(index)) for index in range(5)])
    serial.close()
    assert answers[::2] == [("0", True), ("2", True), ("4", True)]
    assert isinstance(answers[1], AnswerError) and "prompt too long" in str(answers[1])
    assert isinstance(answers[3], AnswerError) and "no faces" in str(answers[3])


def test_requests_are_concurrent_and_ordered(server: Server, endpoint: Endpoint) -> None:
    server.delay = 0.05
    start = time.monotonic()
    answers = endpoint.complete([ask(str(index)) for index in range(12)])
    assert answers == [(str(index), True) for index in range(12)]
    assert server.most == 4 and time.monotonic() - start < 12 * 0.05


def test_truncated_answers_and_thinking(server: Server, tmp_path: Path) -> None:
    """`length` marks an answer as cut, also without text: a server may keep thoughts apart."""
    cut = {"choices": [{"message": {"content": "<think> so"}, "finish_reason": "length"}]}
    nothing = {
        "choices": [{"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}]
    }
    server.script = [(200, cut), (200, nothing)]
    one = EndpointSettings(concurrency=1, thinking="off")
    with closing(Endpoint("m", server.url, cache=tmp_path, settings=one)) as endpoint:
        said = endpoint.complete([ask("1"), ask("2"), ask("3")])
        assert said == [("<think> so", False), ("", False), ("3", True)]
        assert endpoint.complete([ask("1"), ask("2"), ask("3")]) == said, "from the cache"
    assert len(server.bodies) == 3
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    with closing(Endpoint("m", server.url)) as plain:
        plain.answer(ask("1"))
    assert "chat_template_kwargs" not in server.bodies[-1]


def test_command_says_that_answers_were_cut(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_corpus(tmp_path / "corpus", 3)
    cut = {"choices": [{"message": {"content": "<think> 0 or 1"}, "finish_reason": "length"}]}
    server.script = [(200, cut)]
    run_eval(server, tmp_path / "corpus", tmp_path / "out", "--thinking", "on", "--concurrency", "1")
    shown = " ".join(capsys.readouterr().out.split())
    limit = BENCHMARKS["scene"].max_tokens + THINKING_TOKENS
    assert f"1 of 3 answers were cut at their limit ({limit} tokens" in shown and "truncated" in shown
    assert server.bodies[0]["max_tokens"] == limit
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": True}
    result = load_result(tmp_path / "out")
    assert [p.truncated for p in result.predictions] == [True, False, False]
    assert result.predictions[0].parsed is None
    assert "thoughts included" in (tmp_path / "out/report.html").read_text()
    run_eval(server, tmp_path / "corpus", tmp_path / "few", "--max-tokens", "3")
    assert server.bodies[-1]["max_tokens"] == 3


def test_cache(server: Server, tmp_path: Path) -> None:
    made = [Endpoint(model, server.url, cache=tmp_path) for model in ("m", "m", "other")]
    for endpoint in made:
        for _ in range(2):
            assert endpoint.answer(ask("red")) == "red"
    assert len(server.bodies) == 2  # the same model is asked once, whoever asks
    made[0].answer(ask("red"), max_tokens=9)
    with closing(Endpoint("m", server.url, cache=tmp_path, settings=EndpointSettings(seed=None))) as seedless:
        seedless.answer(ask("red"))
    assert len(server.bodies) == 4 and "seed" not in server.bodies[-1]
    server.script = [(400, fault("no"))]
    with pytest.raises(AnswerError):
        made[0].answer(ask("blue"))
    assert made[0].answer(ask("blue")) == "blue"  # a refusal is not kept
    for endpoint in made:
        endpoint.close()


QUESTIONS = [
    Question(id=str(i), kind="k", messages=(Message("user", (f"say {i}",)),), answer=str(i), group=str(i))
    for i in range(10)
]


def test_evaluation_over_an_endpoint_survives_an_outage(server: Server, tmp_path: Path) -> None:
    """The run stops at the outage, keeps what it had, and ends as if nothing had happened."""
    server.script = [None] * 5 + [(500, b"down")] * 2
    settings = EndpointSettings(attempts=2, concurrency=1, first_wait=0.0)
    endpoint = Endpoint("m", server.url, cache=tmp_path / "answers", settings=settings)
    config = DigitalEvalConfig(batch=3)
    with pytest.raises(BlmError, match="no answer from"):
        evaluate_digital(endpoint, QUESTIONS, tmp_path, model="m", config=config)
    asked = len(server.bodies)
    result = evaluate_digital(endpoint, QUESTIONS, tmp_path, model="m", config=config)
    assert result.summary.overall.rate == 1 and len(server.bodies) - asked == 5
    server.script = [(400, fault("refused"))]
    other = evaluate_digital(endpoint, QUESTIONS[:2], tmp_path / "b", model="m")
    assert other.summary.overall.rate == 1  # all from the cache
    endpoint.close()
    fresh = Endpoint("m", server.url, settings=settings)
    failed = evaluate_digital(fresh, QUESTIONS[:4], tmp_path / "c", model="m")
    fresh.close()
    assert failed.summary.overall.refused == 1 and failed.summary.overall.hits == 3
    assert failed.predictions[0].failure == "refused with status 400: refused"


class Echo(EchoGenerator):
    def begin(self, messages: Sequence[Message], sampling: Sampling) -> Words:
        seen = [image.pixels.shape for image in messages[-1].images]
        return Words(f"{messages[-1].text} {seen} {sampling.max_tokens}", 1, sampling.max_tokens)


def test_our_own_server_is_such_an_endpoint() -> None:
    messages = (Message("user", (Image(np.zeros((3, 5, 3), np.uint8)), "hi")),)
    with running(None, Echo(), name="BLM", api_key="k") as address:
        name = f"openai:BLM@http://{address}/v1"
        named = load_chat(name, api_key="k")
        assert isinstance(named.chat, Endpoint)
        assert named.chat.answer(messages, max_tokens=5) == "hi [(3, 5, 3)] 5"
        assert named.revision == f"BLM@http://{address}/v1"
        named.chat.close()
        with (
            closing(open_endpoint(name, api_key="wrong")) as locked,
            pytest.raises(BlmError, match="refuses the API key"),
        ):
            locked.answer(messages)
        with (
            closing(open_endpoint(name.replace("BLM@", "other@"), api_key="k")) as unknown,
            pytest.raises(BlmError, match=r"has no model 'other' .* it has: BLM"),
        ):
            unknown.answer(messages)


def test_names(tmp_path: Path) -> None:
    for bad in ("openai:m", "openai:m@localhost:8000", "openai:@http://h/v1"):
        with pytest.raises(BlmError, match="openai:MODEL@http"):
            load_chat(bad)
    with pytest.raises(BlmError, match=r"unknown model 'nan'. Did you mean 'nano'.* openai:MODEL@URL"):
        load_chat("nan")
    with closing(open_endpoint("openai:org/m@1@http://h/v1/")) as endpoint:
        assert endpoint.name == "org/m@1@http://h/v1"


# --- the commands, on such a server ---


def make_corpus(folder: Path, rows: int) -> None:
    """Conversations 'say 0', 'say 1', ..., each with a picture."""
    write_corpus(
        folder,
        [
            Conversation(
                id=f"c{index}",
                group=f"scene/{index}",
                source="test",
                kinds=("count",),
                messages=(
                    Message("user", (Image(np.full((4, 4, 3), index, np.uint8)), f"say {index}")),
                    Message("assistant", (str(index),)),
                ),
            )
            for index in range(rows)
        ],
    )


def run_eval(server: Server, data: Path, out: Path, *more: str, benchmark: str = "scene") -> None:
    where = ["--benchmark", benchmark, "--data", str(data), "--out", str(out)]
    run_command("eval digital", [*where, "--model", f"openai:m@{server.url}", *more])


def test_command_evaluates_a_corpus(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_corpus(tmp_path / "corpus", 6)
    server.script = [(200, said("9"))]
    baseline = ("--baseline-corpus", str(tmp_path / "corpus"))
    run_eval(server, tmp_path / "corpus", tmp_path / "out", *baseline, "--concurrency", "1")
    shown = capsys.readouterr().out
    assert "83.3%" in shown and "model minus question only: -16.7 points" in shown
    result = load_result(tmp_path / "out")
    assert result.protocol.benchmark == "scene" and result.model == f"m@{server.url}"
    assert "83 %" in (tmp_path / "out/report.html").read_text()
    run_eval(server, tmp_path / "corpus", tmp_path / "few", "--limit", "3")
    assert [p.id for p in load_result(tmp_path / "few").predictions] == ["c0/0", "c2/0", "c4/0"]
    for bad, message in (
        (("--coordinates", "inches"), "valid: thousandths"),
        (("--judge", "gpt"), "must have the form openai:MODEL@"),
    ):
        with pytest.raises(BlmError, match=message):
            run_eval(server, tmp_path / "corpus", tmp_path / "bad", *bad)
    with pytest.raises(SystemExit):
        run_eval(server, tmp_path / "corpus", tmp_path / "bad", "--limit", "0")
    assert "limit is 0; it must be 1 to" in capsys.readouterr().err
    with pytest.raises(BlmError, match=r"unknown benchmark 'robvqa'. Did you mean 'robovqa'"):
        run_eval(server, tmp_path, tmp_path / "bad", benchmark="robvqa")


def test_command_scores_free_questions_by_their_facts(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`scene_free` asks the free questions of a corpus only, and `scene` the others."""
    facts = KeyFacts(required=("red cube",), forbidden=("nothing",), things=("red cube", "blue ball"))
    write_corpus(
        tmp_path / "corpus",
        [
            Conversation(
                id=f"c{index}",
                group=f"c{index}",
                source="s",
                kinds=("free_see", "count"),
                messages=(
                    Message("user", (Image(np.full((4, 4, 3), index, np.uint8)), "What do you see?")),
                    Message("assistant", ("I see a red cube.",)),
                    Message("user", ("How many cubes?",)),
                    Message("assistant", ("1",)),
                ),
                facts=(facts, None),
            )
            for index in range(4)
        ],
    )
    server.script = [(200, said("There's a block that is red.")), (200, said("A red cube and a cat."))]
    more = ("--baseline-corpus", str(tmp_path / "corpus"), "--concurrency", "1")
    run_eval(server, tmp_path / "corpus", tmp_path / "out", *more, benchmark="scene_free")
    result = load_result(tmp_path / "out")
    assert {p.scorer for p in result.predictions} == {"facts"} and result.protocol.average == "kinds"
    assert [p.score for p in result.predictions] == [1, 0, 0, 0]
    assert result.predictions[1].facts.false == ("a cat",)
    assert result.baselines["majority"].summary.overall.rate == 1
    run_eval(server, tmp_path / "corpus", tmp_path / "closed")
    assert {p.kind for p in load_result(tmp_path / "closed").predictions} == {"count"}
    make_corpus(tmp_path / "none", 2)
    with pytest.raises(BlmError, match=r"no questions of 'scene_free'.*--free 1"):
        run_eval(server, tmp_path / "none", tmp_path / "bad", benchmark="scene_free")


def test_command_on_published_layouts(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures and clips go out as data URIs; parser and judge are named in the result."""
    for name in ("robovqa", "egothink"):
        make_fixture(name, tmp_path / name)
    flags = ("--compat", "cosmos_letter")
    run_eval(server, tmp_path / "robovqa", tmp_path / "a", *flags, benchmark="robovqa")
    assert load_result(tmp_path / "a").protocol.compat == "cosmos_letter"
    parts = server.bodies[0]["messages"][-1]["content"]
    assert {part["type"] for part in parts} == {"text", "image_url"}
    run_eval(server, tmp_path / "egothink", tmp_path / "b", "--judge", "match", benchmark="egothink")
    result, shown = load_result(tmp_path / "b"), capsys.readouterr().out
    assert len(result.summary.kinds) == 12 and result.summary.headline.average == "kinds"
    assert "not the paper's metric" in shown and "EgoThink" in shown and "BLM1" in shown
    limits = {body["max_tokens"] for body in server.bodies}
    assert {30, 300} <= limits
    with pytest.raises(BlmError, match="--judge openai:MODEL@URL"):
        run_eval(server, tmp_path / "egothink", tmp_path / "c", benchmark="egothink")


def as_benchmark(result: Path, out: Path, name: str) -> Path:
    """The same result under another benchmark's name."""
    found = load_result(result)
    write_result(out, replace(found, protocol=replace(found.protocol, benchmark=name)))
    return out


def test_table_in_the_papers_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Half:
        def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
            return str(int(messages[-1].text.split()[-1]) % 5)

    evaluate_digital(Half(), QUESTIONS, tmp_path / "r", model="mine")
    folders = [as_benchmark(tmp_path / "r", tmp_path / name, name) for name in published.SIX]
    page, text = tmp_path / "t.html", tmp_path / "t.md"
    for out in (page, text):
        run_command("eval table", [*map(str, folders), "--out", str(out)])
    lines = text.read_text().splitlines()
    assert (
        lines[2] == "| model | robovqa | agibot | holoassist | robofail | egothink | sharerobot | average |"
    )
    mine = next(line for line in lines if line.startswith("| mine"))
    assert mine.count("50.0 (24–76)") == 6 and mine.endswith("| 50.0 (39–61) |")
    theirs = next(line for line in lines if line.startswith("| BLM1"))
    assert "published, not measured" in theirs and "95.5 (90–98)" in theirs and theirs.endswith("| 64.9 |")
    assert "published, not measured" in page.read_text()
    assert "which 205 episodes of ShareRobot" in page.read_text()
    rows = [line.split(" | ") for line in lines if line.startswith("| mine | ")]
    found = {(row[1], row[2]) for row in rows if len(row) == 4}
    assert ("split", "RoboVQA: 10 of 110 questions") in found
    assert ("judge", "EgoThink: words were compared, no language model judged") in found
    assert not any(part == "data" for part, _ in found)
    run_command("eval table", [str(folders[0]), f"other={folders[1]}"])
    shown = capsys.readouterr().out
    assert "mine" in shown and "other" in shown and "–" not in shown.split("average")[0]
    for bad, message in (
        ([str(folders[0])] * 2, "two results of 'robovqa' for 'mine'"),
        ([str(folders[0]), "--out", "t.pdf"], "written as .md or .html"),
    ):
        with pytest.raises(BlmError, match=message):
            run_command("eval table", bad)


def test_published_rows_are_whole() -> None:
    """Averages as printed; EgoThink's and ShareRobot's means are the columns of the big table."""
    averages = (59.86, 50.38, 48.89, 50.28, 57.51, 58.55, 40.55, 56.01, 45.07, 53.14, 64.88)
    for (name, row), average in zip(published.DIGITAL.items(), averages, strict=True):
        assert np.mean(row) == pytest.approx(average, abs=0.011), name
        ego, share = published.EGOTHINK[name], published.SHAREROBOT[name]
        assert len(ego) == len(published.EGOTHINK_KINDS) and len(share) == len(published.SHAREROBOT_KINDS)
        assert np.mean(ego) == pytest.approx(row[4], abs=0.011), name
        assert np.mean(share) == pytest.approx(row[5], abs=0.03), name
    assert {*published.SIX} < {*BENCHMARKS}
