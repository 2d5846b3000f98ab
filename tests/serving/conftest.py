"""A server of a policy and a generator that echo, and a client for its chat."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.serving import EchoGenerator, EchoPolicy, running


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(EchoPolicy(), EchoGenerator()) as address:
        yield address


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{server}/v1", api_key="none", max_retries=0) as client:
        yield client
