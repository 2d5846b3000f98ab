"""A factory of policies that has created one already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blm.types import Policy


class ReadyPolicy:
    """A picklable factory of policies, which has created one: its first call returns that one.

    So the contract is known before an evaluation, and a checkpoint is loaded and hashed once less.
    A copy in another process creates its own.
    """

    def __init__(self, make: Callable[[], Policy]) -> None:
        self._make = make
        self._ready: Policy | None = make()
        self.contract = self._ready.contract

    def __call__(self) -> Policy:
        """Return the policy that is ready, and then new ones."""
        ready, self._ready = self._ready, None
        return self._make() if ready is None else ready

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ready": None}
