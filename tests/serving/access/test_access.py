"""Who may use the server: hosts, origins, keys and sessions; and what clients may do with connections."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blm import addresses
from blm.serving.access import keys as access_module
from blm.serving.access.keys import (
    AccessControl,
    HostPolicy,
    LoginSessions,
    check_key,
    read_keys,
    read_origin,
)
from blm.serving.access.login import login_page
from blm.serving.access.rate_limit import MAX_ADDRESSES, RateLimiter
from blm.serving.app import create_app
from blm.serving.client import RemotePolicy
from blm.types import BlmError
from tests.support.serving import (
    EchoGenerator,
    EchoPolicy,
    ask,
    body,
    connected,
    observation,
    running,
    wait_for,
)

KEY = "open-sesame"
HEADERS = {
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    host_policy = HostPolicy.read(["Robot.Local."], ["https://lab.example"])
    with running(EchoPolicy(), EchoGenerator(), access=AccessControl(host_policy=host_policy)) as address:
        yield address


@contextmanager
def page_running(access: AccessControl) -> Iterator[str]:
    """A server with a page at /playground, which shows the model's name."""
    app = create_app(EchoPolicy(), EchoGenerator(), access=access)

    @app.get("/playground")
    async def page() -> str:
        return "the page of blm-secret"

    from tests.support.serving import running_app

    with running_app(app) as address:
        yield address


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with page_running(AccessControl([KEY, "second-key"])) as address:
        yield address


def raw(address: str, request: str) -> tuple[int, dict[str, str], str]:
    """Send bytes as they are; return status, headers and body."""
    with connected(address) as opened:
        opened.sendall(request.encode("latin-1"))
        data = b""
        while chunk := opened.recv(65536):
            data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, rest.decode()


def get(address: str, *lines: str, path: str = "/version", version: str = "1.1") -> int:
    head = "\r\n".join([f"GET {path} HTTP/{version}", *lines, "Connection: close", "", ""])
    status, headers, text = raw(address, head)
    if "content-security-policy" in headers:
        assert HEADERS.items() <= headers.items()
        if status >= 400:
            assert json.loads(text)["error"]["message"]
    return status


def handshake(address: str, *lines: str, path: str = "/") -> tuple[int, str]:
    """Try to open a websocket with these headers; return the status and the body of a denial."""
    common = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    key = "Sec-WebSocket-Key: " + "A" * 22 + "=="
    with connected(address) as opened:
        head = "\r\n".join([f"GET {path} HTTP/1.1", *lines, *common, key, "", ""])
        opened.sendall(head.encode("latin-1"))
        data = opened.recv(65536)
        if b" 101 " not in data.split(b"\r\n")[0]:
            while chunk := opened.recv(65536):
                data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest.decode("latin-1")


# --- host ---

GOOD_HOSTS = [
    "localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:1", "192.168.1.7:8000", "[::1]",
    "[::1]:8000",
    "::1", "[fe80::1]", "[::ffff:127.0.0.1]", "robot.local", "ROBOT.local.:80", "localhost:",
]  # fmt: skip
BAD_HOSTS = {
    "evil.com": 421, "localhost.evil.com": 421, "127.0.0.1.evil.com": 421, "evil.localhost": 421,
    "robot": 421,
    "2130706433": 421, "0x7f000001": 421, "127.1": 421, "localhost:99999": 400, "evil.com:80@localhost": 400,
    "localhost@evil.com": 400, "local host": 400, "[::1": 400, "[evil.com]": 400, "localhost:80:80": 400,
    "": 400,
    "localhost, evil.com": 400, "localhost..": 400, "-localhost": 400, "localhost/evil": 400, "a" * 300: 400,
    "*": 400, "localhost\t.evil.com": 400,
}  # fmt: skip


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_names_of_this_machine_are_served(server: str, host: str) -> None:
    assert get(server, f"Host: {host}") == 200
    assert handshake(server, f"Host: {host}")[0] == 101


@pytest.mark.parametrize("host, status", BAD_HOSTS.items(), ids=range(len(BAD_HOSTS)))
def test_dns_rebinding_is_refused(server: str, host: str, status: int) -> None:
    for path in ("/version", "/health", "/v1/models", "/nothing"):
        assert get(server, f"Host: {host}", "X-Forwarded-Host: localhost", path=path) == status
    assert handshake(server, f"Host: {host}")[0] == status
    asked = json.dumps(body("hi"))
    lines = [f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(asked)}"]
    head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "Connection: close", "", asked])
    assert raw(server, head)[0] == status


