"""API keys, login sessions, and the host and origin policy."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shlex
import stat
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import HTTPConnection

from blm.addresses import is_loopback, read_authority, read_ip, to_url
from blm.serving.access.rate_limit import RateLimiter
from blm.serving.errors import RequestError
from blm.types import BlmError

SESSION_S = 12 * 3600.0
"""Lifetime of a login session [s]."""
MAX_SESSIONS = 256
"""Maximum number of login sessions; a further login ends the oldest one."""
LOGIN_TRIES = 10
"""Number of failed logins that one address may send at once."""
LOGIN_REFILL_S = 6.0
"""Time until a further login is allowed [s]."""
KEY_VARIABLE = "BLM_API_KEY"
MAX_KEY_FILE = 65536
"""Maximum size of a key file [bytes]."""
DEFAULT_PORTS = {"http": 80, "https": 443}
Origin = tuple[str, str, int]
"""Scheme, host in lower case, port."""

SECURITY_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every response, including errors.

With `no-referrer`, browsers would send 'Origin: null' with the login form (Fetch standard, "append
a request Origin header").
"""


@dataclass(frozen=True, kw_only=True)
class HostPolicy:
    """Host names of the server, in addition to loopback and IP addresses; allowed origins."""

    hosts: frozenset[str] = field(default_factory=frozenset)
    origins: frozenset[Origin] = field(default_factory=frozenset)

    @classmethod
    def read(cls, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> HostPolicy:
        """Read the values of --allowed-host and --allowed-origin.

        Raises BlmError for a malformed one.
        """
        names = set[str]()
        for host in hosts:
            try:
                name, port = read_authority(host)
            except ValueError:
                name, port = "", None
            if not name or port is not None:
                raise BlmError(
                    f"--allowed-host '{host[:80]}': expected a host name without port, such as robot.local"
                )
            names.add(name)
        pages = set[Origin]()
        for origin in origins:
            page = read_origin(origin.removesuffix("/"))
            if page is None:
                raise BlmError(
                    f"--allowed-origin '{origin[:80]}': expected scheme and host, such as https://lab.example"
                )
            pages.add(page)
        return cls(hosts=frozenset(names), origins=frozenset(pages))

    def knows_host(self, host: str) -> bool:
        return is_loopback(host) or read_ip(host) is not None or host in self.hosts


class AccessControl:
    """Keys, sessions and host policy of one server, at `app.state.access`.

    Without keys, the server is open to all.
    """

    def __init__(self, keys: Sequence[str] = (), host_policy: HostPolicy | None = None) -> None:
        """Raises BlmError for a key that is empty or has characters that a header cannot carry."""
        self._keys = tuple(check_key(key) for key in keys)
        self.host_policy = host_policy or HostPolicy()
        self.internal_key = secrets.token_urlsafe(32)
        """Accepted like a key and never shown: for requests of this process to its own server."""
        self.sessions = LoginSessions()
        self.login_limit = RateLimiter(LOGIN_TRIES, LOGIN_REFILL_S)

    @property
    def needs_key(self) -> bool:
        return bool(self._keys)

    def accepts(self, given: str) -> bool:
        """Return whether `given` is one of the keys. Compares in constant time."""
        data = given.encode("utf-8", "surrogateescape")
        known = [key.encode() for key in (*self._keys, self.internal_key)]
        return sum(hmac.compare_digest(data, key) for key in known) > 0

    def is_signed_in(self, connection: HTTPConnection) -> bool:
        """Return whether the client may use the server.

        On a server with keys, it needs a valid key or session.
        """
        return not self.needs_key or self.has_valid_key(connection)

    def has_valid_key(self, connection: HTTPConnection) -> bool:
        """Return whether the request has a valid key or session; False without keys."""
        given = _given_key(connection.headers.getlist("authorization"))
        if given is not None:
            return self.needs_key and self.accepts(given)
        token = connection.cookies.get(cookie_name(connection))
        return token is not None and self.needs_key and self.sessions.knows(token)

    def require(self, connection: HTTPConnection) -> None:
        """Raise RequestError 401 unless `is_signed_in`."""
        if not self.is_signed_in(connection):
            raise RequestError(401, "wrong or missing API key", code="invalid_api_key")


def read_origin(text: str) -> Origin | None:
    """Return scheme, host and port of an Origin header; None for 'null' and for a malformed one."""
    scheme, separator, authority = text.strip().lower().partition("://")
    if not separator or scheme not in DEFAULT_PORTS:
        return None
    try:
        host, port = read_authority(authority)
    except ValueError:
        return None
    return scheme, host, port or DEFAULT_PORTS[scheme]


def origin_text(origin: Origin) -> str:
    """Return an origin as browsers write it: without the default port of its scheme."""
    scheme, host, port = origin
    url = to_url(scheme, host, port)
    return url.removesuffix(f":{port}") if port == DEFAULT_PORTS[scheme] else url


class LoginSessions:
    """Random session tokens with an expiry time; only their hashes are stored, in memory."""

    def __init__(self) -> None:
        self._ends: OrderedDict[bytes, float] = OrderedDict()

    def start(self) -> str:
        """Return the token of a new session; beyond MAX_SESSIONS, the oldest session ends."""
        now = time.monotonic()
        for digest in [digest for digest, end in self._ends.items() if end <= now]:
            del self._ends[digest]
        while len(self._ends) >= MAX_SESSIONS:
            self._ends.popitem(last=False)
        token = secrets.token_urlsafe(32)
        self._ends[_digest(token)] = now + SESSION_S
        return token

    def knows(self, token: str) -> bool:
        """Return whether the session exists and has not expired."""
        return self._ends.get(_digest(token), float("-inf")) > time.monotonic()

    def end(self, token: str) -> None:
        self._ends.pop(_digest(token), None)

    def __len__(self) -> int:
        return len(self._ends)


def check_key(key: str) -> str:
    """Return the key if it is printable ASCII without spaces.

    Raises BlmError otherwise; the message does not contain the key.
    """
    if not key.strip():
        raise BlmError("the API key is empty; give at least one printable character, or no key")
    if not all("!" <= character <= "~" for character in key):
        raise BlmError(
            "the API key has spaces or characters beyond ASCII; use letters, digits and punctuation"
        )
    return key


def read_keys(
    given: str | None, file: Path | None, environment: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Return the keys of --api-key-file, --api-key or BLM_API_KEY, and warnings about them.

    Without any of these there are no keys. Raises BlmError for an empty key, file or variable,
    because a secret that is missing by mistake must not open the server.
    """
    if given is not None and file is not None:
        raise BlmError("give --api-key-file or --api-key, not both")
    if file is not None:
        return _keys_of_file(file)
    if given is not None:
        warning = "other users of this machine can see --api-key in `ps`; use BLM_API_KEY or --api-key-file"
        return [check_key(given)], [warning]
    if KEY_VARIABLE not in environment:
        return [], []
    if not environment[KEY_VARIABLE].strip():
        raise BlmError(f"{KEY_VARIABLE} is set but empty; set it to a key, or unset it to need no key")
    return [check_key(environment[KEY_VARIABLE])], []


def _keys_of_file(file: Path) -> tuple[list[str], list[str]]:
    try:
        with file.open("rb") as opened:
            mode, data = os.fstat(opened.fileno()).st_mode, opened.read(MAX_KEY_FILE + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise BlmError(f"cannot read --api-key-file '{file}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise BlmError(f"--api-key-file '{file}' is not a text file") from None
    if len(data) > MAX_KEY_FILE:
        raise BlmError(f"--api-key-file '{file}' has more than {MAX_KEY_FILE} bytes; write one key per line")
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise BlmError(f"--api-key-file '{file}' has no key; write one per line")
    shared = stat.S_ISREG(mode) and mode & 0o077 and os.name == "posix"
    warning = f"other users may read or change '{file}'; run: chmod 600 {shlex.quote(str(file))}"
    return [check_key(key) for key in keys], [warning] if shared else []


def cookie_name(connection: HTTPConnection) -> str:
    """Return the name of the session cookie.

    It contains the port, because browsers share the cookies of a host between its ports.
    """
    server = connection.scope.get("server") or ("", None)
    return f"blm_session_{server[1] or 'local'}"


def _given_key(values: Sequence[str]) -> str | None:
    """Return the key of the Authorization header; None without one, and for more than one."""
    if len(values) != 1:
        return None
    scheme, _, given = values[0].partition(" ")
    given = given.strip()
    return given if given and scheme.lower() in ("bearer", "api-key") else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
