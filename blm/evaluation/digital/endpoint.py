"""An OpenAI-compatible endpoint as a Chat: concurrent, with a cache on disk, retries and timeouts.

Requests without an answer are retried with exponential backoff: a dropped connection, 408, 429
(after Retry-After) and 5xx. A request that the server refuses for its content (400, 413, 422, a
content filter) is an `AnswerError` for that question alone. A wrong key, an unknown model and a
server that stays unavailable end the run; the same command resumes it.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import PIL.Image

from blm.addresses import is_loopback_url
from blm.evaluation.digital.answers import Answer, AnswerCache, AnswerError
from blm.evaluation.digital.thinking import Thinking
from blm.media import load_pixels
from blm.types import BlmError, Image, Message, require_numbers

REFUSED = (400, 413, 422)
"""Statuses for bad content of a request: prompt too long, image refused, content filter."""
RETRIED = (408, 429)
"""Statuses that are retried, as are all 5xx."""
LONGEST_WAIT = 60.0
"""Maximum wait between two attempts [s]."""


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """Sampling, concurrency, timeout and retries of an endpoint."""

    temperature: float = 0.0
    seed: int | None = 0
    """Sampling seed, sent with each request; None for servers that refuse one."""
    thinking: Thinking = "auto"
    """Whether the model thinks before it answers: sent as `enable_thinking` to the chat template
    (vLLM, SGLang), unless it is "auto"."""
    token_field: str = "max_tokens"
    """Field of the token limit; some models want max_completion_tokens."""
    concurrency: int = 8
    """Maximum number of concurrent requests."""
    attempts: int = 6
    """Maximum number of attempts per request."""
    timeout: float = 300.0
    """Timeout of one request [s]."""
    first_wait: float = 1.0
    """Wait before the second attempt [s]; it doubles with each further attempt."""

    def __post_init__(self) -> None:
        require_numbers(
            self, concurrency=(1, 1024), attempts=(1, 1000), timeout=(0, 1e6), first_wait=(0, 1e6)
        )
        require_numbers(self, temperature=(0, 100))


class Endpoint:
    """A model behind `url` (which ends in /v1). It is a `Chat`, and answers batches concurrently."""

    def __init__(
        self,
        model: str,
        url: str,
        *,
        api_key: str | None = None,
        cache: Path | None = None,
        settings: EndpointSettings | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.model = model
        self.url = url.rstrip("/")
        self.settings = settings or EndpointSettings()
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=self.settings.concurrency)
        try:
            self._client = httpx.Client(
                headers=headers,
                timeout=self.settings.timeout,
                limits=limits,
                trust_env=not is_loopback_url(self.url),  # no proxy for this machine
            )
        except (ImportError, ValueError) as error:
            raise BlmError(
                f"cannot use the proxy that the environment names for {self.url}: {error}"
            ) from error
        self._cache = AnswerCache(cache)
        self._sleep = sleep

    @property
    def name(self) -> str:
        """Model and address, for results and caches."""
        return f"{self.model}@{self.url}"

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        """Return the answer.

        Raises AnswerError for a refused conversation, BlmError for a server that fails.
        """
        return self._ask(messages, max_tokens).text

    def _ask(self, messages: Sequence[Message], max_tokens: int) -> Answer:
        body = self._body(messages, max_tokens)
        key = AnswerCache.key(self.url, body, "with its ending")
        kept = self._cache.get(key)
        if kept is None:
            kept = _answer_of(self._post(body))
            self._cache.put(key, kept)
        return kept

    def complete(
        self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 128
    ) -> list[tuple[str, bool] | AnswerError]:
        """Ask all conversations concurrently; return each answer and whether it came to its end.

        A refused one gives an AnswerError in its place. Raises BlmError like `answer`.
        """

        def ask(messages: Sequence[Message]) -> tuple[str, bool] | AnswerError:
            try:
                found = self._ask(messages, max_tokens)
            except AnswerError as error:
                return error
            return found.text, not found.truncated

        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = [pool.submit(ask, messages) for messages in conversations]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def close(self) -> None:
        self._client.close()

    def _body(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        settings = self.settings
        body: dict[str, Any] = {"model": self.model, "temperature": settings.temperature}
        body |= {"messages": [_message(message) for message in messages], settings.token_field: max_tokens}
        if settings.thinking != "auto":
            body["chat_template_kwargs"] = {"enable_thinking": settings.thinking == "on"}
        return body if settings.seed is None else {**body, "seed": settings.seed}

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        trouble = ""
        wait = 0.0
        for attempt in range(self.settings.attempts):
            if attempt:
                self._sleep(wait)
            wait = min(self.settings.first_wait * 2**attempt, LONGEST_WAIT)
            try:
                response = self._client.post(f"{self.url}/chat/completions", json=body)
                if response.status_code == 200:
                    reply: dict[str, Any] = response.json()
                    return reply
            except (httpx.TransportError, ValueError) as error:  # a truncated body is not JSON
                trouble = f"{type(error).__name__}: {error}"
                continue
            trouble = f"status {response.status_code}: {_reason(response)}"
            if response.status_code not in RETRIED and response.status_code < 500:
                raise self._refusal(response.status_code, trouble)
            wait = min(max(wait, _seconds(response.headers.get("Retry-After"))), LONGEST_WAIT)
        raise BlmError(
            f"no answer from '{self.name}' in {self.settings.attempts} attempts; last: {trouble}. Answers so "
            "far are kept: run the same command again when the server is available"
        )

    def _refusal(self, status: int, trouble: str) -> BlmError:
        if status in REFUSED:
            return AnswerError(f"refused with {trouble}")
        if status in (401, 403):
            return BlmError(f"'{self.url}' refuses the API key ({trouble}); set OPENAI_API_KEY or --api-key")
        if status == 404:
            return BlmError(f"'{self.url}' has no model '{self.model}' ({trouble}); it has: {self._models()}")
        return BlmError(f"'{self.name}' answers {trouble}")

    def _models(self) -> str:
        try:
            names = [str(entry["id"]) for entry in self._client.get(f"{self.url}/models").json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            names = []
        return ", ".join(names) or "(it does not say; does the address end in /v1?)"


def _message(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": [_part(part) for part in message.content]}


def _part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    buffer = io.BytesIO()
    PIL.Image.fromarray(load_pixels(part)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _answer_of(reply: dict[str, Any]) -> Answer:
    """Return the answer in a reply; empty if the model was cut while it thought.

    Raises AnswerError for an answer that a filter removed, and BlmError for any other form.
    """
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content")
        truncated = choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise BlmError(f"a reply does not have the OpenAI form ({error!r}): {str(reply)[:200]}") from error
    if text is None and not truncated:
        why = message.get("refusal") or f"finish reason {choice.get('finish_reason')}"
        raise AnswerError(f"the reply has no text ({why})")
    return Answer(str(text or ""), truncated)


def _reason(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return response.text[:300]


def _seconds(header: str | None) -> float:
    """Return Retry-After in seconds; 0 for a date or a missing header."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