def test_tricks_with_the_host_header(server: str) -> None:
    own = f"Host: {server}"
    assert get(server) == 400  # none
    assert get(server, version="1.0") == 400
    assert get(server, own, version="1.0") == 200
    assert get(server, own, "Host: evil.com") == 400
    assert get(server, "Host: evil.com", own) == 400
    assert get(server, own, "X-Forwarded-Host: evil.com", "Forwarded: host=evil.com") == 200
    for target in ("http://evil.com/version", f"http://{server}/version", "evil.com:80"):
        assert get(server, own, path=target) == 400
    assert get(server, own, path="//evil.com/version") == 404
    status, text = handshake(server, "Host: evil.com:8000", f"Origin: http://{server}")
    assert status == 421 and "--allowed-host evil.com" in json.loads(text)["error"]["message"]


@given(st.text(max_size=40))
def test_reading_an_authority_never_ends_in_anything_but_value_error(text: str) -> None:
    try:
        host, port = addresses.read_authority(text)
    except ValueError:
        return
    assert host == host.lower() and (port is None or 0 <= port <= 65535)
    assert addresses.read_ip(host) or re.fullmatch(r"[a-z0-9_.-]+", host)


@given(st.ip_addresses(), st.none() | st.integers(0, 65535))
def test_addresses_are_read_in_all_forms(address: object, port: int | None) -> None:
    text = f"[{address}]" if ":" in str(address) else str(address)
    found = addresses.read_authority(text if port is None else f"{text}:{port}")
    assert found == (str(addresses.read_ip(str(address))), port)


# --- origin ---

FOREIGN = [
    "http://evil.com", "null", "https://127.0.0.1", "http://localhost:1", "file://", "http://127.0.0.1.evil.com",
    "chrome-extension://abc", "http://lab.example", "https://lab.example.evil.com", "https://lab.example:444",
    "http://127.0.0.1", "", "http://[::1]", "https://lab.example, http://evil.com",
]  # fmt: skip


def post(address: str, headers: dict[str, str], path: str = "/v1/chat/completions") -> httpx.Response:
    json_type = {"Content-Type": "application/json", **headers}
    return httpx.post(f"http://{address}{path}", content=json.dumps(body("hi")), headers=json_type)


@pytest.mark.parametrize("origin", FOREIGN)
def test_foreign_pages_are_refused_everywhere(server: str, origin: str) -> None:
    reply = post(server, {"Origin": origin})
    assert reply.status_code == 403 and reply.json()["error"]["code"] == "foreign_origin"
    assert "access-control-allow-origin" not in reply.headers
    for path in ("/", "/v1/realtime/robot/openpi", "/nothing"):
        assert handshake(server, f"Host: {server}", f"Origin: {origin}", path=path)[0] == 403
    assert httpx.get(f"http://{server}/version", headers={"Origin": origin}).status_code == 403
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked = httpx.request("OPTIONS", f"http://{server}/v1/chat/completions", headers=preflight)
    assert asked.status_code == 403 and "access-control-allow-origin" not in asked.headers


def test_own_pages_programs_and_allowed_pages_are_served(server: str) -> None:
    for headers in ({}, {"Origin": f"http://{server}"}, {"Origin": f"HTTP://{server}"}):
        assert post(server, headers).status_code == 200
        lines = [f"{name}: {value}" for name, value in headers.items()]
        assert handshake(server, f"Host: {server}", *lines)[0] == 101
    page = {"Origin": "https://lab.example"}
    reply = post(server, page)
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == page["Origin"]
    assert handshake(server, f"Host: {server}", "Origin: https://lab.example")[0] == 101
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-stainless-os",
    }
    asked = httpx.request("OPTIONS", f"http://{server}/v1/chat/completions", headers={**page, **asks})
    assert asked.status_code == 200 and "x-stainless-os" in asked.headers["access-control-allow-headers"]
    own = f"Origin: http://{server}"
    assert handshake(server, f"Host: {server}", own, own)[0] in (400, 403)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_sec_fetch_site_is_respected(server: str, site: str) -> None:
    assert post(server, {"Sec-Fetch-Site": site}).status_code == 403
    assert handshake(server, f"Host: {server}", f"Sec-Fetch-Site: {site}")[0] == 403
    image = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    assert httpx.get(f"http://{server}/v1/models", headers=image).status_code == 403
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert httpx.get(f"http://{server}/version", headers=link).status_code == 200, "a link that one clicks on"
    for fine in ("same-origin", "none"):
        assert post(server, {"Sec-Fetch-Site": fine}).status_code == 200


