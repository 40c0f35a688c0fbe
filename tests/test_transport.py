"""The way to the dashboard: deadlines, limits, TLS, the environment, and what answers mean."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock

import pytest
import trustme
from conftest import KEY, ROOT
from dashboard import ANSWERS, APIS, RAW, Dashboard
from hypothesis import given
from hypothesis import strategies as st

import tinomail_agent as agent
from tinomail_agent import Answer, Outcome

LIMIT_S = 1.0
NEUTRAL = {"timestamp": "t", "role": "haraka", "system": {"open_files": 1}}
REQUESTS = {
    api: dialect.register(NEUTRAL, "mta-01", "10.0.0.1", KEY)
    for api, dialect in agent.DIALECTS.items()
}
REQUEST = REQUESTS["v1"]


@pytest.fixture
def api() -> str:
    """The way to the dashboard is the same in each dialect; what differs is tried in both."""
    return "v1"


each_dialect = pytest.mark.parametrize("api", APIS)


def post(server: Dashboard, ca_bundle: str = "", limit_s: float = LIMIT_S) -> Answer:
    return agent.Transport(server.url, ca_bundle).post(REQUESTS[server.api], limit_s)


def key_of(headers: dict[str, str]) -> str | None:
    return headers.get("x-api-key") or headers.get("Authorization", "").removeprefix("Bearer ")


# --- faults of the network and the dashboard


@each_dialect
def test_an_honest_answer(dashboard: Dashboard) -> None:
    answer = post(dashboard)
    assert (answer.status, agent.confirmed_id(answer.body)) == (201, "mta-01")
    assert answer.date and answer.server
    [got] = dashboard.posts
    assert key_of(got.headers) == KEY
    assert got.headers["User-Agent"] == f"tinomail-agent/{agent.VERSION}"
    assert "Cookie" not in got.headers


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("refuse", "connection refused"),
        ("hang", "no complete answer in time"),
        ("drip", "no complete answer in time"),
        ("drip-headers", "no complete answer in time"),
        ("reset", "closed before the answer was complete"),
        ("half", "closed before the answer was complete"),
    ],
)
def test_no_answer_is_told_in_our_own_words(fault: str, says: str, dashboard: Dashboard) -> None:
    dashboard.fault = fault
    started = time.monotonic()
    answer = post(dashboard)
    assert time.monotonic() - started < LIMIT_S + 2  # not the 500 s that it would drip on
    assert answer.status == 0
    assert says in answer.reason
    assert KEY not in answer.reason


@pytest.mark.parametrize("fault", ANSWERS)
def test_answers_arrive_as_they_are(fault: str, dashboard: Dashboard) -> None:
    dashboard.fault = fault
    status, headers, body = ANSWERS[fault]()
    answer = post(dashboard)
    assert (answer.status, answer.body) == (status, body)
    assert answer.location == headers.get("Location", "")
    assert bool(answer.retry_after) == ("Retry-After" in headers)


def test_a_redirect_is_not_followed(dashboard: Dashboard) -> None:
    with Dashboard(KEY) as elsewhere:
        elsewhere_301 = (301, {"Location": f"{elsewhere.url}/api/v1/nodes"}, b"")
        ANSWERS["redirect"], before = (lambda: elsewhere_301), ANSWERS["redirect"]
        try:
            dashboard.fault = "redirect"
            assert post(dashboard).status == 301
        finally:
            ANSWERS["redirect"] = before
        assert elsewhere.connections == 0


def test_at_most_64_kib_of_an_answer_are_read(dashboard: Dashboard) -> None:
    dashboard.fault = "huge"
    transport = agent.Transport(dashboard.url)
    answer = transport.post(REQUESTS[dashboard.api], 5.0)
    assert answer.status == 200
    assert 32 * 1024 < len(answer.body) <= agent.ANSWER_LIMIT_BYTES
    dashboard.fault = "off"  # the connection with the rest of it is not used again
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == 201
    assert dashboard.connections == 2


def test_one_connection_for_many_posts(dashboard: Dashboard) -> None:
    transport = agent.Transport(dashboard.url)
    request = REQUESTS[dashboard.api]
    assert [transport.post(request, LIMIT_S).status for _ in range(100)] == [201] * 100
    assert dashboard.connections == 1


def test_a_connection_that_the_dashboard_closed_meanwhile_is_no_failure(
    dashboard: Dashboard,
) -> None:
    transport = agent.Transport(dashboard.url)
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == 201
    dashboard.drop_connections()  # as a server does after its keep-alive time
    time.sleep(0.2)
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == 201


def read_request(stream: BinaryIO) -> bool:
    """Read one request with its body; tell whether there was one."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return False
        head += line
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert length
    return len(stream.read(int(length[1]))) == int(length[1])


