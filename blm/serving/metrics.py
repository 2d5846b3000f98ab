"""Counters, gauges and histograms of a server, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
"""Bucket boundaries of latencies [s]."""


class Metrics:
    """The metrics of one server, in a separate registry per server."""

    def __init__(self, waiting: Callable[[], Mapping[str, int]]) -> None:
        """`waiting` returns the number of queued and running requests by kind."""
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "blm_requests", "Requests, by kind and outcome", ("kind", "status"), registry=own
        )
        self.action = Histogram(
            "blm_action_seconds",
            "From receiving an observation to sending its action chunk",
            buckets=SECONDS,
            registry=own,
        )
        self.infer = Histogram(
            "blm_action_infer_seconds",
            "Duration of the forward pass that produced a chunk",
            buckets=SECONDS,
            registry=own,
        )
        self.action_batch = Histogram(
            "blm_actions_together",
            "Batch size of the forward pass, counted once per observation",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=own,
        )
        self.first_token = Histogram(
            "blm_chat_first_token_seconds", "From request to first token", buckets=SECONDS, registry=own
        )
        self.tokens = Counter("blm_chat_tokens", "Generated tokens", registry=own)
        for kind in waiting():
            gauge = Gauge(f"blm_waiting_{kind}", f"Number of {kind} queued or in progress", registry=own)
            gauge.set_function(partial(_count, waiting, kind))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _count(waiting: Callable[[], Mapping[str, int]], kind: str) -> float:
    return waiting()[kind]
