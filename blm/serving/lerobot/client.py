"""The client of a server that keeps what a policy remembers of an episode."""

from __future__ import annotations

from blm.serving.client import RemotePolicy
from blm.types import ActionChunk, BlmError, Observation, PolicyContract


class EpisodePolicy:
    """A `Policy` over OpenPI that opens a connection for each episode, which is new to the server."""

    def __init__(self, uri: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        """Connect to a server; see `RemotePolicy`. Raises BlmError if the connection fails."""
        self._uri, self._api_key, self._timeout_s = uri, api_key, timeout_s
        self._remote = self._connect()
        self._fresh = True

    def _connect(self) -> RemotePolicy:
        return RemotePolicy(self._uri, api_key=self._api_key, timeout_s=self._timeout_s)

    @property
    def contract(self) -> PolicyContract:
        return self._remote.contract

    def act(self, observation: Observation) -> ActionChunk:
        """Request the next action chunk; see `RemotePolicy.act`."""
        self._fresh = False
        return self._remote.act(observation)

    def reset(self) -> None:
        """Begin an episode. Raises BlmError if the server has another policy now."""
        if self._fresh:
            return
        contract = self.contract
        self._remote.close()
        self._remote, self._fresh = self._connect(), True
        if self.contract != contract:
            raise BlmError(f"the server at {self._uri} has another policy than at the episode before")

    def close(self) -> None:
        self._remote.close()