def test_a_refused_websocket_leaves_no_error_in_the_log(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert handshake(server, f"Host: {server}", "Origin: http://evil.com")[0] == 403
    assert handshake(server, f"Host: {server}", path="/nothing")[0] == 404
    time.sleep(0.1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_read_origin() -> None:
    assert read_origin("https://Lab.Example") == ("https", "lab.example", 443)
    assert read_origin("http://[::1]:8000") == ("http", "::1", 8000)
    for bad in (
        "null",
        "",
        "lab.example",
        "ftp://a",
        "http://",
        "http://a/b",
        "http://a b",
        "http://u@a",
        "://a",
    ):
        assert read_origin(bad) is None
    for flag in (["https://a/b"], ["null"], ["*"], ["a"]):
        with pytest.raises(BlmError, match="--allowed-origin"):
            HostPolicy.read((), flag)
    for flag in (["a:80"], ["http://a"], ["*"], [""]):
        with pytest.raises(BlmError, match="--allowed-host"):
            HostPolicy.read(flag)


# --- content type and headers ---


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain", "text/plain; application/json", "application/x-www-form-urlencoded",
        "multipart/form-data", "",
        "application/json; charset=utf-16",
        "application/jsonp", "application/json, text/plain", "text/json",
    ],
)  # fmt: skip
def test_only_json_is_read(server: str, kind: str) -> None:
    reply = post(server, {"Content-Type": kind})
    assert reply.status_code == 415 and "application/json" in reply.json()["error"]["message"]


def test_json_in_utf8_is_read(server: str) -> None:
    for kind in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
        assert post(server, {"Content-Type": kind}).status_code == 200
    assert httpx.post(f"http://{server}/v1/chat/completions").status_code == 415


def test_every_response_has_the_headers_that_keep_other_pages_out(server: str, guarded: str) -> None:
    replies = [
        httpx.get(f"http://{server}{path}") for path in ("/health", "/version", "/nothing", "/openapi.json")
    ]
    replies += [post(server, {}), post(server, {"Origin": "null"}), httpx.put(f"http://{server}/version")]
    replies += [httpx.get(f"http://{guarded}{path}") for path in ("/version", "/playground", "/ping")]
    for reply in replies:
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
        assert HEADERS["x-content-type-options"] == reply.headers["x-content-type-options"]
        assert reply.headers["referrer-policy"] == "same-origin" and "server" not in reply.headers
    status, headers, text = raw(server, "GARBAGE\r\n\r\n")
    assert status == 400 and HEADERS.items() <= headers.items() and "error" in json.loads(text)


def test_internal_errors_have_the_same_form() -> None:
    app = create_app(EchoPolicy())

    @app.get("/fails")
    async def fails() -> None:
        raise RuntimeError("the secret of the server")

    from tests.support.serving import running_app

    with running_app(app) as address:
        reply = httpx.get(f"http://{address}/fails")
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text and HEADERS.items() <= dict(reply.headers).items()


# --- keys ---

PUBLIC = ("/health", "/healthz", "/ping")
PRIVATE = (
    "/version",
    "/openapi.json",
    "/metrics",
    "/v1/models",
    "/playground",
    "/nothing",
    "/docs",
    "/health/",
)


def test_without_a_key_only_status_routes_answer(guarded: str) -> None:
    wait_for(lambda: httpx.get(f"http://{guarded}/health").status_code == 200)
    for path in PUBLIC:
        assert httpx.get(f"http://{guarded}{path}").text == "OK\n"
    for path in PRIVATE:
        reply = httpx.get(f"http://{guarded}{path}")
        assert reply.status_code == 401 and "blm-secret" not in reply.text and "panda" not in reply.text, path
    for path in ("/", "/v1/realtime/robot/openpi", "/playground/ws", "/nothing"):
        status, text = handshake(guarded, f"Host: {guarded}", path=path)
        assert status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
    huge = {"Content-Length": str(10**9), "Content-Type": "application/json"}
    head = "\r\n".join(
        ["POST /v1/chat/completions HTTP/1.1", f"Host: {guarded}", *map(": ".join, huge.items()), "", ""]
    )
    with connected(guarded) as opened:
        opened.sendall(head.encode())
        assert b" 401 " in opened.recv(100), "the key is checked before the body comes"