def serve_raw(
    *answers: bytes, per_connection: int = 99, resets: bool = False
) -> tuple[str, list[int]]:
    """Answer each request with raw bytes; close, or reset, a connection after so many answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections = [0]

    def serve() -> None:
        rest = list(answers)
        with listener:
            while rest:
                connection, _ = listener.accept()
                connections[0] += 1
                if resets:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                with connection, connection.makefile("rb") as stream:
                    for _ in range(min(per_connection, len(rest))):
                        if not read_request(stream):
                            break
                        connection.sendall(rest.pop(0))

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", connections


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 100_000, "too long"),
        (b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"a" * 4_000 + b"\r\n") * 40, "too long"),
        (CHUNKED + b"-1\r\n" + bytes(200_000), "too long"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
        (b"220 mail.example.com ESMTP\r\n", "not HTTP"),
        (b"", "closed before"),
        (CHUNKED + b"zz\r\n", "closed before"),
    ],
)
def test_answers_of_other_servers(raw: bytes, says: str) -> None:
    url, _ = serve_raw(raw, per_connection=1)
    answer = agent.Transport(url).post(REQUEST, 3.0)
    assert answer.status == 0
    assert says in answer.reason


TAKEN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def test_a_server_that_closes_after_each_answer_without_a_word() -> None:
    """The next request meets a connection that is gone: it is sent again at once, on a new one."""
    url, connections = serve_raw(*[TAKEN] * 20, per_connection=1)
    transport = agent.Transport(url)
    assert [transport.post(REQUEST, 3.0).status for _ in range(20)] == [200] * 20
    assert connections == [20]


@pytest.mark.parametrize("resets", [False, True])
def test_part_of_an_answer_is_not_asked_for_again(resets: bool) -> None:
    """The dashboard may have stored the sample: only a connection that is gone is no attempt."""
    part = b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"
    url, connections = serve_raw(TAKEN, part, TAKEN, per_connection=2, resets=resets)
    transport = agent.Transport(url)
    assert transport.post(REQUEST, 3.0).status == 200
    assert "closed before" in transport.post(REQUEST, 3.0).reason
    assert connections == [1]


def test_a_new_connection_that_is_closed_is_not_tried_again() -> None:
    url, connections = serve_raw(b"", b"", per_connection=1)
    assert agent.Transport(url).post(REQUEST, 3.0).status == 0
    assert connections == [1]


def test_a_server_that_goes_away_is_asked_once(dashboard: Dashboard) -> None:
    transport = agent.Transport(dashboard.url)
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == 201
    dashboard.fault = "refuse"
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).reason == "connection refused"


def test_interim_answers_are_skipped() -> None:
    url, _ = serve_raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 2 + TAKEN)
    assert agent.Transport(url).post(REQUEST, 3.0).status == 200


def test_an_answer_that_is_deflated_all_the_same() -> None:
    body = zlib.compress(b'{"success": true}')
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\nContent-Length: %d\r\n\r\n"
    url, _ = serve_raw(head % len(body) + body)
    assert agent.Transport(url).post(REQUEST, 3.0).body == b'{"success": true}'


def test_an_answer_that_is_compressed_all_the_same() -> None:
    body = gzip.compress(b'{"success": false}')
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    url, _ = serve_raw(head % len(body) + body, head % 4 + b"junk")
    transport = agent.Transport(url)
    assert agent.judge(transport.post(REQUEST, 3.0), KEY).outcome is Outcome.KEPT
    assert transport.post(REQUEST, 3.0).body == b"junk"


def test_a_bomb_does_not_go_off() -> None:
    body = gzip.compress(bytes(50_000_000))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    url, _ = serve_raw(head % len(body) + body)
    assert len(agent.Transport(url).post(REQUEST, 3.0).body) <= agent.ANSWER_LIMIT_BYTES


def test_a_name_that_cannot_be_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    transport = agent.Transport("https://nowhere.invalid")
    assert "cannot be resolved" in transport.post(REQUEST, LIMIT_S).reason
    assert transport.route_ip() == ""
    assert transport.deadline != math.inf  # and no name look-up is under way


def resolve(monkeypatch: pytest.MonkeyPatch, look_up: Callable[[], object]) -> None:
    """Let each look-up of a name be this one; create_connection() still gets its addresses."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: Any, **_: object) -> object:
        return real(host, port, *args) if args else look_up()

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def names(monkeypatch: pytest.MonkeyPatch, *addresses: Any, pause_s: float = 0) -> None:
    """Let every name stand for these addresses."""

    def look_up() -> object:
        time.sleep(pause_s)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    resolve(monkeypatch, look_up)


