"""What a server counts and times, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The figures of one server; several servers may live in one process."""

    def __init__(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        """`waiting` tells how many requests of each kind wait or are being answered."""
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "blm_requests", "Requests, by kind and outcome", ("kind", "status"), registry=own
        )
        self.action = Histogram(
            "blm_action_seconds", "From observation received to chunk sent", buckets=SECONDS, registry=own
        )
        self.infer = Histogram(
            "blm_action_infer_seconds", "Of the pass that made a chunk", buckets=SECONDS, registry=own
        )
        self.together = Histogram(
            "blm_actions_together",
            "Observations in one pass, seen by each of them",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=own,
        )
        self.first_token = Histogram(
            "blm_chat_first_token_seconds", "From request to first token", buckets=SECONDS, registry=own
        )
        self.tokens = Counter("blm_chat_tokens", "Tokens of answers", registry=own)
        for kind in waiting():
            gauge = Gauge(f"blm_waiting_{kind}", f"How many {kind} wait or are in progress", registry=own)
            gauge.set_function(partial(_count, waiting, kind))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _count(waiting: Callable[[], Mapping[str, int]], kind: str) -> float:
    return waiting()[kind]