WRONG = [
    "Bearer ", "Bearer", "Bearer  ", "", "Basic open-sesame", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
    f"bearer{KEY}",
    "Bearer null", "Bearer None", f"Bearer {KEY} second-key", "Bearer \xe9", f"Token {KEY}",
    f"Bearer {KEY.upper()}",
]  # fmt: skip


@pytest.mark.parametrize("given_key", WRONG)
def test_wrong_keys_are_refused(guarded: str, given_key: str) -> None:
    lines = f"Host: {guarded}", f"Authorization: {given_key}"
    assert get(guarded, *lines, path="/v1/models") == 401
    assert handshake(guarded, *lines)[0] == 401


def test_each_key_opens_everything(guarded: str) -> None:
    for scheme in ("Bearer", "bearer", "Api-Key", "BEARER "):
        for key in (KEY, "second-key"):
            headers = {"Authorization": f"{scheme} {key}"}
            for path in PRIVATE[:5]:
                assert httpx.get(f"http://{guarded}{path}", headers=headers).status_code == 200, path
    twice = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer wrong")]
    assert httpx.get(f"http://{guarded}/version", headers=twice).status_code == 401
    with RemotePolicy(f"ws://{guarded}", api_key=KEY) as remote:
        assert remote.act(observation()).actions.shape == (4, 8)
    with openai.OpenAI(base_url=f"http://{guarded}/v1", api_key="second-key", max_retries=0) as client:
        assert ask(client, "hi").choices[0].message.content == "user: hi"


@pytest.mark.parametrize("key", ["", " ", "\n", "\t", "a b", "schlüssel", "a\nb", "\x00", "a\x7f"])
def test_keys_that_cannot_work_are_refused_and_not_shown(key: str) -> None:
    with pytest.raises(BlmError, match="the API key") as caught:
        check_key(key)
    assert len(key) < 3 or key not in str(caught.value)
    for make in (lambda: create_app(EchoPolicy(), api_key=key), lambda: AccessControl([KEY, key])):
        with pytest.raises(BlmError, match="the API key"):
            make()


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\r\n\n  second  \n")
    file.chmod(0o600)
    assert read_keys(None, file, {}) == (["first", "second"], [])
    file.chmod(0o644)
    keys, (warning,) = read_keys(None, file, {"BLM_API_KEY": "other"})
    assert keys == ["first", "second"] and "chmod 600" in warning
    assert read_keys(None, None, {"BLM_API_KEY": "k"}) == (["k"], [])
    keys, (warning,) = read_keys("k", None, {})
    assert keys == ["k"] and "`ps`" in warning
    assert read_keys(None, None, {}) == ([], [])
    for content in (b"", b" \n\n", b"\xff\xfe", b"a b\n", b"x" * 70000):
        file.write_bytes(content)
        with pytest.raises(BlmError):
            read_keys(None, file, {})
    for bad in ((None, tmp_path / "none", {}), (None, tmp_path, {}), (None, None, {"BLM_API_KEY": " "})):
        with pytest.raises(BlmError):
            read_keys(*bad)
    with pytest.raises(BlmError, match="not both"):
        read_keys("a", file, {})


# --- signing in with a browser ---


def sign_in(client: httpx.Client, address: str, key: str = KEY, **headers: str) -> httpx.Response:
    return client.post(f"http://{address}/playground/login", data={"key": key}, headers=headers)


