"""Rate limits: token buckets, one for all events or one per address."""

from __future__ import annotations

import time
from collections import OrderedDict

MAX_ADDRESSES = 4096
"""Addresses whose failed tries are counted; the least recent one is forgotten first."""


class TokenBucket:
    """A rate limiter: `burst` events at once, and `rate` per second in the long run."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._tokens = float(burst)
        self._filled = time.monotonic()

    def wait_s(self) -> float:
        """Return the time until a token is available [s]; 0 if there is one now."""
        return max(0.0, (1 - self._refill()) / self.rate)

    def take(self) -> None:
        """Take a token, which the bucket owes if it has none."""
        self._tokens = self._refill() - 1

    def try_take(self) -> float:
        """Take a token and return 0, or return the time until a token is available [s]."""
        wait_s = self.wait_s()
        if not wait_s:
            self.take()
        return wait_s

    def _refill(self) -> float:
        now = time.monotonic()
        self._tokens = min(float(self.burst), self._tokens + self.rate * (now - self._filled))
        self._filled = now
        return self._tokens


class RateLimiter:
    """A token bucket per address: `burst` tries at once, then one per `refill_s` seconds.

    It keeps at most MAX_ADDRESSES buckets.
    """

    def __init__(self, burst: int, refill_s: float) -> None:
        self.burst, self.refill_s = burst, refill_s
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Return how long the address must wait before its next try [s]; 0 if it may try now."""
        bucket = self._buckets.get(address)
        return 0.0 if bucket is None else bucket.wait_s()

    def count(self, address: str) -> None:
        """Count a failed try."""
        bucket = self._buckets.pop(address, None) or TokenBucket(1 / self.refill_s, self.burst)
        bucket.take()
        self._buckets[address] = bucket
        while len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
