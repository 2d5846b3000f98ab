"""Load test of a server: latency of actions with and without chat, and whether replies are correct.

    python benchmarks/load.py CHECKPOINT [--robots 32] [--rate-hz 5] [--chats 8] [--seconds 60] [--out FILE]
    python benchmarks/load.py CHECKPOINT --worst [--only WORDS ..] [--server-source FOLDER] [--out FILE]

It starts `blm serve CHECKPOINT` in a separate process. Every robot has its own observation and every
chat its own question; the expected replies were requested once before, one at a time. There are two
phases of equal length: actions alone, then actions with chat. Latency is the time from when a request
was due until its reply, measured in the client. A robot whose reply is late sends its next request
when it has arrived, so with too many robots all of them become slower than their rate. Overhead is
the latency of one robot minus the time of the model. `--worst` measures the most expensive requests
instead; see worst_requests.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import tyro
from websockets.asyncio.client import connect
from worst_requests import table

from blm.app.model import BLM
from blm.evaluation.results import this_machine
from blm.serving.protocols.openpi import wire
from blm.serving.scheduler import blank_observation
from blm.types import Observation, PolicyContract


def main(
    checkpoint: tyro.conf.Positional[str],
    robots: int = 32,
    rate_hz: float = 5.0,
    chats: int = 8,
    seconds: float = 60.0,
    worst: bool = False,
    only: tuple[str, ...] = (),
    server_source: Path | None = None,
    out: Path | None = None,
) -> None:
    """Print the table; the exit status is 1 if a reply was lost, wrong or refused.

    Args:
        checkpoint: Folder or name of a release.
        robots: Number of simultaneous robots.
        rate_hz: Requests per second of each robot.
        chats: Number of simultaneous chat users.
        seconds: Duration of both phases together [s].
        worst: Measure the most expensive requests instead.
        only: With --worst, only the kinds whose name contains one of these words.
        server_source: Serve with the `blm` of this checkout, to compare versions.
        out: File to write the result to.
    """
    port = free_port()
    blm = str(Path(sys.executable).with_name("blm"))
    source = {} if server_source is None else {"PYTHONPATH": str(server_source)}
    server = subprocess.Popen([blm, "serve", checkpoint, "--port", str(port)], env={**os.environ, **source})
    result: dict[str, Any]
    try:
        wait_until_ready(port, server)
        if worst:
            generation = BLM.from_pretrained(checkpoint).generator()
            result = asyncio.run(table(port, server.pid, generation, only))
        else:
            result = asyncio.run(load(port, robots, rate_hz, chats, seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    result |= {
        "machine": this_machine().to_json(),
        "checkpoint": checkpoint,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    if worst:
        sys.exit(result["health"] != 200)
    sys.exit(bool(result["wrong_actions"] or result["wrong_answers"] or result["failed"]))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit("the server did not become ready")


def observations(contract: PolicyContract, count: int) -> list[Observation]:
    """Return different observations: random images, poses and seeds, for the robots in turn."""
    found = []
    for number in range(count):
        rng = np.random.default_rng(number)
        names = list(contract.action_spaces)
        blank = blank_observation(contract, names[number % len(names)])
        noise = {c: rng.integers(0, 256, i.shape, dtype=np.uint8) for c, i in blank.images.items()}
        state = blank.state + rng.normal(0, 0.05, blank.state.shape).astype(np.float32)
        found.append(
            Observation(
                images=noise, state=state, instruction="push the cube.", robot=blank.robot, seed=number
            )
        )
    return found


async def load(port: int, robots: int, rate_hz: float, chats: int, seconds: float) -> dict[str, Any]:
    """Run both phases."""
    tally: dict[str, Any] = {"wrong_actions": 0, "wrong_answers": 0, "failed": 0, "answers": 0, "actions": 0}
    address = f"ws://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as http:
        questions = [f"What can a robot with {number + 2} arms do?" for number in range(chats)]
        known = [await ask(http, question) for question in questions]
        async with connect(address, compression=None, max_size=None) as first:
            contract = PolicyContract.from_json(wire.unpack(cast(bytes, await first.recv())))
            seen = observations(contract, robots)
            wanted, overhead = [], []
            for one in seen:
                begin = time.perf_counter()
                reply = await act(first, one)
                overhead.append(1000 * (time.perf_counter() - begin) - reply["policy_timing"]["infer_ms"])
                wanted.append(reply["actions"])
        phases = {}
        for name, crowd in (("without chat", 0), ("with chat", chats)):
            end = time.perf_counter() + seconds / 2
            driving = [
                run_robot(address, one, chunk, rate_hz, number / robots, end, tally)
                for number, (one, chunk) in enumerate(zip(seen, wanted, strict=True))
            ]
            chatting = [
                run_chat(http, q, a, end, tally) for q, a in zip(questions[:crowd], known, strict=False)
            ]
            found, _ = await asyncio.gather(asyncio.gather(*driving), asyncio.gather(*chatting))
            values = [value for one in found for value in one]
            phases[name] = percentiles(values) | {"rate_hz": round(len(values) / robots / (seconds / 2), 2)}
        metrics = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    lines = [line.split() for line in metrics.splitlines() if line.startswith("blm_actions_together_")]
    together = {words[0]: float(words[1]) for words in lines}
    return {
        "robots": robots,
        "rate_hz": rate_hz,
        "chats": chats,
        "seconds": seconds,
        "latency_ms": phases,
        "p99_ratio": phases["with chat"]["p99"] / phases["without chat"]["p99"],
        "overhead_ms": percentiles(overhead),
        "observations_in_a_pass": together["blm_actions_together_sum"]
        / together["blm_actions_together_count"],
        **tally,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "p50": round(float(np.median(values)), 2),
        "p99": round(float(np.quantile(values, 0.99)), 2),
    }


async def act(socket: Any, observation: Observation) -> Any:
    await socket.send(wire.pack(wire.to_request(observation)))
    return wire.unpack(await socket.recv())


async def run_robot(
    address: str,
    observation: Observation,
    wanted: Any,
    rate_hz: float,
    phase: float,
    end: float,
    tally: dict[str, Any],
) -> list[float]:
    """Send the requests of one robot at its rate, or as fast as possible; return latencies [ms]."""
    latencies: list[float] = []
    async with connect(address, compression=None, max_size=None) as socket:
        await socket.recv()
        due = time.perf_counter() + phase / rate_hz
        while due < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            try:
                reply = await act(socket, observation)
            except Exception as error:
                tally["failed"] += 1
                print(f"an action failed: {error!r}", file=sys.stderr)
                return latencies
            latencies.append(1000 * (time.perf_counter() - due))
            tally["actions"] += 1
            tally["wrong_actions"] += not np.allclose(reply["actions"], wanted, atol=1e-3)
            due = max(due + 1 / rate_hz, time.perf_counter())
    return latencies


async def ask(http: httpx.AsyncClient, question: str) -> str:
    body = {
        "model": "BLM",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 32,
    }
    reply = await http.post("/chat/completions", json=body)
    reply.raise_for_status()
    return reply.json()["choices"][0]["message"]["content"]


async def run_chat(
    http: httpx.AsyncClient, question: str, known: str, end: float, tally: dict[str, Any]
) -> None:
    """Send the requests of one chat user, each as soon as the last answer has arrived."""
    while time.perf_counter() < end:
        try:
            answer = await ask(http, question)
        except httpx.HTTPError as error:
            tally["failed"] += 1
            print(f"a chat failed: {error!r}", file=sys.stderr)
            return
        tally["answers"] += 1
        tally["wrong_answers"] += answer != known


if __name__ == "__main__":
    tyro.cli(main)
