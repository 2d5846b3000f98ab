"""The most expensive requests that a server accepts, attacks that it must refuse, and their delays.

One robot requests actions continuously while one request of each kind is served. A row of the table
has the outcome of the request, the robot's median and longest wait in that time, the ratio of that
wait to an ordinary decision, and the growth of the server's memory. Run it with `python
benchmarks/load.py CHECKPOINT --worst`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import httpx
import msgpack
import numpy as np
from PIL import Image as Pillow
from websockets.asyncio.client import connect

from blm.backbone.generation.generator import Generation
from blm.serving.protocols.openpi import wire
from blm.serving.scheduler import blank_observation
from blm.types import MAX_INSTRUCTION, BlmError, Message, PolicyContract, Sampling

PATIENCE_S = 30.0
"""Timeout after which a request is abandoned, as a client may do [s]."""
ORDINARY_S = 3.0
"""Time in which the robot is the only client at first [s]."""
AFTER_S = 0.3
"""Time in which the robot continues after a request, to measure its after-effects [s]."""
Send = Callable[[httpx.AsyncClient, str], Awaitable[str]]


def requests_of(generation: Generation) -> dict[str, Send]:
    """Return the requests by kind.

    Those whose names begin with "attack" must be refused, all others served.
    """
    text = longest_text(generation, 64)
    part = {"type": "text", "text": "a"}
    context = generation.context_length
    rows: dict[str, Send] = {
        "chat of the longest text": chat(text, max_tokens=16),
        "chat of 8 answers to a long text": chat(
            longest_text(generation, 512), n=8, max_tokens=64, temperature=1
        ),
        "chat of 8 long answers": chat("Count.", n=8, max_tokens=context, temperature=2.0),
        "chat of the most turns": raw({"messages": [turn("a")] * (context // 8), "max_tokens": 4}),
        "chat of the most parts": chat([part] * (context // 8), max_tokens=4),
        "chat of the most pictures": chat(pictures(generation.capacity.max_images, 112), max_tokens=4),
        "chat of 30 pictures of 1 MP": chat(pictures(30, 1024), max_tokens=4),
        "chat of one large picture": chat(pictures(1, 4000), max_tokens=4),
        "chat of 4 long stop strings": chat(
            "Count.", stop=["x" * 60 + str(n) for n in range(4)], max_tokens=256
        ),
        "count of the longest text": post("/tokenize", {"prompt": text}),
        "observation of the longest instruction": frame(
            {wire.PROMPT: ("push the cube " * 100)[:MAX_INSTRUCTION]}
        ),
        "attack: 10 MB of text": chat("word " * 2_000_000),
        "attack: a megabyte of wrong messages": raw({"messages": [{"role": "x"}] * 70_000}),
        "attack: 60 large pictures of one bit": chat(pictures(60, 3990, mode="1"), max_tokens=4),
        "attack: a million stop strings": chat("Count.", stop=[f"{n:06}" for n in range(1_000_000)]),
        "attack: a million parts": chat([part] * 1_000_000),
        "attack: a robot with a name of 8 MB": frame({wire.ROBOT: "x" * 2**23}),
        "attack: a frame of tiny deep items": frame({"x": deep(2_000_000)}),
        "attack: an instruction of a megabyte": frame({wire.PROMPT: "push " * 200_000}),
    }
    return rows


def longest_text(generation: Generation, room: int) -> str:
    """Return a text that leaves `room` tokens of the context."""
    words, context = "Is there a red cube on the table? ", generation.context_length
    count = context
    while True:
        try:
            tokens = generation.prepare((Message("user", (words * count,)),), [Sampling()]).tokens
        except BlmError:
            count = count * 9 // 10
            continue
        if tokens <= context - room:
            return words * count
        count = min(count - 1, count * (context - room) // tokens)


def deep(items: int) -> Any:
    """Return many small containers nested in each other, in many containers."""
    value: Any = []
    for _ in range(200):
        value = [value]
    return [value] * (items // 200)


def pictures(count: int, side: int, mode: str = "RGB") -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    if mode == "1":
        Pillow.new("1", (side, side)).save(buffer, "PNG")
    else:
        small = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Pillow.fromarray(small).resize((side, side)).save(buffer, "JPEG")
    url = "data:image/*;base64,".replace("*", "png" if mode == "1" else "jpeg")
    url += base64.b64encode(buffer.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}] * count


def turn(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chat(content: Any, **others: Any) -> Send:
    return raw({"messages": [turn(content)], **others})


def raw(body: dict[str, Any]) -> Send:
    return post("/v1/chat/completions", body)


def post(path: str, body: dict[str, Any]) -> Send:
    content = json.dumps({"model": "BLM", **body}).encode()

    async def send(http: httpx.AsyncClient, address: str) -> str:
        reply = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        return str(reply.status_code)

    return send


def frame(change: dict[str, Any]) -> Send:
    async def send(http: httpx.AsyncClient, address: str) -> str:
        async with connect(address, compression=None, max_size=None) as socket:
            contract = PolicyContract.from_json(wire.unpack(cast(bytes, await socket.recv())))
            observation = blank_observation(contract, next(iter(contract.action_spaces)))
            packed = wire.pack(wire.to_request(observation))
            await socket.send(msgpack.packb({**msgpack.unpackb(packed), **change}))
            reply = await socket.recv()
            return "refused" if isinstance(reply, str) else "served"

    return send


async def table(port: int, pid: int, generation: Generation, only: Sequence[str] = ()) -> dict[str, Any]:
    """Return the ordinary decision and a row for each kind whose name has one of `only`."""
    address = f"ws://127.0.0.1:{port}"
    chosen = {
        kind: send
        for kind, send in requests_of(generation).items()
        if not only or any(word in kind for word in only)
    }
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
        ordinary = await waits_during(address, lambda: asyncio.sleep(ORDINARY_S))
        rows = {}
        for kind, send in chosen.items():
            before = reset_peak(pid)
            start, outcome = time.perf_counter(), list[str]()

            async def request(send: Send = send, outcome: list[str] = outcome) -> None:
                outcome.append(await outcome_of(send, http, address))
                await asyncio.sleep(AFTER_S)

            waits = await waits_during(address, request)
            rows[kind] = {
                "outcome": outcome[0],
                "seconds": round(time.perf_counter() - start - AFTER_S, 2),
                **waits,
                "stall_ms": round(waits["max_ms"] - ordinary["max_ms"], 1),
                "memory_mb": round((peak(pid) - before) / 2**20, 1),
            }
            print(kind, json.dumps(rows[kind]), file=sys.stderr, flush=True)
        alive = (await http.get("/health")).status_code
    return {"ordinary": ordinary, "worst": rows, "health": alive}


async def outcome_of(send: Send, http: httpx.AsyncClient, address: str) -> str:
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await send(http, address)
    except (TimeoutError, httpx.TimeoutException):
        return "given up"
    except Exception as error:  # the server closed the connection, which is also a refusal
        return f"refused ({type(error).__name__})"


async def waits_during(address: str, work: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    """Return the waits of a robot that requests actions continuously while `work` runs."""
    waits, asked = list[float](), 0.0
    async with connect(address, compression=None, max_size=None, ping_interval=None) as socket:
        contract = PolicyContract.from_json(wire.unpack(cast(bytes, await socket.recv())))
        packed = wire.pack(wire.to_request(blank_observation(contract, next(iter(contract.action_spaces)))))

        async def drive() -> None:
            nonlocal asked
            while True:
                asked = time.perf_counter()
                await socket.send(packed)
                await socket.recv()
                waits.append(1000 * (time.perf_counter() - asked))

        await socket.send(packed)
        await socket.recv()
        driving = asyncio.create_task(drive())
        await work()
        so_far = 1000 * (time.perf_counter() - asked)
        if not waits or so_far > max(waits):  # the robot is still waiting
            waits.append(so_far)
        driving.cancel()
        with suppress(asyncio.CancelledError):
            await driving
    return {
        "decisions": len(waits),
        "p50_ms": round(float(np.median(waits)), 1),
        "max_ms": round(max(waits), 1),
    }


def reset_peak(pid: int) -> int:
    """Reset the kernel's peak memory of a process; return its present memory [bytes]."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return status_of(pid, "VmRSS")


def peak(pid: int) -> int:
    """Return the peak resident memory since `reset_peak` [bytes]."""
    return status_of(pid, "VmHWM")


def status_of(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