def test_name_resolution_is_outside_the_deadline(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, dashboard.server_address, pause_s=LIMIT_S + 0.3)
    assert post(dashboard).status == 201


def test_a_dead_address_costs_its_share_of_the_time_once(
    dashboard: Dashboard, deaf_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with a dead address first: it is tried last as soon as the other one answered."""
    names(monkeypatch, ("127.0.0.1", deaf_port), dashboard.server_address)
    transport = agent.Transport(dashboard.url)
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == 201
    dashboard.drop_connections()
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).took_s < LIMIT_S / 2


def test_every_address_is_tried_before_one_that_failed(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Dashboard(KEY, api=dashboard.api) as one, Dashboard(KEY, api=dashboard.api) as other:
        one.fault = other.fault = "503"
        servers = one, other, dashboard
        names(monkeypatch, *(server.server_address for server in servers))
        transport = agent.Transport(dashboard.url)
        for status in (503, 503, 201, 201):  # a good one is tried once more
            assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == status
            transport.disconnect()


def test_a_bad_address_does_not_keep_the_good_one_from_its_turn(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried last once the other one has answered, and next when that one fails twice."""
    with Dashboard(KEY, api=dashboard.api) as bad:
        bad.fault = "503"
        names(monkeypatch, bad.server_address, dashboard.server_address)
        transport = agent.Transport(dashboard.url)
        for status in (503, 201, 201, 500, 201, 500, 500, 503, 201):
            dashboard.fault = "500" if status == 500 else "off"
            assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == status
            if status != 201:
                transport.disconnect()


@pytest.fixture
def without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ipv6.disable=1: no socket of that family; a name may have such an address."""
    real = socket.socket

    def open_socket(family: int = -1, *args: Any, **named: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *args, **named)

    monkeypatch.setattr(socket, "socket", open_socket)


@pytest.mark.usefixtures("without_ipv6")
@pytest.mark.parametrize("is_first", [True, False])
def test_an_address_of_a_family_that_is_off(
    is_first: bool, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = dashboard.server_address[1]
    found = [(socket.AF_INET6, 1, 6, "", ("::1", port, 0, 0)),
             (socket.AF_INET, 1, 6, "", ("127.0.0.1", port))]
    resolve(monkeypatch, lambda: found if is_first else found[::-1])
    transport = agent.Transport(dashboard.url)
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == 201
    dashboard.fault = "refuse"
    transport.disconnect()
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).reason == "connection refused"
    dashboard.fault = "off"
    transport.disconnect()
    assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == 201


def test_a_link_local_address_keeps_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, lambda: [(socket.AF_INET6, 1, 6, "", ("fe80::1", 443, 0, 1))])
    connect = Mock(side_effect=ConnectionRefusedError)
    monkeypatch.setattr(socket, "create_connection", connect)
    transport = agent.Transport("https://dashboard.example.com")
    assert transport.post(REQUEST, LIMIT_S).reason == "connection refused"
    assert connect.call_args.args[0] == (f"fe80::1%{socket.if_indextoname(1)}", 443)


def test_no_name_server_answers_any_more(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address that worked still does; a name that is gone is another matter."""
    names(monkeypatch, dashboard.server_address)
    transport = agent.Transport(dashboard.url)
    for code, status in ((0, 201), (socket.EAI_AGAIN, 201), (socket.EAI_NONAME, 0)):
        if code:
            error = socket.gaierror(code, "")
            resolve(monkeypatch, Mock(side_effect=error))
        assert transport.post(REQUESTS[dashboard.api], LIMIT_S).status == status
        transport.disconnect()


def test_a_connection_is_closed_after_an_hour(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = agent.Transport(dashboard.url)
    request = REQUESTS[dashboard.api]
    assert transport.post(request, LIMIT_S).status == 201
    monkeypatch.setattr(agent, "CONNECTION_LIMIT_S", 0.2)
    time.sleep(0.3)
    assert transport.post(request, LIMIT_S).status == 201
    assert dashboard.connections == 2


def test_the_deadline_is_longer_after_an_attempt_that_ran_out_of_time(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "REQUEST_DEADLINE_S", 0.5)
    monkeypatch.setattr(agent, "SLOW_DEADLINE_S", 60.0)
    transport = agent.Transport(dashboard.url)
    request = REQUESTS[dashboard.api]
    dashboard.pause_s = 0.8
    assert transport.post(request).status == 0
    assert transport.post(request).status == 201
    assert transport.post(request).status == 201  # as slow as before: as much time as before
    dashboard.pause_s = 0.0
    assert transport.post(request).status == 201
    dashboard.pause_s = 0.8
    assert transport.post(request).status == 0


def test_no_thread_is_left_by_a_post(dashboard: Dashboard) -> None:
    before = threading.active_count()
    transport = agent.Transport(dashboard.url)
    for _ in range(20):
        transport.post(REQUESTS[dashboard.api], 30.0)
    for _ in range(100):
        if threading.active_count() <= before + 1:  # the stand-in's, for the connection
            return
        time.sleep(0.1)
    raise AssertionError(threading.enumerate())


def test_the_address_on_the_way_to_the_dashboard(dashboard: Dashboard) -> None:
    transport = agent.Transport(dashboard.url)
    assert (transport.local_ip, transport.route_ip()) == (None, "127.0.0.1")
    transport.post(REQUESTS[dashboard.api], LIMIT_S)
    assert transport.local_ip == "127.0.0.1"
    assert agent.Transport("http://[::1]:80").route_ip() == "::1"


# --- TLS


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def certificate(
    ca: trustme.CA, folder: Path, *names: str, not_after: datetime | None = None
) -> tuple[str, str]:
    issued = ca.issue_cert(*names, not_after=not_after)
    cert, key = folder / "cert.pem", folder / "key.pem"
    key.write_bytes(issued.private_key_pem.bytes())
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return str(cert), str(key)


@pytest.fixture
def bundle(ca: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return str(path)


@pytest.fixture
def tls_dashboard(ca: trustme.CA, tmp_path: Path) -> Iterator[Dashboard]:
    with Dashboard(KEY, tls=certificate(ca, tmp_path, "127.0.0.1", "localhost")) as server:
        yield server


def test_ca_bundle(tls_dashboard: Dashboard, bundle: str) -> None:
    transport = agent.Transport(tls_dashboard.url, bundle)
    assert [transport.post(REQUEST, 3.0).status for _ in range(20)] == [201] * 20
    assert tls_dashboard.connections == 1


def test_a_ca_that_is_not_trusted(tls_dashboard: Dashboard) -> None:
    answer = post(tls_dashboard, limit_s=3.0)
    assert answer.status == 0
    assert "a CA that this node does not trust" in answer.reason and "CA_BUNDLE" in answer.reason
    assert tls_dashboard.posts == []


def test_an_expired_certificate(ca: trustme.CA, bundle: str, tmp_path: Path) -> None:
    past = datetime.now(timezone.utc) - timedelta(days=2)
    with Dashboard(KEY, tls=certificate(ca, tmp_path, "127.0.0.1", not_after=past)) as server:
        reason = post(server, bundle, 3.0).reason
    assert "has expired" in reason and "CA_BUNDLE" in reason


def test_a_certificate_for_another_name(ca: trustme.CA, bundle: str, tmp_path: Path) -> None:
    with Dashboard(KEY, tls=certificate(ca, tmp_path, "other.example.com")) as server:
        by_address = post(server, bundle, 3.0).reason
        server.url = server.url.replace("127.0.0.1", "localhost")
        by_name = post(server, bundle, 3.0).reason
    assert "is for another" in by_address and "CA_BUNDLE" in by_address
    assert "is for another name" in by_name and "CA_BUNDLE" in by_name


def test_a_self_signed_certificate(tmp_path: Path) -> None:
    cert, key = str(tmp_path / "c.pem"), str(tmp_path / "k.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
         "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )
    with Dashboard(KEY, tls=(cert, key)) as server:
        reason = post(server, limit_s=3.0).reason
        assert "is self-signed" in reason and "CA_BUNDLE" in reason
        assert post(server, cert, 3.0).status == 201  # the way out that the line names


def test_https_to_a_port_that_speaks_http(dashboard: Dashboard) -> None:
    dashboard.url = dashboard.url.replace("http://", "https://")
    assert "TLS failed" in post(dashboard, limit_s=3.0).reason


def test_a_handshake_that_stalls_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and says nothing
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        answer = agent.Transport(url).post(REQUEST, LIMIT_S)
    assert "no complete answer in time" in answer.reason
    assert time.monotonic() - started < LIMIT_S + 2


def run_check(home: Path, url: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tinomail_agent.py"), "--check", "--env-file", os.devnull],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "DASHBOARD_URL": url, "API_KEY": KEY,
             "NODE_ID": "mta-01", "CHECK_PORTS": "1", **environ},
        capture_output=True, text=True, timeout=30, check=False,
    )


def test_the_environment_changes_nothing(
    tls_dashboard: Dashboard, bundle: str, tmp_path: Path
) -> None:
    """REQUESTS_CA_BUNDLE, a proxy and ~/.netrc: requests would follow all three."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login joe password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    proxy = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "all")}
    trusted = dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"), bundle)
    url = tls_dashboard.url
    refused = run_check(tmp_path, url, **trusted, **proxy)
    assert refused.returncode == 1
    assert "a CA that this node does not trust" in refused.stdout
    wrong = dict.fromkeys(trusted, "/nowhere/ca.pem")
    taken = run_check(tmp_path, url, CA_BUNDLE=bundle, **wrong, **proxy)
    assert taken.returncode == 0, taken.stdout
    keys = [post.headers["Authorization"] for post in tls_dashboard.posts]
    assert keys == [f"Bearer {KEY}"] * 2  # the registration, the sample


def test_a_broken_system_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.crt").touch()
    monkeypatch.setattr(agent, "SYSTEM_CA", str(tmp_path / "ca.crt"))
    assert agent.tls_context("").get_ca_certs()


def test_the_system_store_is_the_default() -> None:
    names = {tuple(sorted(cert["serialNumber"] for cert in context.get_ca_certs())) for context in (
        agent.tls_context(""), ssl.create_default_context(cafile=agent.SYSTEM_CA))}
    assert len(names) == 1


# --- what an answer means


def judged(status: int, body: str = "{}", api: str = "v1") -> agent.Verdict:
    return agent.judge(Answer(status, body=body.encode()), KEY, agent.DIALECTS[api].hints)


EXPECTED = {
    **dict.fromkeys((200, 201, 202, 204, 409), Outcome.DELIVERED),
    **dict.fromkeys((408, 425, 429, 500, 502, 503, 504, 599), Outcome.RETRY),
    **dict.fromkeys((401, 403, 301, 302, 307, 308, 402, 405, 410, 418, 451), Outcome.KEPT),
    **dict.fromkeys((400, 413, 415, 422), Outcome.REFUSED),
    404: Outcome.REGISTER,
}


@each_dialect
@pytest.mark.parametrize(("status", "outcome"), EXPECTED.items())
def test_the_table_of_answers(status: int, outcome: Outcome, api: str) -> None:
    if (status, api) == (404, "tinomail-monitor"):  # it never asks for a registration
        outcome = Outcome.KEPT
    verdict = judged(status, "" if status == 204 else "{}", api=api)
    assert verdict.outcome is outcome
    if outcome is Outcome.REGISTER or status in (400, 409, 413, 415, 422):
        assert judged(status, "<html>", api).outcome is Outcome.KEPT
    elif not 200 <= status < 300:
        assert judged(status, "<html>", api).outcome is outcome
    if outcome is not Outcome.DELIVERED:
        assert verdict.problem.startswith(f"answered {status}")


@pytest.mark.parametrize(
    ("status", "body", "delivered"),
    [
        (201, "", True), (202, "", True), (204, "", True), (200, "", False), (206, "", False),
        (200, '{"success": true}', True), (200, "{}", True), (200, '{"status": "stored"}', True),
        (200, '{"data": {"success": false}}', True), (200, '{"error": null}', True),
        (200, '{"errors": []}', True), (200, '{"statusCode": 201}', True),
        (201, '{"success": false, "error": "no"}', False), (200, '{"success": "false"}', False),
        (200, '{"ok": false}', False), (200, '{"ok": "False"}', False), (200, '{"ok": 0}', False),
        (200, '{"error": "unauthorized"}', False), (200, '{"errors": ["x"]}', False),
        (200, '{"status": "error"}', False), (200, '{"status": "FAIL"}', False),
        (200, '{"statusCode": 500}', False), (200, '{"statusCode": "404"}', False),
        (200, "null", False), (200, "[]", False), (201, "ok", False), (200, "{", False),
        (200, "<html></html>", False), (200, "Welcome", False), (200, "[" * 5000, False),
        (204, "\ufeff\n <!DOCTYPE HTML><title>Login", False), (200, '"ok"', False),
    ],
)
def test_a_success_is_the_dashboards_own_or_none(status: int, body: str, delivered: bool) -> None:
    verdict = judged(status, body)
    assert verdict.outcome is (Outcome.DELIVERED if delivered else Outcome.KEPT)
    assert delivered or verdict.problem.startswith(f"answered {status}")


@pytest.mark.parametrize(
    ("status", "body", "is_own"),
    [(500, '{"error": "boom"}', True), (599, "{}", True), (500, "<html>", False), (500, "", False),
     (502, "{}", False), (503, "{}", False), (504, "{}", False), (429, "{}", False)],
)
def test_an_error_of_the_dashboards_own(status: int, body: str, is_own: bool) -> None:
    assert judged(status, body).is_own_error is is_own


def test_what_answered_is_named() -> None:
    proxy = Answer(502, body=b"<html>", server="nginx/1.22.1 " + "x" * 99)
    assert str(agent.judge(proxy, KEY)) == f"answered 502 (Server: {proxy.server[:60]})"
    dashboard = Answer(403, body=b'{"error": {"code": "BLOCKED", "message": "no"}}')
    assert "look there for a blocked key or node" in str(agent.judge(dashboard, KEY))
    dashboard = Answer(422, body=b'{"error": {"code": "BAD"}}')
    assert str(agent.judge(dashboard, KEY)) == "answered 422: BAD"
    away = Answer(302, location="https://right.example.com/" + "y" * 99)
    assert str(agent.judge(away, KEY)).endswith(f"correct DASHBOARD_URL: {away.location[:60]}")


@pytest.mark.parametrize(
    ("body", "node_id"),
    [
        ('{"node_id": "a", "id": "b"}', "a"),
        ('{"nodeId": "a", "id": "b"}', "a"),
        ('{"id": 7}', "7"),
        ('{"success": true, "data": {"id": "a"}}', "a"),
        ('{"data": {"nodeId": "a"}}', "a"),
        ('{"id": "request-1", "data": {"node_id": "a"}}', "a"),
        ('{"node_id": "  "}', None),
        ('{"node_id": ""}', None), ('{"id": true}', None), ('{"id": null}', None), ("[]", None),
        ("", None), ('{"data": []}', None), ("x", None),
    ],
)
def test_the_confirmed_id(body: str, node_id: str | None) -> None:
    assert agent.confirmed_id(body.encode()) == node_id


@given(st.binary(max_size=200), st.integers(100, 999), st.text(max_size=20), st.text(max_size=40))
def test_no_answer_breaks_the_judge(
    body: bytes, status: int, content_type: str, header: str
) -> None:
    answer = Answer(status, "", body, content_type, header, header, header)
    agent.judge_registration(answer, KEY)
    for dialect in agent.DIALECTS.values():
        verdict = agent.judge(answer, KEY, dialect.hints)
        assert isinstance(verdict.outcome, Outcome)
        assert "\n" not in str(verdict) and len(str(verdict)) < 400
    assert 0 <= agent.retry_after_s(answer, 0.0) <= agent.RETRY_AFTER_LIMIT_S
    agent.confirmed_id(body)


def test_what_is_logged_of_an_answer_is_one_short_line_without_the_key() -> None:
    text = f"key {KEY} \x1b[31m\r\nnext" + "\ufffd\u2028" * 300
    shown = agent.printable(text, KEY)
    assert len(shown) == agent.EXCERPT_CHARS and shown.isprintable()
    assert shown.startswith("key *** ?[31m??next")
    assert agent.printable("", KEY) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("abcdefghij", "***"), ("x abcdefghij y", "x *** y"), ("cdefgh", "***"), ("abcde", "abcde"),
        ("abcdefX", "***X"), ("abcdefabcdef", "***"), ("bcdefg, fghij", "***, fghij"), ("", ""),
    ],
)
def test_pieces_of_the_key_are_hidden(text: str, shown: str) -> None:
    assert agent.mask(text, "abcdefghij") == shown


def test_a_short_key_is_hidden_as_a_whole() -> None:
    assert agent.mask("the key is abc, not ab", "abc") == "the key is ***, not ab"
    assert agent.mask("no key", "") == "no key"


@given(st.text("ab$1", min_size=6, max_size=30), st.text(max_size=20), st.text(max_size=20))
def test_no_six_characters_of_the_key_are_shown(key: str, before: str, after: str) -> None:
    shown = agent.mask(before + key + after, key).replace("***", "\0")
    assert not any(key[i : i + 6] in shown for i in range(len(key) - 5))


NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=timezone.utc)


def http(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("30", 30), (" 7 ", 7), ("100000", 300), ("-5", 0), ("soon", 0), ("", 0), ("1e3", 0),
        (http(NOW + timedelta(seconds=42)), 42),
        (http(NOW + timedelta(days=1)), 300),
        (http(NOW - timedelta(days=1)), 0),
    ],
)
def test_retry_after(retry_after: str, seconds: float) -> None:
    """A date counts from the answer's own Date: this node's clock may be a year off."""
    answer = Answer(429, date=http(NOW), retry_after=retry_after)
    assert agent.retry_after_s(answer, NOW.timestamp() + 31_536_000) == seconds


def test_retry_after_without_a_date_of_the_answer() -> None:
    answer = Answer(429, retry_after=http(NOW + timedelta(seconds=42)))
    assert agent.retry_after_s(answer, NOW.timestamp()) == 42


@pytest.mark.parametrize("text", ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT",
                                  "Sun Nov  6 08:49:37 1994"])
def test_each_format_of_a_date_is_utc(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Ho_Chi_Minh")
    time.tzset()
    try:
        assert agent.http_date(text) == 784111777
    finally:
        monkeypatch.undo()
        time.tzset()


# --- the dialect


def test_v1() -> None:
    request = agent.V1.sample(NEUTRAL, "id-7", KEY)
    assert request.path == "/api/v1/metrics/system"
    assert request.headers == {
        "Authorization": f"Bearer {KEY}", "Content-Type": "application/json",
        "Content-Encoding": "gzip",
    }
    assert json.loads(gzip.decompress(request.body)) == {
        "node_id": "id-7", "timestamp": "t", "system": {"open_files": 1},
    }
    assert "Content-Encoding" not in REQUEST.headers
    assert json.loads(REQUEST.body) == {
        "node_id": "mta-01", "hostname": socket.gethostname(), "ip": "10.0.0.1", "role": "haraka",
        "version": agent.VERSION,
    }


# --- the stand-in dashboard itself is strict


GOOD = {"node_id": "mta-01", "timestamp": "2026-01-01T00:00:00.000Z", "system": {"open_files": 1}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timestamp": "2026-01-01T00:00:00Z"}, "timestamp is not ISO"),
        ({"timestamp": "2026-13-01T00:00:00.000Z"}, "timestamp is no date"),
        ({"system": {"open_files": 1.5}}, "system .open_files is not an integer"),
        ({"system": {"open_files": None}}, "open_files is not an integer"),
        ({"system": {"open_files": True}}, "open_files is not an integer"),
        ({"system": {"open_files": -1}}, "not within 0"),
        ({"system": {"cpu_percent": 100.04}}, "cpu_percent is not within"),
        ({"system": {"colour": 1}}, ".colour is unknown"),
        ({"colour": 1}, ".colour is unknown"),
        ({"services": {"port_25": 1}}, "is not true or false"),
        ({"processes": {"redis": {"status": "up"}}}, ".redis"),
        ({"processes": {"redis": {"status": "running", "pid": None, "memory_mb": 0,
                                  "cpu_percent": 0}}}, "does not go with its pid"),
        ({"agent": {"rss_bytes": 0}}, ".rss_bytes is not within"),
    ],
)
def test_the_stand_in_refuses(change: dict[str, object], says: str, dashboard: Dashboard) -> None:
    transport = agent.Transport(dashboard.url)
    assert transport.post(REQUEST).status == 201
    body = gzip.compress(json.dumps({**GOOD, **change}).encode())
    headers = agent.V1.sample({"role": "", "system": {}}, "x", KEY).headers
    answer = transport.post(agent.Request("/api/v1/metrics/system", headers, body))
    assert answer.status == 422
    assert says in answer.body.decode()
    assert dashboard.stored() == []


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Authorization": "Bearer wrong"}, gzip.compress(b"{}", mtime=0), 401),
        ({"Authorization": ""}, gzip.compress(b"{}", mtime=0), 401),
        ({"Content-Encoding": "identity"}, json.dumps(GOOD).encode(), 415),
        ({"Content-Type": "text/plain"}, gzip.compress(b"{}", mtime=0), 415),
        ({}, b"no gzip", 422),
        ({}, gzip.compress(b'{"a": NaN}', mtime=0), 422),
        ({}, gzip.compress(b'{"a": 1, "a": 2}', mtime=0), 422),
        ({}, gzip.compress(json.dumps({**GOOD, "node_id": "stranger"}).encode(), mtime=0), 404),
    ],
)
def test_the_stand_in_refuses_what_is_no_proper_post(
    headers: dict[str, str], body: bytes, status: int, dashboard: Dashboard
) -> None:
    good = agent.V1.sample({"role": "", "system": {}}, "x", KEY).headers
    request = agent.Request("/api/v1/metrics/system", {**good, **headers}, body)
    assert agent.Transport(dashboard.url).post(request).status == status


def test_every_fault_has_a_test() -> None:
    covered = {"hang", "drip", "drip-headers", "reset", "half", "huge"}
    assert set(RAW) == covered
