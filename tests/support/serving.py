"""Policies, generators and servers that the tests of serving share."""

from __future__ import annotations

import base64
import io
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import numpy as np
import openai
from fastapi import FastAPI
from openpi_client import msgpack_numpy
from PIL import Image as Pillow

from blm.serving.app import Server, create_app, server_config
from blm.serving.scheduler import TokenGenerator
from blm.types import (
    ActionChunk,
    ActionSpace,
    BlmError,
    Message,
    Observation,
    Policy,
    PolicyContract,
    Sampling,
)

SIDE = 8

JSON = {"Content-Type": "application/json"}

PNG = "data:image/png;base64,"


def space(robot: str, dim: int) -> ActionSpace:
    names = (*(f"joint{i}" for i in range(1, dim)), "gripper")
    units = (*("rad" for _ in range(1, dim)), "opening")
    return ActionSpace(robot=robot, names=names, units=units, low=(-3.0,) * dim, high=(3.0,) * dim)


CONTRACT = PolicyContract(
    action_spaces={"panda": space("panda", 8), "xarm6": space("xarm6", 7)},
    cameras=("base", "wrist"),
    image_size=SIDE,
    horizon=4,
    execute=2,
    revision="echo",
)


class EchoPolicy:
    """Actions that depend on every part of the observation, so that nothing can be lost on the way."""

    def __init__(self, contract: PolicyContract = CONTRACT) -> None:
        self.contract = contract

    def act(self, observation: Observation) -> ActionChunk:
        if observation.instruction == "break":
            raise RuntimeError("the weights are gone")
        base, wrist = (float(observation.images[camera].mean()) for camera in ("base", "wrist"))
        noise = np.random.default_rng(observation.seed).normal(size=(4, len(observation.state)))
        actions = observation.state + noise + base - 2 * wrist + len(observation.instruction)
        return ActionChunk(actions=actions.astype(np.float32))

    def reset(self) -> None: ...


class Words:
    """An answer in progress: each word with the space before it is a token."""

    def __init__(self, text: str, prompt_tokens: int, most: int) -> None:
        self.words = re.findall(r"\s*\S+", text)
        self.tokens, self.most, self.prompt_tokens = list[int](), most, prompt_tokens
        self.ended: Literal["stop", "length"] | None = None

    def go_on(self) -> None:
        self.tokens.append(len(self.tokens))
        if len(self.tokens) >= len(self.words):
            self.ended = "stop"
        elif len(self.tokens) >= self.most:
            self.ended = "length"


class EchoGenerator:
    """Says what it got, word by word: words, picture colours, and how it was to be drawn."""

    def __init__(self) -> None:
        self.running: list[Words] = []

    def start(
        self, conversations: Sequence[Sequence[Message]], samplings: Sequence[Sampling]
    ) -> Sequence[Words]:
        answers = [self.begin(*pair) for pair in zip(conversations, samplings, strict=True)]
        self.running += answers
        self.step()
        return answers

    def begin(self, messages: Sequence[Message], sampling: Sampling) -> Words:
        last = messages[-1]
        if last.text == "break":
            raise RuntimeError("the weights are gone")
        if last.text == "long":
            raise BlmError("the conversation has 9000 tokens, the model reads 4096")
        colours = [tuple(int(v) for v in image.pixels[0, 0]) for image in last.images]
        drawn = [f"seed {sampling.seed}"] if sampling.temperature else []
        text = " ".join([f"{messages[0].role}: {last.text}", *map(str, colours), *drawn])
        prompt = sum(len(message.text.split()) + 10 * len(message.images) for message in messages)
        return Words(text, prompt, sampling.max_tokens)

    def step(self) -> None:
        for answer in self.running:
            answer.go_on()
        self.running = [answer for answer in self.running if answer.ended is None]

    def drop(self, answer: Words) -> None:
        if answer in self.running:
            self.running.remove(answer)

    def text(self, answer: Words) -> str:
        return "".join(answer.words[: len(answer.tokens)])


def observation(robot: str = "panda", seed: int = 3, size: int = SIDE) -> Observation:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in ("base", "wrist")}
    state = rng.normal(size=CONTRACT.action_spaces[robot].dim).astype(np.float32)
    return Observation(images=images, state=state, instruction="push the cube", robot=robot, seed=seed)


def running(
    policy: Policy | None, generator: TokenGenerator | None, **options: object
) -> AbstractContextManager[str]:
    """A real server on a free port; gives 'host:port'."""
    return running_app(create_app(policy, generator, **options))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_app(app: FastAPI, **settings: object) -> Iterator[str]:
    config = server_config(app, port=0)
    for name, value in settings.items():
        setattr(config, name, value)
    server = Server(config)
    for name in ("uvicorn", "uvicorn.access"):  # their handlers hold the stderr of one captured test
        logging.getLogger(name).handlers.clear()
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "127.0.0.1:" + str(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def ask(client: openai.OpenAI, content: object, **options: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(
        model="BLM", messages=[{"role": "user", "content": content}], **options
    )


def png(color: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> str:
    buffer = io.BytesIO()
    Pillow.new(mode, size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def body(content: object, **others: object) -> dict[str, object]:
    return {"model": "BLM", "messages": [{"role": "user", "content": content}], **others}


def picture(url: str, **others: str) -> list[dict[str, object]]:
    return [{"type": "image_url", "image_url": {"url": url, **others}}]


@contextmanager
def foreign_openpi_server(seen: list[dict]) -> Iterator[str]:
    """As in OpenPI's own repository: some metadata first, then a chunk for each observation."""
    from websockets.sync.server import serve

    def talk(socket) -> None:
        socket.send(msgpack_numpy.packb({"policy": "pi0"}))
        for frame in socket:
            seen.append(msgpack_numpy.unpackb(frame))
            actions = np.tile(seen[-1]["observation/state"], (4, 1))
            socket.send(msgpack_numpy.packb({"actions": actions, "server_timing": {"infer_ms": 1.0}}))

    with serve(talk, "127.0.0.1", 0) as running_server:
        thread = threading.Thread(target=running_server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running_server.socket.getsockname()[1]}"
        running_server.shutdown()
        thread.join()


class EndlessGenerator(EchoGenerator):
    """Goes on until `enough` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.enough, self.steps = threading.Event(), 0

    def begin(self, messages: Sequence[Message], sampling: Sampling) -> Words:
        short = messages[-1].text == "Hello"
        return Words("Hello" if short else "word " * 100_000, 1, 100_000)

    def step(self) -> None:
        self.steps += 1
        time.sleep(0.001)
        if self.enough.is_set():
            for answer in self.running:
                answer.words = answer.words[: len(answer.tokens) + 1]
        super().step()


def connected(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen within 10 s"
        time.sleep(0.005)


class BatchEcho(EchoPolicy):
    """Waits for `go` and notes how many observations came together."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.sizes = threading.Event(), list[int]()

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        if observations[0].instruction != "hold still.":  # of the warm-up
            self.go.wait(10)
            self.sizes.append(len(observations))
        return [self.act(one) for one in observations]
