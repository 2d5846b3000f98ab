"""Hosts, ports and addresses: parsing Host headers, recognising loopback, listening sockets."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urlsplit

from blm.types import BlmError

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})
"""Host names of loopback in /etc/hosts; without a dot, nobody can register them."""
_NAME = re.compile(r"(?!-)[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_AUTHORITY = re.compile(r"(?P<host>\[[0-9a-f:.]+(%[\w.-]+)?\]|[^:\[\]]*)(:(?P<port>\d{0,5}))?")
BACKLOG = 2048
"""Maximum number of connections that wait to be accepted; the system may have a lower limit."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
"""An IP address."""


def read_authority(text: str) -> tuple[str, int | None]:
    """Split 'host', 'host:port' or '[v6]:port', the form of a Host header.

    IPv6 may also come without brackets. The host is returned in lower case, without brackets and
    the trailing dot; the port is None if none is given. Raises ValueError for any other form: user
    names, spaces, ports beyond 65535.
    """
    text = text.lower()
    if ":" in text and (bare := read_ip(text)) is not None:
        return str(bare), None
    found = _AUTHORITY.fullmatch(text)
    if found is None or not found["host"]:
        raise ValueError(f"'{text[:60]}' is not HOST or HOST:PORT")
    host, port = found["host"], int(found["port"]) if found["port"] else None
    if port is not None and port > 65535:
        raise ValueError(f"port {port} is greater than 65535")
    address = read_ip(host[1:-1] if host.startswith("[") else host)
    if address is not None:
        return str(address), port
    if host.startswith("[") or not _NAME.fullmatch(host) or len(host) > 253:
        raise ValueError(f"'{host[:60]}' is neither a host name nor an address")
    return host.removesuffix("."), port


def read_ip(text: str) -> Address | None:
    """Return an IP literal, or None for any other text.

    An IPv4 address mapped into IPv6 is returned as IPv4.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def is_loopback(host: str) -> bool:
    """Return whether a host name or IP literal is loopback, without asking a name server."""
    address = read_ip(host.strip("[]"))
    return address.is_loopback if address else host.lower().removesuffix(".") in LOOPBACK_NAMES


def is_loopback_url(url: str) -> bool:
    """Return whether an http:// or ws:// URL is on loopback; such traffic must bypass proxies."""
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def to_url(scheme: str, host: str, port: int) -> str:
    """Return 'scheme://host:port', with brackets around IPv6."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_port(port: int, flag: str) -> None:
    """Raise BlmError unless the port is 0 .. 65535 (0: the system chooses a free one)."""
    if not 0 <= port <= 65535:
        raise BlmError(f"{flag} {port}: a TCP port must be 0 to 65535 (0: any free port)")


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Return the addresses that a server on `host` listens on.

    Raises BlmError for an unknown host.
    """
    if not host.strip():
        raise BlmError("--host is empty; give 127.0.0.1 (this machine only), an address, or 0.0.0.0 for all")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise BlmError(
            f"--host '{host[:80]}' is no address of this machine and no name it knows: {error}"
        ) from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def reaches_network(host: str) -> bool:
    """Return whether other machines could reach a server on `host`.

    Raises BlmError for an unknown host.
    """
    addresses = [read_ip(address[0].partition("%")[0]) for _, address in resolve(host, 0)]
    return not all(address is not None and address.is_loopback for address in addresses)


def listen(host: str, port: int, flag: str = "--port") -> list[socket.socket]:
    """Return listening sockets, one for each address of `host`, all on one port.

    Raises BlmError for a port that is taken, forbidden or invalid, and for a foreign address.
    """
    check_port(port, flag)
    sockets = list[socket.socket]()
    try:
        for family, address in resolve(host, port):
            if sockets and port == 0:  # the port that the first address got
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sockets.append(_bound(family, address))
            sockets[-1].listen(BACKLOG)
    except OSError as error:
        for one in sockets:
            one.close()
        raise BlmError(f"cannot listen on {host}, {flag} {port}: {_reason(error, flag)}") from None
    return sockets


def check_free(host: str, port: int, flag: str = "--port") -> None:
    """Raise BlmError if a server cannot listen there now. Call it before a long load."""
    for one in listen(host, port, flag):
        one.close()


def _bound(family: socket.AddressFamily, address: Any) -> socket.socket:
    created = socket.socket(family, socket.SOCK_STREAM)
    try:
        created.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT
        if family == socket.AF_INET6:
            created.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        created.bind(address)
    except OSError:
        created.close()
        raise
    return created


def _reason(error: OSError, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"another program has it; stop that, or choose another {flag}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "this user may not; choose a port from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return "the address belongs to no interface of this machine"
    return str(error)
