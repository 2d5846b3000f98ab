"""GET /v1/models: the list of models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from blm.serving.errors import RequestError, quoted
from blm.serving.scheduler import ModelScheduler


def add_models(app: FastAPI, scheduler: ModelScheduler, name: str, serves: Sequence[str]) -> None:
    """Add GET /v1/models and GET /v1/models/NAME in OpenAI's format.

    They also have vLLM's `root` and `max_model_len`. `serves` lists the abilities of the model:
    "chat", "actions" or both.
    """
    created = int(time.time())

    def card() -> dict[str, Any]:
        capacity = scheduler.capacity
        context = None if capacity is None else capacity.context_tokens
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "blm",
            "root": name,
            "parent": None,
            "serves": list(serves),
            "max_model_len": context,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model:path}", responses={404: {"description": "unknown model"}})
    async def one_model(model: str) -> dict[str, Any]:
        if model != name:
            message = f"the model {quoted(model)} does not exist; this server has {quoted(name)}"
            raise RequestError(404, message, "model", "model_not_found")
        return card()