def test_a_browser_signs_in_with_a_form(guarded: str) -> None:
    with httpx.Client() as browser:
        form = browser.get(f"http://{guarded}/playground")
        assert form.status_code == 401 and 'action="/playground/login"' in form.text
        assert (
            "blm-secret" not in form.text and "form-action 'self'" in form.headers["content-security-policy"]
        )
        wrong = sign_in(browser, guarded, "nope")
        assert (
            wrong.status_code == 401 and "wrong API key" in wrong.text and "set-cookie" not in wrong.headers
        )
        done = sign_in(browser, guarded, f" {KEY}\n", Origin=f"http://{guarded}")
        assert done.status_code == 303 and done.headers["location"] == "/playground"
        cookie = done.headers["set-cookie"]
        for part in ("HttpOnly", "SameSite=strict", "Path=/"):
            assert part in cookie
        assert "Secure" not in cookie and KEY not in cookie
        token = next(iter(browser.cookies.values()))
        assert "blm-secret" in browser.get(f"http://{guarded}/playground").text
        assert browser.get(f"http://{guarded}/v1/models").status_code == 200
        same = {"Origin": f"http://{guarded}"}
        asked = browser.post(f"http://{guarded}/v1/chat/completions", json=body("hi"), headers=same)
        assert asked.status_code == 200
        name = next(iter(browser.cookies))
        line = f"Cookie: {name}={token}"
        assert handshake(guarded, f"Host: {guarded}", line, f"Origin: http://{guarded}")[0] == 101
        assert handshake(guarded, f"Host: {guarded}", line, "Origin: http://evil.com")[0] == 403
        for other in (f"{name}={token}x", f"{name}=", f"blm_session_1={token}", f"{name}={KEY}"):
            assert handshake(guarded, f"Host: {guarded}", f"Cookie: {other}")[0] == 401
        assert handshake(guarded, f"Host: {guarded}", line, "Authorization: Bearer wrong")[0] == 401
        out = browser.post(f"http://{guarded}/playground/logout", json={})
        assert out.status_code == 200
        assert handshake(guarded, f"Host: {guarded}", line)[0] == 401, "the session itself has ended"


def test_logging_in_is_for_pages_of_this_server_and_bounded(guarded: str) -> None:
    with httpx.Client() as browser:
        for origin in ("http://evil.com", "null"):
            assert sign_in(browser, guarded, Origin=origin).status_code == 403
        url = f"http://{guarded}/playground/login"
        assert browser.post(url, json={"key": KEY}).json() == {"done": True}
        secure = browser.post(url, json={"key": KEY}, headers={"Origin": f"http://{guarded}"})
        assert "Secure" not in secure.headers["set-cookie"]
        for bad in (b"", b"[]", b"{}", b'{"key": 3}', b"[" * 5000, b"\xff"):
            reply = browser.post(url, content=bad, headers={"Content-Type": "application/json"})
            assert reply.status_code == 400, bad
        assert browser.post(url, json={"key": "x" * 10000}).status_code == 413
        assert browser.post(url, content="key=" + KEY).status_code == 415


def test_behind_https_the_cookie_is_secure() -> None:
    host_policy = HostPolicy.read(["robot.example"], ["https://robot.example"])
    with page_running(AccessControl([KEY], host_policy)) as address:
        headers = {"Host": "robot.example", "Origin": "https://robot.example"}
        reply = httpx.post(f"http://{address}/playground/login", data={"key": KEY}, headers=headers)
        assert reply.status_code == 303 and "Secure" in reply.headers["set-cookie"]


def test_guessing_is_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "LOGIN_TRIES", 3)
    monkeypatch.setattr(access_module, "LOGIN_REFILL_S", 0.5)
    with page_running(AccessControl([KEY])) as address, httpx.Client() as browser:
        assert [sign_in(browser, address, "guess").status_code for _ in range(4)] == [401, 401, 401, 429]
        late = sign_in(browser, address)
        assert late.status_code == 429 and int(late.headers["retry-after"]) >= 1
        assert (
            httpx.get(f"http://{address}/version", headers={"Authorization": f"Bearer {KEY}"}).status_code
            == 200
        )
        time.sleep(0.6)
        assert sign_in(browser, address).status_code == 303


def test_sessions_end_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = LoginSessions()
    tokens = [sessions.start() for _ in range(access_module.MAX_SESSIONS + 5)]
    assert len(sessions) == access_module.MAX_SESSIONS
    assert [sessions.knows(token) for token in tokens[:6]] == [False] * 5 + [True]
    monkeypatch.setattr(access_module, "SESSION_S", -1.0)
    assert not sessions.knows(sessions.start()) and not sessions.knows("") and not sessions.knows("\udcff")
    limit = RateLimiter(2, 60)
    for number in range(MAX_ADDRESSES + 10):
        limit.count(str(number))
    assert len(limit._buckets) == MAX_ADDRESSES
    assert limit.wait_s("new") == 0


def test_the_form_shows_no_markup_of_a_message() -> None:
    assert "<script" not in login_page("<script>").body.decode()
